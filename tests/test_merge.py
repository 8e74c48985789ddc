"""Whole merges of real transformers models: what is written loads, and equals a merge done in memory with torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers as tf
from conftest import UP, Llama, save_model
from merge_models import AUTO, CONFIGS, Tensors, build, close, entries, load, logits, mean, merged, save, tensors

import yeam
from yeam.errors import ConfigError


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

    report = yeam.merge({"merge_method": "yeam", "base_model": base, "models": entries(a, b)}, tmp_path / "yeam")
    load(tmp_path / "yeam", auto)
    ours, x, y, z = (tensors(tmp_path / name) for name in ("yeam", "base", "a", "b"))
    embeddings = {tensor["name"] for tensor in report.tensors if tensor["role"] == "embedding"}
    turned = re.compile(r"\.c_\w+\.weight$" if family == "gpt2" else "$.")  # stored [in, out]
    plain = {
        name: reference.merge(
            x[name].double(), torch.stack([y[name] - x[name], z[name] - x[name]]).double(), depth=2,
            transposed=bool(turned.search(name)), embedding=name in embeddings,
        )
        .to(x[name].dtype)
        for name in x
    }  # fmt: skip
    assert ours.keys() == plain.keys()
    for name in plain:  # frames divide by small eigenvalues: float32 keeps five digits of the whole update
        error = (ours[name] - plain[name]).norm() / (y[name] - x[name]).norm()
        assert error < 1e-4, (name, error)


def test_stored_the_other_way(tmp_path: Path) -> None:
    """GPT-2's matrices, stored [in, out], come out as those of a model that stores the same ones [out, in]; rays that turn
    nothing, as their blocks of four lie along the rows of either."""
    found: list[Tensors] = []
    for is_turned in (False, True):
        folders = []
        for seed in (1, 2, 3):
            own = tensors(save(build(CONFIGS["gpt2"](), seed), tmp_path / f"{seed}"))
            if is_turned:
                own = {n: x.T.contiguous() if re.search(r"\.c_\w+\.weight$", n) else x for n, x in own.items()}
            config = {"model_type": "nobody-knows"} if is_turned else CONFIGS["gpt2"]().to_dict()
            folders.append(save_model(tmp_path / f"{seed}-{is_turned}", own, config))
        keys = {"base_model": str(folders[0]), "parameters": {"softness": 1e7}}
        found.append(merged(tmp_path / f"out-{is_turned}", "yeam", entries(*folders[1:]), **keys))
    base = tensors(tmp_path / "1")
    for name, x in found[0].items():
        other = found[1][name].T if re.search(r"\.c_\w+\.weight$", name) else found[1][name]
        assert (x - other).norm() / (x - base[name]).norm() < 1e-4, name


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
            n: reference.merge(
                x[n],
                torch.stack([0.5 * (y[n] - x[n]), z[n] - x[n]]),
                lam=strength(n),
                depth=3,
                embedding="embed_tokens" in n,
                **options,
            )
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
