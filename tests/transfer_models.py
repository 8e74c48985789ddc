"""Tiny decoders of the families that transfer knows, in float64, and random symmetries of theirs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers as T
from family_models import Saved
from interpreter import Interpreter
from safetensors.torch import load_file, save_file
from torch import Tensor

from yeam.checkpoint import open_checkpoint
from yeam.families import describe
from yeam.transfer.body import FAMILIES, Body, Parts
from yeam.transfer.gauge import LayerGauge
from yeam.transfer.residual import Rotation, only_permutes

SIZES = {
    "vocab_size": 160, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
NO_GROUPS = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")} | {
    "num_attention_heads": 4
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (T.LlamaConfig, T.LlamaForCausalLM, SIZES),
    "llama-biases": (T.LlamaConfig, T.LlamaForCausalLM, {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": (T.LlamaConfig, T.LlamaForCausalLM, {**SIZES, "tie_word_embeddings": True}),
    "mistral": (T.MistralConfig, T.MistralForCausalLM, SIZES),
    "qwen2": (T.Qwen2Config, T.Qwen2ForCausalLM, {**SIZES}),
    "qwen3": (T.Qwen3Config, T.Qwen3ForCausalLM, SIZES),
    "gemma3": (T.Gemma3TextConfig, T.Gemma3ForCausalLM, {**SIZES, "tie_word_embeddings": True, "query_pre_attn_scalar": 6,
               "layer_types": [f"{x}_attention" for x in ("sliding", "full", "sliding")]}),
    "phi3": (T.Phi3Config, T.Phi3ForCausalLM, {**SIZES, "partial_rotary_factor": 0.5}),
    "gpt2": (T.GPT2Config, T.GPT2LMHeadModel, {"vocab_size": 160, "n_embd": 32, "n_inner": 56, "n_layer": 3, "n_head": 4,
             "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "gpt_neox": (T.GPTNeoXConfig, T.GPTNeoXForCausalLM, {**NO_GROUPS, "rotary_pct": 0.5}),
    "granite": (T.GraniteConfig, T.GraniteForCausalLM, {**SIZES, "embedding_multiplier": 2.0,
                "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 3.0}),
    "olmo2": (T.Olmo2Config, T.Olmo2ForCausalLM, {**SIZES}),
}  # fmt: skip

LATENT = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")} | {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 56, "first_k_dense_replace": 1,
}  # fmt: skip
STATE_SPACE = {
    "mamba_n_heads": 4,
    "mamba_d_head": "auto",
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "attn_layer_indices": [1],
}
PARTIAL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (T.MixtralConfig, T.MixtralForCausalLM, {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2,
                "rope_theta": 1e4, "rms_norm_eps": 1e-6}),
    "qwen2_moe": (T.Qwen2MoeConfig, T.Qwen2MoeForCausalLM, {**SIZES, "num_experts": 3, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24, "shared_expert_intermediate_size": 56}),
    "deepseek_v2": (T.DeepseekV2Config, T.DeepseekV2ForCausalLM, {**LATENT, "norm_topk_prob": False}),
    "deepseek_v3": (T.DeepseekV3Config, T.DeepseekV3ForCausalLM, LATENT),
    "bamba": (T.BambaConfig, T.BambaForCausalLM, {**SIZES, **STATE_SPACE}),
    "jamba": (T.JambaConfig, T.JambaForCausalLM, {**SIZES, "num_experts": 3, "attn_layer_period": 3, "attn_layer_offset": 1,
              "expert_layer_period": 3, "expert_layer_offset": 2, "mamba_d_state": 8, "use_mamba_kernels": False}),
    "qwen3_next": (T.Qwen3NextConfig, T.Qwen3NextForCausalLM, {
        **SIZES, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 56,
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
}  # fmt: skip
"""Models of which only a part is looked into: with experts, or with attention that is not by heads."""


def make(kind: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Path:
    """A model folder with random weights, none of them at a value that hides a mistake."""
    config_class, model_class, config = (KINDS | PARTIAL)[kind]
    made = config_class(**copy.deepcopy({**config, **changes}))
    made._experts_implementation = "eager"  # the grouped one has no float64
    model = model_class(made)
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            offset = 0.0 if "gemma" in kind or kind == "qwen3_next" else 1.0
            parameter.copy_(offset + 0.5 * noise.tanh() if is_gain else 0.25 * noise)
    model.to(dtype).save_pretrained(folder)
    return folder


def body_of(folder: Path) -> Body:
    checkpoint = open_checkpoint(str(folder))
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    anatomy = describe(checkpoint.config, shapes)
    return Body(checkpoint, anatomy, partial=anatomy.family not in FAMILIES)


def random_rotation(body: Body, seed: int = 0) -> Rotation:
    """Any legal change of the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    size = body.hidden
    if only_permutes(body) or body.is_tied:
        sign = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        matrix = torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
        return Rotation.of(matrix if body.traits.norm == "ln" else sign[:, None] * matrix)
    matrix = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    if body.traits.norm == "ln":  # the vector of ones stays: rotate its complement
        ones = torch.ones(size, 1, dtype=torch.float64) / size**0.5
        basis = torch.linalg.qr(
            torch.cat([ones, torch.randn(size, size - 1, generator=generator, dtype=torch.float64)], 1)
        ).Q
        inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), torch.linalg.qr(matrix[1:, 1:]).Q)
        matrix = basis @ inner @ basis.T
    return Rotation.of(matrix)


def random_gauge(body: Body, layer: int, seed: int = 0) -> LayerGauge:
    """Any legal change inside a layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gauge = LayerGauge.identity(body, layer, torch.float64)
    r = body.heads // body.kv_heads
    gauge.groups_K = torch.randperm(body.kv_heads, generator=generator)
    gauge.heads_H = torch.cat([g * r + torch.randperm(r, generator=generator) for g in gauge.groups_K.tolist()])
    if body.traits.qk_norm == "none":
        gauge.planes_KP = torch.complex(normal(*gauge.planes_KP.shape), normal(*gauge.planes_KP.shape))
        gauge.rest_KRR = gauge.rest_KRR + 0.3 * normal(*gauge.rest_KRR.shape)
    else:
        gauge.planes_KP = (
            torch.randint(0, 2, gauge.planes_KP.shape, generator=generator).double().mul(2).sub(1).to(torch.complex128)
        )
    gauge.values_KEE = gauge.values_KEE + 0.3 * normal(*gauge.values_KEE.shape)
    gauge.neurons_I = torch.randperm(len(gauge.neurons_I), generator=generator)
    if body.traits.glu:
        gauge.scale_I = normal(len(gauge.scale_I))
        gauge.scale_I = gauge.scale_I.sign() * (gauge.scale_I.abs() + 0.3)
    return gauge


def inverse(gauge: LayerGauge) -> LayerGauge:
    """What takes a gauge back."""
    heads, groups, neurons = (order.argsort() for order in (gauge.heads_H, gauge.groups_K, gauge.neurons_I))
    return LayerGauge(
        heads,
        groups,
        1 / gauge.planes_KP[groups],
        torch.linalg.inv(gauge.rest_KRR)[groups],
        torch.linalg.inv(gauge.values_KEE)[groups],
        neurons,
        1 / gauge.scale_I[neurons],
    )


IDS = torch.tensor([5, 17, 3, 80, 44, 9, 61, 120, 33])


def rewritten(folder: Path, tensors: Parts) -> Path:
    """A copy of a model folder with other tensors; a head of its own unties it."""
    copy_of = folder.with_name(folder.name + "-rewritten")
    copy_of.mkdir(exist_ok=True)
    state = load_file(folder / "model.safetensors") | tensors
    config = json.loads((folder / "config.json").read_text())
    if "lm_head.weight" in state:
        config["tie_word_embeddings"] = False
    (copy_of / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, copy_of / "model.safetensors", {"format": "pt"}
    )
    return copy_of


def logits(folder: Path) -> Tensor:
    """What transformers computes for a few tokens (it keeps norms and angles in float32)."""
    config = T.AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    model = T.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(IDS[None]).logits[0]


def exact_logits(folder: Path) -> Tensor:
    """The same in float64 throughout, by the interpreter of families that is tested against transformers."""
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    anatomy = describe(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return Interpreter(Saved(config, state, anatomy, None)).decoder_only(IDS, causal=True)


def difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
