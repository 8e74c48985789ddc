"""What stands where the output goes: foreign folders, links, inputs, old models; nothing of it is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import WEIGHTS, Q, same_output, save_model
from disks import mount, unmount
from safetensors.torch import load_file
from unfinished import Stop

import yeam
from yeam.engine import output as output_module


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


def test_foreign_partial_folder(pair, refused, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "thesis.txt").write_text("years of work")
    refused(["merge", pair, out], str(partial), "no journal", inputs=[partial / "model"])
    shutil.rmtree(partial)
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
    partial.unlink()
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")  # neither in the way nor ours
    yeam.merge(pair, out)
    assert (partial / "notes.txt").read_text() == "mine" and len(list(partial.iterdir())) == 1


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
                patch.setattr(output_module, "_sync_folder", killer(1, output_module._sync_folder))
            else:
                patch.setattr(Path, "rename", killer({"before": 0, "between": 1}[moment], Path.rename))
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


def killer(count: int, real: Callable[..., object] | None = None) -> Callable[..., object]:
    """A function that does what `real` does `count` times and then ends the process."""
    calls = iter(range(count))

    def function(*arguments: object) -> object:
        if next(calls, None) is None:
            raise Stop
        assert real is not None
        return real(*arguments)

    return function
