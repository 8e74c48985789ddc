"""Tiny models of every tabled family with random weights: as transformers saves them, and as `describe` reads them."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as T
from safetensors.torch import load_file

from yeam.families import Anatomy, describe

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
