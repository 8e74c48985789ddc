"""Every recipe of the gallery can be planned: models of this repository as they are, those of the Hub as tiny stand-ins.

A relative path is looked for in the current directory first, so the stand-ins simply lie there under the Hub's names.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from conftest import REPOSITORY
from peft import LoraConfig, get_peft_model

import yeam
from yeam.plugins import plugin_references
from yeam.recipe.document import read_documents
from yeam.recipe.ranges import find_ranges, parse_range
from yeam.vocabulary.files import tokenizer_files

GALLERY = sorted((REPOSITORY / "merge_configs").glob("*.yaml"))
TINY_FAMILY = REPOSITORY / "examples" / "tiny-family" / "models" / "base"
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "dtype": "bfloat16",
}  # fmt: skip
LLAMA = partial(tf.LlamaConfig, **SIZES)
MISTRAL = partial(tf.MistralConfig, **SIZES)
QWEN2 = partial(tf.Qwen2Config, **SIZES, tie_word_embeddings=True)
STAND_INS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "HuggingFaceH4/zephyr-7b-beta": MISTRAL,
    "HuggingFaceTB/SmolLM2-135M": LLAMA,
    "HuggingFaceTB/SmolLM2-135M-Instruct": LLAMA,
    "HuggingFaceTB/SmolLM2-360M-Instruct": LLAMA,
    "Intel/neural-chat-7b-v3-1": MISTRAL,
    "NousResearch/Hermes-3-Llama-3.1-8B": LLAMA,
    "NousResearch/Meta-Llama-3.1-8B": LLAMA,
    "NousResearch/Meta-Llama-3.1-8B-Instruct": LLAMA,
    "Qwen/Qwen2.5-0.5B": QWEN2,
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN2,
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN2,
    "Qwen/Qwen2.5-Coder-0.5B": QWEN2,
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": QWEN2,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": LLAMA,
    "huggyllama/llama-7b": LLAMA,
    "mistralai/Mistral-7B-Instruct-v0.1": MISTRAL,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
}
ADAPTERS = {"tloen/alpaca-lora-7b": LLAMA, "timdettmers/guanaco-7b": LLAMA}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the stand-ins under their names, and the repository's examples."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    vocabulary = len(tf.AutoTokenizer.from_pretrained(TINY_FAMILY))
    for name, config in {**STAND_INS, **ADAPTERS}.items():
        made = config()
        made.vocab_size = vocabulary
        model = tf.AutoModelForCausalLM.from_config(made)
        if name in ADAPTERS:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
            model.save_pretrained(folder / name)
            continue
        model.save_pretrained(folder / name)
        for file, path in tokenizer_files(TINY_FAMILY).items():
            shutil.copy(path, folder / name / file)
    return folder


@pytest.fixture(autouse=True)
def _there(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def first_values(recipe: Path) -> list[str]:
    """Overrides that put the value with which a search would begin in place of every range."""
    ranges = [pair for document in read_documents(recipe.read_text(), str(recipe)) for pair in find_ranges(document)]
    return [f"{'.'.join(map(str, path))}={json.dumps(parse_range(written).default)}" for path, written in ranges]


@pytest.mark.parametrize("recipe", GALLERY, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(recipe: Path) -> None:
    overrides = first_values(recipe)
    loaded = yeam.load_recipe(recipe, overrides)
    assert [str(ref) for ref in loaded.sources() if not ref.is_local()] == []
    made = yeam.plan(recipe, overrides=overrides)
    assert made.jobs and made.config is not None
    # what a user reads first is what it does and how to run it
    text = recipe.read_text()
    command = "search" if overrides else "merge"
    assert text.startswith("# ") and f"yeam {command} merge_configs/{recipe.name}" in text
    assert loaded.recipe.output is not None and loaded.recipe.output.startswith("./merged/")


@pytest.mark.parametrize(
    "name", ["chat-models-slerp", "three-experts", "lora-stack", "ties", "dare-ties", "model-stock"]
)
def test_recipes_for_the_hub_merge(name: str, tmp_path: Path) -> None:
    """With stand-ins: the result loads, and has the tokenizer and the chat template that the recipe promises."""
    out = tmp_path / "out"
    yeam.merge(REPOSITORY / "merge_configs" / f"{name}.yaml", out)
    model, info = tf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    tokenizer = tf.AutoTokenizer.from_pretrained(out)
    assert not any(info.values()) and model.config.vocab_size == len(tokenizer)
    ids = tokenizer("Once", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    if name == "three-experts":
        assert "<|start_header_id|>" in tokenizer.chat_template


def test_the_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The example as it stands: the merge keeps a part of what every expert has gained, and writes."""
    monkeypatch.setattr("sys.argv", ["pipeline.py", "--out", str(tmp_path / "out")])
    runpy.run_path(str(REPOSITORY / "examples" / "pipeline.py"), run_name="__main__")
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(("  base", "  merged"))}
    base, merged = ([float(loss) for loss in rows[name]] for name in ("base", "merged"))
    assert sum(merged) < sum(base)
    assert "'17 * 23 =" in said


def test_every_stand_in_is_in_use() -> None:
    """The table holds no name that the gallery has given up."""
    recipes = [yeam.load_recipe(recipe, first_values(recipe)) for recipe in GALLERY]
    named = {ref for loaded in recipes for ref in loaded.sources()}
    named |= {ref for loaded in recipes for _, ref in plugin_references(loaded)}
    paths = {ref.written for ref in named} | {ref.lora.written for ref in named if ref.lora is not None}
    assert {*STAND_INS, *ADAPTERS} <= paths
