"""Slices that repeat layers with `tie:`: stored once where the family shares layers, told where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import yeam
from yeam.errors import ConfigError


def slices(*ranges: tuple[object, int, int, bool], **keys: Any) -> dict[str, Any]:
    pieces = [
        {"sources": [{"model": str(model), "layer_range": [first, end]}], **({"tie": True} if tie else {})}
        for model, first, end, tie in ranges
    ]
    return {"merge_method": "passthrough", "slices": pieces, **keys}


def test_tied_layers_are_written_again_where_the_format_has_no_aliases(
    llama: Callable[..., Path], tmp_path: Path
) -> None:
    a = llama("a", layers=3)
    report = yeam.merge(slices((a, 0, 3, False), (a, 1, 3, True)), tmp_path / "out")
    layer = sum(tensor.nbytes for name, tensor in load_file(a / "model.safetensors").items() if ".layers.1." in name)
    assert report.notes == [
        f"tie: model.layers: layers 3, 4 repeat earlier ones and cannot be stored once, so {2 * layer:,} bytes are written "
        "again: safetensors has no aliases, and llama loads every layer under its own name"
    ]
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").model
    for again, first in ((3, 1), (4, 2)):
        theirs = dict(model.layers[first].named_parameters())
        assert all(torch.equal(value, theirs[name]) for name, value in model.layers[again].named_parameters())


def test_what_repeats_nothing_cannot_be_tied(llama: Callable[..., Path], tmp_path: Path) -> None:
    a, b = llama("a", layers=3), llama("b", layers=3)
    with pytest.raises(
        ConfigError, match=r"slices\[1\].tie: model.layers.2 is to be tied, and repeats no earlier layer"
    ):
        yeam.plan(slices((a, 0, 2, False), (a, 2, 3, True)))
    with pytest.raises(ConfigError, match=r"model.layers.2 is to be tied"):
        yeam.plan(slices((a, 0, 2, False), (b, 0, 1, True)))
    scaled = slices((a, 0, 2, False), (a, 0, 1, True))
    scaled["slices"][1]["parameters"] = {"scale": [{"filter": "o_proj", "value": 0.5}]}
    with pytest.raises(
        ConfigError, match=r"of the same layers as model.layers.0, but self_attn.o_proj.weight has other"
    ):
        yeam.plan(scaled)


def albert(folder: Path, groups: int, layers: int) -> Path:
    torch.manual_seed(groups)
    config = tf.AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=16, num_hidden_layers=layers, num_hidden_groups=groups,
        num_attention_heads=2, intermediate_size=32, inner_group_num=1,
    )  # fmt: skip
    model = tf.AlbertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def test_a_family_that_shares_layers_stores_a_tied_one_once(tmp_path: Path) -> None:
    source = albert(tmp_path / "albert", groups=2, layers=4)  # each group is applied twice
    recipe = slices((source, 0, 1, False), (source, 0, 1, True), (source, 1, 2, False), (source, 1, 2, True))
    report = yeam.merge(recipe, tmp_path / "out")
    assert report.notes == [] and report.totals["bytes"] == yeam.plan(slices((source, 0, 2, False))).total_bytes
    deeper = tf.AlbertForMaskedLM.from_pretrained(source, num_hidden_layers=8)  # the same groups, four times each
    merged, problems = tf.AlbertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not problems["missing_keys"] and (merged.config.num_hidden_layers, merged.config.num_hidden_groups) == (8, 2)
    tokens = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(tokens).logits, deeper.eval()(tokens).logits)
    uneven = yeam.plan(slices((source, 0, 2, False), (source, 0, 1, True)))
    assert [note for note in uneven.notes if "albert shares only layers that follow each other" in note]
