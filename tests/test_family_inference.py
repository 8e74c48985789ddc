"""Families without a table, and tensors that no table names: inferred from names and shapes, never dropped."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from typing import Any

import pytest
import transformers as T
from family_models import IMAGE, MOE, PLAIN, TEXT, save, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from yeam.families import FAMILIES, ROLES, aliases_of, config_updates, describe

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
