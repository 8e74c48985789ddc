"""Families against transformers: names as it writes them, layouts and flags as it computes with them.

Every tabled family is built tiny with random weights, saved, described from config.json and headers, and then computed
by `Interpreter`, which knows only sites, views and flags: a wrong role, layout or flag changes the logits.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN
from transformers.models.falcon.modeling_falcon import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from yeam.checkpoint.base import Checkpoint, TensorInfo
from yeam.errors import CheckpointError, ConfigError
from yeam.families import (
    FAMILIES,
    GROUPS,
    ROLES,
    Anatomy,
    View,
    aliases_of,
    config_updates,
    describe,
    rename_layer,
    tied,
)
from yeam.families.layouts import view_of
from yeam.report.inspect import inspect_model

T.utils.logging.set_verbosity_error()
T.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WIDE = {**TEXT, "head_dim": 16}  # heads * head_dim is not hidden_size
PLAIN = {k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")}
IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
         "patch_size": 14}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FALCON = {k: TEXT[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "bos_token_id",
                               "eos_token_id", "pad_token_id")}  # fmt: skip
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}

# label -> (family, class of the config, class of the model, config)
TABLED: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "llama": ("llama", T.LlamaConfig, T.LlamaForCausalLM, WIDE),
    "llama-biases": ("llama", T.LlamaConfig, T.LlamaForCausalLM, {**TEXT, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", T.MistralConfig, T.MistralForCausalLM, WIDE),
    "qwen2": ("qwen2", T.Qwen2Config, T.Qwen2ForCausalLM, TEXT),
    "qwen3": ("qwen3", T.Qwen3Config, T.Qwen3ForCausalLM, WIDE),
    "gemma": ("gemma", T.GemmaConfig, T.GemmaForCausalLM, WIDE),
    "gemma2": ("gemma2", T.Gemma2Config, T.Gemma2ForCausalLM, {
        **WIDE, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3", T.Gemma3TextConfig, T.Gemma3ForCausalLM, {
        **WIDE, "query_pre_attn_scalar": 3, "layer_types": [f"{x}_attention" for x in ("sliding", "full", "sliding")]}),
    "gemma3-vlm": ("gemma3", T.Gemma3Config, T.Gemma3ForConditionalGeneration, {
        "text_config": WIDE, "vision_config": IMAGE, "mm_tokens_per_image": 4, "image_token_index": 95}),
    "phi3": ("phi3", T.Phi3Config, T.Phi3ForCausalLM, {**TEXT, "partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", T.GPT2Config, T.GPT2LMHeadModel, {
        "vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2}),
    "gpt_neox": ("gpt_neox", T.GPTNeoXConfig, T.GPTNeoXForCausalLM, {**PLAIN, "rotary_pct": 0.5}),
    "gpt_neox-serial": ("gpt_neox", T.GPTNeoXConfig, T.GPTNeoXForCausalLM, {**PLAIN, "use_parallel_residual": False}),
    "mixtral": ("mixtral", T.MixtralConfig, T.MixtralForCausalLM, {**TEXT, "num_local_experts": 3, **MOE}),
    "qwen2_moe": ("qwen2_moe", T.Qwen2MoeConfig, T.Qwen2MoeForCausalLM, {
        **TEXT, "num_experts": 3, "shared_expert_intermediate_size": 24, **MOE}),
    "qwen3_moe": ("qwen3_moe", T.Qwen3MoeConfig, T.Qwen3MoeForCausalLM, {
        **TEXT, "num_experts": 3, "norm_topk_prob": True, "mlp_only_layers": [1], **MOE}),
    "olmo2": ("olmo2", T.Olmo2Config, T.Olmo2ForCausalLM, TEXT),
    "starcoder2": ("starcoder2", T.Starcoder2Config, T.Starcoder2ForCausalLM, TEXT),
    "stablelm": ("stablelm", T.StableLmConfig, T.StableLmForCausalLM, {**TEXT, "partial_rotary_factor": 0.5}),
    "stablelm-2": ("stablelm", T.StableLmConfig, T.StableLmForCausalLM, {
        **TEXT, "qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True}),
    "cohere": ("cohere", T.CohereConfig, T.CohereForCausalLM, {**PLAIN, "num_key_value_heads": 2, "logit_scale": 0.5}),
    "cohere-plus": ("cohere", T.CohereConfig, T.CohereForCausalLM, {**PLAIN, "use_qk_norm": True}),
    "granite": ("granite", T.GraniteConfig, T.GraniteForCausalLM, {
        **TEXT, "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.7,
        "logits_scaling": 2.0}),
    "falcon-7b": ("falcon", T.FalconConfig, T.FalconForCausalLM, FALCON),
    "falcon-40b": ("falcon", T.FalconConfig, T.FalconForCausalLM, {
        **FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-rw": ("falcon", T.FalconConfig, T.FalconForCausalLM, {
        **FALCON, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}),
    "bert": ("bert", T.BertConfig, T.BertForMaskedLM, PLAIN),
    "roberta": ("roberta", T.RobertaConfig, T.RobertaForMaskedLM, PLAIN),
    "t5": ("t5", T.T5Config, T.T5ForConditionalGeneration, T5),
    "t5-v1.1": ("t5", T.T5Config, T.T5ForConditionalGeneration, {
        **T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}  # fmt: skip
BIDIRECTIONAL = ("bert", "roberta")


@dataclass
class Saved:
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    anatomy: Anatomy
    model: Any

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def text(self) -> dict[str, Any]:
        found: Any = self.config
        for key in self.anatomy.text_path:
            found = found[key]
        return found


def save(model: Any, **options: Any) -> Saved:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Saved(config, tensors, describe(config, shapes), model)


def randomise(model: Any) -> Any:
    """float64, and no weight at a value that hides a mistake: norms are not one, biases not zero."""
    generator = torch.Generator().manual_seed(0)
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            norm = "q_norm" in name or "k_norm" in name or (parameter.dim() == 1 and name.endswith("weight"))
            parameter.copy_(1 + 0.4 * noise if norm else 0.25 * noise)
    return model


@functools.cache
def saved(label: str) -> Saved:
    _, config_class, model_class, config = TABLED[label]
    made = config_class(**copy.deepcopy(config))
    made._experts_implementation = "eager"  # the grouped one has no float64
    return save(randomise(model_class(made)))


# ---------------------------------------------------------------------------------------------------------------------
# a transformer out of nothing but sites, views and flags
# ---------------------------------------------------------------------------------------------------------------------


class Interpreter:
    def __init__(self, model: Saved, **flags: Any) -> None:
        self.config, self.anatomy = model.text, model.anatomy
        self.traits = replace(model.anatomy.traits, **flags)
        self.weights: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        towers = ("vision_tower", "multi_modal_projector")
        for name, tensor in model.tensors.items():
            meaning = self.anatomy.tensors[name]
            if meaning.module in towers:
                continue
            scope = meaning.site.rpartition(".")[0]
            parts = meaning.view.split(tensor) if meaning.view else {meaning.site.rpartition(".")[2]: tensor}
            home = meaning.stack or (meaning.module if meaning.module in ("encoder", "decoder") else "")
            for part, piece in parts.items():
                expert = meaning.expert
                if meaning.view and meaning.view.experts:
                    number, part = part.split(".")
                    expert = int(number)
                key = (home, meaning.layer, f"{scope}.{part}" if scope else part, expert, meaning.role == "bias")
                self.weights.setdefault(key, []).append(piece)
        self.heads = next(self.config[k] for k in ("num_attention_heads", "n_head", "num_heads") if k in self.config)
        self.eps = next(v for k, v in self.config.items() if k.endswith(("norm_eps", "norm_epsilon")) or k == "eps")
        act = next(self.config[k] for k in ("hidden_act", "hidden_activation", "activation_function", "activation",
                                            "dense_act_fn") if self.config.get(k))  # fmt: skip
        self.act = ACT2FN[act]
        self.home: tuple[str, int | None] = ("", None)

    def get(self, site: str, expert: int | None = None, bias: bool = False) -> torch.Tensor | None:
        found = self.weights.get((*self.home, site, expert, bias))
        return None if found is None else found[0] if len(found) == 1 else torch.stack(found)

    def linear(self, x: torch.Tensor, site: str, expert: int | None = None) -> torch.Tensor:
        weight = self.get(site, expert)
        assert weight is not None, (self.home, site)
        return F.linear(x, weight, self.get(site, expert, True))

    def norm(self, x: torch.Tensor, site: str) -> torch.Tensor:
        weight = self.get(site)
        assert weight is not None, (self.home, site)
        if self.traits.norm == "ln":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        x = x * (1 + weight if self.traits.norm == "rms1p" else weight)
        bias = self.get(site, bias=True)
        return x if bias is None else x + bias

    def rotate(self, x: torch.Tensor) -> torch.Tensor:  # [tokens, heads, head_dim]
        n = int(self.traits.rotary * x.shape[-1])
        rope = self.config["rope_parameters"]
        kinds = self.config.get("layer_types")
        theta = rope.get(kinds[self.home[1] or 0] if kinds else "", rope)["rope_theta"]
        angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, n, 2) / n)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        y = x[..., :n]
        a, b = (y[..., : n // 2], y[..., n // 2 :]) if self.traits.rope == "half" else (y[..., ::2], y[..., 1::2])
        turned = (a * cos - b * sin, b * cos + a * sin)
        y = torch.cat(turned, -1) if self.traits.rope == "half" else torch.stack(turned, -1).flatten(-2)
        return torch.cat([y, x[..., n:]], -1)

    def attention(self, x: torch.Tensor, causal: bool, offset: torch.Tensor | float = 0.0, scope: str = "",
                  memory: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        source = x if memory is None else memory
        q, k, v = self.linear(x, scope + "q"), self.linear(source, scope + "k"), self.linear(source, scope + "v")
        width = q.shape[-1] // self.heads
        if self.traits.qk_norm == "all":
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        q, k, v = (y.unflatten(-1, (-1, width)) for y in (q, k, v))
        if self.traits.qk_norm in ("head", "each"):
            assert (self.get("q_norm").dim() == 1) == (self.traits.qk_norm == "head")
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        if self.traits.rope != "none":
            q, k = self.rotate(q), self.rotate(k)
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.traits.scalars.get("attention", width**-0.5)
        if cap := self.traits.scalars.get("attention_softcap"):
            scores = cap * torch.tanh(scores / cap)
        if self.traits.position == "alibi":
            ones = torch.ones(1, len(x), dtype=torch.long)
            offset = build_alibi_tensor(ones, self.heads, torch.float64) * width**-0.5
        scores = scores + offset
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        return self.linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), scope + "o")

    def mlp(self, x: torch.Tensor, scope: str = "", expert: int | None = None) -> torch.Tensor:
        up = self.linear(x, scope + "up", expert)
        up = self.act(self.linear(x, scope + "gate", expert)) * up if self.traits.glu else self.act(up)
        return self.linear(up, scope + "down", expert)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.get("router") is None:
            return self.mlp(x)
        chances, chosen = self.linear(x, "router").softmax(-1).topk(self.config["num_experts_per_tok"])
        if self.config.get("norm_topk_prob", True):
            chances = chances / chances.sum(-1, keepdim=True)
        out = torch.stack([
            sum(c * self.mlp(row, "expert.", int(e)) for c, e in zip(cs, es)) for row, cs, es in zip(x, chances, chosen)
        ])  # fmt: skip
        if self.get("shared_expert.up") is not None:
            out = out + torch.sigmoid(self.linear(x, "shared_router")) * self.mlp(x, "shared_expert.")
        return out

    def branch(self, x: torch.Tensor, f: Any, name: str) -> torch.Tensor:
        """The residual stream after one branch."""
        place, factor = self.traits.placement, self.traits.scalars.get("residual", 1.0)
        y = f(self.norm(x, f"{name}_norm") if place in ("pre", "sandwich") else x)
        if place in ("sandwich", "post"):
            y = self.norm(y, f"{name}_post_norm")
        x = x + factor * y
        return self.norm(x, f"{name}_post_norm") if place == "post_add" else x

    def layer(
        self, x: torch.Tensor, causal: bool, offset: Any = 0.0, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.traits.parallel:
            y = self.norm(x, "attn_norm")
            z = y if self.get("mlp_norm") is None else self.norm(x, "mlp_norm")
            return x + self.attention(y, causal) + self.feed_forward(z)
        x = self.branch(x, lambda y: self.attention(y, causal, offset), "attn")
        if memory is not None:
            y = self.norm(x, "cross.attn_norm")
            x = x + self.attention(y, False, scope="cross.", memory=memory)
        return self.branch(x, self.feed_forward, "mlp")

    def stack(self, prefix: str, x: torch.Tensor, causal: bool, **more: Any) -> torch.Tensor:
        for number in range(self.anatomy.stacks[prefix].count):
            self.home = (prefix, number)
            x = self.layer(x, causal, **more)
        return x

    def decoder_only(self, ids: torch.Tensor, causal: bool, first_position: int = 0) -> torch.Tensor:
        x = self.get("embedding")[ids] * self.traits.scalars.get("embedding", 1.0)
        if self.traits.position == "learned":
            x = x + self.get("position")[first_position : first_position + len(ids)]
        if self.get("token_type") is not None:
            x = x + self.get("token_type")[0]
        if self.get("embedding_norm") is not None:
            x = self.norm(x, "embedding_norm")
        prefix = next(p for p, s in self.anatomy.stacks.items() if s.module in ("default", "text_decoder"))
        x = self.stack(prefix, x, causal)
        self.home = ("", None)
        return self.head(self.norm(x, "final_norm") if self.get("final_norm") is not None else x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        if self.get("head_transform") is not None:
            x = self.norm(self.act(self.linear(x, "head_transform")), "head_norm")
        head = self.get("embedding") if self.anatomy.is_tied else self.get("head")
        x = F.linear(x, head, self.get("head", bias=True)) * self.traits.scalars.get("logits", 1.0)
        cap = self.traits.scalars.get("logits_softcap")
        return cap * torch.tanh(x / cap) if cap else x

    def two_sided(self, ids: torch.Tensor, decoder_ids: torch.Tensor) -> torch.Tensor:
        embedding, memory = self.get("embedding"), None
        for side, tokens in (("encoder", ids), ("decoder", decoder_ids)):
            prefix = f"{side}.block"
            self.home = (side, None)
            distance = torch.arange(len(tokens))[None, :] - torch.arange(len(tokens))[:, None]
            buckets = T5Attention._relative_position_bucket(distance, bidirectional=side == "encoder")
            offset = self.get("relative_position")[buckets].permute(2, 0, 1)
            x = self.stack(prefix, embedding[tokens], side == "decoder", offset=offset, memory=memory)
            self.home = (side, None)
            memory = self.norm(x, "final_norm")
        self.home = ("", None)
        return self.head(memory)


IDS = torch.tensor([5, 17, 3, 80, 44, 9, 61])
DECODER_IDS = torch.tensor([0, 33, 7, 12])


def interpret(label: str, **flags: Any) -> torch.Tensor:
    model = saved(label)
    if model.anatomy.family == "t5":
        return Interpreter(model, **flags).two_sided(IDS, DECODER_IDS)
    roberta = model.anatomy.family == "roberta"
    causal = model.anatomy.family not in BIDIRECTIONAL
    return Interpreter(model, **flags).decoder_only(IDS, causal, model.config["pad_token_id"] + 1 if roberta else 0)


@functools.cache
def expected(label: str) -> torch.Tensor:
    model = saved(label)
    more = {"decoder_input_ids": DECODER_IDS[None]} if model.anatomy.family == "t5" else {}
    with torch.no_grad():
        return model.model(input_ids=IDS[None], **more).logits[0]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("label", TABLED)
def test_flags_sites_and_views_compute_what_transformers_computes(label: str) -> None:
    # transformers computes norms and softmax in float32 whatever the weights are
    assert error(interpret(label), expected(label)) < 1e-5


@pytest.mark.parametrize(
    ("label", "flags"),
    [
        ("llama", {"norm": "rms1p"}),
        ("llama", {"norm": "ln"}),
        ("llama", {"rope": "interleaved"}),
        ("llama", {"rotary": 0.5}),
        ("llama", {"parallel": True}),
        ("gemma3", {"scalars": {}}),
        ("gemma2", {"placement": "pre"}),
        ("olmo2", {"qk_norm": "none"}),
        ("cohere", {"rope": "half"}),
        ("gpt_neox", {"parallel": False}),
        ("bert", {"position": "rope"}),
    ],
)
def test_a_wrong_flag_would_be_seen(label: str, flags: dict[str, Any]) -> None:
    assert error(interpret(label, **flags), expected(label)) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# names, roles, stacks, ties, as transformers writes them
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", TABLED)
def test_every_tensor_of_a_tabled_family_is_known(label: str) -> None:
    model = saved(label)
    anatomy = model.anatomy
    assert anatomy.family == TABLED[label][0] and not anatomy.notes
    assert list(anatomy.tensors) == list(model.tensors)
    assert [n for n, m in anatomy.tensors.items() if m.role == "other" or m.role not in ROLES] == []
    for name, meaning in anatomy.tensors.items():
        assert (meaning.layer is None) == (meaning.stack is None) == (meaning.place != "layer")
        assert meaning.role in meaning.roles <= {*ROLES, *GROUPS}
        if meaning.layer is not None:
            assert name.startswith(f"{meaning.stack}.{meaning.layer}.")
        if meaning.view is not None:
            assert meaning.view == View.from_dict(json.loads(json.dumps(meaning.view.to_dict())))
    text = model.model.config.get_text_config()
    layers = [s for s in anatomy.stacks.values() if s.module != "vision_tower"]
    assert sum(s.count for s in layers) == text.num_hidden_layers + getattr(text, "num_decoder_layers", 0)
    per_layer = Counter(
        (m.stack, m.layer, part)
        for m in anatomy.tensors.values()
        if m.role in ("q", "k", "v", "o", "qkv") and m.module != "vision_tower" and "cross" not in m.site
        for part in (m.view.names if m.view else (m.role,))
    )
    assert per_layer == {(s.prefix, i, x): 1 for s in layers for i in range(s.count) for x in "qkvo"}


def test_places_follow_the_flow_of_the_model() -> None:
    for label, pre, post in (
        ("llama", ["model.embed_tokens.weight"], ["lm_head.weight", "model.norm.weight"]),
        ("t5", ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight"],
         ["decoder.final_layer_norm.weight", "encoder.final_layer_norm.weight"]),
    ):  # fmt: skip
        for place, names in (("pre", pre), ("post", post)):
            assert [n for n, m in saved(label).anatomy.tensors.items() if m.place == place] == names
    bert = saved("bert").anatomy.tensors
    assert {m.place for n, m in bert.items() if "embeddings" in n} == {"pre"}
    assert {m.place for n, m in bert.items() if n.startswith("cls.")} == {"post"}


@pytest.mark.parametrize("label", [x for x in TABLED if not x.startswith("t5")])
def test_ties_are_those_that_transformers_leaves_out(label: str) -> None:
    _, config_class, model_class, config = TABLED[label]
    written: dict[bool, Saved] = {}
    for tie in (False, True):
        made = config_class(**copy.deepcopy(config), tie_word_embeddings=tie)
        written[tie] = save(model_class(made))
    duplicates = set(written[False].tensors) - set(written[True].tensors)
    assert written[False].anatomy.is_tied is False and written[False].anatomy.ties == ()
    assert written[True].anatomy.is_tied is True and {pair[0] for pair in written[True].anatomy.ties} == duplicates
    assert duplicates and all(kept in written[True].tensors for _, kept in written[True].anatomy.ties)
    # a config that does not say: the class default, if the head is there; if it is not, it must be tied
    for part in (written[False].config, written[False].text):
        part.pop("tie_word_embeddings", None)
    default = config_class(**copy.deepcopy(config)).tie_word_embeddings
    assert describe(written[False].config, written[False].shapes).is_tied is default
    assert describe(written[False].config, written[True].shapes).is_tied is True


OTHER_CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mt5": (T.MT5ForConditionalGeneration, T5),
    "umt5": (T.UMT5ForConditionalGeneration, T5),
    "t5 encoder": (T.T5EncoderModel, T5),
    "t5 classifier": (T.T5ForSequenceClassification, T5),
    "xlm-roberta": (T.XLMRobertaForMaskedLM, PLAIN),
    "bert decoder": (T.BertLMHeadModel, {**PLAIN, "is_decoder": True, "add_cross_attention": True}),
    "bert pre-training": (T.BertForPreTraining, PLAIN),
    "roberta classifier": (T.RobertaForSequenceClassification, PLAIN),
    "gpt2 cross-attention": (T.GPT2LMHeadModel, {**TABLED["gpt2"][3], "add_cross_attention": True}),
    "gpt2 two heads": (T.GPT2DoubleHeadsModel, TABLED["gpt2"][3]),
    "llama classifier": (T.LlamaForSequenceClassification, TEXT),
    "llama answers": (T.LlamaForQuestionAnswering, TEXT),
    "falcon tagger": (T.FalconForTokenClassification, FALCON),
}


@pytest.mark.parametrize("label", OTHER_CLASSES)
def test_other_classes_of_tabled_families(label: str) -> None:
    model_class, config = OTHER_CLASSES[label]
    model = save(model_class(model_class.config_class(**copy.deepcopy(config))))
    assert (
        model.anatomy.family == re.split(r"[ -]", label.replace("xlm-", "").replace("um", "").replace("mt5", "t5"))[0]
    )
    assert all(m.role != "other" for m in model.anatomy.tensors.values()) and not model.anatomy.notes
    assert set(model.anatomy.ties) == set(model.model.all_tied_weights_keys.items())
    assert model.anatomy.is_tied is (True if model.model.get_output_embeddings() is not None else None)


def test_ties_of_odd_files() -> None:
    t5 = saved("t5")
    assert dict(t5.anatomy.ties) == t5.model.all_tied_weights_keys
    own_head = {**t5.shapes, "lm_head.weight": (96, 32)}
    flan = describe({**t5.config, "tie_word_embeddings": False}, own_head)  # as the v1.1 checkpoints are published
    assert flan.is_tied is False and ("lm_head.weight", "shared.weight") not in flan.ties
    llama = {n: s for n, s in saved("llama").shapes.items() if n != "model.embed_tokens.weight"}
    only_head = tied({**saved("llama").config, "tie_word_embeddings": True}, llama)
    assert only_head == [("model.embed_tokens.weight", "lm_head.weight")]
    lost = {n: s for n, s in saved("llama").shapes.items() if n != "lm_head.weight"}
    assert any("lm_head" in note for note in describe(saved("llama").config, lost).notes)
    base = describe(*_headless("llama"))
    assert base.is_tied is None and base.ties == ()
    # T5's flag says whether the decoder's output is scaled; a head in the file is its own weight all the same
    for kind in ("t5", "pop2piano"):
        assert describe({**t5.config, "model_type": kind}, own_head).is_tied is False
    # a part that draws pictures has a head, too
    draws = {**saved("qwen2").config, "tie_word_embeddings": True}
    shapes = {n: s for n, s in saved("qwen2").shapes.items() if n != "lm_head.weight"}
    shapes |= {"model.generation_head.proj_out.weight": (32, 32), "generation_head.lm_head.weight": (64, 32)}
    assert tied(draws, shapes) == [("lm_head.weight", "model.embed_tokens.weight")]


def _headless(label: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    bare = save(T.AutoModel.from_config(TABLED[label][1](**copy.deepcopy(TABLED[label][3]))))
    return bare.config, bare.shapes


@pytest.mark.parametrize(
    "label", ["llama", "gpt2", "falcon-7b", "gpt_neox", "bert", "roberta", "gemma3-vlm", "mixtral"]
)
def test_aliases_lead_from_one_way_of_saving_to_the_other(label: str) -> None:
    full = saved(label)
    config, bare = _headless(label)
    bare_anatomy = describe(config, bare)
    assert bare_anatomy.family == full.anatomy.family
    head = {"head", "classifier", "head_transform", "head_norm"}
    for name, meaning in full.anatomy.tensors.items():
        if meaning.site not in head:
            found = [x for x in (name, *aliases_of(name, full.anatomy)) if x in bare]
            assert len(found) == 1 and bare[found[0]] == full.shapes[name], name
    for name in bare_anatomy.tensors:
        if "pooler" not in name:
            assert sum(x in full.tensors for x in (name, *aliases_of(name, bare_anatomy))) == 1, name


def test_other_spellings() -> None:
    bert = saved("bert").anatomy
    assert "bert.embeddings.LayerNorm.gamma" in aliases_of("bert.embeddings.LayerNorm.weight", bert)
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): s
           for n, s in saved("bert").shapes.items()}  # fmt: skip
    assert [m.site for m in describe(saved("bert").config, old).tensors.values()] == [
        m.site for m in bert.tensors.values()
    ]
    assert "lm_head.weight" in aliases_of("embed_out.weight", saved("gpt_neox").anatomy)
    vlm = save(saved("gemma3-vlm").model, save_original_format=False)
    assert any(name.startswith("model.language_model.layers.") for name in vlm.tensors)
    for name, meaning in saved("gemma3-vlm").anatomy.tensors.items():
        counterpart = [x for x in aliases_of(name, saved("gemma3-vlm").anatomy) if x in vlm.tensors]
        assert len(counterpart) == 1 and vlm.anatomy.tensors[counterpart[0]].site == meaning.site


# ---------------------------------------------------------------------------------------------------------------------
# views
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
sizes = st.integers(1, 4)


@st.composite
def fused(draw: st.DrawFn) -> tuple[View, tuple[int, ...]]:
    """A layout of the table with the view that a config gives it, and the shape of a weight or a bias."""
    heads_per_group, kv, width, columns, experts = (draw(sizes) for _ in range(5))
    heads = heads_per_group * kv
    base = {"hidden_size": heads * width, "num_attention_heads": heads}
    q, d = heads * width, columns
    cases = {
        "phi3": ("q|k|v", "qkv", {**base, "num_key_value_heads": kv}, (q + 2 * kv * width, d)),
        "gate_up": ("gate|up", "gate_up", base, (2 * width, d)),
        "gpt2": ("T q|k|v", "qkv", base, (d, 3 * q)),
        "gpt2-o": ("T", "o", base, (d, q)),
        "gpt_neox": ("heads(q k v)", "qkv", base, (3 * q, d)),
        "falcon-7b": ("falcon", "qkv", base, (q + 2 * width, d)),
        "falcon-40b": ("falcon", "qkv", {**base, "num_kv_heads": kv, "new_decoder_architecture": True},
                       (q + 2 * kv * width, d)),
        "falcon-rw": ("falcon", "qkv", {**base, "multi_query": False}, (3 * q, d)),
        "packed": ("gate|up", "expert.gate_up", base, (experts, 2 * width, d)),
        "packed-down": (None, "expert.down", base, (experts, d, width)),
    }  # fmt: skip
    layout, site, config, shape = cases[draw(st.sampled_from(sorted(cases)))]
    if layout != "T" and draw(st.booleans()):  # the bias
        shape = shape[-1:] if layout is not None and layout.startswith("T") else shape[:-1]
        view = view_of(layout, site, shape, config, True)
    else:
        view = view_of(layout, site, shape, config, False)
    assert view is not None
    return view, shape


@settings(max_examples=100, deadline=None)
@given(case=fused(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
def test_views_split_and_join_bit_for_bit(case: tuple[View, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    view, shape = case
    n = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    parts = view.split(tensor)
    assert {name: tuple(part.shape) for name, part in parts.items()} == view.parts(shape)
    joined = view.join(parts)
    assert joined.is_contiguous() and torch.equal(joined.view(torch.uint8).flatten(), raw)  # as a writer takes it
    # the intervals say the same for a reader that goes by rows, and cover the fused axis exactly once
    bare = len(shape) == (2 if view.experts else 1)
    rows = tensor.reshape(-1) if bare else tensor.t() if view.transposed else tensor.reshape(-1, shape[-1])
    for name, part in parts.items():
        pieces = torch.cat([rows[start:stop] for start, stop in view.intervals(name)])
        assert torch.equal(as_bytes(pieces), as_bytes(part))
    runs = sorted(run for name in view.names for run in view.intervals(name))
    assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])] and runs[-1][1] == len(rows)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def test_a_view_refuses_another_shape() -> None:
    view = View((("q", 4), ("k", 2)))
    for shape in ((), (5, 3), (12, 3)):
        with pytest.raises(CheckpointError, match="does not fall into"):
            view.parts(shape)


def test_fused_parts_are_what_the_module_computes() -> None:
    """q, k, v of layer 0, beside the whole-model check above: for phi3, gpt2, gpt_neox and the three falcons."""
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for label, path, heads in (
        ("phi3", "model.layers.0.self_attn", None),
        ("gpt2", "transformer.h.0.attn", None),
        ("gpt_neox", "gpt_neox.layers.0.attention", "neox"),
        *((f"falcon-{kind}", "transformer.h.0.self_attention", "falcon") for kind in ("7b", "40b", "rw")),
    ):
        model = saved(label)
        module = model.model.get_submodule(path)
        name = next(n for n in ("qkv_proj", "c_attn", "query_key_value") if hasattr(module, n))
        with torch.no_grad():
            out = getattr(module, name)(x)
        if heads == "neox":
            wanted = [y.flatten(1) for y in out.view(5, 4, -1).chunk(3, -1)]
        elif heads == "falcon":
            wanted = [y[0].flatten(1) for y in module._split_heads(out[None])]
        else:
            q = 4 * 8
            wanted = list(out.split([q, (out.shape[1] - q) // 2, (out.shape[1] - q) // 2], 1))
        parts: dict[str, dict[str, torch.Tensor]] = {"weight": {}, "bias": {}}
        for n, meaning in model.anatomy.tensors.items():
            if meaning.site == "qkv" and meaning.layer == 0:
                parts["bias" if meaning.role == "bias" else "weight"] = meaning.view.split(model.tensors[n])
        for part, y in zip("qkv", wanted):
            mine = F.linear(x, parts["weight"][part], parts["bias"].get(part))
            if label == "falcon-40b" and part != "q":  # the module repeats each key/value head for its query heads
                mine = mine.view(5, 2, 1, 8).expand(5, 2, 2, 8).flatten(1)
            assert torch.allclose(mine, y, atol=1e-12), (label, part)


@pytest.mark.parametrize("label", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_packed_experts_hold_the_same_parts_as_single_ones(label: str) -> None:
    single, packed = saved(label), save(saved(label).model, save_original_format=False)
    assert any(m.view and m.view.experts == 3 for m in packed.anatomy.tensors.values())

    def parts(model: Saved) -> dict[tuple[Any, ...], torch.Tensor]:
        found = {}
        for name, meaning in model.anatomy.tensors.items():
            if "experts" in meaning.roles:
                pieces = {f"{meaning.expert}.{meaning.role}": model.tensors[name]}
                for part, tensor in (meaning.view.split(model.tensors[name]) if meaning.view else pieces).items():
                    found[meaning.layer, part] = tensor
        return found

    one, other = parts(single), parts(packed)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert {m.site for m in packed.anatomy.tensors.values()} >= {"router", "expert.gate_up", "expert.down"}
    assert all(m.role != "other" for m in packed.anatomy.tensors.values())


# ---------------------------------------------------------------------------------------------------------------------
# layers picked, repeated, reordered
# ---------------------------------------------------------------------------------------------------------------------


def relayer(
    model: Saved, layers: dict[str, list[int]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor], tuple[str, ...]]:
    update = config_updates(model.config, model.anatomy, layers)
    tensors = {}
    for name, meaning in model.anatomy.tensors.items():
        if meaning.stack not in layers:
            tensors[name] = model.tensors[name]
            continue
        for new, old in enumerate(layers[meaning.stack]):
            if old == meaning.layer:
                renamed = rename_layer(name, model.anatomy.stacks[meaning.stack], new)
                tensors[renamed] = model.tensors[name].clone()
    return update.config, tensors, update.notes


@pytest.mark.parametrize("label", TABLED)
def test_a_relayered_model_loads_and_its_layers_keep_their_kind(label: str, tmp_path: Path) -> None:
    model = saved(label)
    layers = {p: [s.count - 1, 0, 0, *range(s.count)] for p, s in model.anatomy.stacks.items()}
    before = copy.deepcopy(model.config)
    config, tensors, notes = relayer(model, layers)
    assert model.config == before and notes == ()
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = TABLED[label][2].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    old, new = model.model.config.get_text_config(), loaded.config.get_text_config()
    if getattr(old, "layer_types", None):
        picked = layers[next(p for p, s in model.anatomy.stacks.items() if s.module != "vision_tower")]
        assert new.layer_types == [old.layer_types[i] for i in picked]
    # the identity changes nothing
    same = config_updates(
        model.config, model.anatomy, {p: list(range(s.count)) for p, s in model.anatomy.stacks.items()}
    )
    assert same.config == model.config and same.notes == ()


def test_kinds_that_follow_from_the_index_are_kept() -> None:
    def kinds(config_class: Any, config: dict[str, Any], picked: list[int], **keep: Any) -> tuple[list[str], list[str]]:
        full = {**TEXT, **config, "model_type": config_class.model_type, **keep}
        anatomy = describe(full, {f"model.layers.{i}.self_attn.q_proj.weight": (32, 32) for i in range(12)})
        update = config_updates(full, anatomy, {"model.layers": picked})
        old = config_class(**full).layer_types
        return [old[i] for i in picked], config_class(**update.config).layer_types

    picked = [0, 1, 2, 2, 1, 5, 11, 3]
    for config_class, config in (
        (T.Gemma2Config, {}),
        (T.Gemma3TextConfig, {"sliding_window_pattern": 3}),
        (T.Gemma3TextConfig, {}),
        (T.Qwen2Config, {"use_sliding_window": True, "max_window_layers": 2}),
        (T.Qwen3Config, {"use_sliding_window": False}),
        (T.Qwen2MoeConfig, {"use_sliding_window": True, "max_window_layers": 5}),
        (T.Cohere2Config, {}),
        (T.Cohere2Config, {"sliding_window_pattern": 2}),
    ):
        wanted, got = kinds(config_class, config, picked, num_hidden_layers=12)
        assert got == wanted, (config_class, config)
        assert len(set(wanted)) == 2 or config_class is T.Qwen3Config


def test_one_side_of_t5_does_not_change_the_other() -> None:
    model = saved("t5")
    config = {k: v for k, v in model.config.items() if k != "num_decoder_layers"}  # as t5-small is published
    shapes = {n: s for n, s in model.shapes.items() if not n.startswith("decoder.block.2.")}
    update = config_updates(config, describe(config, shapes), {"encoder.block": [0, 1, 1]})
    made = T.T5Config(**update.config)
    assert (made.num_layers, made.num_decoder_layers) == (3, 2)


def test_sparse_layers_stay_sparse() -> None:
    def is_dense(config: dict[str, Any], i: int) -> bool:  # as Qwen's MoE layers decide it
        return i in config["mlp_only_layers"] or (i + 1) % config["decoder_sparse_step"] != 0

    model = saved("qwen3_moe")
    config = {**model.config, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    anatomy = describe(config, {f"model.layers.{i}.mlp.gate.weight": (3, 32) for i in range(6)})
    picked = [5, 3, 1, 1, 0]
    new = config_updates(config, anatomy, {"model.layers": picked}).config
    assert [is_dense(new, i) for i in range(5)] == [is_dense(config, i) for i in picked]

    deep = {"model_type": "deepseek_v3", "num_hidden_layers": 6, "first_k_dense_replace": 2}
    anatomy = describe(deep, {f"model.layers.{i}.mlp.gate.weight": (3, 32) for i in range(6)})
    kept = config_updates(deep, anatomy, {"model.layers": [1, 4, 5]})
    assert kept.config["first_k_dense_replace"] == 1 and not kept.notes
    assert any("first_k_dense" in note for note in config_updates(deep, anatomy, {"model.layers": [4, 1]}).notes)


def test_layers_from_models_with_other_configs() -> None:
    model = saved("gemma3")
    other = {**model.config, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    origins = {"model.layers": [model.config, other, other]}
    update = config_updates(model.config, model.anatomy, {"model.layers": [0, 3, 2]}, origins)
    assert update.config["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    with pytest.raises(ConfigError, match="no layer 3 in a model of 3"):
        config_updates(model.config, model.anatomy, {"model.layers": [0, 3]})
    with pytest.raises(ConfigError, match=r"model\.layers"):
        config_updates(model.config, model.anatomy, {"layers": [0]})


def test_what_cannot_be_kept_true_is_said() -> None:
    config = {"model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    anatomy = describe(config, {f"model.layers.{i}.mamba.D": (4,) for i in range(4)})
    assert any("attn_layer_period" in note for note in config_updates(config, anatomy, {"model.layers": [1, 0]}).notes)
    uneven = {
        f"model.layers.{i}.{x}.weight": (4,)
        for i in range(3)
        for x in ("attn_norm", "mlp_norm")
        if (i, x[0]) != (0, "a")
    }
    anatomy = describe({"model_type": "modernbert", "num_hidden_layers": 3}, uneven)
    config = {"model_type": "modernbert", "num_hidden_layers": 3}
    assert any(
        "layer 1 is made of layer 0 " in n for n in config_updates(config, anatomy, {"model.layers": [0, 0]}).notes
    )
    assert not config_updates(config, anatomy, {"model.layers": [0, 2, 1, 2]}).notes
    bare = describe({}, {f"model.layers.{i}.self_attn.q_proj.weight": (4, 4) for i in range(2)})
    assert any("by hand" in note for note in config_updates({}, bare, {"model.layers": [1]}).notes)


# ---------------------------------------------------------------------------------------------------------------------
# everything else
# ---------------------------------------------------------------------------------------------------------------------

SIDED = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}  # fmt: skip
LATENT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "kv_lora_rank": 8,
          "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1,
          "n_group": 1, "topk_group": 1}  # fmt: skip
# no interpreter knows them: model, config, stacks, how many tensors are other
UNTABLED: dict[str, tuple[Any, dict[str, Any], dict[str, int], int]] = {
    "opt": (T.OPTForCausalLM, {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 16}, {"model.decoder.layers": 3}, 2),
    "bloom": (T.BloomForCausalLM, {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
              {"transformer.h": 3}, 0),
    "phi": (T.PhiForCausalLM, PLAIN, {"model.layers": 3}, 0),
    "olmo": (T.OlmoForCausalLM, PLAIN, {"model.layers": 3}, 0),
    "gptj": (T.GPTJForCausalLM, {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
             {"transformer.h": 3}, 0),
    "mamba": (T.MambaForCausalLM, {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3},
              {"backbone.layers": 3}, 27),
    "bart": (T.BartForConditionalGeneration, SIDED, {"model.encoder.layers": 2, "model.decoder.layers": 3}, 0),
    "whisper": (T.WhisperForConditionalGeneration, {**SIDED, "num_mel_bins": 8, "max_source_positions": 32,
                "max_target_positions": 32}, {"model.encoder.layers": 2, "model.decoder.layers": 3}, 0),
    "llava": (T.LlavaForConditionalGeneration, {"text_config": {"model_type": "llama", **TEXT},
              "vision_config": {"model_type": "clip_vision_model", **IMAGE}, "image_token_index": 95},
              {"language_model.model.layers": 3, "vision_tower.encoder.layers": 2}, 0),
    "deepseek_v2": (T.DeepseekV2ForCausalLM, {**PLAIN, **LATENT}, {"model.layers": 3}, 0),
    "deepseek_v3": (T.DeepseekV3ForCausalLM, {**PLAIN, **LATENT}, {"model.layers": 3}, 0),
    "gpt_oss": (T.GptOssForCausalLM, {**TEXT, "num_local_experts": 2}, {"model.layers": 3}, 3),
    "qwen3_next": (T.Qwen3NextForCausalLM, {**TEXT, **MOE, "num_hidden_layers": 4, "num_experts": 2,
                   "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8}, {"model.layers": 4}, 21),
}  # fmt: skip


@pytest.mark.parametrize("label", UNTABLED)
def test_untabled_families_are_inferred(label: str) -> None:
    model_class, config, stacks, others = UNTABLED[label]
    model = save(model_class(model_class.config_class(**copy.deepcopy(config))))
    anatomy = model.anatomy
    assert list(anatomy.tensors) == list(model.tensors)
    tabled = {"llava": "llama", "deepseek_v2": "deepseek_v3", "deepseek_v3": "deepseek_v3", "qwen3_next": "qwen3_next"}
    assert anatomy.family == tabled.get(label, "inferred")
    is_whole = anatomy.traits is None or anatomy.traits.attention == "heads"
    assert is_whole == (label not in tabled or label == "llava")
    assert {p: s.count for p, s in anatomy.stacks.items()} == stacks
    assert all(s.config_paths for s in anatomy.stacks.values()) and not anatomy.notes
    unknown = [n for n, m in anatomy.tensors.items() if m.role == "other"]
    assert len(unknown) == others, unknown
    assert all(re.search("mixer|linear_attn|sinks|project_", n) for n in unknown)
    keys = model.model.all_tied_weights_keys
    assert anatomy.is_tied is bool(keys)
    written = {(d, k) for d, k in keys.items() if "embed_tokens" not in d}
    assert set(anatomy.ties) == written
    roles = Counter(m.role for m in anatomy.tensors.values() if m.layer is not None and "attention" in m.roles)
    if label in ("opt", "phi", "olmo", "gptj", "gpt_oss"):
        assert {roles[x] for x in "qkvo"} == {3}
    update = config_updates(model.config, anatomy, {p: [1, 0, 1] for p in stacks})
    shallow = {f"{p}.{i}.mlp.x.weight": (2, 2) for p in stacks for i in range(3)}
    for prefix, stack in describe(update.config, shallow).stacks.items():
        assert (stack.count, stack.config_paths) == (3, anatomy.stacks[prefix].config_paths)
    model_class.config_class(**update.config)  # transformers checks its per-layer lists


def test_modules_bear_the_names_of_recipes() -> None:
    for label, wanted in (
        ("llama", {"default"}),
        ("gemma3-vlm", {"text_decoder", "vision_tower", "multi_modal_projector"}),
        ("t5", {"encoder", "decoder", "shared"}),
    ):
        anatomy = saved(label).anatomy
        assert set(anatomy.modules) == wanted
        assert sorted(n for names in anatomy.modules.values() for n in names) == sorted(anatomy.tensors)
        assert all(anatomy.tensors[n].module == m for m, names in anatomy.modules.items() for n in names)
    assert saved("t5").anatomy.modules["shared"] == ("shared.weight",)


def test_odd_tensors_are_kept_and_named_other() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (96, 32),
        "transformer.x0_lambda": (),
        "transformer.skip_weights": (6,),
        "transformer.ngram_hash.tables.0.weight": (4096, 16),
        "transformer.value_embeds.0.weight": (96, 32),
        "transformer.smear_gate.weight": (1, 12),
        **{f"transformer.h.{i}.attn.{x}.weight": (32, 32) for i in range(4) for x in ("c_q", "c_k", "c_v", "c_proj")},
        **{f"transformer.h.{i}.resid_lambda": () for i in range(4)},
        **{f"transformer.h.{i}.attn.q_proj.weight_scale_inv": (1, 1) for i in range(4)},
        **{f"transformer.h.{i}.mlp.experts.{e}.w1.weight": (8, 32) for i in range(4) for e in range(3)},
        **{f"transformer.h.{i}.attn.rotary_emb.inv_freq": (4,) for i in range(4)},
    }
    anatomy = describe({"model_type": "nobody_knows", "n_layer": 4}, shapes)
    assert list(anatomy.tensors) == list(shapes) and {p: s.count for p, s in anatomy.stacks.items()} == {
        "transformer.h": 4
    }
    other = {re.sub(r"\d+", "#", n) for n, m in anatomy.tensors.items() if m.role == "other"}
    assert other >= {"transformer.x#_lambda", "transformer.skip_weights", "transformer.ngram_hash.tables.#.weight",
                     "transformer.smear_gate.weight", "transformer.h.#.resid_lambda"}  # fmt: skip
    at = anatomy.tensors
    assert at["transformer.h.2.attn.q_proj.weight_scale_inv"].role == "scale"
    assert at["transformer.h.1.attn.rotary_emb.inv_freq"].role == "buffer"
    expert = at["transformer.h.1.mlp.experts.2.w1.weight"]
    assert (expert.layer, expert.expert, expert.roles) == (1, 2, {"up", "mlp", "experts"})


def test_names_of_less_common_modules() -> None:
    """Wrapped projections, sequential MLPs, mergers, constants of linear attention; all found in models of transformers."""
    shapes: dict[str, tuple[int, ...]] = {
        **{f"model.layers.{i}.self_attn.{x}_proj.linear.weight": (32, 32) for i in range(2) for x in "qkvo"},
        **{f"model.layers.{i}.self_attn.slope_rate": (4, 1, 1) for i in range(2)},
        **{f"model.blocks.{i}.ffn.experts.mlp.{x}": (64, 32) for i in range(2) for x in ("w1", "v1", "w2")},
        **{f"model.blocks.{i}.attn.projection.weight": (32, 32) for i in range(2)},
        **{f"visual.blocks.{i}.mlp.{x}.weight": (32, 32) for i in range(2) for x in ("fc0", "fc1")},
        **{f"visual.deepstack_merger_list.{i}.linear_fc1.weight": (32, 32) for i in range(2)},
        "visual.downsample.weight": (32, 32, 2, 2),
        "transformer.positions_embed.weight": (64, 32),
    }
    anatomy = describe({"model_type": "nobody_knows", "num_hidden_layers": 2}, shapes)
    role = {name: meaning.role for name, meaning in anatomy.tensors.items()}
    assert [role[f"model.layers.1.self_attn.{x}_proj.linear.weight"] for x in "qkvo"] == ["other"] * 4  # decays: linear
    assert role["model.layers.0.self_attn.slope_rate"] == "buffer"
    plain = {name: shape for name, shape in shapes.items() if "slope_rate" not in name}
    alone = describe({"model_type": "nobody_knows", "num_hidden_layers": 2}, plain)
    assert [alone.tensors[f"model.layers.1.self_attn.{x}_proj.linear.weight"].role for x in "qkvo"] == [*"qkvo"]
    assert [role[f"model.blocks.0.ffn.experts.mlp.{x}"] for x in ("w1", "v1", "w2")] == ["gate", "up", "down"]
    assert role["model.blocks.1.attn.projection.weight"] == "o"
    assert [role[f"visual.blocks.1.mlp.{x}.weight"] for x in ("fc0", "fc1")] == ["up", "down"]
    assert role["visual.deepstack_merger_list.1.linear_fc1.weight"] == "projector"
    assert "visual.deepstack_merger_list" not in anatomy.stacks
    assert role["visual.downsample.weight"] == "conv" and role["transformer.positions_embed.weight"] == "position"


WORDS = (
    "model layers h 0 1 2 self_attn q_proj experts weight bias norm lm_head gate encoder vision_tower A_log ü qkv_proj "
    "c_attn embed_tokens relative_attention_bias layers.1 transformer decoder block"
)
words = st.sampled_from([*WORDS.split(), ""])
jsonable = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
config_keys = st.sampled_from(
    ["model_type", "num_hidden_layers", "n_layer", "num_attention_heads", "hidden_size", "head_dim", "text_config",
     "tie_word_embeddings", "architectures", "vocab_size", "rope_parameters", "layer_types", "num_kv_heads"]
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    names=st.lists(st.lists(words, min_size=1, max_size=6).map(".".join), max_size=12, unique=True),
    config=st.dictionaries(config_keys, st.sampled_from(sorted(FAMILIES)) | jsonable, max_size=6),
    data=st.data(),
)
def test_describe_never_raises_and_never_drops(names: list[str], config: dict[str, Any], data: st.DataObject) -> None:
    shape = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    shapes = {name: data.draw(shape) for name in names}
    anatomy = describe(config, shapes)
    assert list(anatomy.tensors) == names
    for name, meaning in anatomy.tensors.items():
        assert aliases_of(name, anatomy) is not None and meaning.role in ROLES
        if meaning.view is not None:
            assert sum(math.prod(s) for s in meaning.view.parts(shapes[name]).values()) == math.prod(shapes[name])


def test_extra_prediction_layers_are_not_of_the_stack() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    anatomy = describe(config, {f"model.layers.{i}.mlp.up_proj.weight": (2, 2) for i in range(3)})
    assert anatomy.stacks["model.layers"].count == 2 and anatomy.notes
    assert anatomy.tensors["model.layers.2.mlp.up_proj.weight"].layer is None


class Headers(Checkpoint):
    """A checkpoint of which only the headers exist."""

    def __init__(self, model: Saved, dtype: str = "F64") -> None:
        self.reference, self.folder, self.config = "tiny", Path("."), model.config
        self.tensors = {name: TensorInfo(name, dtype, shape) for name, shape in model.shapes.items()}
        self.aliases: dict[str, str] = {}

    def fingerprint(self) -> str:
        return "0"

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("inspection must not read weights")


def test_inspection_of_a_tabled_model() -> None:
    model = saved("qwen3_moe")
    found = inspect_model(Headers(model))
    assert found.parameters == sum(p.numel() for p in model.model.parameters())
    assert found.bytes == 8 * found.parameters and found.dtypes == {"F64": found.parameters}
    assert (found.family, found.coverage_tensors, found.unrecognised) == ("qwen3_moe", 1.0, ())
    assert (found.tied, found.vocab_size, found.vocab_rows) == (False, 96, 96)
    assert sum(row.tensors for row in found.roles) == found.tensors == len(model.tensors)
    assert json.loads(json.dumps(found.to_dict()))["stacks"][0]["layers"] == 3
    text = found.to_text()
    assert re.search(r"^router +2 +\S+ +F64 +\[3, 32\]$", text, re.M) and "coverage      100.0%" in text


def test_inspection_tells_what_it_does_not_know() -> None:
    model = copy.copy(saved("llama"))
    model.tensors = {**model.tensors, "model.mystery": torch.zeros(7), "model.embed_tokens.weight": torch.zeros(99, 32)}
    found = inspect_model(Headers(model))
    assert found.unrecognised == ("model.mystery",) and 0.9 < found.coverage_tensors < 1
    assert any("vocab_size 96" in note and "99 rows" in note for note in found.notes)
    assert "model.mystery" in found.to_text()
