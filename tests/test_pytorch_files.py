"""The reader of PyTorch files: ties, views and nesting as torch saves them; nothing in them is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import whole
from transformers import AutoModelForCausalLM, LlamaConfig

from yeam.checkpoint import open_checkpoint
from yeam.errors import CheckpointError


def test_transformers_saves_bin_with_ties(tmp_path: Path) -> None:
    """A tied model saved as one `.bin` and as shards, and its config: equal tensors, the head an alias."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    one = open_checkpoint(str(tmp_path))
    assert one.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert one.config["hidden_size"] == 16
    stamp = one.fingerprint()

    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for position, (name, tensor) in enumerate(state.items()):
        shards[position % 2][name] = tensor.clone()
    weight_map = {name: f"pytorch_model-{i}.bin" for i, shard in enumerate(shards) for name in shard}
    for i, shard in enumerate(shards):
        torch.save(shard, tmp_path / f"pytorch_model-{i}.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    two = open_checkpoint(str(tmp_path))
    assert set(two.tensors) == set(state) and not two.aliases
    for name, tensor in state.items():
        assert whole(one, one.aliases.get(name, name)).equal(tensor) and whole(two, name).equal(tensor)
    assert two.fingerprint() != stamp
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {**weight_map, "ghost": "pytorch_model-0.bin"}})
    )
    with pytest.raises(CheckpointError, match=r"places 'ghost' in pytorch_model-0.bin"):
        open_checkpoint(str(tmp_path))


def test_nested_strided_and_foreign_entries(tmp_path: Path) -> None:
    big = torch.randn(6, 5, 4)
    tensors = {
        "p": torch.nn.Parameter(torch.randn(3, 2)), "t": big.permute(2, 0, 1), "s": big[1:4, 2], "f": big[0].bfloat16(),
        "scalar": torch.tensor(2), "e": torch.empty(0, 3), "z": torch.ones(1).expand(4, 3),
    }  # fmt: skip
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {**tensors, "step": 3}, "epoch": 1, "optimizer": {"x": torch.ones(3)}}, path)
    checkpoint = open_checkpoint(str(path))
    assert set(checkpoint.tensors) == set(tensors)
    assert "'epoch', 'optimizer', 'step'" in checkpoint.notes[0]
    for name, tensor in tensors.items():
        assert whole(checkpoint, name).equal(tensor.detach())
        row = tensor.shape[-1] if tensor.dim() else 1
        for start in range(0, tensor.numel(), row):
            stop = min(tensor.numel(), start + 2 * row)
            part = checkpoint.read(name, start, stop, torch.empty(1000, dtype=torch.uint8))
            assert part.equal(tensor.detach().reshape(-1)[start:stop])


class _Touch:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_malicious_pickle_is_refused(tmp_path: Path) -> None:
    victim, path = tmp_path / "created", tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2), "x": _Touch(str(victim))}, path)
    with pytest.raises(CheckpointError, match=r"refused.*posix.system.*nothing was executed") as caught:
        open_checkpoint(str(tmp_path))
    assert str(path) in caught.value.message and caught.value.remedy
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the same file does create it where nobody cares
    assert victim.exists()


def test_bad_pytorch_files(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"not in PyTorch's zip format.*\n.*torch.save"):
        open_checkpoint(str(path))
    torch.save({"w": torch.ones(2000)}, path)
    os.truncate(path, 4000)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(str(path))
    torch.save({"w": torch.ones(2)}, path)
    whole = path.read_bytes()
    name = whole.rindex(b"data.pkl")
    newer = whole.replace(b"PK\x01\x02\x00\x00\x00\x00", b"PK\x01\x02\x00\x00\x83\x00")
    for damaged in (whole[:name] + b"\xff" + whole[name + 1 :], newer):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{path}: "):
            open_checkpoint(str(path))
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        open_checkpoint(str(path))
    torch.save({"w": torch.ones(2).to_sparse()}, path)
    with pytest.raises(CheckpointError, match="'w' is sparse"):
        open_checkpoint(str(path))
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, path)
    with pytest.raises(CheckpointError, match=r"'w' has the dtype torch.complex128"):
        open_checkpoint(str(path))
