"""Fixtures for tests that merge: tiny models on disk, recipes, and the command line in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "PYTEST_XDIST_WORKER" in os.environ:  # torch reads it when it is imported: workers do not fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import forked
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file
from typer.testing import CliRunner

if TYPE_CHECKING:
    from yeam.checkpoint import Checkpoint

# no test depends on how busy the machine is, nor on luck: `--hypothesis-profile default` looks for new examples
settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
REPOSITORY = Path(__file__).parents[1]
Llama = Callable[..., Path]  # the fixture `llama`
WEIGHTS = "model.safetensors"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
os.environ.pop("HF_HUB_OFFLINE", None)  # a server on this machine stands in for the Hub


def llama_tensors(
    seed: int = 0, *, hidden: int = 16, layers: int = 2, vocab: int = 32, tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Random weights with the names and shapes of a LlamaForCausalLM: 2 heads, 1 key/value head, MLP of 2 × hidden."""
    generator = torch.Generator().manual_seed(seed)
    half = hidden // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        parts = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (half, hidden), "self_attn.v_proj": (half, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (2 * hidden, hidden),
            "mlp.up_proj": (2 * hidden, hidden), "mlp.down_proj": (hidden, 2 * hidden),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def llama_config(
    *, hidden: int = 16, layers: int = 2, vocab: int = 32, tied: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The config.json that belongs to `llama_tensors`."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "intermediate_size": 2 * hidden, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": vocab,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "bos_token_id": 1,
        "eos_token_id": 2, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def save_model(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """Write a model folder as transformers lays it out; `config` None leaves config.json out."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name] for name in names}, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def whole(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of a checkpoint in its shape."""
    info = checkpoint.tensors[name]
    return checkpoint.read(name, 0, info.numel).view(info.shape)


@pytest.fixture
def llama(tmp_path: Path) -> Llama:
    """`llama("a", seed=1, layers=2, vocab=32, dtype=torch.bfloat16, shards=2, change={}, config={})` makes tmp_path/a.

    `change` replaces or adds tensors (None drops one), `config` updates config.json; the seed follows from the name.
    """

    def build(
        name: str, seed: int | None = None, *, shards: int = 1, change: Mapping[str, torch.Tensor | None] | None = None,
        config: Mapping[str, Any] | None = None, **kind: Any,
    ) -> Path:  # fmt: skip
        tensors = llama_tensors(sum(name.encode()) if seed is None else seed, **kind)
        changed = {**tensors, **(change or {})}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        return save_model(tmp_path / name, kept, {**llama_config(**kind), **(config or {})}, shards)

    return build


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """`recipe(a, b, merge_method="linear", ...)` writes tmp_path/recipe.yaml over these models.

    A model is a path, or a mapping for a whole `models:` entry; keywords are top-level keys. For `linear`, the default,
    every model has weight 1 unless `parameters` are given.
    """

    def write(*models: Path | str | Mapping[str, Any], file: str = "recipe.yaml", **keys: Any) -> Path:
        content: dict[str, Any] = {"merge_method": "linear"}
        if keys.get("merge_method", "linear") == "linear":
            content["parameters"] = {"weight": 1.0}
        if models:
            content["models"] = [m if isinstance(m, Mapping) else {"model": str(m)} for m in models]
        for key, value in keys.items():
            content[key] = str(value) if isinstance(value, Path) else value
        path = tmp_path / file
        path.write_text(json.dumps(content, indent=1))  # JSON is YAML
        return path

    return write


@pytest.fixture
def pair(llama: Llama, recipe: Callable[..., Path]) -> Path:
    """A recipe over two models."""
    return recipe(llama("a"), llama("b", shards=2))


def command(*words: object) -> list[str]:
    """The command line of `python -m yeam …`."""
    return [sys.executable, "-m", "yeam", *(str(word) for word in words)]


def environment(**more: str) -> dict[str, str]:
    """The environment for a child process that imports the package as the tests do, on one thread."""
    path = os.pathsep.join(filter(None, [str(forked.PACKAGE), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def yeam_process(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`yeam_process("merge", recipe, out)` runs the command line in a process of its own, in tmp_path."""

    def run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        return forked.begun(words, tmp_path, tmp_path_factory.mktemp("said"), **more).ended()

    return run


def snapshot(*folders: Path) -> dict[Path, tuple[int, str]]:
    """Every file in the folders: its modification time and a hash of its bytes."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def same_output(one: Path, other: Path) -> None:
    """The two folders hold the same bytes; the reports may differ in where and when."""
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    reports = [json.loads((folder / "yeam_report.json").read_text()) for folder in (one, other)]
    for report in reports:
        del report["out"], report["seconds"], report["resumed"]
    assert reports[0] == reports[1]
    for name in set(files) - {"yeam_report.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """`refused(["merge", recipe, out], "text", ..., status=2, inputs=[a, b])` runs a command that must fail cleanly.

    Checks the exit status, one message and one JSON object that say the same and contain every text, no traceback, a
    remedy, and that the input folders are as they were. Returns the message.
    """

    def run(words: Sequence[object], *texts: str, status: int = 2, inputs: Sequence[Path] = ()) -> str:
        from yeam.cli.app import app

        before = snapshot(*inputs)
        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert result.exit_code == status, (result.stderr, result.exception)
        said = json.loads(result.stdout)
        assert said.keys() == {"error", "remedy", "status"} and said["status"] == status
        remedy = f"  {said['remedy']}\n" if said["remedy"] else ""
        assert result.stderr == f"error: {said['error']}\n{remedy}" and "Traceback" not in result.stderr
        assert remedy or "did you mean" in said["error"] or "is not usable: " in said["error"]
        assert [text for text in texts if text not in result.stderr] == [], result.stderr
        assert snapshot(*inputs) == before
        return result.stderr

    return run
