"""Models on the Hub, against a loopback server: what is asked for, what is downloaded, and what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment
from hub_server import HubServer, Repository, point_at
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file

from yeam.checkpoint import open_checkpoint
from yeam.checkpoint.hub import HubCheckpoint
from yeam.errors import CheckpointError

SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
ROWS = 400  # of 256 float32: 400 KiB, more than what a header request asks for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model with the usual files around it."""
    path = tmp_path_factory.mktemp("served")
    weight_map = {}
    for i, shard in enumerate(SHARDS):
        save_file({f"w{i}": torch.full((ROWS, 256), float(i))}, path / shard)
        weight_map[f"w{i}"] = shard
    # A header longer than the first request: its rest has to be asked for.
    save_file({f"w{len(SHARDS) - 1}": torch.full((ROWS, 256), 2.0)}, path / SHARDS[-1], {"padding": "x" * 100_000})
    texts = {
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}), "generation_config.json": "{}",
        "tekken.json": "{}", "spiece.spm": "s",
        "config.json": '{"model_type": "llama"}', "tokenizer.json": "{}", "tokenizer_config.json": "{}",
        "chat_template.jinja": "x", "additional_chat_templates/rag.jinja": "y", "README.md": "#",
        "modeling_custom.py": "raise SystemExit",
        "onnx/config.json": "{}",
    }  # fmt: skip
    for name, text in texts.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[HubServer]:
    """A server with `org/model`, and huggingface_hub pointed at it and at an empty cache."""
    server = HubServer({"org/model": Repository(folder)}).start()
    point_at(server, monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    yield server
    server.stop()


def error(path: str = "org/model", **more: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **more)
    assert caught.value.remedy and path.partition("+")[0] in caught.value.message
    return caught.value


def test_opening_takes_headers_and_small_files_only(hub: HubServer) -> None:
    checkpoint = open_checkpoint("org/model")
    assert {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()} == {
        f"w{i}": ("F32", (ROWS, 256)) for i in range(3)
    }
    files = {path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.folder.rglob("*") if path.is_file()}
    assert files == {
        "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "tekken.json", "spiece.spm",
        "README.md",
    }  # fmt: skip
    assert checkpoint.config == {"model_type": "llama"} and checkpoint.notes == []
    assert hub.bytes_of("org/model", *SHARDS[:2]) == 2 * 65536
    assert 100_000 < hub.bytes_of("org/model", SHARDS[2]) < 101_000
    assert not hub.bytes_of("org/model", "modeling_custom.py", "onnx/config.json")


def test_reading_downloads_one_shard_once(hub: HubServer, folder: Path) -> None:
    checkpoint = open_checkpoint("org/model")
    assert isinstance(checkpoint, HubCheckpoint) and checkpoint.extent("w1") is None
    before = hub.bytes_of("org/model")
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: checkpoint.read("w1", 256 * i, 256 * (i + 1)), range(16)))
    assert all(part.eq(1).all() for part in parts)
    assert hub.bytes_of("org/model") - before == (folder / SHARDS[1]).stat().st_size
    extent = checkpoint.extent("w1")
    assert extent is not None and extent.path.read_bytes()[extent.offset : extent.offset + 4] == b"\0\0\x80\x3f"
    checkpoint.prepare("w2")
    assert checkpoint.extent("w2") is not None and checkpoint.extent("w0") is None
    assert {path.name for path in checkpoint.folder.glob("*.safetensors")} == set(SHARDS[1:])


def test_commit_is_resolved_once(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    """A branch that moves while a merge runs does not change what is read; the fingerprint is the commit's."""
    checkpoint = open_checkpoint("org/model", "main")
    stamp = checkpoint.fingerprint()
    assert open_checkpoint("org/model", hub.repositories["org/model"].commit).fingerprint() == stamp
    old = hub.repositories["org/model"].commit
    hub.repositories["org/model"].commit, hub.repositories["org/model"].older = "f" * 40, (old,)
    assert checkpoint.read("w0", 0, 256).eq(0).all() and (checkpoint.folder / SHARDS[0]).exists()
    assert checkpoint.folder.name == old
    assert open_checkpoint("org/model").fingerprint() != stamp
    assert "no such revision" in error("org/model", revision="v9").message
    hub.repositories["org/model"].branches = ("main", "pr/1")
    late = open_checkpoint("org/model", "pr/1")
    assert late.folder.name == "f" * 40
    hub.repositories["org/model"].commit = (
        "e" * 40
    )  # the branch was rewritten, and nothing refers to the commit any more
    with pytest.raises(CheckpointError, match="commit ffffffffffff, which was planned with, is no longer on the Hub"):
        late.read("w1", 0, 256)


def test_server_without_ranges(hub: HubServer) -> None:
    """Where a mirror ignores ranges, reading stops as soon as the header is there."""
    hub.ranges = False
    assert set(open_checkpoint("org/model").tensors) == {"w0", "w1", "w2"}


def test_busy_server_is_asked_again(hub: HubServer) -> None:
    hub.failures = 2
    assert set(open_checkpoint("org/model").tensors) == {"w0", "w1", "w2"}
    hub.failures = 3
    assert "HTTP 503" in error().message
    checkpoint = open_checkpoint("org/model")
    hub.faults += ["503", "429", "cut", "500", "cut"]
    before = hub.bytes_of("org/model", SHARDS[1])
    assert checkpoint.read("w1", 0, ROWS * 256).eq(1).all() and not hub.faults
    sent, whole = hub.bytes_of("org/model", SHARDS[1]) - before, (checkpoint.folder / SHARDS[1]).stat().st_size
    assert whole <= sent <= whole + 2 * hub.cut_after  # it was not begun anew
    hub.faults += ["429"] * 50
    with pytest.raises(CheckpointError, match="429"):
        checkpoint.read("w0", 0, 256)


def test_access(hub: HubServer, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub.repositories["org/gated"] = Repository(folder, access="gated")
    hub.repositories["org/private"] = Repository(folder, access="private")
    assert "gated" in error("org/gated").message and "HF_TOKEN" in error("org/gated").remedy
    assert "private" in error("org/private").message and "HF_TOKEN" in error("org/private").remedy
    assert "no such model" in error("org/other").message
    (Path("org")).mkdir()
    (Path("org") / "model-2").mkdir()
    assert "did you mean the local org/model-2" in error("org/modell-2").remedy
    monkeypatch.setenv("HF_TOKEN", hub.token)
    for repo in ("org/gated", "org/private"):
        assert open_checkpoint(repo).read("w2", 0, 256).eq(2).all()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    for repo in ("org/private", "org/model"):
        assert "does not accept the token" in error(repo).message and "HF_TOKEN" in error(repo).remedy
        assert "hf_wrong_secret" not in str(error(repo))
    assert hub.leaks == []


def test_offline_and_unreachable(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in error().remedy
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    stamp = open_checkpoint("org/model").fingerprint()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is not in the cache" in error().message  # its small files are, its shards are not
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download("org/model")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint("org/model")
    assert checkpoint.read("w2", 0, 256).eq(2).all() and checkpoint.fingerprint() == stamp
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # where nothing listens
    checkpoint = open_checkpoint("org/model")
    assert "cannot be reached" in checkpoint.notes[0] and checkpoint.read("w1", 0, 256).eq(1).all()
    assert "cannot be reached" in error("org/other").message


def serve(hub: HubServer, tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    path = tmp_path / name.replace("/", "-")
    path.mkdir()
    make(path)
    hub.repositories[name] = Repository(path)


def test_damaged_repositories(hub: HubServer, tmp_path: Path) -> None:
    def index(shard: str) -> Callable[[Path], Any]:
        text = json.dumps({"weight_map": {"w": shard}})
        return lambda path: (path / "model.safetensors.index.json").write_text(text)

    serve(hub, tmp_path, "bad/gone", index("model-1.safetensors"))
    assert "names 'model-1.safetensors', which the repository does not have" in error("bad/gone").message
    serve(hub, tmp_path, "bad/escape", index("../../x"))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_checkpoint("bad/escape")
    serve(hub, tmp_path, "bad/short", lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 20))
    assert "bad/short/model.safetensors: the header claims" in error("bad/short").message
    serve(hub, tmp_path, "bad/empty", lambda path: (path / "config.json").write_text("{}"))
    assert "holds no weights" in error("bad/empty").message
    serve(hub, tmp_path, "bad/gguf", lambda path: (path / "x.gguf").write_text("{}"))
    assert "GGUF" in error("bad/gguf").message


@pytest.mark.parametrize("name", ["../x.json", "tokenizer\\..\\x.json", "1_P/../../model.safetensors", "a\x1b[2J.json"])
def test_names_that_lead_out_of_a_repository(hub: HubServer, folder: Path, name: str) -> None:
    hub.repositories["bad/names"] = Repository(folder, listed=(name,))
    assert f"lists {name!r}" in error("bad/names").message and not list(Path("cache").glob("models--bad*"))


def test_a_repository_without_a_commit(hub: HubServer, folder: Path) -> None:
    hub.repositories["bad/commit"] = Repository(folder, commit="None")
    assert "the Hub names no commit, but 'None'" in error("bad/commit").message


def test_pytorch_only_repository(hub: HubServer, tmp_path: Path) -> None:
    weight = torch.randn(8, 4)

    def make(path: Path) -> None:
        torch.save({"w": weight, "v": weight}, path / "pytorch_model.bin")

    serve(hub, tmp_path, "org/old", make)
    checkpoint = open_checkpoint("org/old")
    assert checkpoint.aliases == {"v": "w"} and checkpoint.read("w", 4, 12).equal(weight.view(-1)[4:12])
    assert checkpoint.fingerprint() == open_checkpoint("org/old").fingerprint()


def test_adapter_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    def make(path: Path) -> None:
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": "org/model"}
        (path / "adapter_config.json").write_text(json.dumps(config))
        factors = {"l.lora_A.weight": torch.ones(1, 256), "l.lora_B.weight": torch.arange(400.0)[:, None]}
        save_file({f"base_model.model.{name}": t for name, t in factors.items()}, path / "adapter_model.safetensors")

    serve(hub, tmp_path, "org/adapter", make)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"l.weight": torch.zeros(400, 256)}, base / "model.safetensors")
    checkpoint = open_checkpoint(str(base), lora=("org/adapter", None))
    before = hub.bytes_of("org/adapter", "adapter_model.safetensors")
    assert checkpoint.read("l.weight", 256 * 3, 256 * 5).tolist() == [6.0] * 256 + [8.0] * 256
    assert hub.bytes_of("org/adapter", "adapter_model.safetensors") > before
    assert "org/model+org/adapter" in str(error("org/adapter"))


def test_environment_variables(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, as a user sets them, in a process of its own."""
    hub.repositories["org/private"] = Repository(folder, access="private")
    code = (
        "from yeam.checkpoint import open_checkpoint; c = open_checkpoint('org/private');"
        "print(c.folder, [float(c.read(n, 0, 256).mean()) for n in c.tensors])"
    )
    env = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_TOKEN=hub.token)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "home" / "hub")) and run.stdout.endswith("[0.0, 1.0, 2.0]\n")
    assert hub.token not in run.stderr + run.stdout
