"""The families: which module of a checkpoint is which site, and how the family computes. Data; a family inherits.

Paths are the module paths inside a layer (or outside of one) as they stand in safetensors files, without `.weight` and
`.bias`; `#` stands for any index; a path may also be a whole tensor name. Sites: see `sites.py`; layouts: `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from yeam.families import traits as t
from yeam.families.configs import LAYERS, Config

Sites = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One family; see `Traits` for `flags`, which `rule` completes from the config."""

    name: str
    model_types: tuple[str, ...]
    base: str  # the prefix of the base model, "" if it has none
    stacks: Mapping[str, Sites]  # path of a layer stack -> what its layers hold
    pre: Sites = field(default_factory=dict)
    post: Sites = field(default_factory=dict)
    head: Sites = field(default_factory=dict)  # outside the base model
    layouts: Mapping[str, str] = field(default_factory=dict)  # site -> layout of a fused tensor
    depth: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stack -> config keys of its layer count
    ties: tuple[tuple[str, str], ...] = (("head", "embedding"),)  # (duplicate, kept): sites, or names under the base
    flags: Mapping[str, Any] = field(default_factory=dict)
    rule: t.Rule | None = None

    def traits(self, config: Config) -> t.Traits:
        """The flags for a config (of the text model, where a config nests)."""
        return t.Traits(**{**self.flags, **(self.rule(config) if self.rule else {})})


FAMILIES: dict[str, Family] = {}


def _add(
    name: str, parent: str | None = None, *types: str, layer: Mapping[str, str | None] | None = None, **own: Any
) -> None:
    """Enter a family. Mappings extend the parent's (None removes an entry), `layer` those of its stacks."""
    if parent is None:
        FAMILIES[name] = Family(name, (name, *types), **own)
        return
    old = FAMILIES[parent]
    for slot in ("pre", "post", "head", "layouts", "flags"):
        own[slot] = _extend(getattr(old, slot), own.get(slot, {}))
    own.setdefault("stacks", {stack: _extend(sites, layer or {}) for stack, sites in old.stacks.items()})
    FAMILIES[name] = replace(old, name=name, model_types=(name, *types), **own)


def _extend(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**old, **new}.items() if v is not None}


_CLASSIFIERS = {"score": "classifier", "classifier": "classifier", "qa_outputs": "classifier"}
_QK_NORM = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
_NO_MLP = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_NO_QKV = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_EXPERTS = {
    "mlp.gate": "router",
    "mlp.experts.#.gate_proj": "expert.gate",
    "mlp.experts.#.up_proj": "expert.up",
    "mlp.experts.#.down_proj": "expert.down",
    "mlp.experts.gate_up_proj": "expert.gate_up",  # packed [experts, 2 intermediate, hidden]
    "mlp.experts.down_proj": "expert.down",  # packed [experts, hidden, intermediate]
}
_PACKED = {"expert.gate_up": "gate|up"}

_add(
    "llama",
    base="model",
    stacks={
        "layers": {
            "input_layernorm": "attn_norm",
            **{f"self_attn.{x}_proj": x for x in "qkvo"},
            "post_attention_layernorm": "mlp_norm",
            **{f"mlp.{x}_proj": x for x in ("gate", "up", "down")},
            "self_attn.rotary_emb.inv_freq": "buffer",
        }
    },
    pre={"embed_tokens": "embedding"},
    post={"norm": "final_norm"},
    head={"lm_head": "head", **_CLASSIFIERS},
    depth={"layers": LAYERS},
)
_add("mistral", "llama")
_add("qwen2", "llama")
_add("qwen3", "llama", layer=_QK_NORM, flags={"qk_norm": "head"})
_add(
    "granite",
    "llama",
    rule=t.scalars(
        ("embedding", t.key("embedding_multiplier", default=1.0)),
        ("residual", t.key("residual_multiplier", default=1.0)),
        ("attention", t.key("attention_multiplier", default=1.0)),
        ("logits", t.key("logits_scaling", default=1.0, inverse=True)),
    ),
)
_add("gemma", "llama", flags={"norm": "rms1p", "tie": True}, rule=t.scalars(("embedding", t.root_hidden)))
_add(
    "gemma2",
    "gemma",
    layer={
        "post_attention_layernorm": "attn_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
    flags={"placement": "sandwich"},
    rule=t.scalars(
        ("embedding", t.root_hidden),
        ("attention", t.query_scale),
        ("attention_softcap", t.key("attn_logit_softcapping")),
        ("logits_softcap", t.key("final_logit_softcapping")),
    ),
)
_add("gemma3", "gemma2", "gemma3_text", layer=_QK_NORM, flags={"qk_norm": "head"})
_add(
    "phi3",
    "llama",
    layer={
        **_NO_QKV,
        "self_attn.qkv_proj": "qkv",
        "mlp.gate_proj": None,
        "mlp.up_proj": None,
        "mlp.gate_up_proj": "gate_up",
    },
    layouts={"qkv": "q|k|v", "gate_up": "gate|up"},
    rule=t.partial(1.0),
)
_add(
    "mixtral",
    "llama",
    layer={
        **_NO_MLP,
        **{path: site for path, site in _EXPERTS.items() if "#" not in path},
        "block_sparse_moe.gate": "router",
        "block_sparse_moe.experts.#.w1": "expert.gate",
        "block_sparse_moe.experts.#.w3": "expert.up",
        "block_sparse_moe.experts.#.w2": "expert.down",
    },
    layouts=_PACKED,
)
_add(
    "qwen2_moe",
    "qwen2",
    layer={
        **_EXPERTS,
        **{f"mlp.shared_expert.{x}_proj": f"shared_expert.{x}" for x in ("gate", "up", "down")},
        "mlp.shared_expert_gate": "shared_router",
    },
    layouts=_PACKED,
)
_add("qwen3_moe", "qwen3", layer=_EXPERTS, layouts=_PACKED)
_add(
    "qwen3_next",
    "qwen3_moe",
    layer={
        **{f"mlp.shared_expert.{x}_proj": f"shared_expert.{x}" for x in ("gate", "up", "down")},
        "mlp.shared_expert_gate": "shared_router",
    },
    flags={"norm": "rms1p", "attention": "mixed"},
)
_add(
    "deepseek_v3",
    "llama",
    "deepseek_v2",
    layer={
        **_NO_QKV,
        "self_attn.q_a_proj": "q_a",
        "self_attn.q_a_layernorm": "norm",
        "self_attn.q_b_proj": "q_b",
        "self_attn.q_proj": "q",  # V2 Lite
        "self_attn.kv_a_proj_with_mqa": "kv_a",
        "self_attn.kv_a_layernorm": "norm",
        "self_attn.kv_b_proj": "kv_b",
        **_EXPERTS,
        "mlp.gate.e_score_correction_bias": "router",
        **{f"mlp.shared_experts.{x}_proj": f"shared_expert.{x}" for x in ("gate", "up", "down")},
    },
    layouts=_PACKED,
    flags={"attention": "latent"},
)
_add(
    "bamba",
    "llama",
    layer={
        **_NO_MLP,
        "post_attention_layernorm": None,
        "pre_ff_layernorm": "mlp_norm",
        **{f"feed_forward.{x}_proj": x for x in ("gate", "up", "down")},
    },
    post={"norm": None, "final_layernorm": "final_norm"},
    flags={"attention": "mixed"},
)
_add(
    "jamba",
    "bamba",
    layer={
        "feed_forward.router": "router",
        **{f"feed_forward.experts.#.{x}_proj": f"expert.{x}" for x in ("gate", "up", "down")},
        "feed_forward.experts.gate_up_proj": "expert.gate_up",
        "feed_forward.experts.down_proj": "expert.down",
    },
    layouts=_PACKED,
)
_add(
    "olmo2",
    "llama",
    layer={
        **_QK_NORM,
        "input_layernorm": None,
        "post_attention_layernorm": "attn_post_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
    flags={"placement": "post", "qk_norm": "all"},
)
_add(
    "starcoder2",
    "llama",
    layer={**_NO_MLP, "mlp.c_fc": "up", "mlp.c_proj": "down"},
    flags={"norm": "ln", "glu": False, "tie": True},
)
_add(
    "stablelm",
    "llama",
    "stablelm_epoch",
    layer={"self_attn.q_layernorm.norms.#": "q_norm", "self_attn.k_layernorm.norms.#": "k_norm"},
    flags={"norm": "ln"},
    rule=t.stablelm,
)
_add(
    "cohere",
    "llama",
    layer={**_QK_NORM, "post_attention_layernorm": None},
    flags={"norm": "ln", "parallel": True, "rope": "interleaved", "tie": True},
    rule=t.cohere,
)
_LEARNED_POSITIONS = {"norm": "ln", "position": "learned", "rope": "none", "rotary": 0.0, "glu": False, "tie": True}
_add(
    "gpt2",
    base="transformer",
    stacks={
        "h": {
            "ln_1": "attn_norm",
            "attn.c_attn": "qkv",
            "attn.c_proj": "o",
            "ln_cross_attn": "cross.attn_norm",
            "crossattention.q_attn": "cross.q",
            "crossattention.c_attn": "cross.kv",
            "crossattention.c_proj": "cross.o",
            "ln_2": "mlp_norm",
            "mlp.c_fc": "up",
            "mlp.c_proj": "down",
            **dict.fromkeys(("attn.bias", "attn.masked_bias", "crossattention.bias"), "buffer"),
        }
    },
    pre={"wte": "embedding", "wpe": "position"},
    post={"ln_f": "final_norm"},
    head={"lm_head": "head", "multiple_choice_head.summary": "classifier", **_CLASSIFIERS},
    layouts={"qkv": "T q|k|v", "cross.kv": "T k|v", **dict.fromkeys(("o", "up", "down", "cross.q", "cross.o"), "T")},
    depth={"h": LAYERS[1::-1]},  # n_layer first: transformers reads the other name as an alias of it
    flags=_LEARNED_POSITIONS,
    rule=t.scalars(("attention", t.gpt2_attention)),
)
_add(
    "gpt_neox",
    base="gpt_neox",
    stacks={
        "layers": {
            "input_layernorm": "attn_norm",
            "attention.query_key_value": "qkv",
            "attention.dense": "o",
            "post_attention_layernorm": "mlp_norm",
            "mlp.dense_h_to_4h": "up",
            "mlp.dense_4h_to_h": "down",
            **dict.fromkeys(("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"), "buffer"),
        }
    },
    pre={"embed_in": "embedding"},
    post={"final_layer_norm": "final_norm"},
    head={"embed_out": "head", "lm_head": "head", **_CLASSIFIERS},
    layouts={"qkv": "heads(q k v)"},
    depth={"layers": LAYERS},
    flags={"norm": "ln", "glu": False},
    rule=t.neox,
)
_add(
    "falcon",
    None,
    "RefinedWeb",
    "RefinedWebModel",
    base="transformer",
    stacks={
        "h": {
            **dict.fromkeys(("input_layernorm", "ln_attn"), "attn_norm"),
            **dict.fromkeys(("post_attention_layernorm", "ln_mlp"), "mlp_norm"),
            "self_attention.query_key_value": "qkv",
            "self_attention.dense": "o",
            "mlp.dense_h_to_4h": "up",
            "mlp.dense_4h_to_h": "down",
        }
    },
    pre={"word_embeddings": "embedding"},
    post={"ln_f": "final_norm"},
    head={"lm_head": "head", **_CLASSIFIERS},
    layouts={"qkv": "falcon"},
    depth={"h": LAYERS},
    flags={"norm": "ln", "glu": False, "tie": True},
    rule=t.falcon,
)
_BERT_EMBEDDINGS = {
    "embeddings.word_embeddings": "embedding",
    "embeddings.position_embeddings": "position",
    "embeddings.token_type_embeddings": "token_type",
    "embeddings.LayerNorm": "embedding_norm",
    "embeddings.position_ids": "buffer",
    "embeddings.token_type_ids": "buffer",
}
_BERT_LAYER = {
    **{f"attention.self.{x}": x[0] for x in ("query", "key", "value")},
    "attention.output.dense": "o",
    "attention.output.LayerNorm": "attn_post_norm",
    **{f"crossattention.self.{x}": f"cross.{x[0]}" for x in ("query", "key", "value")},
    "crossattention.output.dense": "cross.o",
    "crossattention.output.LayerNorm": "cross.attn_post_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "mlp_post_norm",
}
_add(
    "bert",
    base="bert",
    stacks={"encoder.layer": _BERT_LAYER},
    pre=_BERT_EMBEDDINGS,
    post={"pooler.dense": "pooler"},
    head={
        "cls.predictions.transform.dense": "head_transform",
        "cls.predictions.transform.LayerNorm": "head_norm",
        "cls.predictions.decoder": "head",
        "cls.predictions.bias": "head",
        "cls.seq_relationship": "classifier",
        **_CLASSIFIERS,
    },
    depth={"encoder.layer": LAYERS},
    ties=(("cls.predictions.decoder.weight", "embedding"), ("cls.predictions.decoder.bias", "cls.predictions.bias")),
    flags={**_LEARNED_POSITIONS, "placement": "post_add"},
)
_add(
    "roberta",
    "bert",
    "xlm-roberta",
    "camembert",
    base="roberta",
    head={
        "lm_head.dense": "head_transform",
        "lm_head.layer_norm": "head_norm",
        "lm_head.decoder": "head",
        "lm_head.bias": "head",
        "classifier.dense": "head_transform",
        "classifier.out_proj": "classifier",
    },
    ties=(("lm_head.decoder.weight", "embedding"), ("lm_head.decoder.bias", "lm_head.bias")),
)
_T5_ATTENTION = {
    **{f"layer.0.SelfAttention.{x}": x for x in "qkvo"},
    "layer.0.SelfAttention.relative_attention_bias": "relative_position",
    "layer.0.layer_norm": "attn_norm",
}


def _t5_mlp(layer: int) -> dict[str, str]:
    paths = {"DenseReluDense.wi": "up", "DenseReluDense.wi_0": "gate", "DenseReluDense.wi_1": "up",
             "DenseReluDense.wo": "down", "layer_norm": "mlp_norm"}  # fmt: skip
    return {f"layer.{layer}.{path}": site for path, site in paths.items()}


_add(
    "t5",
    None,
    "mt5",
    "umt5",
    base="",
    stacks={
        "encoder.block": {**_T5_ATTENTION, **_t5_mlp(1)},
        "decoder.block": {
            **_T5_ATTENTION,
            **{f"layer.1.EncDecAttention.{x}": f"cross.{x}" for x in "qkvo"},
            "layer.1.EncDecAttention.relative_attention_bias": "buffer",  # left in old files, read by no version
            "layer.1.layer_norm": "cross.attn_norm",
            **_t5_mlp(2),
        },
    },
    pre=dict.fromkeys(("shared", "encoder.embed_tokens", "decoder.embed_tokens"), "embedding"),
    post=dict.fromkeys(("encoder.final_layer_norm", "decoder.final_layer_norm"), "final_norm"),
    head={"lm_head": "head", "classification_head.dense": "head_transform",
          "classification_head.out_proj": "classifier", **_CLASSIFIERS},
    depth={"encoder.block": ("num_layers", "num_hidden_layers"), "decoder.block": ("num_decoder_layers",)},
    ties=tuple((f"{x}.weight", "shared.weight") for x in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
    flags={"position": "relative", "rope": "none", "rotary": 0.0, "tie": True},
    rule=t.t5,
)  # fmt: skip

BY_MODEL_TYPE = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}
