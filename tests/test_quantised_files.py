"""Quantised models: float8 with scales reads as the numbers it stands for, packed integers are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import whole
from safetensors.torch import save_file

from yeam.checkpoint import Checkpoint, open_checkpoint
from yeam.errors import CheckpointError


def quantised(folder: Path, settings: dict[str, Any] | None, **tensors: torch.Tensor) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"hidden_size": 8, "dtype": "float16"} | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(str(folder))


def float8(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).mul(50).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("shape", "scale", "settings", "expand"),
    [
        ((300, 200), (3, 2), {"quant_method": "fp8"}, (128, 128)),
        ((10, 7), (5, 3), {"quant_method": "fp8", "weight_block_size": [2, 3]}, (2, 3)),
        ((3, 10, 7), (3, 5, 3), {"quant_method": "fp8", "weight_block_size": [2, 3]}, (2, 3)),
        ((6, 8), (), {"quant_method": "fp8", "weight_block_size": None}, (6, 8)),
        ((6, 8), (1,), {"quant_method": "modelopt"}, (6, 8)),
        ((6, 8), (6, 1), {"quant_method": "fbgemm_fp8"}, (1, 8)),
        ((6, 8), (6,), {"quant_method": "compressed-tensors"}, (1, 8)),
        ((6, 8), (6, 2), {"config_groups": {"g": {"weights": {"group_size": 4}}}}, (1, 4)),
        ((6, 8), (3, 2), {"config_groups": {"g": {"weights": {"block_structure": "2x4"}}}}, (2, 4)),
        ((3, 4, 6), (3, 1, 6), {"quant_method": "fbgemm_fp8"}, (4, 1)),
        ((3, 4, 6), (3,), None, (4, 6)),
    ],
)
def test_float8_scales(shape: Any, scale: Any, settings: Any, expand: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, scales = float8(*shape), torch.rand(scale) + 0.5
    spread = scales.reshape(*scale, *(1,) * (len(shape) - len(scale))) if scale != (1,) else scales.view(1, 1)
    spread = spread.repeat_interleave(expand[0], -2).repeat_interleave(expand[1], -1)[..., : shape[-2], : shape[-1]]
    expected = weight.float() * spread
    suffix = "weight_scale_inv" if settings and settings.get("quant_method") == "fp8" else "weight_scale"
    checkpoint = quantised(
        tmp_path / "m", settings, **{
            "l.weight": weight, f"l.{suffix}": scales, "l.bias": torch.ones(3), "plain": weight.clone(),
            "l.input_scale": torch.ones(()), "learned.scale": torch.ones(4),
        },
    )  # fmt: skip
    assert set(checkpoint.tensors) == {"l.weight", "l.bias", "plain", "learned.scale"}
    assert checkpoint.tensors["l.weight"].dtype == "F32" and checkpoint.tensors["plain"].dtype == "F8_E4M3"
    assert checkpoint.natural_dtype("l.weight") == "F16" and checkpoint.extent("l.weight") is None
    assert checkpoint.config == {"hidden_size": 8, "dtype": "float16"}
    assert any("'l.input_scale'" in note for note in checkpoint.notes)
    torch.testing.assert_close(whole(checkpoint, "l.weight"), expected, rtol=0, atol=0)
    assert whole(checkpoint, "plain").view(torch.uint8).equal(weight.view(torch.uint8))
    row, rows = shape[-1], expected.numel() // shape[-1]
    for first, last in [(0, 1), (1, rows), (rows // 2, rows), (rows - 1, rows)]:
        part = checkpoint.read("l.weight", first * row, last * row, torch.empty(expected.nbytes, dtype=torch.uint8))
        torch.testing.assert_close(part.view(-1, row), expected.view(-1, row)[first:last], rtol=0, atol=0)


def test_power_of_two_scales(tmp_path: Path) -> None:
    """DeepSeek's newer checkpoints store scales as float8 exponents."""
    weight, exponents = float8(4, 4), torch.tensor([[126, 127], [128, 130]], dtype=torch.uint8)
    scales = {"l.weight": weight, "l.weight_scale_inv": exponents.view(torch.float8_e8m0fnu)}
    checkpoint = quantised(tmp_path / "m", {"quant_method": "fp8", "weight_block_size": [2, 2]}, **scales)
    spread = torch.tensor([[0.5, 1.0], [2.0, 8.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert whole(checkpoint, "l.weight").equal(weight.float() * spread)


def test_float8_scale_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'l.weight_scale' of shape \[3, 2\] does not fit .*\[8, 8\]"):
        quantised(tmp_path / "m", None, **{"l.weight": float8(8, 8), "l.weight_scale": torch.ones(3, 2)})


INTEGERS = torch.ones(2, 2, dtype=torch.int32)
PACKED: dict[str, dict[str, torch.Tensor]] = {
    "GPTQ": {
        "l.qweight": INTEGERS,
        "l.qzeros": INTEGERS.clone(),
        "l.scales": torch.ones(2),
        "l.g_idx": INTEGERS.clone(),
    },
    "AWQ": {"l.qweight": INTEGERS, "l.qzeros": INTEGERS.clone(), "l.scales": torch.ones(2)},
    "bitsandbytes": {
        "l.weight": INTEGERS.byte(),
        "l.weight.absmax": torch.ones(2),
        "l.weight.quant_map": torch.ones(2),
    },
    "packed integers": {"l.weight_packed": INTEGERS, "l.weight_scale": torch.ones(2)},
    "mxfp4": {"e.down_proj_blocks": INTEGERS.byte(), "e.down_proj_scales": INTEGERS.byte().clone()},
    "nvfp4": {"l.weight": INTEGERS.byte(), "l.weight_scale": float8(2), "l.weight_scale_2": torch.ones(())},
    "integers with scales": {"l.weight": INTEGERS.to(torch.int8), "l.weight_scale": torch.ones(2, 1)},
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_quantisation_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"quantised as .*{kind}.*quant_method 'xyz'.*\n.*dequantise"):
        quantised(tmp_path / "m", {"quant_method": "xyz"}, **PACKED[kind])


def test_stale_quantisation_config_is_dropped(tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes"}
    checkpoint = quantised(tmp_path / "m", settings, w=torch.ones(2), absmax=torch.ones(2, dtype=torch.uint8))
    assert "quantization_config" not in checkpoint.config and checkpoint.notes
    assert set(checkpoint.tensors) == {"w", "absmax"}
