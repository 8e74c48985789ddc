"""What stands where the output goes: foreign folders, links, inputs, old models; nothing of it is lost."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WEIGHTS, Q, same_output, save_model
from disks import mount, unmount
from safetensors.torch import load_file
from unfinished import Stop, interrupted, killer

import yeam
from yeam.engine import output as output_module
from yeam.engine.output import Output
from yeam.engine.partial import check_ours, remove


def test_out_exists(pair, refused, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refused(["merge", pair, out], f"{out} exists", "--overwrite")
    yeam.merge(pair, out, overwrite=True)  # an empty folder
    refused(["merge", pair, out], f"{out} exists", "--overwrite", inputs=[out])
    file = tmp_path / "file"
    file.write_text("x")
    refused(["merge", pair, file, "--overwrite"], f"{file} exists and is not a folder", inputs=[tmp_path])
    assert "--overwrite" not in refused(["merge", pair, file])  # which would not help
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    refused(["merge", pair, link], f"{link} exists")
    refused(["merge", pair, link, "--overwrite"], f"{link} exists and is a symbolic link")
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"port": 8080}')
    (project / "main.py").write_text("print()")
    for words in ([], ["--overwrite"]):
        said = refused(["merge", pair, project, *words], str(project), "is not a model folder", inputs=[project])
        assert "pass --overwrite" not in said
    assert not list(tmp_path.glob("*.partial"))


def test_out_is_an_input(llama, recipe, refused, tmp_path):
    models = tmp_path / "models"
    a, b = llama("models/a"), llama("models/b")
    shutil.copy(a / "config.json", models)  # so that it looks like a model folder
    path = recipe(a, b)
    refused(["merge", path, a], f"{a} exists", inputs=[models])
    link = tmp_path / "link"
    link.symlink_to(models)
    for out in (a, b, models, link / "a", models / ".." / "models" / "b"):
        message = refused(["merge", path, out, "--overwrite"], "would replace the input", inputs=[models])
        assert str(a) in message or str(b) in message
    llama("models/c.partial")
    for options in ([], ["--overwrite"], ["--no-resume"]):
        words = ["merge", recipe(a, models / "c.partial"), models / "c", *options]
        refused(words, "would replace the input", "c.partial", inputs=[models])
    llama("models/d.partial/model")
    words = ["merge", recipe(a, models / "d.partial" / "model"), models / "d", "--no-resume"]
    refused(words, "would replace the input", inputs=[models])
    words = ["merge", recipe(a / WEIGHTS, b), a, "--overwrite"]
    refused(words, "would replace the input", inputs=[models])
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in b.iterdir():
        (linked / file.name).symlink_to(file)
    refused(["merge", recipe(linked), b, "--overwrite"], "would replace the input", inputs=[models])
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "c.partial", "config.json", "d.partial"]


def test_out_is_an_adapter(llama, recipe, refused, tmp_path):
    a, adapter = llama("a"), tmp_path / "adapter"
    factors = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    name = f"base_model.model.{Q}".removesuffix(".weight")
    save_model(adapter, {f"{name}.{factor}.weight": tensor for factor, tensor in factors.items()})
    (adapter / WEIGHTS).rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    )
    words = ["merge", recipe(f"{a}+{adapter}"), adapter, "--overwrite"]
    refused(words, "would replace the input", str(adapter), inputs=[a, adapter])
    yeam.merge(words[1], tmp_path / "out")
    merged, plain = load_file(tmp_path / "out" / WEIGHTS)[Q], load_file(a / WEIGHTS)[Q]
    assert torch.allclose(merged, plain + 2, atol=1e-6)


PLAN = b'{"plan": "0123456789abcdef0123456789abcdef"}\n'


@pytest.mark.parametrize("options", [[], ["--no-resume"]])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"notes.txt": b"mine"}, "it holds notes.txt"),
        ({"model/thesis.txt": b"mine"}, "it holds model"),
        ({"guard/thesis.txt": b"mine", "lock": b""}, "it holds guard"),
        ({"stages/raw/thesis.txt": b"mine", "journal.jsonl": b""}, "it holds stages"),
        ({"replaced/thesis.txt": b"mine"}, "it holds replaced"),
        ({"journal-notes.jsonl": b"mine"}, "it holds journal-notes.jsonl"),
        ({"journal.jsonl": b'{"my": "own log"}\n'}, "journal.jsonl is not a merge's"),
        ({"journal.jsonl": b'{"plan": "tomorrow", "do": "sleep"}\n'}, "journal.jsonl is not a merge's"),
        ({"journal.jsonl": b"["}, "journal.jsonl is not a merge's"),
        ({"lock": b"precious"}, "lock is not a merge's"),
        ({"lock": "a/config.json"}, "lock is a link"),
        ({"journal.jsonl": "a/config.json"}, "journal.jsonl is a link"),
        ({"journal.jsonl": PLAN, "journal-1.jsonl": "a/config.json"}, "journal-1.jsonl is a link"),
        ({"journal.jsonl": PLAN, "model": "a"}, "model is a link"),
        ({"journal.jsonl": PLAN, "stages": b"mine"}, "stages is not a merge's"),
    ],
)
def test_foreign_partial_folder(content, why, options, pair, refused, tmp_path):
    """What only bears the name of an unfinished merge is left as it is. Text stands for a link to that place."""
    partial = tmp_path / "out.partial"
    for name, what in content.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, str):
            (partial / name).symlink_to(tmp_path / what)
        else:
            (partial / name).write_bytes(what)
    names = sorted(partial.rglob("*"))
    refused(["merge", pair, tmp_path / "out", *options], str(partial), why, inputs=[partial, tmp_path / "a"])
    assert sorted(partial.rglob("*")) == names


def test_partial_folder_that_is_none(pair, refused, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.symlink_to(tmp_path / "a")
    refused(["merge", pair, out, "--no-resume"], str(partial), "would replace the input", inputs=[tmp_path / "a"])
    partial.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    partial.symlink_to(elsewhere)
    refused(["merge", pair, out, "--no-resume"], str(partial), "is a link")
    partial.unlink()
    partial.write_text("a file")
    refused(["merge", pair, out], str(partial), "cannot be created", inputs=[tmp_path / "a"])


def test_what_is_not_ours_stays_beside_a_merge(pair, tmp_path):
    interrupted(pair, tmp_path / "out")
    partial = tmp_path / "out.partial"
    theirs = [partial / name for name in ("notes.txt", "journal-notes.jsonl", "stages/raw/thesis.txt")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert yeam.merge(pair, tmp_path / "out").resumed > 0
    assert sorted(path for path in partial.rglob("*") if path.is_file()) == sorted(theirs)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"lock": b""},
        {"lock": b"0123456789abcdef" * 2, "journal.jsonl": b""},
        {"lock": b"", "journal.jsonl": b'{"pla'},
        {"lock": b"", "journal.jsonl": PLAN[:-3]},
        {"lock": b"\0" * 32, "journal.jsonl": b"\0" * 46},
        {"lock": b"", "journal.jsonl": PLAN, "journal-1.jsonl": b"", "guard/0.5/model.partial/lock": b""},
        {"lock": b"", "journal.jsonl": PLAN, "stages/0123456789abcdef0123456789abcdef.partial/lock": b""},
    ],
)
def test_what_has_hardly_begun_is_taken_over(content, pair, tmp_path):
    """A merge that was killed, or lost its power, before anything was finished."""
    (tmp_path / "out.partial").mkdir()
    for name, what in content.items():
        (tmp_path / "out.partial" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out.partial" / name).write_bytes(what)
    yeam.merge(pair, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_removal_may_end_anywhere(tmp_path, monkeypatch):
    """What is left of a folder, and of a stage in it, is YeAM's at every moment."""
    folder = tmp_path / "out.partial"
    stage = folder / "stages" / ("0" * 32 + ".partial")
    for count in itertools.count():
        for place in (stage, folder):
            for name in ("model/x", "guard/0.5/x", "replaced/x", "lock"):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).touch()
            for name in ("journal.jsonl", "journal-1.jsonl"):
                (place / name).write_bytes(PLAN)
        calls = iter(range(count))
        with monkeypatch.context() as patch, contextlib.suppress(Stop):
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, killer(calls, getattr(os, name)))
            remove(folder)
            break
        for place in (folder, stage):
            if place.exists():
                check_ours(place)
    assert count > 3 and not folder.exists()


def test_lock_that_was_removed_keeps_nobody_out(pair, tmp_path, monkeypatch):
    """One process ends, and a third begins, between the second's opening of the lock and its taking it."""
    plan, out = yeam.plan(pair), tmp_path / "out"
    first, flock, third = Output(plan, out), fcntl.flock, []

    def late(fd: int, how: int) -> None:
        monkeypatch.undo()
        first.abandon()
        third.append(Output(plan, out))
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(yeam.OutputError, match="another yeam process is writing"):
        Output(plan, out)
    third[0].abandon()
    assert not (tmp_path / "out.partial").exists()


def test_unwritable(pair, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    refused(["merge", pair, file / "out"], str(file / "out"), "Not a directory", "choose another")
    refused(["merge", pair, "/proc/out"], "/proc/out", "choose another")
    refused(["merge", pair, tmp_path / ("o" * 250)], "ooo", "too long", "choose another")
    assert file.read_text() == "x"


def test_read_only(pair, refused, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    mounted = False
    if os.geteuid() != 0:
        folder.chmod(0o555)
    elif mounted := mount(folder, "ro"):
        pass
    else:
        folder = Path(
            "/proc/sys"
        )  # mounted read-only wherever mounting is forbidden, and closed to everybody in any case
    try:
        refused(["merge", pair, folder / "out"], str(folder / "out"), "choose")
        assert not (folder / "out").exists()
    finally:
        if mounted:
            unmount(folder)


def test_overwrite(pair, recipe, tmp_path):
    out = tmp_path / "out"
    save_model(out, {f"old{i}": torch.zeros(2) for i in range(4)}, {"model_type": "old"}, shards=2)
    (out / "notes").mkdir()
    yeam.merge(pair, out, overwrite=True)
    yeam.merge(pair, tmp_path / "fresh" / "out")
    same_output(out, tmp_path / "fresh" / "out")
    yeam.merge(recipe(tmp_path / "a", merge_method="passthrough"), out, overwrite=True)
    assert (out / WEIGHTS).read_bytes() != (tmp_path / "fresh" / "out" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "fresh", "out", "recipe.yaml"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_while_replacing(moment, pair, recipe, llama, refused, tmp_path, monkeypatch):
    """Whenever the process dies: the old or the new model is OUT, or the next run puts the old one back."""
    out = tmp_path / "out"
    old = {"old": torch.arange(3.0)}

    def die() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        save_model(out, old, {"model_type": "llama"})
        with monkeypatch.context() as patch:
            if moment == "after":
                patch.setattr(output_module, "_sync_folder", killer(iter(range(1)), output_module._sync_folder))
            else:
                patch.setattr(Path, "rename", killer(iter(range(moment == "between")), Path.rename))
            with pytest.raises(Stop):
                yeam.merge(pair, out, overwrite=True)

    die()
    assert out.exists() == (moment != "between")
    assert yeam.merge(pair, out, overwrite=True).resumed == (0 if moment == "after" else 21)
    yeam.merge(pair, tmp_path / "fresh" / "out")
    same_output(out, tmp_path / "fresh" / "out")
    assert not (tmp_path / "out.partial").exists()

    die()  # and a rerun that cannot succeed loses nothing
    spoilt = llama("spoilt", change={"model.norm.weight": torch.full((16,), float("nan"))})
    refused(["merge", recipe(spoilt, file="spoilt.yaml"), out, "--overwrite", "--no-resume"], "nan at element 0")
    assert out.is_dir()
    if moment != "after":
        assert torch.equal(load_file(out / WEIGHTS)["old"], old["old"])

    die()  # nor does one that is not allowed to
    refused(["merge", pair, out], f"{out} exists")
    assert out.is_dir()
