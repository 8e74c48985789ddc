"""Merges that compiled loops do alone never import torch: it takes a second, and a hundred megabytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Llama
from safetensors.torch import load_file

import yeam
from yeam.engine import device
from yeam.errors import UserError

MERGE = """
import json, sys
import yeam
yeam.merge(json.loads(sys.argv[1]), sys.argv[2], device=sys.argv[3])
print("torch" in sys.modules)
"""
RECIPES = {
    "linear": {"parameters": {"weight": 1.0}},
    "task_arithmetic": {"parameters": {"weight": 0.5}},
    "slerp": {"parameters": {"t": 0.3}},
    "karcher": {},
    "model_stock": {},
    "ties": {"parameters": {"weight": 0.5, "density": 0.4}},
    "breadcrumbs": {"parameters": {"weight": 0.5, "density": 0.4}},
    "dare_ties": {"parameters": {"weight": 0.5, "density": 0.4}},
    "della": {"parameters": {"weight": 0.5, "density": 0.4}},
    "yeam": {"parameters": {"frames": "none"}},
    "passthrough": {},
}
BASELESS = ("linear", "karcher", "passthrough")


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_has_driver", lambda: False)


def imports_torch(recipe: dict[str, object], out: Path) -> bool:
    command = [sys.executable, "-c", MERGE, json.dumps(recipe), str(out), "cpu"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"


def test_torch_is_not_imported(tmp_path: Path, llama: Llama) -> None:
    """And what comes out is what comes out beside it, to the bit."""
    base, a, b = (str(llama(name, dtype=torch.bfloat16)) for name in ("base", "a", "b"))
    stages = []
    for method, options in RECIPES.items():
        models = [a] if method in ("passthrough", "slerp") else [a, b]
        found = {"merge_method": method, "models": [{"model": model} for model in models], **options}
        stages.append(found if method in BASELESS else {**found, "base_model": base})
    for found in stages:
        out = tmp_path / str(found["merge_method"])
        assert not imports_torch(found, out), found["merge_method"]
        yeam.merge(found, tmp_path / "again", device="cpu", overwrite=True)
        ours, again = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
        assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in again)


def test_torch_is_imported_where_it_is_needed(tmp_path: Path, llama: Llama) -> None:
    base, a, b = (str(llama(name, hidden=16)) for name in ("base", "a", "b"))
    found = {"merge_method": "yeam", "base_model": base, "models": [{"model": a}, {"model": b}]}
    assert imports_torch(found, tmp_path / "out")


def test_without_a_driver_the_cpu_is_chosen_without_asking(no_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert device.choose_device("auto") == device.choose_device("cpu") == device.CPU


def test_devices_are_what_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(device.choose_device("auto")) == "cuda" and str(device.choose_device("cuda:1")) == "cuda:1"
    for name, problem in (("cuda:2", "there is no device"), ("mps", "not supported"), ("gpu", "unknown device")):
        with pytest.raises(UserError, match=problem):
            device.choose_device(name)


def test_a_reading_thread_may_be_the_first_to_need_it(tmp_path: Path, llama: Llama) -> None:
    """One lane reads ahead on a thread of its own; what is no plain file comes as tensors, and is set up for the lane."""
    a, b = llama("a"), llama("b")
    torch.save(load_file(b / "model.safetensors"), b / "pytorch_model.bin")
    (b / "model.safetensors").unlink()
    found = {"merge_method": "ties", "base_model": str(a), "models": [{"model": str(b)}], "parameters": {"weight": 1}}
    one_core = "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n" if sys.platform == "linux" else ""
    command = [sys.executable, "-c", one_core + MERGE, json.dumps(found), str(tmp_path / "out"), "cpu"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"
    yeam.merge(found, tmp_path / "again", device="cpu")
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(ours[name], again[name]) for name in again)
