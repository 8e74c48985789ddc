"""Readers of local files: safetensors, PyTorch, float8 with scales; every malformed input is one clear error."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment
from safetensors.torch import save_file, save_model
from transformers import AutoModelForCausalLM, LlamaConfig

from yeam.checkpoint import Checkpoint, open_checkpoint
from yeam.checkpoint.dtypes import DTYPES
from yeam.checkpoint.files import Descriptors
from yeam.checkpoint.header import read_header
from yeam.errors import CheckpointError


def whole(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    info = checkpoint.tensors[name]
    return checkpoint.read(name, 0, info.numel).view(info.shape)


def craft(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file from a header (an object, or the JSON's bytes) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- headers ---------------------------------------------------------------------------------------------------------

BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not json": (b"{nonsense", b"", "not JSON"),
    "deep json": (b"[" * 100_000, b"", "not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "UTF-8"),
    "not an object": (b"[]", b"", "JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"x", "'a' twice"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234", "'a' lacks"),
    "unknown dtype": ({"a": entry(0, 4, [1], "BF17")}, b"1234", "BF17.*did you mean 'BF16'"),
    "four bits": ({"a": entry(0, 4, [8], "F4")}, b"1234", "'a' is stored as F4"),
    "negative": ({"a": entry(0, 4, [-1])}, b"1234", "'a' has an impossible shape"),
    "true": ({"a": entry(0, 4, [True])}, b"1234", "'a' has an impossible shape"),
    "absurd": ({"a": entry(0, 4, [1 << 40, 1 << 40])}, b"1234", "'a' has an impossible shape"),
    "wrong size": ({"a": entry(0, 4, [2])}, b"1234", "'a' of shape .* needs 8 bytes"),
    "backwards": ({"a": entry(4, 0, [1])}, b"1234", "'a' has impossible offsets"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"x" * 12, "'b' overlaps"),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"x" * 12, "4 bytes before tensor 'b'.*hole"),
    "out of range": ({"a": entry(0, 8, [2])}, b"1234", "'a' ends at .*truncated"),
    "left over": ({"a": entry(0, 4, [1])}, b"12345", "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(case: str, tmp_path: Path) -> None:
    header, data, message = BAD_HEADERS[case]
    path = craft(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(tmp_path))
    assert str(path) in caught.value.message and caught.value.remedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"1234567", "truncated: 7 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "claims 1000 bytes but the file ends after 10"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "over the limit"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_bad_lengths(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


# --- safetensors -----------------------------------------------------------------------------------------------------


def test_every_dtype_shape_and_range(tmp_path: Path) -> None:
    """What safetensors wrote is read bit by bit, whole and by ranges, also where data begins at an odd byte."""
    torch.manual_seed(0)
    tensors = {}
    for code, dtype in DTYPES.items():
        raw = torch.randint(0, 2 if code == "BOOL" else 256, (5 * 3 * dtype.itemsize,), dtype=torch.uint8)
        tensors[code] = raw.view(dtype.torch).view(5, 3)
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "cube": torch.randn(2, 3, 4)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "x": "\N{SNOWMAN}"})
    checkpoint = open_checkpoint(str(tmp_path))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    for name, tensor in tensors.items():
        expected = tensor.reshape(-1).view(torch.uint8).tolist()
        size, extent = tensor.element_size(), checkpoint.extent(name)
        assert extent is not None and extent.path.read_bytes()[extent.offset :][: extent.nbytes] == bytes(expected)
        assert whole(checkpoint, name).dtype == tensor.dtype
        assert whole(checkpoint, name).reshape(-1).view(torch.uint8).tolist() == expected
        for start, stop in [(0, 0), (0, 1), (tensor.numel() // 2, tensor.numel())]:
            if stop <= tensor.numel():
                buffer = torch.zeros(tensor.nbytes + 9, dtype=torch.uint8)
                part = checkpoint.read(name, start, stop, buffer)
                assert part.data_ptr() == buffer.data_ptr() or stop == start
                assert part.view(torch.uint8).tolist() == expected[start * size : stop * size]
    checkpoint.close()
    assert whole(checkpoint, "cube").equal(tensors["cube"])

    odd = {"a": entry(0, 3, [3], "U8"), "b": entry(3, 19, [2], "F64"), "c": entry(19, 19, [0]), "d": entry(19, 23, [])}
    values = torch.tensor([1.5, -2.0], dtype=torch.float64)
    data = b"\1\2\3" + values.numpy().tobytes() + torch.tensor(7.0).numpy().tobytes()
    loose = open_checkpoint(str(craft(tmp_path / "x.safetensors", odd, data)))
    assert whole(loose, "b").equal(values) and whole(loose, "d").item() == 7 and loose.tensors["d"].shape == ()
    misaligned = torch.zeros(40, dtype=torch.uint8)[1:]
    assert loose.read("b", 0, 2, misaligned).equal(values)
    with pytest.raises(ValueError, match="16 are needed"):
        loose.read("b", 0, 2, torch.zeros(15, dtype=torch.uint8))


def test_threads_read_more_files_than_stay_open(tmp_path: Path) -> None:
    weight_map = {}
    for shard in range(40):
        name = f"model-{shard:05}.safetensors"
        save_file({f"w{shard}": torch.full((64, 8), float(shard))}, tmp_path / name)
        weight_map[f"w{shard}"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(str(tmp_path))

    def sums(seed: int) -> bool:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        return all(checkpoint.read(f"w{i}", 8 * (i % 9), 512).eq(i).all() for i in order)

    gc.collect()  # files of earlier tests close now or not at all
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(sums, range(16)))
    assert len(os.listdir("/proc/self/fd")) - before <= 32
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_in_use_stay_open(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    files = Descriptors(limit=1)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with files.borrow(paths[0], 1) as first:
        for path in paths[1:]:
            with files.borrow(path, 1) as fd:
                assert os.read(fd, 1) == path.name.encode()
        files.close()
        assert os.read(first, 1) == b"a"
    assert len(os.listdir("/proc/self/fd")) == before + 1
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_changes_under_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    checkpoint, stamp = open_checkpoint(str(tmp_path)), open_checkpoint(str(tmp_path)).fingerprint()
    assert checkpoint.fingerprint() == stamp
    os.utime(path, ns=(1, 1))
    assert checkpoint.fingerprint() != stamp
    assert checkpoint.read("w", 0, 1000).sum() == 1000
    os.truncate(path, 2000)
    assert checkpoint.read("w", 0, 100).sum() == 100
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'w': the file ends \d+ bytes too early"):
        checkpoint.read("w", 0, 1000)
    with pytest.raises(CheckpointError, match="has 2000 bytes now"):
        checkpoint.close()
        checkpoint.read("w", 0, 100)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.read("w", 0, 100)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    index(folder, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    return folder


def index(folder: Path, **weight_map: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_index(sharded: Path, tmp_path: Path) -> None:
    assert open_checkpoint(str(sharded)).notes == []
    index(sharded, a=ONE)
    (sharded / "link").symlink_to(sharded / TWO)
    index(sharded, a=ONE, b="link")
    assert set(open_checkpoint(str(sharded)).tensors) == {"a", "b"}
    save_file({"a": torch.ones(2), "extra": torch.ones(1)}, sharded / ONE)
    checkpoint = open_checkpoint(str(sharded))
    assert set(checkpoint.tensors) == {"a", "b", "extra"} and "does not list 'extra'" in checkpoint.notes[0]
    (sharded / "link").unlink()
    (sharded / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(str(sharded)).tensors) == {"a", "b", "extra"}
    save_file({"only": torch.ones(2)}, sharded / "model.safetensors")
    assert set(open_checkpoint(str(sharded)).tensors) == {"only"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "b": "gone.safetensors"}, "gone.safetensors, which is not in"),
        ({"a": "../sharded/" + ONE, "b": TWO}, "'../sharded/.*not a plain file name"),
        ({"a": "/etc/passwd", "b": TWO}, "'/etc/passwd'"),
        ({"a": "..", "b": TWO}, r"'\.\.'"),
        ({"a": ONE, "b": ONE}, "places 'b' in model-00001-of-00002.safetensors, which does not hold it"),
        ({"a": 1}, "has no `weight_map`"),
    ],
)
def test_bad_index(weight_map: dict[str, Any], message: str, sharded: Path) -> None:
    index(sharded, **weight_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(sharded))
    assert "model.safetensors.index.json" in caught.value.message


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, sharded / TWO)
    with pytest.raises(CheckpointError, match=f"'a' is in two files, {ONE} and {TWO}"):
        open_checkpoint(str(sharded))


def test_aliases_of_save_model(tmp_path: Path) -> None:
    """`safetensors.torch.save_model` keeps one of two shared tensors and names the other in the metadata."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 2), "head": torch.nn.Linear(2, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    checkpoint = open_checkpoint(str(tmp_path))
    assert set(checkpoint.tensors) | set(checkpoint.aliases) == {"embed.weight", "head.weight"}
    assert set(checkpoint.aliases.values()) == set(checkpoint.tensors)


def test_opening_imports_no_torch(sharded: Path) -> None:
    code = (
        "import sys; from yeam.checkpoint import open_checkpoint; "
        f"c = open_checkpoint({str(sharded)!r}); c.extent('a'), c.fingerprint(), c.resident_bytes('a'); "
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def test_transformers_saves_bin_with_ties(tmp_path: Path) -> None:
    """A tied model saved as one `.bin` and as shards, and its config: equal tensors, the head an alias."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    one = open_checkpoint(str(tmp_path))
    assert one.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert one.config["hidden_size"] == 16
    stamp = one.fingerprint()

    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for position, (name, tensor) in enumerate(state.items()):
        shards[position % 2][name] = tensor.clone()
    weight_map = {name: f"pytorch_model-{i}.bin" for i, shard in enumerate(shards) for name in shard}
    for i, shard in enumerate(shards):
        torch.save(shard, tmp_path / f"pytorch_model-{i}.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    two = open_checkpoint(str(tmp_path))
    assert set(two.tensors) == set(state) and not two.aliases
    for name, tensor in state.items():
        assert whole(one, one.aliases.get(name, name)).equal(tensor) and whole(two, name).equal(tensor)
    assert two.fingerprint() != stamp
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {**weight_map, "ghost": "pytorch_model-0.bin"}})
    )
    with pytest.raises(CheckpointError, match=r"places 'ghost' in pytorch_model-0.bin"):
        open_checkpoint(str(tmp_path))


def test_nested_strided_and_foreign_entries(tmp_path: Path) -> None:
    big = torch.randn(6, 5, 4)
    tensors = {
        "p": torch.nn.Parameter(torch.randn(3, 2)), "t": big.permute(2, 0, 1), "s": big[1:4, 2], "f": big[0].bfloat16(),
        "scalar": torch.tensor(2), "e": torch.empty(0, 3), "z": torch.ones(1).expand(4, 3),
    }  # fmt: skip
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {**tensors, "step": 3}, "epoch": 1, "optimizer": {"x": torch.ones(3)}}, path)
    checkpoint = open_checkpoint(str(path))
    assert set(checkpoint.tensors) == set(tensors)
    assert "'epoch', 'optimizer', 'step'" in checkpoint.notes[0]
    for name, tensor in tensors.items():
        assert whole(checkpoint, name).equal(tensor.detach())
        row = tensor.shape[-1] if tensor.dim() else 1
        for start in range(0, tensor.numel(), row):
            stop = min(tensor.numel(), start + 2 * row)
            part = checkpoint.read(name, start, stop, torch.empty(1000, dtype=torch.uint8))
            assert part.equal(tensor.detach().reshape(-1)[start:stop])


class _Touch:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_malicious_pickle_is_refused(tmp_path: Path) -> None:
    victim, path = tmp_path / "created", tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2), "x": _Touch(str(victim))}, path)
    with pytest.raises(CheckpointError, match=r"refused.*posix.system.*nothing was executed") as caught:
        open_checkpoint(str(tmp_path))
    assert str(path) in caught.value.message and caught.value.remedy
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the same file does create it where nobody cares
    assert victim.exists()


def test_bad_pytorch_files(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"not in PyTorch's zip format.*\n.*torch.save"):
        open_checkpoint(str(path))
    torch.save({"w": torch.ones(2000)}, path)
    os.truncate(path, 4000)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(str(path))
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        open_checkpoint(str(path))
    torch.save({"w": torch.ones(2).to_sparse()}, path)
    with pytest.raises(CheckpointError, match="'w' is sparse"):
        open_checkpoint(str(path))
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, path)
    with pytest.raises(CheckpointError, match=r"'w' has the dtype torch.complex128"):
        open_checkpoint(str(path))


# --- float8 ----------------------------------------------------------------------------------------------------------


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


# --- opening ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    def error(path: str | Path, **more: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(str(path), **more)
        assert caught.value.remedy
        return str(caught.value)

    model = tmp_path / "my-model"
    model.mkdir()
    assert "is empty" in error(model)
    assert f"did you mean {model}" in error(tmp_path / "my-modle")
    assert "owner/name" in error("bert")
    (model / "README.md").write_text("x")
    assert "holds no weights" in error(model)
    (model / "model.gguf").write_text("x")
    assert "GGUF" in error(model) and "GGUF" in error(model / "model.gguf")
    assert "not a weight file" in error(model / "README.md")
    save_file({"a": torch.ones(1)}, model / "one.safetensors")
    assert open_checkpoint(str(model)).config == {}
    assert "no revisions" in error(model, revision="main")
    assert "no adapter_config.json" in error(model, lora=(str(model), None))
    save_file({"a": torch.ones(1)}, model / "two.safetensors")
    assert "'one.safetensors', 'two.safetensors'" in error(model)
    (model / "two.safetensors").rename(model / "x-00001-of-00003.safetensors")
    (model / "one.safetensors").unlink()
    assert "nor all shards" in error(model)
    (model / "x-00001-of-00003.safetensors").rename(model / "model.safetensors")
    (model / "config.json").write_text("{bad")
    assert f"{model}/config.json: is not valid JSON" in error(model)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": torch.ones(1)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    assert f"org/base+{adapter}" in error(adapter)


def test_reference_is_what_the_user_wrote(sharded: Path) -> None:
    assert open_checkpoint(str(sharded)).reference == str(sharded)
    assert open_checkpoint(str(sharded), reference="mine").reference == "mine"
