"""Whole merges of real transformers models: what is written loads, and equals a merge done in memory with torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers as tf
from conftest import llama_tensors, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import yeam
from yeam.errors import ConfigError

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


@pytest.mark.parametrize("family", CONFIGS)
def test_families(family: str, tmp_path: Path) -> None:
    """linear equals the average in memory, in tensors and logits; yeam equals the plain reference; both load."""
    config, auto = CONFIGS[family](), AUTO.get(family, tf.AutoModelForCausalLM)
    models = [build(config, seed) for seed in (1, 2, 3)]
    base, a, b = (save(model, tmp_path / name) for model, name in zip(models, ("base", "a", "b")))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": a, "parameters": {"weight": 3}}, {"model": b, "parameters": {"weight": 1}}],
    }
    yeam.merge(recipe, tmp_path / "linear")
    merged = load(tmp_path / "linear", auto)
    expected = mean(models[1], models[2], 0.75)
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-5)
    close(tensors(tmp_path / "linear"), tensors(save(expected, tmp_path / "expected")))
    made, given = ((json.loads((tmp_path / n / "config.json").read_text())) for n in ("linear", "a"))
    assert made == given

    yeam.merge({"merge_method": "yeam", "base_model": base, "models": entries(a, b)}, tmp_path / "yeam")
    load(tmp_path / "yeam", auto)
    ours, x, y, z = (tensors(tmp_path / name) for name in ("yeam", "base", "a", "b"))
    plain = {
        name: reference.merge(x[name].double(), torch.stack([y[name] - x[name], z[name] - x[name]]).double())
        .to(x[name].dtype)
        for name in x
    }  # fmt: skip
    assert ours.keys() == plain.keys()
    for name in plain:  # frames divide by small eigenvalues: float32 keeps five digits of the whole update
        error = (ours[name] - plain[name]).norm() / (y[name] - x[name]).norm()
        assert error < 1e-4, (name, error)


# one tensor


Llama = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"


def merged(out: Path, method: str, models: list[dict[str, Any]], **keys: Any) -> Tensors:
    """The tensors of a merge of these models (none with `slices`)."""
    yeam.merge({"merge_method": method, **({"models": models} if models else {}), **keys}, out)
    return tensors(out)


def test_linear_parameters(tmp_path: Path, llama: Llama) -> None:
    a, b = llama("a", layers=3), llama("b", layers=3)
    x, y = tensors(a), tensors(b)
    weight = [{"filter": "mlp", "value": [0, 1]}, {"filter": "role:head", "value": -2}, {"value": 0.25}]
    models = [{"model": str(a), "parameters": {"weight": 1}}, {"model": str(b), "parameters": {"weight": weight}}]
    ours = merged(tmp_path / "sum", "linear", models, parameters={"normalize": False})
    for name in x:
        share = int(name.split(".")[2]) / 2 if "mlp" in name else -2 if name == "lm_head.weight" else 0.25
        torch.testing.assert_close(ours[name], x[name] + share * y[name])
    ours = merged(tmp_path / "mean", "linear", models)
    torch.testing.assert_close(ours["lm_head.weight"], (x["lm_head.weight"] - 2 * y["lm_head.weight"]) / -1)
    with pytest.raises(ConfigError, match="weights sum to 0"):
        merged(tmp_path / "zero", "linear", [*entries(a, weight=1), *entries(b, weight=-1)])
    assert not (tmp_path / "zero").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_rounds_after_every_operation(dtype: torch.dtype, tmp_path: Path, llama: Llama) -> None:
    """`math: exact`: weights, products, sum and quotient each in the working dtype; otherwise rounded once."""
    a, b, c = (llama(name, dtype=torch.bfloat16) for name in "abc")
    weights = (0.3, 0.5, 0.9)
    models = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip((a, b, c), weights)]
    name = str(dtype).removeprefix("torch.")
    exact = merged(tmp_path / "exact", "linear", models, dtype=name, math="exact")
    once = merged(tmp_path / "once", "linear", models, dtype=name)
    inputs = [tensors(m) for m in (a, b, c)]
    differ = 0
    for key in inputs[0]:
        x_Kn = torch.stack([tensor[key].to(dtype) for tensor in inputs])
        w_K = torch.tensor(weights, dtype=dtype).view(-1, *[1] * (x_Kn.dim() - 1))
        assert torch.equal(exact[key], (w_K * x_Kn).sum(0) / w_K.sum(0)), key
        total = sum(weight * tensor[key].double() for weight, tensor in zip(weights, inputs)) / sum(weights)
        torch.testing.assert_close(once[key], total.to(dtype), rtol=2**-7, atol=0)  # at most one unit in the last place
        differ += int((exact[key] != once[key]).sum())
    assert differ > 0
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == name


def test_out_dtype(tmp_path: Path, llama: Llama) -> None:
    a, b = llama("a"), llama("b")
    x, y = tensors(a), tensors(b)
    out = merged(tmp_path / "out", "linear", entries(a, b, weight=1), dtype="float32", out_dtype="bfloat16")
    close(out, {name: ((x[name] + y[name]) / 2).bfloat16() for name in x}, 0)
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_passthrough(tmp_path: Path, llama: Llama) -> None:
    """Without a scale the file itself; a scale only where a filter says so."""
    a = llama("a", dtype=torch.bfloat16)
    merged(tmp_path / "copy", "passthrough", entries(a))
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (a / "model.safetensors").read_bytes()
    scale = [{"filter": "o_proj", "value": 0}, {"filter": "role:down", "value": [1, 2]}]
    ours, x = merged(tmp_path / "scaled", "passthrough", entries(a, scale=scale)), tensors(a)
    for name in x:
        factor = 0 if "o_proj" in name else int(name.split(".")[2]) + 1 if "down_proj" in name else 1
        assert torch.equal(ours[name], x[name] * factor), name


def test_yeam_parameters(tmp_path: Path, llama: Llama) -> None:
    """Against the plain reference: a listed or unlisted base or none, frames, softness, weights, lambda by layer."""
    base, a, b = llama("base", layers=3), llama("a", layers=3), llama("b", layers=3)
    x, y, z = tensors(base), tensors(a), tensors(b)
    weights = [*entries(a, weight=0.5), *entries(b)]

    def expected(**options: Any) -> Tensors:
        strength = options.pop("strength", lambda name: 1.0)
        return {
            n: reference.merge(x[n], torch.stack([0.5 * (y[n] - x[n]), z[n] - x[n]]), lam=strength(n), **options)
            for n in x
        }

    def check(name: str, wanted: Tensors, **keys: Any) -> None:
        ours = merged(tmp_path / name, "yeam", keys.pop("models", weights), **keys)
        for n in wanted:
            assert (ours[n] - wanted[n]).norm() / (y[n] - x[n]).norm() < 2e-4, (name, n)

    on_base = {"base_model": str(base)}
    check("plain", expected(), **on_base)
    check("listed", expected(), **on_base, models=[weights[0], *entries(base, weight=7), weights[1]])
    check("none", expected(width=None), **on_base, parameters={"frames": "none"})
    # frames as wide as a side of these tensors would be singular matrices
    check("narrow", expected(width=4, rounds=3), **on_base, parameters={"frames": 4, "rounds": 3})
    check("soft", expected(softness=0.5), **on_base, parameters={"softness": 0.5})
    check("seed", expected(width=4, rounds=4, seed=5), **on_base, parameters={"frames": 4, "seed": 5})

    def strength(name: str) -> float:
        return int(name.split(".")[2]) / 2 if ".layers." in name else 0.0

    ours = tensors(tmp_path / "plain")
    check("lambda", expected(strength=strength), **on_base, parameters={"lambda": [0, 1]})
    assert torch.equal(tensors(tmp_path / "lambda")["lm_head.weight"], x["lm_head.weight"])
    spectral = merged(tmp_path / "spectral", "yeam", weights, **on_base, parameters={"frames": "spectral"})
    assert torch.allclose(spectral[UP], ours[UP], atol=1e-3)  # a frame as wide as the side is the limit
    zeros = {n: torch.zeros_like(t) for n, t in x.items()}
    rays = {n: reference.merge(zeros[n], torch.stack([0.5 * y[n], z[n]])) for n in x}
    check("no base", rays)


def test_nothing_to_merge_changes_nothing(tmp_path: Path, llama: Llama) -> None:
    """A single source is followed exactly, and a model merged with itself is that model."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        base, a = llama(f"base-{name}", dtype=dtype), llama(f"a-{name}", dtype=dtype)
        with_base = {"base_model": str(base)}
        exact = [
            ("yeam", entries(a), with_base), ("yeam", entries(a), {}), ("linear", entries(a, weight=0.3), {}),
            ("linear", entries(a, a, weight=1), {}), ("yeam", entries(base, a), with_base),
            ("passthrough", entries(a), {}),
        ]  # fmt: skip
        for number, (method, models, keys) in enumerate(exact):
            close(merged(tmp_path / f"{name}-{number}", method, models, **keys), tensors(a), 0)
        twice = merged(tmp_path / f"{name}-twice", "yeam", entries(a, a), **with_base)
        close(twice, tensors(a), 2e-5 if dtype == torch.float32 else 2**-7)


# several layers, several names


def state_of(model: tf.PreTrainedModel, layers: list[tuple[tf.PreTrainedModel, int]]) -> Tensors:
    """The state dict of `model` with these layers of these models as its own."""
    state = {n: t for n, t in model.state_dict().items() if ".layers." not in n}
    for at, (source, index) in enumerate(layers):
        prefix = f"model.layers.{index}."
        state |= {
            n.replace(prefix, f"model.layers.{at}."): t for n, t in source.state_dict().items() if n.startswith(prefix)
        }
    return state


def stacked(models: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in models]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_frankenmerge(family: str, tmp_path: Path) -> None:
    """Two models' layers, renumbered: config.json has the new count and kinds, and the result computes with them."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "head_dim": 4}
    config = {
        "llama": lambda: CONFIGS["llama"](),
        "qwen3": lambda: tf.Qwen3Config(**SIZES, **kinds, use_sliding_window=True),
        "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, **kinds, query_pre_attn_scalar=4),
    }[family]()
    a, b = build(config, 1), build(config, 2)
    paths = save(a, tmp_path / "a"), save(b, tmp_path / "b")
    slices = stacked([(paths[0], 0, 2), (paths[1], 1, 2), (paths[1], 0, 1)])
    yeam.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    model = load(tmp_path / "out")
    if family != "llama":
        assert model.config.layer_types == [*kinds["layer_types"], "full_attention", "sliding_attention"]
    wanted = copy.deepcopy(model.config)
    assert wanted.num_hidden_layers == 4
    expected = tf.AutoModelForCausalLM.from_config(wanted).eval()
    ours = state_of(a, [(a, 0), (a, 1), (b, 1), (b, 0)])
    ours |= {n: t for n, t in b.state_dict().items() if n in ("model.norm.weight", "lm_head.weight")}
    if config.tie_word_embeddings:
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    expected.load_state_dict(ours)
    torch.testing.assert_close(logits(model), logits(expected))
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_one_model_twice_in_a_slice(tmp_path: Path) -> None:
    """Layers 0 and 1 of one model averaged into a single layer, under linear and against a base under yeam."""
    a, b = build(CONFIGS["llama"](), 1), build(CONFIGS["llama"](), 2)
    path, base = save(a, tmp_path / "a"), save(b, tmp_path / "b")
    both = [{"model": path, "layer_range": [0, 1]}, {"model": path, "layer_range": [1, 2]}]
    ours = merged(tmp_path / "linear", "linear", [], slices=[{"sources": both}], parameters={"weight": 1})
    x, y = tensors(path), tensors(base)
    for name in ours:
        wanted = (x[name] + x[name.replace("layers.0", "layers.1")]) / 2
        torch.testing.assert_close(ours[name], wanted)
    assert load(tmp_path / "linear").config.num_hidden_layers == 1
    ours = merged(tmp_path / "yeam", "yeam", [], slices=[{"sources": both}], base_model=base)
    for name in ours:  # the base gives the layers of the first source
        updates = torch.stack([x[name] - y[name], x[name.replace("layers.0", "layers.1")] - y[name]])
        assert (ours[name] - reference.merge(y[name], updates)).norm() / updates[0].norm() < 1e-4


def test_heads_tied_and_not(tmp_path: Path) -> None:
    """A tied model gives its embedding to an untied head; the result is untied and computes the average's logits."""
    tied, free = tf.LlamaConfig(**SIZES, tie_word_embeddings=True), tf.LlamaConfig(**SIZES, tie_word_embeddings=False)
    a, b = build(tied, 1), build(free, 2)
    paths = [save(a, tmp_path / "a"), save(b, tmp_path / "b")]
    for order in (paths, paths[::-1]):
        out = tmp_path / Path(order[0]).name / "merged"
        merged(out, "linear", entries(*order, weight=1))
        model = load(out)
        assert model.config.tie_word_embeddings is False
        expected = tf.AutoModelForCausalLM.from_config(free).eval()
        mine, other = a.state_dict(), b.state_dict()
        expected.load_state_dict({n: (mine[n] + other[n]) / 2 for n in other})
        torch.testing.assert_close(logits(model), logits(expected))


def test_pickled_models_with_shared_storage(tmp_path: Path) -> None:
    """What a `.bin` holds under two names is written once; untied by the config it is written twice. Both load."""
    for is_tied in (True, False):
        model = build(tf.LlamaConfig(**SIZES, tie_word_embeddings=is_tied), 1)
        folder = tmp_path / f"tied-{is_tied}"
        model.config.save_pretrained(folder)
        state = dict(model.state_dict())
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        torch.save(state, folder / "pytorch_model.bin")
        ours = merged(tmp_path / f"out-{is_tied}", "linear", entries(folder, folder, weight=1))
        assert ("lm_head.weight" in ours) is not is_tied
        loaded = load(tmp_path / f"out-{is_tied}")
        torch.testing.assert_close(loaded.lm_head.weight, model.model.embed_tokens.weight)


def test_prefix_of_a_base_model(tmp_path: Path) -> None:
    """A GPT-2 saved without its head's prefix merges with one saved with it, in either order."""
    a, b = build(CONFIGS["gpt2"](), 1), build(CONFIGS["gpt2"](), 2)
    with_head, bare = save(a, tmp_path / "a"), save(b.transformer, tmp_path / "b")
    assert any(n.startswith("transformer.h.") for n in tensors(with_head)) and any(
        n.startswith("h.") for n in tensors(bare)
    )
    merged(tmp_path / "ab", "linear", entries(with_head, bare, weight=1))
    torch.testing.assert_close(logits(load(tmp_path / "ab")), logits(mean(a, b)))
    merged(tmp_path / "ba", "linear", entries(bare, with_head, weight=1))
    model = load(tmp_path / "ba", tf.AutoModel)
    for name, tensor in mean(a, b).transformer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_language_and_vision(tmp_path: Path) -> None:
    """A LLaVA-like model: whole, and by modules with a tower from one model and a deeper text decoder."""
    text = {**SIZES, "model_type": "llama", "tie_word_embeddings": False}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, vision_feature_layer=-1)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(tf.LlavaForConditionalGeneration(config).eval())
    a, b = (save(model, tmp_path / name) for model, name in zip(models, "ab"))
    merged(tmp_path / "whole", "linear", entries(a, b, weight=1))
    whole = load(tmp_path / "whole", tf.AutoModelForImageTextToText)
    torch.testing.assert_close(logits(whole), logits(mean(*models)))
    modules = {
        "text_decoder": {"slices": stacked([(a, 0, 2), (b, 0, 1)])},
        "vision_tower": {"models": entries(b)},
        "multi_modal_projector": {"models": entries(a)},
    }
    yeam.merge({"merge_method": "passthrough", "modules": modules}, tmp_path / "parts")
    parts = load(tmp_path / "parts", tf.AutoModelForImageTextToText)
    assert parts.config.text_config.num_hidden_layers == 3
    ours, x, y = parts.state_dict(), models[0].state_dict(), models[1].state_dict()
    for name, tensor in ours.items():
        source = y if "vision_tower" in name or "lm_head" in name or name.endswith("language_model.norm.weight") else x
        if "language_model.layers.2." in name:
            name, source = name.replace("layers.2.", "layers.0."), y
        assert torch.equal(tensor, source[name]), name


def test_encoder_and_decoder_by_modules(tmp_path: Path) -> None:
    models = [build(CONFIGS["t5"](), seed) for seed in (1, 2)]
    a, b = (save(model, tmp_path / name) for model, name in zip(models, "ab"))
    modules = {
        "encoder": {"models": entries(a, b), "parameters": {"weight": [1, 3]}},
        "decoder": {"models": entries(b), "parameters": {"weight": 1}},
        "shared": {"models": entries(a), "parameters": {"weight": 1}},
    }
    yeam.merge({"merge_method": "linear", "modules": modules}, tmp_path / "out")
    model = load(tmp_path / "out", tf.AutoModelForSeq2SeqLM)
    x, y = models[0].state_dict(), models[1].state_dict()
    for name, tensor in model.state_dict().items():
        mine, other = x[name], y[name]
        wanted = (
            other
            if name.startswith("decoder.block")
            else (mine + other) / 2
            if name.startswith("encoder.block")
            else mine
        )
        if "embed_tokens" not in name and "block" in name:
            torch.testing.assert_close(tensor, wanted, msg=name)
    assert torch.equal(model.shared.weight, models[0].shared.weight)

    decoder = {"slices": stacked([(b, 1, 2), (a, 0, 2)])}
    parts = {"encoder": {"models": entries(a)}, "decoder": decoder, "shared": {"models": entries(a)}}
    yeam.merge({"merge_method": "passthrough", "modules": parts}, tmp_path / "deep")
    deep = load(tmp_path / "deep", tf.AutoModelForSeq2SeqLM)
    assert (deep.config.num_layers, deep.config.num_decoder_layers) == (2, 3)
    ours = deep.state_dict()
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(ours[bias], y[bias])  # of the whole stack: it stays in layer 0, from the first slice's model
    for at, source, layer in ((0, y, 1), (1, x, 0), (2, x, 1)):
        name = "decoder.block.{}.layer.1.EncDecAttention.q.weight".format
        assert torch.equal(ours[name(at)], source[name(layer)])


# unusual models


def test_any_tensors_of_any_architecture(tmp_path: Path) -> None:
    """Scalars, hash tables, gates, integers, empty tensors: every one comes out, merged or copied."""

    def odd(seed: int) -> Tensors:
        torch.manual_seed(seed)
        return {
            "skip.weights": torch.randn(7), "lambda": torch.randn(()), "ngram.table": torch.randn(1001, 3),
            "blocks.0.gate": torch.randn(1, 4, 2, 3), "blocks.1.gate": torch.randn(1, 4, 2, 3),
            "empty": torch.zeros(0, 3),
            "hash.seeds": torch.arange(5), "flag": torch.tensor(True), "half": torch.randn(9, 9).half(),
            "double": torch.randn(3, dtype=torch.float64), "phase": torch.randn(4, dtype=torch.complex64),
        }  # fmt: skip

    for config in (None, {"model_type": "nobody-knows", "architectures": ["NobodyKnows"]}):
        a, b = (
            save_model(tmp_path / f"{name}-{config is None}", odd(seed), config) for name, seed in (("a", 1), ("b", 2))
        )
        out = tmp_path / f"out-{config is None}"
        for method, keys in (("linear", {"parameters": {"weight": 1}}), ("yeam", {})):
            ours, x, y = merged(out / method, method, entries(a, b), **keys), odd(1), odd(2)
            assert ours.keys() == x.keys()
            for name, tensor in ours.items():
                assert (tensor.dtype, tensor.shape) == (x[name].dtype, x[name].shape)
                if not tensor.is_floating_point():
                    assert torch.equal(tensor, x[name])
                elif method == "linear":
                    torch.testing.assert_close(tensor, (x[name] + y[name]) / 2, rtol=1e-3, atol=1e-3)
                else:
                    zero = torch.zeros_like(x[name]).double()
                    wanted = reference.merge(zero, torch.stack([x[name], y[name]]).double()) if tensor.numel() else zero
                    torch.testing.assert_close(tensor.double(), wanted, rtol=2e-3, atol=2e-3, msg=name)
            assert (out / method / "config.json").exists() is (config is not None)


def test_lora_inputs(tmp_path: Path) -> None:
    """`base+adapter` as a source equals merging what peft's merge_and_unload makes of it, in the base's dtype."""
    models = [build(CONFIGS["llama"](), seed, torch.bfloat16) for seed in (1, 2)]
    base, other = (save(model, tmp_path / name) for model, name in zip(models, ("base", "other")))
    torch.manual_seed(3)
    tuned = get_peft_model(
        copy.deepcopy(models[0]), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(copy.deepcopy(models[0]).float(), tmp_path / "adapter").merge_and_unload()
    ours = merged(
        tmp_path / "out", "linear", [*entries(f"{base}+{tmp_path / 'adapter'}", weight=3), *entries(other, weight=1)]
    )
    mine, theirs = plain.state_dict(), models[1].state_dict()
    assert ours.keys() == mine.keys()
    for name, tensor in ours.items():
        wanted = (3 * mine[name] + theirs[name].float()) / 4
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), wanted, rtol=2**-8, atol=1e-6)
    applied = merged(tmp_path / "applied", "passthrough", entries(f"{base}+{tmp_path / 'adapter'}"))
    x = tensors(base)
    changed = {name for name in x if not torch.equal(applied[name], x[name])}
    assert changed == {name for name in x if "q_proj" in name or "down_proj" in name}
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_float8_with_scales(tmp_path: Path, llama: Llama) -> None:
    """Weights in float8 with block scales merge as the numbers they stand for; the output is plain bfloat16."""
    weights = llama_tensors(1, dtype=torch.bfloat16)
    blocks = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    change: Tensors = {}
    for name, tensor in weights.items():
        if tensor.shape == (16, 16):
            change |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": blocks.clone()}
    scales = {"quant_method": "fp8", "weight_block_size": [8, 8], "fmt": "e4m3", "activation_scheme": "dynamic"}
    a = llama("a", 1, dtype=torch.bfloat16, change=change, config={"quantization_config": scales})
    b = llama("b", 2, dtype=torch.bfloat16)
    ours, y = merged(tmp_path / "out", "linear", entries(a, b, weight=1)), tensors(b)
    assert ours.keys() == weights.keys() and {t.dtype for t in ours.values()} == {torch.bfloat16}
    for name, tensor in weights.items():
        plain = (
            change[name].float() * blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
            if name in change
            else tensor.float()
        )
        torch.testing.assert_close(ours[name].float(), (plain + y[name].float()) / 2, rtol=2**-7, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    load(tmp_path / "out")


# the same bytes


def test_shards_are_those_of_transformers(tmp_path: Path) -> None:
    """Files, index and their bytes as `save_pretrained` makes them of the same tensors in the same order; they load."""
    model = build(CONFIGS["llama"](), 1, torch.bfloat16)
    source = save(model, tmp_path / "source")
    recipe = {"merge_method": "passthrough", "models": entries(source)}
    yeam.merge(recipe, tmp_path / "ours", shard_size=2000)
    state = {job.name: model.state_dict()[job.name] for job in yeam.plan(recipe).jobs}
    model.save_pretrained(tmp_path / "theirs", state_dict=state, max_shard_size=2000)
    names = sorted(path.name for path in (tmp_path / "theirs").glob("model*"))
    assert len(names) > 4 and names == sorted(path.name for path in (tmp_path / "ours").glob("model*"))
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_bytes_do_not_depend_on_the_machine(tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """linear: the same bytes for every memory bound, number of lanes and tile size. yeam: for lanes and memory.

    Tile sizes change the order of its sums, and with it the update's fifth digit.
    """
    base, a, b = (llama(name, layers=3, hidden=32, vocab=300) for name in ("base", "a", "b"))
    models = entries(a, b, weight=0.7)
    for method, keys in (("linear", {}), ("yeam", {"base_model": str(base)})):
        made = []
        for number, (lanes, tile, memory) in enumerate(
            [(1, 1 << 18, None), (3, 1 << 18, "2GiB"), (2, 1 << 9, None), (1, 64, None)]
        ):
            with monkeypatch.context() as patch:
                patch.setattr("yeam.engine.run.cores", lambda n=lanes: n)
                patch.setattr("yeam.engine.memory.cores", lambda n=lanes: n)
                patch.setattr("yeam.engine.run.CPU_TILE", tile)
                out = tmp_path / f"{method}-{number}"
                yeam.merge({"merge_method": method, "models": models, **keys}, out, memory=memory)
            made.append((out / "model.safetensors").read_bytes())
        assert made[0] == made[1]
        if method == "linear":
            assert len(set(made)) == 1
        else:
            whole = tensors(tmp_path / f"{method}-0")
            before = tensors(base)
            for number in (2, 3):
                for name, tensor in tensors(tmp_path / f"{method}-{number}").items():
                    assert (tensor - whole[name]).norm() / (whole[name] - before[name]).norm() < 1e-4, name


# the other files


def test_small_files(tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """generation config, tokenizer and code of the base; the recipe verbatim; a report without absolute paths."""
    monkeypatch.chdir(tmp_path)
    auto_map = {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    base, a = llama("base", config=auto_map), llama("a")
    for name, text in (("generation_config.json", "{}"), ("tokenizer.json", "{}"), ("configuration_x.py", "x = 1\n")):
        (base / name).write_text(text)
    (a / "generation_config.json").write_text('{"of": "a"}')
    (a / "training_args.bin").write_bytes(b"")
    (base / "notes.txt").write_text("")
    text = "# a comment\nmerge_method: yeam\nbase_model: base\nmodels:\n"
    text += "- model: a\n- model: ./a\n  parameters: {weight: 2}\n"
    Path("recipe.yaml").write_text(text)
    report = yeam.merge("recipe.yaml", "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "configuration_x.py", "generation_config.json", "model.safetensors",
        "tokenizer.json", "yeam_config.yaml", "yeam_report.json",
    ]  # fmt: skip
    assert (out / "yeam_config.yaml").read_text() == text and (out / "generation_config.json").read_text() == "{}"
    written = json.loads((out / "yeam_report.json").read_text())
    assert str(tmp_path) not in (out / "yeam_report.json").read_text() + (out / "README.md").read_text()
    assert written["models"] == ["a", "base"] and written["out"] == "out" and report.out == out
    assert written["totals"]["tensors"] == len(written["tensors"]) == len(llama_tensors())
    assert written["totals"]["shards"] == 1 and written["versions"]["torch"] == torch.__version__
    entry = next(tensor for tensor in written["tensors"] if tensor["name"] == UP)
    assert entry["sources"] == [f"a: {UP}", f"a: {UP}"] and entry["base"] == f"base: {UP}"
    assert entry["method"] == "yeam" and entry["role"] == "up" and entry["layer"] == 1
    value = tensors(out)[UP]
    assert entry["norm"] == pytest.approx(float(value.norm()), rel=1e-5)
    update = tensors(a)[UP] - tensors(base)[UP]
    assert entry["update"]["update_norms"] == pytest.approx([float(update.norm()), 2 * float(update.norm())], rel=1e-5)
    assert 0 < written["totals"]["mean_agreement"] <= 1 and written["totals"]["relative_change"] > 0


def test_model_card(tmp_path: Path, llama: Llama) -> None:
    """Front matter that the Hub reads; a hostile name brings no markup of its own."""
    import yaml

    bad = tmp_path / "x`](http:b)<script>*"
    llama("plain").rename(bad)
    recipe = {"merge_method": "linear", "models": entries(bad, weight=1)}
    yeam.merge(recipe, tmp_path / "out <b>bold")
    card = (tmp_path / "out <b>bold" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "yeam"]}
    before, fence, _ = body.partition("```yaml")
    assert fence and "<b>" not in before and "# out &lt;b&gt;" in before
    listed = next(line for line in before.splitlines() if line.startswith("| `"))
    assert listed.endswith(" of 21 |") and listed.count("`") == 2 and listed.replace("\\|", "").count("|") == 4
