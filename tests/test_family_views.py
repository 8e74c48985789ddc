"""Views: fused and packed tensors split into the parts that their module computes with, and join bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_models import Saved, save, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from yeam.errors import CheckpointError
from yeam.families import View
from yeam.families.layouts import view_of

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
