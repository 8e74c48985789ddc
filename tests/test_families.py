"""Tabled families against transformers: names as it writes them, layouts and flags as it computes with them.

Every tabled family is built tiny with random weights, saved, described from config.json and headers, and then computed
by `Interpreter`, which knows only sites, views and flags: a wrong role, layout or flag changes the logits.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as T
from family_models import FALCON, PLAIN, T5, TABLED, TEXT, Saved, save, saved
from interpreter import Interpreter

from yeam.families import GROUPS, ROLES, View, aliases_of, describe, tied

BIDIRECTIONAL = ("bert", "roberta")


IDS = torch.tensor([5, 17, 3, 80, 44, 9, 61])
DECODER_IDS = torch.tensor([0, 33, 7, 12])


def interpret(label: str, **flags: Any) -> torch.Tensor:
    model = saved(label)
    if model.anatomy.family == "t5":
        return Interpreter(model, **flags).two_sided(IDS, DECODER_IDS)
    roberta = model.anatomy.family == "roberta"
    causal = model.anatomy.family not in BIDIRECTIONAL
    return Interpreter(model, **flags).decoder_only(IDS, causal, model.config["pad_token_id"] + 1 if roberta else 0)


@functools.cache
def expected(label: str) -> torch.Tensor:
    model = saved(label)
    more = {"decoder_input_ids": DECODER_IDS[None]} if model.anatomy.family == "t5" else {}
    with torch.no_grad():
        return model.model(input_ids=IDS[None], **more).logits[0]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("label", TABLED)
def test_flags_sites_and_views_compute_what_transformers_computes(label: str) -> None:
    # transformers computes norms and softmax in float32 whatever the weights are
    assert error(interpret(label), expected(label)) < 1e-5


@pytest.mark.parametrize(
    ("label", "flags"),
    [
        ("llama", {"norm": "rms1p"}),
        ("llama", {"norm": "ln"}),
        ("llama", {"rope": "interleaved"}),
        ("llama", {"rotary": 0.5}),
        ("llama", {"parallel": True}),
        ("gemma3", {"scalars": {}}),
        ("gemma2", {"placement": "pre"}),
        ("olmo2", {"qk_norm": "none"}),
        ("cohere", {"rope": "half"}),
        ("gpt_neox", {"parallel": False}),
        ("bert", {"position": "rope"}),
    ],
)
def test_a_wrong_flag_would_be_seen(label: str, flags: dict[str, Any]) -> None:
    assert error(interpret(label, **flags), expected(label)) > 1e-3


@pytest.mark.parametrize("label", TABLED)
def test_every_tensor_of_a_tabled_family_is_known(label: str) -> None:
    model = saved(label)
    anatomy = model.anatomy
    assert anatomy.family == TABLED[label][0] and not anatomy.notes
    assert list(anatomy.tensors) == list(model.tensors)
    assert [n for n, m in anatomy.tensors.items() if m.role == "other" or m.role not in ROLES] == []
    for name, meaning in anatomy.tensors.items():
        assert (meaning.layer is None) == (meaning.stack is None) == (meaning.place != "layer")
        assert meaning.role in meaning.roles <= {*ROLES, *GROUPS}
        if meaning.layer is not None:
            assert name.startswith(f"{meaning.stack}.{meaning.layer}.")
        if meaning.view is not None:
            assert meaning.view == View.from_dict(json.loads(json.dumps(meaning.view.to_dict())))
    text = model.model.config.get_text_config()
    layers = [s for s in anatomy.stacks.values() if s.module != "vision_tower"]
    assert sum(s.count for s in layers) == text.num_hidden_layers + getattr(text, "num_decoder_layers", 0)
    per_layer = Counter(
        (m.stack, m.layer, part)
        for m in anatomy.tensors.values()
        if m.role in ("q", "k", "v", "o", "qkv") and m.module != "vision_tower" and "cross" not in m.site
        for part in (m.view.names if m.view else (m.role,))
    )
    assert per_layer == {(s.prefix, i, x): 1 for s in layers for i in range(s.count) for x in "qkvo"}


def test_places_follow_the_flow_of_the_model() -> None:
    for label, pre, post in (
        ("llama", ["model.embed_tokens.weight"], ["lm_head.weight", "model.norm.weight"]),
        ("t5", ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight"],
         ["decoder.final_layer_norm.weight", "encoder.final_layer_norm.weight"]),
    ):  # fmt: skip
        for place, names in (("pre", pre), ("post", post)):
            assert [n for n, m in saved(label).anatomy.tensors.items() if m.place == place] == names
    bert = saved("bert").anatomy.tensors
    assert {m.place for n, m in bert.items() if "embeddings" in n} == {"pre"}
    assert {m.place for n, m in bert.items() if n.startswith("cls.")} == {"post"}


@pytest.mark.parametrize("label", [x for x in TABLED if not x.startswith("t5")])
def test_ties_are_those_that_transformers_leaves_out(label: str) -> None:
    _, config_class, model_class, config = TABLED[label]
    written: dict[bool, Saved] = {}
    for tie in (False, True):
        made = config_class(**copy.deepcopy(config), tie_word_embeddings=tie)
        written[tie] = save(model_class(made))
    duplicates = set(written[False].tensors) - set(written[True].tensors)
    assert written[False].anatomy.is_tied is False and written[False].anatomy.ties == ()
    assert written[True].anatomy.is_tied is True and {pair[0] for pair in written[True].anatomy.ties} == duplicates
    assert duplicates and all(kept in written[True].tensors for _, kept in written[True].anatomy.ties)
    # a config that does not say: the class default, if the head is there; if it is not, it must be tied
    for part in (written[False].config, written[False].text):
        part.pop("tie_word_embeddings", None)
    default = config_class(**copy.deepcopy(config)).tie_word_embeddings
    assert describe(written[False].config, written[False].shapes).is_tied is default
    assert describe(written[False].config, written[True].shapes).is_tied is True


OTHER_CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mt5": (T.MT5ForConditionalGeneration, T5),
    "umt5": (T.UMT5ForConditionalGeneration, T5),
    "t5 encoder": (T.T5EncoderModel, T5),
    "t5 classifier": (T.T5ForSequenceClassification, T5),
    "xlm-roberta": (T.XLMRobertaForMaskedLM, PLAIN),
    "bert decoder": (T.BertLMHeadModel, {**PLAIN, "is_decoder": True, "add_cross_attention": True}),
    "bert pre-training": (T.BertForPreTraining, PLAIN),
    "roberta classifier": (T.RobertaForSequenceClassification, PLAIN),
    "gpt2 cross-attention": (T.GPT2LMHeadModel, {**TABLED["gpt2"][3], "add_cross_attention": True}),
    "gpt2 two heads": (T.GPT2DoubleHeadsModel, TABLED["gpt2"][3]),
    "llama classifier": (T.LlamaForSequenceClassification, TEXT),
    "llama answers": (T.LlamaForQuestionAnswering, TEXT),
    "falcon tagger": (T.FalconForTokenClassification, FALCON),
}


@pytest.mark.parametrize("label", OTHER_CLASSES)
def test_other_classes_of_tabled_families(label: str) -> None:
    model_class, config = OTHER_CLASSES[label]
    model = save(model_class(model_class.config_class(**copy.deepcopy(config))))
    assert (
        model.anatomy.family == re.split(r"[ -]", label.replace("xlm-", "").replace("um", "").replace("mt5", "t5"))[0]
    )
    assert all(m.role != "other" for m in model.anatomy.tensors.values()) and not model.anatomy.notes
    assert set(model.anatomy.ties) == set(model.model.all_tied_weights_keys.items())
    assert model.anatomy.is_tied is (True if model.model.get_output_embeddings() is not None else None)


def test_ties_of_odd_files() -> None:
    t5 = saved("t5")
    assert dict(t5.anatomy.ties) == t5.model.all_tied_weights_keys
    own_head = {**t5.shapes, "lm_head.weight": (96, 32)}
    flan = describe({**t5.config, "tie_word_embeddings": False}, own_head)  # as the v1.1 checkpoints are published
    assert flan.is_tied is False and ("lm_head.weight", "shared.weight") not in flan.ties
    llama = {n: s for n, s in saved("llama").shapes.items() if n != "model.embed_tokens.weight"}
    only_head = tied({**saved("llama").config, "tie_word_embeddings": True}, llama)
    assert only_head == [("model.embed_tokens.weight", "lm_head.weight")]
    lost = {n: s for n, s in saved("llama").shapes.items() if n != "lm_head.weight"}
    assert any("lm_head" in note for note in describe(saved("llama").config, lost).notes)
    base = describe(*_headless("llama"))
    assert base.is_tied is None and base.ties == ()
    # T5's flag says whether the decoder's output is scaled; a head in the file is its own weight all the same
    for kind in ("t5", "pop2piano"):
        assert describe({**t5.config, "model_type": kind}, own_head).is_tied is False
    # a part that draws pictures has a head, too
    draws = {**saved("qwen2").config, "tie_word_embeddings": True}
    shapes = {n: s for n, s in saved("qwen2").shapes.items() if n != "lm_head.weight"}
    shapes |= {"model.generation_head.proj_out.weight": (32, 32), "generation_head.lm_head.weight": (64, 32)}
    assert tied(draws, shapes) == [("lm_head.weight", "model.embed_tokens.weight")]


def _headless(label: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    bare = save(T.AutoModel.from_config(TABLED[label][1](**copy.deepcopy(TABLED[label][3]))))
    return bare.config, bare.shapes


@pytest.mark.parametrize(
    "label", ["llama", "gpt2", "falcon-7b", "gpt_neox", "bert", "roberta", "gemma3-vlm", "mixtral"]
)
def test_aliases_lead_from_one_way_of_saving_to_the_other(label: str) -> None:
    full = saved(label)
    config, bare = _headless(label)
    bare_anatomy = describe(config, bare)
    assert bare_anatomy.family == full.anatomy.family
    head = {"head", "classifier", "head_transform", "head_norm"}
    for name, meaning in full.anatomy.tensors.items():
        if meaning.site not in head:
            found = [x for x in (name, *aliases_of(name, full.anatomy)) if x in bare]
            assert len(found) == 1 and bare[found[0]] == full.shapes[name], name
    for name in bare_anatomy.tensors:
        if "pooler" not in name:
            assert sum(x in full.tensors for x in (name, *aliases_of(name, bare_anatomy))) == 1, name


def test_other_spellings() -> None:
    bert = saved("bert").anatomy
    assert "bert.embeddings.LayerNorm.gamma" in aliases_of("bert.embeddings.LayerNorm.weight", bert)
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): s
           for n, s in saved("bert").shapes.items()}  # fmt: skip
    assert [m.site for m in describe(saved("bert").config, old).tensors.values()] == [
        m.site for m in bert.tensors.values()
    ]
    assert "lm_head.weight" in aliases_of("embed_out.weight", saved("gpt_neox").anatomy)
    vlm = save(saved("gemma3-vlm").model, save_original_format=False)
    assert any(name.startswith("model.language_model.layers.") for name in vlm.tensors)
    for name, meaning in saved("gemma3-vlm").anatomy.tensors.items():
        counterpart = [x for x in aliases_of(name, saved("gemma3-vlm").anatomy) if x in vlm.tensors]
        assert len(counterpart) == 1 and vlm.anatomy.tensors[counterpart[0]].site == meaning.site


@pytest.mark.parametrize(
    ("kind", "inputs_first"), [("gpt_oss", True), ("llama4_text", True), ("qwen3_moe", False), ("new", True)]
)
def test_packed_experts_are_as_they_are_stored(kind: str, inputs_first: bool) -> None:
    """[experts, in, out] or [experts, out, in]: told by the hidden size, and where both sides have it not at all."""
    block = "model.layers.0.feed_forward.experts" if kind == "llama4_text" else "model.layers.0.mlp.experts"
    for width, known in ((56, inputs_first), (24, False)):
        shapes = {"gate_up_proj": (3, 48, 2 * width), "down_proj": (3, width, 48)}
        if not inputs_first:
            shapes = {name: (n, out, into) for name, (n, into, out) in shapes.items()}
        found = describe({"model_type": kind, "hidden_size": 48}, {f"{block}.{name}": s for name, s in shapes.items()})
        assert found.tensors[f"{block}.gate_up_proj"].transposed == known
        assert found.tensors[f"{block}.down_proj"].transposed == inputs_first
