"""Opening local models: files, folders, indexes; every malformed one is one clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment
from safetensors.torch import save_file

from yeam.checkpoint import open_checkpoint
from yeam.errors import CheckpointError


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
        ({"a": "x" * 300 + ".safetensors"}, "'xxx.*not a plain file name"),
        ({"a": "x\n.safetensors"}, "not a plain file name"),
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


def test_opening_imports_no_torch(sharded: Path) -> None:
    code = (
        "import sys; from yeam.checkpoint import open_checkpoint; "
        f"c = open_checkpoint({str(sharded)!r}); c.extent('a'), c.fingerprint(), c.resident_bytes('a'); "
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


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
    (model / "config.json").write_text(r'{"x": "\ud800"}')
    assert f"{model}/config.json: is not valid JSON" in error(model)
    (model / "config.json").unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(model / "config.json")
        assert f"{model}/config.json: is no file of at most" in error(model)
        (model / "config.json").unlink()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": torch.ones(1)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    assert f"org/base+{adapter}" in error(adapter)


def test_reference_is_what_the_user_wrote(sharded: Path) -> None:
    assert open_checkpoint(str(sharded)).reference == str(sharded)
    assert open_checkpoint(str(sharded), reference="mine").reference == "mine"
