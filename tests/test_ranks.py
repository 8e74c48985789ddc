"""Several processes for one merge: the same bytes for any number of them, and what happens when one of them does not live."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import same_output
from disks import mount_alone
from hub_server import HubServer, Repository, point_at
from typer.testing import CliRunner

import yeam
from yeam.checkpoint import open_checkpoint
from yeam.cli.app import app
from yeam.engine import ranks
from yeam.engine.ranks_store import place_here
from yeam.engine.together import cost, shares
from yeam.planning.stages import Pipeline

KIND = {"hidden": 32, "layers": 6}


@pytest.fixture
def finish(tmp_path) -> Callable[..., list[str]]:
    """Wait for ranks that `forked.together` started, check their exit statuses; returns what each of them printed."""

    def wait(processes: Sequence[BaseProcess], *statuses: int) -> list[str]:
        for process in processes:
            process.join(120)
        said = [(tmp_path / f"log-{rank}").read_text() for rank in range(len(processes))]
        assert [process.exitcode for process in processes] == list(statuses), said
        return said

    return wait


def start(words: Sequence[object], count: int, folder: Path, **options: object) -> list[BaseProcess]:
    return forked.together(words, count, folder / "log", **options)


@pytest.fixture
def staged(llama, tmp_path) -> Path:
    """A recipe of three stages: one in memory, one in files, and a result whose coefficients are sums over whole models."""
    a, b, c = (str(llama(name, **KIND)) for name in "abc")
    documents = [
        {"name": "soup", "merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1.0}} for m in (a, b)]},
        {"name": "trimmed", "merge_method": "ties", "base_model": a, "parameters": {"weight": 1.0, "density": 0.5},
         "models": [{"model": "soup"}, {"model": b}]},
        {"merge_method": "metagpt", "base_model": a, "models": [{"model": "trimmed"}, {"model": c}]},
    ]  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text("\n---\n".join(json.dumps(document) for document in documents))
    return path


def test_same_bytes_for_any_number_of_processes(staged, finish, tmp_path):
    out = tmp_path / "together" / "out"
    expected = yeam.merge(staged, tmp_path / "alone" / "out")
    for count in (2, 3):
        said = finish(start(["merge", staged, out, "--json"], count, tmp_path), *[0] * count)
        assert json.loads(said[0])["totals"] == expected.totals
        assert said[1:] == [""] * (count - 1)
        same_output(out, tmp_path / "alone" / "out")
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        out.rename(tmp_path / f"of {count}")


@pytest.mark.parametrize("method", ["karcher", "tsv_m"])
def test_the_rest_of_a_merge_has_the_same_bytes(method, llama, recipe, tmp_path, monkeypatch):
    """One tensor is left, and could have all processors for itself: sums and factorizations would differ in their last bits."""
    kind = {"hidden": 384, "layers": 1}
    monkeypatch.setattr("yeam.engine.run.cores", lambda: 4)
    monkeypatch.setattr("yeam.engine.budget.cores", lambda: 4)
    base, a, b = (llama(name, **kind) for name in ("base", "a", "b"))
    path = recipe(a, b, merge_method=method, base_model=base)
    yeam.merge(path, tmp_path / "whole" / "out")
    out, left = tmp_path / "out", "model.layers.0.mlp.gate_proj.weight"

    def stop(event: yeam.Progress) -> None:
        if event.tensors == event.total_tensors:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        yeam.merge(path, out, progress=stop)
    place = next(job for job in yeam.plan(path).jobs if job.name == left)
    with (tmp_path / "out.partial" / "model" / "model.safetensors").open("r+b") as file:
        file.seek(place.begin)
        file.write(bytes(64))
    assert yeam.merge(path, out).resumed == 11
    same_output(out, tmp_path / "whole" / "out")


def die_while_writing(rank: int, after: int) -> None:
    """This process, if it is of that rank, kills itself in the middle of its work."""
    if int(os.environ["RANK"]) != rank:
        return
    pwrite, lock, calls = os.pwrite, threading.Lock(), 0

    def killing(fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        with lock:
            calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(fd, data, offset)

    os.pwrite = killing  # type: ignore[assignment]


def test_killed_ranks(llama, recipe, finish, tmp_path):
    path = recipe(llama("a", **KIND), llama("b", shards=2, **KIND), shard_size=50_000)
    headers = len(yeam.plan(path).shards)  # which rank 0 writes
    yeam.merge(path, tmp_path / "alone" / "out")
    out, partial = tmp_path / "together" / "out", tmp_path / "together" / "out.partial"

    killed = start(["merge", path, out], 3, tmp_path, prepare=die_while_writing, arguments=(1, 5))
    said = finish(killed, 1, -signal.SIGKILL, 1)
    assert re.fullmatch(r"error: rank 1 of 3 on \S+ is gone: .*\n  run again, .*the work continues\n", said[0])
    assert said[1:] == ["", ""]
    assert not out.exists() and (partial / "journal-1.jsonl").exists()

    killed = start(["merge", path, out, "--json"], 2, tmp_path, prepare=die_while_writing, arguments=(0, headers + 2))
    said = finish(killed, -signal.SIGKILL, 1)
    assert re.fullmatch(
        r"error: rank 0 of 2 on \S+ is gone: .*\n  run again, .*\n|error: rank 1.* cannot reach rank 0.*\n.*\n", said[1]
    )
    assert not out.exists()

    report = yeam.merge(path, out)
    assert 5 <= report.resumed < 57
    same_output(out, tmp_path / "alone" / "out")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def elsewhere(after: int | None = None) -> None:
    """This process believes that it is alone on its machine; rank 1 dies if it is given a moment."""
    ranks._machine = lambda: f"machine {os.environ['RANK']}"
    ranks.SILENCE = 3.0
    if after is not None:
        die_while_writing(1, after)


def test_several_machines(llama, recipe, finish, tmp_path):
    """Where nobody sees the others' processes: bytes are looked at again, and silence tells of a death."""
    path = recipe(llama("a", **KIND), llama("b", **KIND))
    yeam.merge(path, tmp_path / "alone" / "out")
    out = tmp_path / "together" / "out"
    said = finish(start(["merge", path, out], 2, tmp_path, prepare=elsewhere, arguments=(5,)), 1, -signal.SIGKILL)
    assert re.match(r"error: rank 1 of 2 on \S+ is gone: ", said[0])
    finish(start(["merge", path, out], 2, tmp_path, prepare=elsewhere), 0, 0)
    same_output(out, tmp_path / "alone" / "out")


def hide(folder: Path) -> None:
    """Rank 1 has another disk in the folder's place."""
    if os.environ["RANK"] == "1" and not mount_alone(folder, 1 << 20):
        os._exit(77)


def test_a_folder_that_is_not_shared(llama, recipe, finish, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = recipe(llama("a"), llama("b"))
    processes = start(["merge", path, folder / "out"], 2, tmp_path, prepare=hide, arguments=(folder,))
    processes[1].join(120)
    if processes[1].exitcode == 77:
        processes[0].kill()
        pytest.skip("mounting is not allowed here")
    said = finish(processes, 2, 2)
    assert "is not to be seen by rank 1\n  choose an output folder that all machines share" in said[0] and said[1] == ""


def test_an_error_in_one_rank_is_told_once(llama, recipe, finish, tmp_path):
    spoilt = torch.full((32,), float("nan"))
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):  # of different ranks
        path = recipe(llama("a", **KIND), llama("b", change={name: spoilt}, **KIND))
        said = finish(start(["merge", path, tmp_path / name, "--json"], 2, tmp_path), 2, 2)
        message = said[0].splitlines()
        assert message[0].startswith("error: ") and f"{name} holds nan at element 0" in message[0]
        assert message[1] == "  repair the model, or pass --allow-nan to merge it all the same"
        assert json.loads(message[2])["status"] == 2 and len(message) == 3
        assert said[1] == ""
        assert not (tmp_path / name).exists()


def change_inputs() -> None:
    """To rank 1 the inputs, which it may have on a disk of its own, have changed when everything is merged."""
    if os.environ["RANK"] == "1":

        def changed(self: Pipeline) -> None:
            raise yeam.CheckpointError("a: its files were changed", "merge again")

        Pipeline.check_inputs = changed  # type: ignore[method-assign]


def test_nothing_is_published_if_a_rank_has_read_something_else(llama, recipe, finish, tmp_path):
    words = ["merge", recipe(llama("a"), llama("b")), tmp_path / "out"]
    said = finish(start(words, 2, tmp_path, prepare=change_inputs), 2, 2)
    assert "its files were changed" in said[0] and said[1] == "" and not (tmp_path / "out").exists()


def use_hub(server: HubServer, cache: Path) -> None:
    """This process takes models from the server, into a cache that it shares with others."""
    point_at(server, pytest.MonkeyPatch(), cache)


def test_models_of_the_hub(llama, recipe, finish, tmp_path):
    """Every rank downloads what it needs into the cache that they share, and no tensor comes twice."""
    a, b = llama("a", **KIND), llama("b", shards=2, **KIND)
    yeam.merge(recipe(a, b), tmp_path / "alone" / "out")
    server = HubServer({"org/a": Repository(a), "org/b": Repository(b)}).start()
    try:
        address = SimpleNamespace(url=server.url)
        words = ["merge", recipe("org/a", "org/b"), tmp_path / "out"]
        finish(start(words, 2, tmp_path, prepare=use_hub, arguments=(address, tmp_path / "cache")), 0, 0)
    finally:
        server.stop()
    weights = [folder / "model.safetensors" for folder in (tmp_path / "out", tmp_path / "alone" / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    sizes = sum(path.stat().st_size for path in [*a.glob("*.safetensors"), *b.glob("*.safetensors")])
    sent = sum(count for (_, name), count in server.sent.items() if name.endswith(".safetensors"))
    headers = 2 * 3 << 16  # each rank has looked into the three files, 64 KiB at a time
    assert sent <= sizes + headers


def test_ranks_that_do_not_belong_together(llama, recipe, finish, tmp_path):
    a, b = llama("a"), llama("b")
    one, other = recipe(a, b), recipe(a, b, parameters={"weight": 2.0, "normalize": False}, file="other.yaml")
    words = [["merge", one, "out"], ["merge", other, "out"]]
    port = str(forked.free_port())
    processes = [
        forked.forked(
            words[rank], tmp_path / f"log-{rank}", os.chdir, (str(tmp_path),), RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = finish(processes, 2, 2)
    assert "error: rank 1 on " in said[0] and " has another plan than rank 0 on " in said[0]
    assert said[1] == "" and not list(tmp_path.glob("out*"))

    said = finish(start(["merge", one, tmp_path / "out", "--cache-budget", "1G"], 2, tmp_path), 2, 2)
    assert said[0].startswith("error: several processes share the Hub's cache") and said[1] == ""


def test_places(monkeypatch, tmp_path):
    assert place_here({"WORLD_SIZE": "1"}) is None and place_here({"RANK": "3"}) is None
    full = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    place = place_here(full)
    assert place is not None and (place.rank, place.size, place.local, place.address, place.port) == (
        3,
        4,
        1,
        "head",
        29500,
    )
    mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1"}
    assert place_here(mpi) is not None
    for change, text in (
        ({"RANK": ""}, "RANK"),
        ({"RANK": "4"}, "RANK is 4"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is -1"),
        ({"MASTER_PORT": "x"}, "'x'"),
        ({"MASTER_PORT": "99999999"}, "MASTER_PORT is 99999999"),
    ):
        with pytest.raises(yeam.UserError, match=text):
            place_here({**full, **change})
    for name, value in {**full, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["push", str(tmp_path), "owner/name"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: `yeam push` runs in one process, and 4 were started (WORLD_SIZE)\n  leave ")


def test_shares_are_even_and_whole(llama, recipe):
    a = llama("a", **KIND)
    jobs = yeam.plan(recipe(a, llama("b", **KIND))).jobs
    models = [open_checkpoint(str(a))] * 2
    costs = {job.name: cost(job, models) for job in jobs}
    for count in (1, 2, 3, 7, 100):
        parts = shares(jobs, models, count)
        assert len(parts) == count
        assert sorted(job.name for part in parts for job in part) == sorted(costs)
        loads = [sum(costs[job.name] for job in part) for part in parts]
        assert max(loads) - min(loads) <= max(costs.values())
        place = {job.name: number for number, job in enumerate(jobs)}
        assert all(part == sorted(part, key=lambda job: place[job.name]) for part in parts)


def test_a_call_from_python_takes_part_only_if_asked(llama, recipe, tmp_path, monkeypatch):
    """A training script calls it in one of its ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert len(yeam.merge(recipe(llama("a"), llama("b")), tmp_path / "out").tensors) == 21
