"""Merges of Hub models, against a loopback server: which bytes are sent, how many stay on disk, what happens when the network fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import llama_config, llama_tensors, save_model
from hub_server import HubServer, Repository, point_at
from huggingface_hub import constants, scan_cache_dir

import yeam
from yeam.checkpoint.hub_store import Piece, Stopped, Store, using
from yeam.checkpoint.open import open_checkpoint
from yeam.errors import CheckpointError, UserError
from yeam.planning.jobs import Input, Plan
from yeam.plugins import plugin

SIZE = {"hidden": 256, "layers": 4}


@plugin("test-attention-only")
def attention_only(plan: Plan) -> Plan:
    """Merge the attention; everything else is the first model's."""
    jobs = [
        job
        if job.role in ("q", "k", "v", "o")
        else replace(job, method="copy", sources=(Input(0, job.name),), parameters={})
        for job in plan.jobs
    ]
    return replace(plan, jobs=tuple(jobs))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models: `base` stays local, `org/one` (two shards) and `org/two` (one file) are on the Hub."""
    place = tmp_path_factory.mktemp("models")
    config = llama_config(**SIZE)
    return {
        name: save_model(place / name, llama_tensors(seed, **SIZE), config, shards)
        for seed, (name, shards) in enumerate({"base": 1, "one": 2, "two": 1}.items())
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> Iterator[HubServer]:
    server = HubServer({f"org/{name}": Repository(folders[name]) for name in ("one", "two")}).start()
    point_at(server, monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    yield server
    server.stop()


def recipe(*models: str | Path, plugins: bool = True) -> dict[str, Any]:
    made: dict[str, Any] = {"merge_method": "linear", "models": [{"model": str(m)} for m in models]}
    made["parameters"] = {"weight": 1.0}
    return {**made, "plugins": ["test-attention-only"]} if plugins else made


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def sent(hub: HubServer) -> int:
    return sum(count for (_, name), count in hub.sent.items() if name.endswith(".safetensors"))


def on_disk(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*.safetensors.*-*") if path.exists())


def test_attention_only_merge_transfers_the_attention(hub: HubServer, folders: dict[str, Path], tmp_path: Path) -> None:
    """And the second time nothing but headers; the bytes are those of a merge of local copies."""
    yeam.merge(recipe(folders["base"], "org/one", "org/two"), "out")
    attention = sum(t.nbytes for name, t in llama_tensors(1, **SIZE).items() if "self_attn" in name)
    headers = sum(
        8 + int.from_bytes(path.open("rb").read(8), "little")
        for n in ("one", "two")
        for path in folders[n].glob("*.safetensors")
    )
    assert 2 * attention < sent(hub) <= 1.05 * (2 * attention) + headers
    yeam.merge(recipe(*folders.values()), "local")
    assert weights(Path("out")) == weights(Path("local"))
    before = sent(hub)
    yeam.merge(recipe(folders["base"], "org/one", "org/two"), "again")
    assert sent(hub) - before == 3 * 65536 and weights(Path("again")) == weights(Path("local"))  # headers
    assert not list(Path("cache").rglob("snapshots/*/*.safetensors"))  # a part does not pose as the whole
    assert scan_cache_dir(tmp_path / "cache").warnings == []


def test_a_repository_under_its_old_name(
    hub: HubServer, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub answers for a renamed repository, also a private one, from its new place: parts of files and whole ones."""
    hub.repositories["org/one"].access = "private"
    hub.renamed["team/former"] = "org/one"
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    for plugins in (True, False):
        wanted, out = tmp_path / f"wanted-{plugins}", tmp_path / f"out-{plugins}"
        yeam.merge(recipe(folders["base"], folders["one"], plugins=plugins), wanted)
        yeam.merge(recipe(folders["base"], "team/former", plugins=plugins), out)
        assert (out / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert not hub.leaks and hub.bytes_of("org/one", "model-00001-of-00002.safetensors")


def test_whole_files_where_half_is_needed(hub: HubServer, folders: dict[str, Path]) -> None:
    yeam.merge(recipe("org/one", "org/two", plugins=False), "out")
    files = [path for name in ("one", "two") for path in folders[name].glob("*.safetensors")]
    assert sent(hub) == sum(path.stat().st_size for path in files) + 3 * 65536
    assert len(list(Path("cache").rglob("snapshots/*/*.safetensors"))) == 3 and not list(Path("cache").rglob("yeam"))
    yeam.merge(recipe(folders["one"], folders["two"], plugins=False), "local")
    assert weights(Path("out")) == weights(Path("local"))


@pytest.mark.parametrize("keep", [True, False])
def test_disk_stays_within_the_budget(
    hub: HubServer, folders: dict[str, Path], keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on the disk after every download; the budget is a third of what is read, and little more than one job needs."""
    budget, most, lock, plain = 4_000_000, [0], threading.Lock(), Piece.download

    def measured(piece: Piece, *stopped: Any) -> None:
        plain(piece, *stopped)
        with lock:
            most[0] = max(most[0], on_disk(Path("cache")))

    monkeypatch.setattr(Piece, "download", measured)
    made = recipe("org/one", "org/two", plugins=False)
    yeam.merge(made, "out", cache_budget=budget, keep_downloads=keep)
    assert 1_000_000 < most[0] <= budget < sent(hub) / 4
    assert (on_disk(Path("cache")) == 0) is not keep
    yeam.merge(recipe(folders["one"], folders["two"], plugins=False), "local")
    assert weights(Path("out")) == weights(Path("local"))
    with pytest.raises(UserError, match=r"needs 1,048,576 bytes of downloads at a time") as caught:
        yeam.merge(made, "small", cache_budget="900K")
    assert "--cache-budget 2M" in caught.value.remedy and not Path("small").exists()


def test_downloads_go_when_they_have_been_used(hub: HubServer, folders: dict[str, Path]) -> None:
    """Also those that a merge which failed has left; what was kept before stays."""
    made = recipe("org/one", "org/two", plugins=False)
    yeam.merge(recipe(folders["base"], "org/one", "org/two"), "kept")
    kept = on_disk(Path("cache"))
    hub.faults += ["403"] * 100
    with pytest.raises(CheckpointError, match="org/"):
        yeam.merge(made, "out", keep_downloads=False)
    hub.faults.clear()
    yeam.merge(made, "out", keep_downloads=False)
    assert on_disk(Path("cache")) == kept > 0 and not list(Path("cache").rglob("*.temporary"))


def test_a_failing_network_changes_nothing(hub: HubServer, folders: dict[str, Path]) -> None:
    """Broken connections, too many requests and server errors on the way; what had arrived is not sent again."""
    yeam.merge(recipe(folders["base"], "org/one", "org/two"), "first")
    clean = sent(hub)
    # five failures in a row, should one request meet them all, would make it give up
    for number, faults in enumerate((["cut", "429", "503", "cut"], ["500", "cut", "502", "cut"])):
        hub.sent.clear()
        for path in list(Path("cache").rglob("*.safetensors.*")):
            path.unlink()
        hub.faults += faults
        out = Path(f"out-{number}")
        yeam.merge(recipe(folders["base"], "org/one", "org/two"), out)
        assert not hub.faults and sent(hub) == clean and weights(out) == weights(Path("first"))


def test_a_piece_goes_on_where_it_stopped(hub: HubServer) -> None:
    with using(Store(budget=10_000_000)):
        checkpoint: Any = open_checkpoint("org/two")
    piece = checkpoint.piece("model.embed_tokens.weight")
    big = Piece(piece.repository, piece.file, piece.begin, piece.begin + 3_000_000)
    calls = iter([False] * 10)
    with pytest.raises(Stopped):
        big.download(lambda: next(calls, True))
    here = on_disk(Path("cache"))
    assert not big.is_here and 0 < here < big.nbytes
    big.download()
    assert hub.asked[-1] == f"bytes={big.begin + here}-{big.end - 1}"
    file = hub.repositories["org/two"].folder / piece.file
    wanted = file.read_bytes()[big.begin : big.end]
    assert big.path.read_bytes() == wanted
    big.path.write_bytes(wanted[:-7])  # the machine went down
    assert not big.is_here
    big.download()
    assert big.is_here and big.path.read_bytes() == wanted


def test_without_room_tensors_are_read_through(hub: HubServer, folders: dict[str, Path]) -> None:
    """A method that looks at all tensors for each of them would need more than the budget: it reads from the Hub into memory."""
    with using(Store(budget=100)) as store:
        checkpoint: Any = open_checkpoint("org/one")
        name = "model.layers.0.self_attn.q_proj.weight"
        expected = llama_tensors(1, **SIZE)[name].view(-1)
        assert checkpoint.read(name, 512, 1024).equal(expected[512:1024])
        assert on_disk(Path("cache")) == 0 and not store.reserve([checkpoint.piece(name)], greedy=True)
        hub.ranges = False
        with pytest.raises(CheckpointError, match="whole files only"):
            checkpoint.read(name, 512, 1024)
    yeam.merge(recipe(folders["base"], "org/one", "org/two"), "out")  # the whole files, then
    yeam.merge(recipe(*folders.values()), "local")
    assert weights(Path("out")) == weights(Path("local"))


def test_a_full_disk_shows_before_the_first_byte(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yeam.checkpoint.hub_repository.Repository.room", lambda self: 1000)
    with pytest.raises(CheckpointError, match=r"need .* bytes in the Hub's cache, 1,000 are free") as caught:
        yeam.merge(recipe("org/one", "org/two", plugins=False), "out")
    assert "--cache-budget" in caught.value.remedy and sent(hub) == 3 * 65536


def test_offline_after_the_fact(hub: HubServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that was made online can be made again offline."""
    made = recipe("org/one", "org/two", plugins=False)
    yeam.merge(made, "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    yeam.merge(made, "again")
    assert len(hub.requests) == asked and weights(Path("again")) == weights(Path("out"))
