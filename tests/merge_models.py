"""Tiny models of transformers to merge whole, what is to be read of the results, and averages of them in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file

import yeam

tf.utils.logging.disable_progress_bar()

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": lambda: tf.MistralConfig(**SIZES, head_dim=4),
    "qwen2": lambda: tf.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, head_dim=4, sliding_window=8),
    "phi3": lambda: tf.Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "gpt2": lambda: tf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, bos_token_id=1, eos_token_id=2
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SIZES, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1],
        bos_token_id=1, eos_token_id=2,
    ),
    "bert": lambda: tf.BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "t5": lambda: tf.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    ),
}  # fmt: skip
AUTO: dict[str, Any] = {"bert": tf.AutoModelForMaskedLM, "t5": tf.AutoModelForSeq2SeqLM}


def build(config: tf.PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """A model whose every parameter is random, norms and biases too, so that no mistake hides behind a zero."""
    auto = AUTO.get(config.model_type, tf.AutoModelForCausalLM)
    torch.manual_seed(0)
    model = auto.from_config(copy.deepcopy(config)).to(dtype).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 * torch.randn(parameter.shape, generator=noise)).to(dtype)
    return model


def save(model: tf.PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def tensors(folder: str | Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def load(out: Path, auto: Any = tf.AutoModelForCausalLM) -> tf.PreTrainedModel:
    model, info = auto.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(1, 13).view(2, 6)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def mean(a: tf.PreTrainedModel, b: tf.PreTrainedModel, share: float = 0.5) -> tf.PreTrainedModel:
    """share · a + (1 - share) · b, in memory."""
    merged = copy.deepcopy(a)
    with torch.no_grad():
        for parameter, other in zip(merged.parameters(), b.parameters(), strict=True):
            parameter.mul_(share).add_(other, alpha=1 - share)
    return merged


def close(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype, name
        torch.testing.assert_close(
            one[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def entries(*paths: str | Path, **each: Any) -> list[dict[str, Any]]:
    return [{"model": str(path), **({"parameters": each} if each else {})} for path in paths]


def merged(out: Path, method: str, models: list[dict[str, Any]], **keys: Any) -> Tensors:
    """The tensors of a merge of these models (none with `slices`)."""
    yeam.merge({"merge_method": method, **({"models": models} if models else {}), **keys}, out)
    return tensors(out)
