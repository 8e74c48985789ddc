"""Small tensors that are merged as if they were one: the bytes, the report and the journal are those of one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Llama, same_output
from safetensors.torch import load_file, save_file

import yeam
from yeam.checkpoint import open_checkpoint
from yeam.checkpoint.base import Checkpoint
from yeam.compiled import Array
from yeam.engine import bundle
from yeam.engine import run as engine
from yeam.errors import CheckpointError
from yeam.methods import registry
from yeam.methods.inputs import Inputs
from yeam.planning.jobs import Job

Recipe = Callable[..., Path]


@pytest.fixture
def bundled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every model counts as one of many tensors; the sizes of the bundles that were computed."""
    found: list[int] = []
    computed = bundle.computed

    def noted(jobs: Sequence[Job], *arguments: Any, **options: Any) -> Any:
        result = computed(jobs, *arguments, **options)
        found.append(len(jobs) if result is not None else 0)
        return result

    monkeypatch.setattr(engine, "MANY", 1)
    monkeypatch.setattr(engine, "computed", noted)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_the_output_is_that_of_one_by_one(
    method: str, dtype: torch.dtype, tmp_path: Path, llama: Llama, recipe: Recipe, bundled: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of models in several files, in other files than the output, with other weights in every layer and tensors of odd lengths."""
    kind: dict[str, Any] = {"layers": 6, "hidden": 22, "dtype": dtype}
    models = [llama("a", shards=3, **kind), llama("b", **kind), llama("c", shards=2, **kind)]
    keys: dict[str, Any] = {"merge_method": method, "parameters": {"weight": [0.25, 0.25, 1.0, 0.5]}}
    keys |= {"base_model": models[2]} if method == "task_arithmetic" else {}
    config = recipe(*models, **keys)
    yeam.merge(config, tmp_path / "together" / "out", shard_size=20_000)
    assert sum(bundled) > 30 and max(bundled) > 4
    monkeypatch.setattr(engine, "MANY", 1 << 30)
    bundled.clear()
    yeam.merge(config, tmp_path / "alone" / "out", shard_size=20_000)
    assert not bundled
    same_output(tmp_path / "together" / "out", tmp_path / "alone" / "out")


def test_a_run_that_is_stopped_goes_on_with_other_neighbours(
    tmp_path: Path, llama: Llama, recipe: Recipe, bundled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal says is finished is there, a tensor of a bundle like any other."""
    config = recipe(llama("a", layers=4), llama("b", layers=4))
    yeam.merge(config, tmp_path / "whole" / "out")
    monkeypatch.setattr(bundle, "MOST", 7)
    out = tmp_path / "stopped" / "out"

    def stop(event: Any) -> None:
        if event.tensors == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        yeam.merge(config, out, progress=stop)
    journal = [json.loads(line) for line in (out.parent / "out.partial" / "journal.jsonl").read_text().splitlines()]
    done = [entry["tensor"] for entry in journal if "tensor" in entry]
    assert len(done) >= 10  # the lane may have gone on meanwhile
    journal_file = out.parent / "out.partial" / "journal.jsonl"
    lines = journal_file.read_bytes().splitlines(keepends=True)
    journal_file.write_bytes(b"".join(lines[:5]) + lines[5][:9])  # as a kill in the middle of the write leaves it
    monkeypatch.setattr(bundle, "MOST", 512)
    report = yeam.merge(config, out)
    assert report.resumed == sum("tensor" in json.loads(line) for line in lines[:5])
    same_output(tmp_path / "whole" / "out", out)


def test_nan_is_blamed_on_its_tensor(tmp_path: Path, llama: Llama, recipe: Recipe, bundled: list[int]) -> None:
    a, b = llama("a", layers=4), llama("b", layers=4)
    tensors = load_file(b / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name][1, 3] = float("nan")
    save_file(tensors, b / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"b: {name} holds nan"):
        yeam.merge(recipe(a, b), tmp_path / "out")
    report = yeam.merge(recipe(a, b), tmp_path / "out", allow_nan=True)
    assert max(bundled) > 4
    (entry,) = [entry for entry in report.tensors if entry["name"] == name]
    assert np.isnan(entry["norm"])
    assert sum(np.isnan(entry["norm"]) for entry in report.tensors) == 1


def test_a_method_that_notes_facts_has_its_tensors_one_by_one(
    tmp_path: Path, llama: Llama, recipe: Recipe, bundled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry.methods()))

    @registry.merge_method("noting", base="unused", needs=registry.Whole, tensors=False, elementwise=True)
    def noting(inputs: Inputs) -> Iterator[Array]:
        """The first model, in half."""
        from yeam.methods.gram import combined

        inputs.record(seen=inputs.name)
        yield from combined(inputs, [0.5, 0.0])  # type: ignore[misc]

    report = yeam.merge(recipe(llama("a"), llama("b"), merge_method="noting"), tmp_path / "out")
    assert bundled and not any(bundled)
    assert all(entry["update"] == {"seen": entry["name"]} for entry in report.tensors)


def test_neighbours_are_read_together(tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their order and files, `read_all` gives what they hold one after the other."""
    folder = llama("a", layers=3, shards=2)
    calls: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        return preadv(fd, buffers, offset)

    checkpoint = open_checkpoint(str(folder))
    names = list(checkpoint.tensors)
    monkeypatch.setattr(os, "preadv", counted)
    for order, runs in ((names, 2), (names[::-1], len(names)), ([*names[3:6], names[0], *names[1:3]], 2), ([], 0)):
        wanted = np.empty(sum(checkpoint.tensors[name].nbytes for name in order), np.uint8)
        Checkpoint.read_all(checkpoint, order, wanted)
        found = np.zeros_like(wanted)
        calls.clear()
        checkpoint.read_all(order, found)
        assert len(calls) == runs and (found == wanted).all()
    path = next(folder.glob("*-00002-*.safetensors"))
    os.truncate(path, path.stat().st_size - 8)
    checkpoint.close()
    with pytest.raises(CheckpointError, match=path.name):
        checkpoint.read_all(names, np.empty(sum(info.nbytes for info in checkpoint.tensors.values()), np.uint8))
    checkpoint.close()
