"""Models onto the Hub, against a loopback server: what is sent, what is not sent twice, and what is refused before a merge begins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, command, environment, llama_config, llama_tensors, save_model
from hub_server import HubServer, Repository, point_at
from hub_uploads import digest
from huggingface_hub import constants

import yeam
from yeam.errors import UserError
from yeam.hub.push import PushProgress
from yeam.recipe import ModelRef
from yeam.report.licence import Licence, Licensing, licence_in

Build = Callable[..., Path]
SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(root=tmp_path / "hub").start()
    point_at(server, monkeypatch, tmp_path / "cache", token=server.token)
    for module in ("_commit_api", "hf_api"):  # from 1.0 on the first, before the second
        monkeypatch.setattr(f"huggingface_hub.{module}.is_xet_available", lambda: False, raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.stop()


def card(folder: Path, licence: str, **more: str) -> Path:
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'license': licence, **more})}---\n# model\n")
    return folder


def remote(hub: HubServer, folder: Path, name: str) -> str:
    hub.repositories[name] = Repository(folder)
    return name


def recipe(*models: str | Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1.0}}


def test_from_the_hub_to_the_hub(hub: HubServer, llama: Build) -> None:
    """Merge two Hub models and push: every file arrives, in one commit, with a card that says where it comes from."""
    for name, licence in (("one", "mit"), ("two", "apache-2.0")):
        remote(hub, card(llama(name), licence), f"org/{name}")
    report = yeam.merge(recipe("org/one", "org/two"), "out", push_to_hub="org/new", private=True, shard_size=10_000)
    pushed = hub.repositories["org/new"]
    files = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert {path.name: path.read_bytes() for path in pushed.folder.iterdir() if path.name != ".gitattributes"} == files
    assert (
        pushed.access == "private" and len(hub.commits) == 1 and len([n for n in files if n.startswith("model-")]) > 2
    )
    assert report.notes[-1] == f"pushed to {hub.url}/org/new, commit {pushed.commit}"
    text = files["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == ["org/one", "org/two"] and front["base_model_relation"] == "merge"
    assert front["library_name"] == "transformers" and "merge" in front["tags"] and front["license"] == "apache-2.0"
    assert "| [org/one](https://huggingface.co/org/one) | mit |" in text and "may take in works under mit." in text
    assert yeam.inspect("org/new").to_dict()["roles"] == yeam.inspect("out").to_dict()["roles"]  # it reads back
    assert hub.leaks == []


def test_a_second_push_sends_nothing_and_a_smaller_model_leaves_nothing_behind(hub: HubServer, llama: Build) -> None:
    first = card(llama("a", shards=3), "mit")
    report = yeam.push(first, "tester/model", message="one")
    assert report.files == sorted(path.name for path in first.iterdir()) and report.removed == [] and not report.private
    assert hub.commits == [("tester/model", "one", report.files)]
    sent = sum(hub.received.values())
    assert sent == sum((first / name).stat().st_size for name in SHARDS)
    assert yeam.push(first, "tester/model").commit == report.commit and sum(hub.received.values()) == sent
    kept = hub.repositories["tester/model"].folder / "unrelated.gguf"
    kept.write_text("x")
    again = yeam.push(llama("small"), "tester/model")
    stale = [*SHARDS, "model.safetensors.index.json"]
    assert again.removed == stale and "removed weight files" in again.notes[-1]
    assert {path.name for path in kept.parent.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "unrelated.gguf", ".gitattributes",
    }  # fmt: skip


@pytest.mark.parametrize(("xet", "at"), [(False, 1), (True, 2)])
def test_killed_push_goes_on(hub: HubServer, llama: Build, tmp_path: Path, xet: bool, at: int) -> None:
    """A real process, killed while it sends a file: those before it are not sent again, and readers never saw half a model."""
    folder = card(llama("a", shards=3, hidden=64), "mit")
    hub.xet = xet
    reached, going = threading.Event(), threading.Event()
    begun: list[str] = []

    def hold(name: str) -> None:
        begun.append(name)
        if len(begun) == at + 1:
            reached.set()
            going.wait(60)

    hub.hold = hold
    more = {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    env = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_TOKEN=hub.token, **more)
    words = command("push", folder, "org/new", "--json")
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert reached.wait(120)
        finished = dict(hub.received)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    going.set()
    assert len(finished) == at and hub.commits == []
    hub.hold = None
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: hub.received[name] for name in finished} == finished  # once
    assert json.loads(done.stdout)["files"] == sorted(path.name for path in folder.iterdir()) and len(hub.commits) == 1
    assert hub.repositories["org/new"].pointers == {name: digest(folder / name) for name in SHARDS}
    assert hub.token not in done.stdout + done.stderr


def test_interrupted_at_any_file(hub: HubServer, llama: Build) -> None:
    folder = card(llama("a", shards=3), "mit")
    total = len(list(folder.iterdir()))
    for at in range(1, total + 1):
        name = f"org/after-{at}"
        hub.objects.clear()
        hub.received.clear()

        def stop(event: PushProgress, at: int = at) -> None:
            if event.files == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            yeam.push(folder, name, progress=stop)
        yeam.push(folder, name)
        assert dict(hub.received) == {digest(folder / shard): (folder / shard).stat().st_size for shard in SHARDS}
    assert [repo for repo, _, _ in hub.commits] == [f"org/after-{at}" for at in range(1, total + 1)]


def test_the_example_pushes(hub: HubServer, llama: Build, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    import pipeline

    pipeline.push(llama("a"), "org/example")
    assert f"pushed 2 files to {hub.url}/org/example" in capsys.readouterr().out
    assert hub.repositories["org/example"].access == "private"


def test_branches(hub: HubServer, llama: Build) -> None:
    yeam.push(llama("a"), "org/model")
    report = yeam.push(llama("b"), "org/model", revision="other")
    assert report.url == f"{hub.url}/org/model/tree/other" and report.revision == "other"
    repository = hub.repositories["org/model"]
    assert repository.pointers["model.safetensors"] == digest(Path("a/model.safetensors"))
    assert repository.others["other"].pointers["model.safetensors"] == digest(Path("b/model.safetensors"))


def test_what_could_fail_after_the_merge_fails_before_it(
    hub: HubServer, llama: Build, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    file = Path("recipe.json")
    file.write_text(json.dumps(recipe(llama("a"), llama("b"))))
    remote(hub, llama("a"), "org/public")

    def said(*texts: str, words: tuple[str, ...] = ("org/new",)) -> None:
        refused(["merge", file, "out", "--push-to-hub", *words], *texts)
        assert not Path("out.partial").exists() and not Path("out").exists()

    said("'new' is no name on the Hub", "owner/name", words=("new",))
    said("is there already, and it is public", words=("org/public", "--private"))
    said("elsewhere/new: the Hub refused making the repository", "may write to it", words=("elsewhere/new",))
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    said("the token of tester may only read", "settings/tokens")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    said("the Hub does not accept the token", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "")
    said("pushing needs a token, and there is none", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said("while HF_HUB_OFFLINE is set", "unset it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refused(["merge", file, "out", "--private"], "are for pushing", "--push-to-hub")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # where nothing listens
    said("the Hub cannot be reached", "check the network")
    assert hub.commits == [] and set(hub.repositories) == {"org/public"}


def test_folders_that_are_not_pushed(hub: HubServer, llama: Build, tmp_path: Path, refused: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    bad = llama("bad", change={name: torch.full((32, 16), float("nan"))})
    refused(["push", bad, "org/new"], "is not pushed", name, "yeam verify")
    (tmp_path / "empty").mkdir()
    refused(["push", tmp_path / "empty", "org/new"], "there is nothing to push")
    refused(["push", tmp_path / "none", "org/new"], "is not a folder")
    linked = llama("linked")
    (tmp_path / "secret").write_text("x")
    (linked / "notes.txt").symlink_to(tmp_path / "secret")
    refused(["push", linked, "org/new"], "leads out of the folder")
    assert hub.commits == [] and not hub.received and not hub.repositories  # not even an empty one


def test_a_failing_push_leaves_the_merge(hub: HubServer, llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    models = recipe(llama("a"), llama("b"))
    monkeypatch.setattr(hub, "hold", lambda name: setattr(hub, "failures", 100))
    with pytest.raises(UserError, match=r"sending .* failed: HTTP 503") as caught:
        yeam.merge(models, "out", push_to_hub="org/new")
    assert "yeam push" in caught.value.remedy and Path("out/model.safetensors").exists()
    monkeypatch.setattr(hub, "hold", None)
    hub.failures = 2  # and these are only waited for
    assert yeam.push("out", "org/new").files == sorted(path.name for path in Path("out").iterdir())


@pytest.mark.parametrize(
    ("cards", "result"),
    [
        (["mit", "mit"], "mit"),
        (["mit", "apache-2.0"], "apache-2.0"),
        (["apache-2.0", "gpl-3.0", "mit"], "gpl-3.0"),
        (["cc-by-4.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["llama3.1", "llama3.1"], "llama3.1"),
        (["llama3.1", "apache-2.0"], None),
        (["cc-by-sa-4.0", "cc-by-nc-4.0"], None),
        (["apache-2.0", "gpl-2.0"], None),
        (["cc-by-nd-4.0", "cc-by-nd-4.0"], None),
        (["mit", None], None),
        ([None], None),
    ],
)
def test_licences(cards: list[str | None], result: str | None) -> None:
    """Whatever the order; what does not follow is said."""
    inputs = [(ModelRef.parse(f"org/m{i}"), Licence(name) if name else None) for i, name in enumerate(cards)]
    for order in (inputs, inputs[::-1]):
        found = Licensing(tuple(order))
        assert (found.result.id if found.result else None) == result and found.front.get("license") == result
        assert found.result is not None or "before you share" in found.sentence
        assert found.is_conflict is (result is None and None not in cards)


def test_what_cards_say(tmp_path: Path) -> None:
    ref = ModelRef.parse("org/model")

    def read(text: str) -> Licence | None:
        (tmp_path / "README.md").write_text(text)
        return licence_in(tmp_path / "README.md", ref)

    assert read("---\nlicense: MIT\n---\n") == read("\ufeff---\r\nlicense: [mit]\r\n---\r\nx") == Licence("mit")
    assert read("---\nlicense: other\nlicense_name: nice\nlicense_link: LICENSE\n---") == Licence(
        "other", "nice", "https://huggingface.co/org/model/blob/main/LICENSE"
    )
    for front in ("license: other", "license: unknown", "license: [mit, x]", "license: '<script>'", ": :\n  - {", "- a",
                  "license: !!python/name:os"):  # fmt: skip
        assert read(f"---\n{front}\n---\n") is None, front
    for nothing in ("", "# x", "---\nlicense: mit\n"):
        assert read(nothing) is None, nothing
    assert licence_in(tmp_path / "none") is None


def test_licences_that_do_not_fit_are_said(hub: HubServer, llama: Build, tmp_path: Path) -> None:
    """In the card and to the user; a hostile name of a licence stays text. An adapter's card counts, too."""
    one = card(llama("one"), "other", license_name="<b>mine</b> | [x](y)")
    report = yeam.merge(recipe(one, card(llama("two"), "apache-2.0")), "out")
    assert [note for note in report.notes if "licences" in note]
    text = Path("out/README.md").read_text()
    assert "license" not in yaml.safe_load(text.split("---")[1]) and "so none is given here" in text
    assert "&lt;b&gt;mine&lt;/b&gt; \\| \\[x\\](y)" in text and "<b>" not in text
    base = card(save_model(tmp_path / "base", llama_tensors(0), llama_config()), "mit")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    from safetensors.torch import save_file

    part = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{part}.lora_A.weight": torch.ones(1, 16), f"{part}.lora_B.weight": torch.ones(16, 1)}
    save_file(factors, adapter / "adapter_model.safetensors")
    yeam.merge(recipe(f"{base}+{adapter}"), "unsaid")
    assert "The card of one input names no licence" in Path("unsaid/README.md").read_text()
    card(adapter, "gpl-3.0")
    yeam.merge(recipe(base, f"{base}+{adapter}"), "said")
    table = Path("said/README.md").read_text().partition("## Licence")[2].partition("## Recipe")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == [  # each once, under its own name
        f"| `{base.name}` | mit |", "| `adapter` | gpl-3.0 |",
    ]  # fmt: skip
    assert yaml.safe_load(Path("said/README.md").read_text().split("---")[1])["license"] == "gpl-3.0"
