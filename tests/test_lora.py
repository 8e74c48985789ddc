"""LoRA adapters applied while reading, against what PEFT itself makes of the same adapter."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import whole
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from yeam.checkpoint import Checkpoint, open_checkpoint
from yeam.checkpoint.lora import LoraCheckpoint
from yeam.errors import CheckpointError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama(tied: bool = False, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True, **more,
    )  # fmt: skip


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)


def qwen3_moe() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip


def mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, tie_word_embeddings=False,
    )  # fmt: skip


def gpt_oss() -> GptOssConfig:
    """Its experts are stored (inputs, outputs), and one of its two matrices per expert is square."""
    return GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base folders by name, as transformers saves them."""
    folders = {}
    for name, config in {
        "llama": llama(), "tied": llama(tied=True), "gpt2": gpt2(), "qwen3_moe": qwen3_moe(), "mixtral": mixtral(),
        "gpt_oss": gpt_oss(),
    }.items():  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    folders["qwen3_moe fused"] = tmp_path_factory.mktemp("fused")
    AutoModelForCausalLM.from_pretrained(folders["qwen3_moe"]).save_pretrained(
        folders["qwen3_moe fused"], save_original_format=False
    )
    return folders


def train(base: Path, folder: Path, before: Any = None, **config: Any) -> PreTrainedModel:
    """Save an adapter with random values under `folder`; returns the model with it, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if before:
            before(model)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **config}))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                    if "magnitude" in name:
                        parameter.abs_().add_(0.1)
        model.save_pretrained(folder)
        return model.eval()


def merged(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.merge_and_unload().state_dict()


def assert_equals(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor of `expected`, whole and in random ranges of rows, into a buffer that is too large."""
    dice = random.Random(0)
    assert set(expected) == set(checkpoint.tensors) | set(checkpoint.aliases)
    for name, tensor in expected.items():
        name = checkpoint.aliases.get(name, name)
        torch.testing.assert_close(whole(checkpoint, name).float(), tensor, rtol=1e-6, atol=1e-6)
        row = checkpoint.tensors[name].shape[-1]
        buffer = torch.full((tensor.numel() * 8,), 255, dtype=torch.uint8)
        for _ in range(5):
            start, stop = sorted(dice.sample(range(tensor.numel() // row + 1), 2))
            part = checkpoint.read(name, start * row, stop * row, buffer)
            assert part.data_ptr() == buffer.data_ptr()
            torch.testing.assert_close(part.float(), tensor.reshape(-1)[start * row : stop * row], rtol=1e-6, atol=1e-6)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": [*ATTENTION, "up_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 5, r"^model.layers.1.self_attn.k_proj": 2, "proj": 7},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.(q|v)_proj": 11, "self_attn.k_proj": 2},
        },
    ),
    "one layer": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "whole modules": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "lora_bias": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "all biases": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "lora_only biases": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 39]}),
    "tokens by name": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [0, 9]}}),
    "tied tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "dora embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "conv1d wte": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [1, 5]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yeam.checkpoint.lora._NORM_TILE", 100)  # so that tiny matrices, too, have several tiles
    base, config = CASES[case]
    expected = merged(train(bases[base], tmp_path, **config))
    checkpoint = open_checkpoint(str(bases[base]), lora=(str(tmp_path), None))
    if base in ("tied", "gpt2"):  # still tied: the head is not a tensor of its own
        expected.pop("lm_head.weight")
    assert_equals(checkpoint, expected)
    assert checkpoint.config == json.loads((bases[base] / "config.json").read_text())


@pytest.mark.parametrize("base", ["qwen3_moe", "qwen3_moe fused", "mixtral", "gpt_oss"])
def test_expert_parameters(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """`target_parameters` on fused experts, over a base that stores them fused or, as on the Hub, one by one."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    alpha = {r".*experts\.down_proj": 9}
    model = train(bases[base], tmp_path, target_modules=[], target_parameters=parameters, alpha_pattern=alpha)
    model = model.merge_and_unload()
    saved = tmp_path / "merged"
    model.save_pretrained(saved, save_original_format="fused" not in base)
    checkpoint = open_checkpoint(str(bases[base]), lora=(str(tmp_path), None))
    assert_equals(checkpoint, load_file(saved / "model.safetensors"))
    changed = [name for name in checkpoint.tensors if "expert" in name and "bias" not in name]
    before = open_checkpoint(str(bases[base]))
    assert not any(torch.equal(whole(checkpoint, name), whole(before, name)) for name in changed)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 9)[None]).logits


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_tied_embeddings_compute_what_was_trained(config: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    """Saved and loaded again, the model computes what it computed in training, tied or untied as it was there."""
    expected = logits(train(bases["tied"], tmp_path / "adapter", **config))
    checkpoint = open_checkpoint(str(bases["tied"]), lora=(str(tmp_path / "adapter"), None))
    keeps = config.get("ensure_weight_tying", False)
    assert checkpoint.config["tie_word_embeddings"] is keeps
    assert ("lm_head.weight" in checkpoint.tensors) is not keeps
    saved = tmp_path / "saved"
    saved.mkdir()
    save_file(
        {name: whole(checkpoint, name) for name in checkpoint.tensors}, saved / "model.safetensors", {"format": "pt"}
    )
    (saved / "config.json").write_text(json.dumps(checkpoint.config))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(saved)), expected, rtol=1e-4, atol=1e-4)


def test_grown_vocabulary(bases: dict[str, Path], tmp_path: Path) -> None:
    model = train(
        bases["llama"], tmp_path, lambda m: m.resize_token_embeddings(44), target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    checkpoint = open_checkpoint(str(bases["llama"]), lora=(str(tmp_path), None))
    assert checkpoint.config["vocab_size"] == 44
    assert_equals(checkpoint, merged(model))


def test_names_without_the_container(bases: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 on the Hub has `h.0.…` where the model, and so the adapter, has `transformer.h.0.…`."""
    model = train(bases["gpt2"], tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    stored = load_file(bases["gpt2"] / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}, bare / "model.safetensors"
    )
    (bare / "config.json").write_bytes((bases["gpt2"] / "config.json").read_bytes())
    checkpoint = open_checkpoint(str(bare), lora=(str(tmp_path / "adapter"), None))
    expected = {name.removeprefix("transformer."): tensor for name, tensor in merged(model).items()}
    assert_equals(checkpoint, {name: expected[name] for name in checkpoint.tensors})


def test_half_precision_base_reads_as_float32(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.bfloat16).save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder), lora=(str(tmp_path / "adapter"), None))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (checkpoint.tensors[name].dtype, checkpoint.natural_dtype(name)) == ("F32", "BF16")
    assert checkpoint.extent(name) is None and checkpoint.resident_bytes(name) == 2 * 3 * 16 * 4
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert checkpoint.tensors[untouched].dtype == "BF16" and checkpoint.extent(untouched) is not None
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{k}.weight"] for k in "AB")
    base = open_checkpoint(str(folder)).read(name, 0, 256).view(16, 16).float()
    torch.testing.assert_close(whole(checkpoint, name), base + 5 / 3 * b @ a, rtol=0, atol=1e-6)
    changed = {name for name in checkpoint.tensors if checkpoint.natural_dtype(name) != checkpoint.tensors[name].dtype}
    assert changed == {n for n in checkpoint.tensors if n.endswith("q_proj.weight")}


@pytest.mark.parametrize("dora", [False, True])
def test_convolution(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("patches", torch.nn.Conv2d(3, 8, 2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["patches"], use_dora=dora))
    torch.nn.init.normal_(adapted.base_model.model.patches.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(str(tmp_path), lora=(str(tmp_path / "adapter"), None))
    assert_equals(checkpoint, merged(adapted))


def test_threads(bases: dict[str, Path], tmp_path: Path) -> None:
    """Rows of many tensors at once, in any order: as many factors as are remembered, and more."""
    config = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True}
    expected = merged(train(bases["gpt2"], tmp_path, **config))
    checkpoint = open_checkpoint(str(bases["gpt2"]), lora=(str(tmp_path), None))
    rows = [(n, r) for n, info in checkpoint.tensors.items() if len(info.shape) > 1 for r in range(info.shape[0])]
    random.Random(0).shuffle(rows)

    def right(place: tuple[str, int]) -> bool:
        name, row = place
        width = checkpoint.tensors[name].shape[1]
        return checkpoint.read(name, row * width, (row + 1) * width).allclose(expected[name][row], 1e-6, 1e-6)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, rows))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"r": 4}, "rank 3"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"lora_alpha": 1e308}, "lora_alpha 1e.308"),
        ({"lora_alpha": True}, "lora_alpha True"),
        ({"rank_pattern": "["}, "rank_pattern is '\\['"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern is"),
        ({"alpha_pattern": 2.5}, "alpha_pattern is 2.5"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is"),
        ({"target_parameters": [None]}, "target_parameters is"),
        ({"rank_pattern": {"(([a-z_.0-9])+)+!": 2}}, "could take for ever"),
        ({"rank_pattern": {"(a|a)*!": 2}}, "could take for ever"),
        ({"alpha_pattern": {".*.*.*.*!": 2.0}}, "could take for ever"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], tmp_path, target_modules=["q_proj"])
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(bases["llama"]), lora=(str(tmp_path), None))
    assert str(tmp_path) in caught.value.message and caught.value.remedy


def test_patterns_as_people_write_them(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], tmp_path, target_modules=["q_proj"])
    for pattern in (
        r"model\.layers\.\d+\.self_attn\.q_proj",
        r".*\.(0|1|[2-9*+])\..*q_proj",
        "^model.layers.(0|1).self_attn.q_.{3,4}",
    ):
        edit(tmp_path, rank_pattern={pattern: 3}, r=8)
        open_checkpoint(str(bases["llama"]), lora=(str(tmp_path), None)).close()


def test_factors_of_another_type(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], tmp_path, target_modules=["q_proj"])
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name: value.to(torch.complex64) for name, value in weights.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"lora_A.* is of type C64, not of real numbers"):
        open_checkpoint(str(bases["llama"]), lora=(str(tmp_path), None))


def test_adapter_of_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], tmp_path, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"lora_A.*\n.*base that the adapter was trained on"):
        open_checkpoint(str(bases["gpt2"]), lora=(str(tmp_path), None))
    larger = tmp_path / "larger"
    AutoModelForCausalLM.from_config(llama(head_dim=8)).save_pretrained(larger)
    with pytest.raises(
        CheckpointError, match=r"q_proj.*\[16, 3\].* does not fit .*\[32, 16\] in the base \S+/larger\n"
    ):
        open_checkpoint(str(larger), lora=(str(tmp_path), None), reference=f"{larger}+{tmp_path}")


def test_adapter_on_a_model_of_the_same_shapes(bases: dict[str, Path], tmp_path: Path) -> None:
    """It fits, but the model is not what the adapter names: a note says so, without the folders of the one who trained it."""
    train(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    named = bases["llama"].name
    for place, told in ((tmp_path / "other", True), (tmp_path / "copies" / named, False)):
        shutil.copytree(bases["llama"], place)
        notes = open_checkpoint(str(place), lora=(str(tmp_path / "adapter"), None)).notes
        assert [note for note in notes if note.startswith(f"its adapter names {named} as its base")] == [
            notes[-1]
        ] * told


def test_bias_of_an_adapter_without_one_in_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], tmp_path, target_modules=["gate_proj"], lora_bias=True)
    with pytest.raises(CheckpointError, match=r"lora_B\.bias.*\n.*without lora_bias"):
        open_checkpoint(str(bases["llama"]), lora=(str(tmp_path), None))


def test_square_conv1d_without_flag(bases: dict[str, Path], tmp_path: Path) -> None:
    """A square matrix does not show how it is stored; the family does, whatever the config's flag says."""
    expected = merged(train(bases["gpt2"], tmp_path, target_modules=["attn.c_proj"], fan_in_fan_out=True))
    edit(tmp_path, fan_in_fan_out=False)
    expected.pop("lm_head.weight")
    assert_equals(LoraCheckpoint(open_checkpoint(str(bases["gpt2"])), tmp_path), expected)
