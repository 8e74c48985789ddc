"""A merge that was killed, interrupted or disturbed goes on to the same bytes, or says why not."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
from conftest import WEIGHTS, Q, same_output, save_model, snapshot
from safetensors.torch import load_file
from unfinished import Stop, entries, interrupted, killer

import yeam
from yeam.engine.journal import Journal, begins
from yeam.engine.output import Output

SLOW = '''
import itertools
import signal
import time
from dataclasses import replace
from pathlib import Path

import yeam

WAIT = Path("wait")
turns = itertools.count(1)  # next() is atomic: several lanes call


def interrupted(number, frame):
    WAIT.unlink(missing_ok=True)
    signal.default_int_handler(number, frame)


signal.signal(signal.SIGINT, interrupted)


@yeam.merge_method("slow_average", base="unused", needs=yeam.Whole)
def slow_average(inputs):
    """The average; after as many tensors as the file `wait` says it waits amid one until the file is gone."""
    turn = next(turns)
    stop = WAIT.exists() and turn > int(WAIT.read_text())
    for tile in inputs.tiles():
        mean_T = tile.sources_KT.mean(0)
        half = len(mean_T) // 2
        yield mean_T[:half]
        while stop and WAIT.exists():
            time.sleep(0.05)
        yield mean_T[half:]


@yeam.plugin("slow")
def slow(plan):
    return replace(plan, jobs=tuple(replace(job, method="slow_average", parameters={}) for job in plan.jobs))
'''
PATIENCE = 300  # seconds; the machine may be busy


@pytest.fixture
def slowly(tmp_path, tmp_path_factory, llama, recipe) -> Callable[..., forked.Running]:
    """Starts `yeam merge` in a process that does `fast` tensors and then waits to be killed or interrupted."""
    (tmp_path / "slow_merge.py").write_text(SLOW)
    path = recipe(llama("a"), llama("b", shards=2), plugins=["slow_merge:slow"], shard_size=8000)

    def start(out: Path, *options: str, fast: int = 1000) -> forked.Running:
        (tmp_path / "wait").write_text(str(fast))
        return forked.begun(["merge", path, out, *options], tmp_path, tmp_path_factory.mktemp("said"))

    return start


def await_entries(running: forked.Running, out: Path, count: int) -> None:
    """Wait until the journal holds `count` finished tensors."""
    deadline = time.monotonic() + PATIENCE
    while entries(out) < count:
        assert running.process.exitcode is None, running.ended()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_and_a_second_process(slowly, recipe, refused, tmp_path):
    out = tmp_path / "out"
    first = slowly(out, "--json", fast=3)
    await_entries(first, out, 1)
    for options in ([], ["--no-resume"], ["--overwrite"]):
        other = recipe(tmp_path / "a", file="other.yaml")
        refused(["merge", other, out, *options], "another yeam process is writing", str(out))
    assert first.process.exitcode is None and first.process.pid is not None
    os.kill(first.process.pid, signal.SIGINT)
    done = first.ended()
    assert done.returncode == 130
    assert done.stderr == "error: interrupted\n  run the same command again to continue\n"
    assert json.loads(done.stdout)["status"] == 130
    assert not out.exists()
    finished = entries(out)
    assert 1 <= finished < 21

    again = slowly(out).ended()
    assert again.returncode == 0 and again.stdout == ""
    assert f"21 tensors, {finished} of them kept" in again.stderr
    assert out.is_dir() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("torn", [b'{"tensor": "lm_head.wei', b"\0\0\0\0\n", b"{}}\n{}\n", b"17\n", b"\xff\xfe\n"])
def test_torn_journal(torn, pair, tmp_path):
    yeam.merge(pair, tmp_path / "whole" / "out")
    out = tmp_path / "out"
    finished = interrupted(pair, out)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == finished + 2
    journal.write_bytes(b"".join(lines[:4]) + torn)
    resumed = interrupted(pair, out, count=21)  # and the journal goes on behind what was cut off
    assert resumed == 21
    assert yeam.merge(pair, out).resumed == 21
    same_output(out, tmp_path / "whole" / "out")


def test_a_journal_begins_with_a_plan_at_every_moment(tmp_path, monkeypatch):
    """Also of a run that is killed while it begins another plan's journal anew."""
    path = tmp_path / "journal.jsonl"
    for count in itertools.count():
        path.write_text('{"plan": "old"}\n{"tile": 4}\n')
        journal, calls = Journal(path), iter(range(count))
        with monkeypatch.context() as patch, contextlib.suppress(Stop):
            for name in ("write", "ftruncate"):
                patch.setattr(os, name, killer(calls, getattr(os, name)))
            journal.restart("new and longer")
            break
        assert begins(path.read_bytes()), count
    journal.append({"tensor": "x"})
    assert path.read_text() == '{"plan": "new and longer"}\n{"tensor": "x"}\n'


def test_damaged_while_it_waited(pair, tmp_path):
    """Finished tensors whose bytes changed, and shards that were cut off or removed, are made again."""
    expected = tmp_path / "whole" / "out"
    yeam.merge(pair, expected)
    out = tmp_path / "out"
    shard = tmp_path / "out.partial" / "model" / WEIGHTS
    plan = yeam.plan(pair)

    finished = interrupted(pair, out, count=21)
    assert finished == 21
    damaged = next(job for job in plan.jobs if job.name == Q)
    with shard.open("r+b") as file:
        file.seek(damaged.begin + 40)
        file.write(b"\x7f\x7f")
    (shard.parent / "stray.txt").write_text("not of this merge")
    report = yeam.merge(pair, out)
    assert report.resumed == 20
    same_output(out, expected)

    shutil.rmtree(out)
    interrupted(pair, out, count=21)
    os.truncate(shard, damaged.begin)
    report = yeam.merge(pair, out)
    assert report.resumed == sum(job.end <= damaged.begin for job in plan.jobs)
    same_output(out, expected)

    shutil.rmtree(out)
    interrupted(pair, out, count=21)
    shard.unlink()
    assert yeam.merge(pair, out).resumed == 0
    same_output(out, expected)


def test_changed_since(llama, recipe, refused, tmp_path):
    """A merge that waits is not continued with other inputs, and not thrown away unasked."""
    a, b = llama("a"), llama("b")
    out = tmp_path / "out"
    old = save_model(out, {"old": torch.zeros(2)}, {"model_type": "llama"})
    before = snapshot(old)
    path = recipe(a, b)
    finished = interrupted(path, out, overwrite=True)
    refusal = ("belongs to another merge", str(tmp_path / "out.partial"), "--no-resume")

    path = recipe(a, b, parameters={"weight": [{"filter": "mlp", "value": 2.0}, {"value": 1.0}]})
    refused(["merge", path, out, "--overwrite"], *refusal, inputs=[a, b, old])
    path = recipe(a, b)
    refused(["merge", path, out, "--overwrite", "--shard-size", "5000"], *refusal, inputs=[a, b, old])
    llama("b", seed=77)
    refused(["merge", path, out, "--overwrite"], *refusal, inputs=[a, b, old])
    assert entries(out) == finished and snapshot(old) == before

    report = yeam.merge(path, out, overwrite=True, resume=False)
    assert report.resumed == 0
    merged = load_file(out / WEIGHTS)[Q]
    assert torch.equal(merged, (load_file(a / WEIGHTS)[Q] + load_file(b / WEIGHTS)[Q]) / 2)
    assert not (tmp_path / "out.partial").exists()


def test_other_merge_without_progress_is_replaced(llama, recipe, tmp_path):
    """What finished nothing is nothing to protect."""
    a, b = llama("a"), llama("b")
    out = tmp_path / "out"
    plan = yeam.plan(recipe(a, b), shard_size=3000)
    Output(plan, out).close()
    assert len(list((tmp_path / "out.partial" / "model").iterdir())) > 2
    yeam.merge(recipe(a, b), out)
    assert [path.name for path in out.glob("*.safetensors")] == [WEIGHTS]


def test_shard_removed_while_merging(pair, tmp_path):
    out = tmp_path / "out"

    def remove(event: object) -> None:
        (tmp_path / "out.partial" / "model" / WEIGHTS).unlink(missing_ok=True)

    with pytest.raises(yeam.YeamError, match=r"model\.safetensors was removed or replaced"):
        yeam.merge(pair, out, progress=remove)
    assert not out.exists()
    yeam.merge(pair, out)
