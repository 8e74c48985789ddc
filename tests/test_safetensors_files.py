"""The reader of safetensors files: every dtype, shape and range bit by bit; malformed headers; files that change."""

from __future__ import annotations

import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import whole
from safetensors.torch import save_file, save_model

from yeam.checkpoint import open_checkpoint
from yeam.checkpoint.dtypes import DTYPES
from yeam.checkpoint.files import Descriptors
from yeam.checkpoint.header import read_header
from yeam.errors import CheckpointError


def craft(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file from a header (an object, or the JSON's bytes) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not json": (b"{nonsense", b"", "not JSON"),
    "deep json": (b"[" * 100_000, b"", "not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "UTF-8"),
    "not an object": (b"[]", b"", "JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"x", "'a' twice"),
    "half a character": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x", "cannot be printed"),
    "escape": ({"a\x1b]0;b": entry(0, 4, [1])}, b"1234", "cannot be printed"),
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
    assert checkpoint.read("w", 0, 1000).sum() == 1000
    os.utime(path, ns=(1, 1))
    assert checkpoint.fingerprint() != stamp
    checkpoint.close()
    with pytest.raises(CheckpointError, match=r"model.safetensors: was replaced or written to"):
        checkpoint.read("w", 0, 1000)
    checkpoint = open_checkpoint(str(tmp_path))
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


def test_aliases_of_save_model(tmp_path: Path) -> None:
    """`safetensors.torch.save_model` keeps one of two shared tensors and names the other in the metadata."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 2), "head": torch.nn.Linear(2, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    checkpoint = open_checkpoint(str(tmp_path))
    assert set(checkpoint.tensors) | set(checkpoint.aliases) == {"embed.weight", "head.weight"}
    assert set(checkpoint.aliases.values()) == set(checkpoint.tensors)
