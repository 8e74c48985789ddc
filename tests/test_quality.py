"""The arithmetic of tests/benchmarks/quality on toy data: splits, scores, the search for a strength, a cell, standard errors."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import yeam

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from quality import rows, sampling, stress, subsets, tasks
from quality.cache import Cache
from quality.cells import Bench, Cell, measure
from quality.family import Spec
from quality.report import margin_of, mean_of, over_seeds, standing
from quality.rivals import named
from quality.rows import EXPERTS, Rows
from quality.scoring import Reader
from quality.strength import COARSE, STEPS_PER_DOUBLING, best_of, climb, grid
from quality.table import table
from quality.texts import Item
from quality.tuning import Regime, fine_tune, fit


@given(st.integers(-30, 30), st.floats(0.1, 3), st.floats(0.1, 3), st.integers(-20, 20))
def test_the_climb_finds_the_best_point_of_the_whole_grid(top: int, left: float, right: float, start: int) -> None:
    def curve(i: int) -> float:  # rises, then falls, at any two speeds
        return -left * (top - i) if i <= top else -right * (i - top)

    tried = climb(curve, start)
    assert best_of(tried) == top
    assert {top - 1, top + 1} <= tried.keys()  # the optimum is inside
    assert len(tried) < 30
    assert grid(0.4, STEPS_PER_DOUBLING) == 0.8


@given(st.floats(-30, 30), st.floats(0.01, 3), st.integers(-20, 20))
def test_the_coarse_climb_finds_the_top_of_a_parabola(top: float, bend: float, start: int) -> None:
    tried = climb(lambda i: -bend * (i - top) ** 2, start, COARSE)
    best = best_of(tried)
    assert abs(best - top) <= 0.5 + 1e-6
    assert min(tried) < best < max(tried)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    losses = torch.randn(8, generator=torch.Generator().manual_seed(0)).tolist()
    base: sampling.Scores = [(0.0, 5)] * 8
    own: sampling.Scores = [(1.0, 5)] * 8
    found: sampling.Scores = [(loss, 5) for loss in losses]
    without = {"code": [sampling.recovery(found, base, own, j) for j in range(8)]}
    expected = float(torch.tensor(losses).std()) / math.sqrt(8)
    assert sampling.error([(1.0, "toy", without)]) == pytest.approx(expected)
    assert sampling.error([(1.0, "toy", without), (-1.0, "toy", without)]) == pytest.approx(0)  # read on the same text
    assert sampling.error([(1.0, "toy", without), (1.0, "toy", {"names": without["code"]})]) == pytest.approx(
        expected * math.sqrt(2)
    )


class Letters:
    """A tokenizer of single characters."""

    eos_token_id = 0

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + ord(c) % 31 for c in text] for text in texts]}


def test_splits_share_nothing_and_answers_that_are_cut_off_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PROBLEMS", 5000)
    docs = tasks.strings()
    parts = {split: rows.part(docs, split) for split in ("train", "tuning", "test")}
    assert not set.intersection(*map(set, parts.values()))
    assert 0.08 < len(parts["test"]) / len(docs) < 0.12
    stream = rows.stream(Letters(), {f"d{i}": [Item("ab", "cde")] for i in range(50)})  # type: ignore[arg-type]
    found = rows.held_out(stream, 12, 100, whole=True)
    assert found.ids_BT.shape == (20, 12)
    for row in found.answers_BT:
        counts = torch.bincount(row)[1:]
        assert set(counts[counts > 0].tolist()) == {3}  # every answer that is scored is there whole
        assert 1 <= int((counts > 0).sum()) <= 2
    for ids, answers in zip(found.ids_BT, found.answers_BT):
        assert all(int(t) in {1 + ord(c) % 31 for c in "cde"} for t in ids[answers > 0])
    text = rows.stream(Letters(), {"d": [Item("", "abc")]})  # type: ignore[arg-type]
    assert text.ids_BT.tolist()[0][-1] == Letters.eos_token_id


def test_subsets_are_spread_evenly_over_the_experts() -> None:
    chosen = subsets.chosen([2, 3], 8)
    assert len(chosen) == len(set(chosen)) == 16
    counts = [sum(e in subset for subset in chosen[:8]) for e in EXPERTS]
    assert min(counts) >= 1 and max(counts) <= 3
    assert subsets.chosen([2], 8) == chosen[:8]
    assert subsets.parsed("code+german") == [("code", "german")]
    with pytest.raises(SystemExit, match="gemran"):
        subsets.parsed("code+gemran")


CONFIG: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": True, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def counting(step: int, seed: int) -> Rows:
    """A stream that counts up by `step` among the ids 3 to 31, with a jump now and then."""
    generator = torch.Generator().manual_seed(seed)
    ids, at = [], 0
    for jump in torch.rand(1200, generator=generator):
        at = int(29 * 10 * jump) if jump < 0.1 else at + step
        ids.append(3 + at % 29)
    return Rows(torch.tensor([ids]), torch.ones(1, 1200, dtype=torch.long))


class Toy:
    """Stands in for a `Family`: a base and two experts on disk that count by one and by two."""

    def __init__(self, work: Path) -> None:
        self.spec = Spec("toy", 1, (Regime("short", 30, 1e-2, 4),), length=16, tuning_rows=8, test_rows=8)
        self.seed, self.base = 0, work / "base"
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
        both = [counting(1, 1), counting(2, 2)]
        fit(model, both, steps=30, rate=1e-2, batch=4, length=16, seed=0, label="base")
        model.to(torch.bfloat16).save_pretrained(self.base)
        for step, name in enumerate(("code", "russian"), 1):
            expert = fine_tune(
                self.load(self.base), both[step - 1], self.spec.regimes[0], length=16, seed=step, label=name
            )
            expert.to(torch.bfloat16).save_pretrained(work / name)
        self.own = {name: work / name for name in ("code", "russian")}

    def load(self, folder: Path) -> Any:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def held_out(self, domain: str, split: str) -> Rows:
        stream = counting({"code": 1, "russian": 2, "neutral": 3}[domain], {"tuning": 5, "test": 6}[split])
        return rows.held_out(stream, 16, 8, whole=False)


def test_a_cell_from_training_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = Toy(tmp_path)
    bench = Bench(family, Cache(tmp_path / "steps"))
    cell = Cell("toy", 0, "short", "subset", tuple(family.own.values()), family.own)
    rivals = named(["linear", "task_arithmetic", "iso_c"])
    assert measure(bench, cell, rivals, only_known=True) is None
    found = measure(bench, cell, rivals)
    assert found is not None and found["domains"] == ["code", "russian"]

    # YeAM's row is what `yeam merge` writes
    config = {
        "merge_method": "yeam",
        "base_model": str(family.base),
        "models": [{"model": str(f)} for f in cell.sources],
    }
    yeam.merge(config, tmp_path / "out")
    base = bench.score_of(family.base, "code", "test").loss
    own = bench.score_of(family.own["code"], "code", "test").loss
    written = bench.score_of(tmp_path / "out", "code", "test").loss
    assert own < written < base
    assert math.isclose(
        found["methods"]["yeam"]["default"]["recovery"]["code"], (base - written) / (base - own), abs_tol=1e-4
    )

    # linear and task arithmetic walk one line, on grids of their own
    linear, arithmetic = (found["methods"][name] for name in ("linear", "task_arithmetic"))
    tensors = [load_file(f / "model.safetensors") for f in (family.base, *cell.sources)]
    strength = arithmetic["tuned"]["strength"]
    line = {n: b.float() + strength * sum(t[n].float() - b.float() for t in tensors[1:]) for n, b in tensors[0].items()}
    bench.reader.take(line)
    loss = bench.reader.score(family.held_out("russian", "test")).loss
    gain = bench.gains(cell, "test")["russian"]
    assert math.isclose(arithmetic["tuned"]["recovery"]["russian"], (-loss - gain[0]) / gain[1], abs_tol=1e-3)
    assert abs(linear["tuned"]["on_tuning_split"] - arithmetic["tuned"]["on_tuning_split"]) < 0.05
    for result in (linear, arithmetic):
        values = [v for line in result["lines"] for v in line["tried"].values()]
        assert max(values) == result["tuned"]["on_tuning_split"]
    assert len(found["methods"]["iso_c"]["lines"]) == 2

    # everything is kept: nothing is read again, and a changed strength is another step
    forwards = bench.reader.forwards
    assert measure(bench, cell, rivals, only_known=True) == found
    assert bench.reader.forwards == forwards
    other = dataclasses.replace(rivals[0], strength=0.5)
    assert measure(bench, cell, [other], only_known=True) is None

    expert = {"family": "toy", "regime": "short", "displacement": 0.1, "loss": [2.0, 1.0], "exact": None}
    monkeypatch.setattr(sys, "argv", ["quality"])
    fewer = {**found, "seed": 1, "domains": ["code"], "left_out": ["russian"]}
    text = table([found, fewer, {**found, "kind": "eight"}], [expert])
    assert f"**{found['methods']['yeam']['default']['mean']:.3f} ± " in text and "eight: code russian |" in text
    assert "| code russian (not told: russian in 1 of 2) | 2 |" in text

    half = stress.scaled(family, family.own["code"], "half", 0.5)
    ratio = stress.displacement(family.base, half) / stress.displacement(family.base, family.own["code"])
    assert math.isclose(ratio, 0.5, rel_tol=0.02)


def test_exact_answers_are_what_greedy_decoding_gives() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    model.generation_config.eos_token_id = None
    fit(model, [counting(1, 1)], steps=40, rate=1e-2, batch=4, length=16, seed=0, label="toy")
    ids_BT = counting(1, 9).ids_BT[0, :960].view(60, 16)
    answers_BT = torch.zeros_like(ids_BT)
    answers_BT[:, 13:] = torch.arange(1, 61)[:, None]
    score = Reader(model, torch.float32).score(Rows(ids_BT, answers_BT))
    greedy = model.generate(ids_BT[:, :13], attention_mask=torch.ones(60, 13), max_new_tokens=3, do_sample=False)
    expected = float((greedy[:, 13:] == ids_BT[:, 13:]).all(dim=1).float().mean())
    assert 0 < expected < 1
    assert score.exact == pytest.approx(expected)


def test_errors_are_over_seeds_and_the_standing_counts_cells() -> None:
    found = over_seeds([(0, 1.0), (0, 3.0), (1, 4.0), (2, 6.0)])  # the means of the seeds are 2, 4 and 6
    assert found.value == 4 and found.count == 4
    assert math.isclose(found.error, 2 / math.sqrt(3))
    assert math.isnan(over_seeds([(0, 1.0)]).error)

    def cell(ours: float, default: float, tuned: float) -> dict[str, Any]:
        entry = {"default": {"mean": default}, "tuned": {"mean": tuned}}
        return {"seed": 0, "methods": {"yeam": {"default": {"mean": ours}}, "a": entry, "b": entry}}

    def read(seed: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
        def entry(parts: list[float]) -> dict[str, Any]:
            return {
                "mean": sum(parts) / len(parts),
                "without": {"code": [(sum(parts) - p) / (len(parts) - 1) for p in parts]},
            }

        methods = {
            name: dict.fromkeys(("default", "tuned"), entry(p)) for name, p in {"yeam": ours, "a": theirs}.items()
        }
        return {"family": "toy", "seed": seed, "methods": methods}

    cells = [read(0, [0.0, 2.0], [0.5, 2.5]), read(1, [2.0, 4.0], [1.0, 3.0])]
    found = mean_of(cells, "yeam", "default", "mean")  # of 1 and 3; of both read on one text, 0 + 2 and 2 + 4
    assert found.value == 2 and found.error == pytest.approx(math.hypot(1, 1))
    assert mean_of(cells[:1], "yeam", "default", "mean").error == pytest.approx(1)
    found = margin_of(cells, ["a"])  # -0.5 and 1, the same on both parts of the text
    assert found.value == pytest.approx(0.25) and found.error == pytest.approx(0.75)
    assert format(found, "+") == "+0.250 ± 0.750"

    place = standing([cell(0.5, 0.4, 0.5), cell(0.5, 0.4, 0.6), cell(0.5, 0.5, 0.52)])
    assert (place.cells, place.above_tuned, place.above_defaults) == (3, 1, 2)
    assert place.worst == pytest.approx(-0.1)
