"""`yeam compare`: every number against plain formulas on whole tensors, whatever the tiles; pictures, pages and bad input."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import yeam
from yeam.cli.app import app
from yeam.report.spectrum import effective_ranks

FAMILY = REPOSITORY / "examples" / "tiny-family" / "models"
PATHS = [FAMILY / name for name in ("code", "prose", "base")]


def plain_rank(x_MN: torch.Tensor) -> float:
    """exp of the entropy of the energies of the singular values."""
    energies = torch.linalg.svdvals(x_MN.double()).square()
    shares = energies / energies.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


@pytest.mark.parametrize("small", [False, True])
def test_numbers(small, monkeypatch):
    """With and without a base; the same from tiles of a few rows and panels of a wide matrix that are read again."""
    if small:
        monkeypatch.setattr("yeam.report.differences._TILE", 3000)
    a, b, base = ({k: v.double() for k, v in load_file(p / "model.safetensors").items()} for p in PATHS)
    # the Gram matrices of a 128 × 352 pair take 4 · 128² · 4 bytes, and a row of both 8 · 352: 40 rows at a time
    memory = 4 * 128 * 128 * 4 + 40 * 8 * 352 if small else "1GiB"
    found = yeam.compare(*PATHS[:2], base=PATHS[2], memory=memory, device="cpu")
    plain = yeam.compare(*PATHS[:2], memory=memory, device="cpu")
    assert found.notes == plain.notes == found.only_a == found.only_b == ()
    rows = {row.name: row for row in found.tensors}
    assert rows.keys() == a.keys() == {row.name for row in plain.tensors}
    for name, row in rows.items():
        x, y = a[name] - base[name], b[name] - base[name]
        dot = float((x * y).sum())
        assert row.relative_norm == pytest.approx(float((b[name] - a[name]).norm() / a[name].norm()), rel=1e-5)
        assert row.update_a == pytest.approx(float(x.norm() / base[name].norm()), rel=1e-5)
        assert row.update_b == pytest.approx(float(y.norm() / base[name].norm()), rel=1e-5)
        assert row.cosine == pytest.approx(dot / float(x.norm() * y.norm()), abs=1e-5)
        assert row.agreement == pytest.approx(max(0, 2 * dot / float(x.square().sum() + y.square().sum())), abs=1e-5)
        signed = (x * y) != 0
        assert row.same_sign == pytest.approx(float(((x * y) > 0).sum() / signed.sum()))
        if x.dim() == 2:
            assert row.rank_a == pytest.approx(plain_rank(x), rel=1e-3) and row.full_rank == min(x.shape)
            assert row.rank_b == pytest.approx(plain_rank(y), rel=1e-3)
        else:
            assert row.rank_a is row.rank_b is row.full_rank is None
    for row in plain.tensors:
        x, y = a[row.name], b[row.name]
        assert row.update_a is row.rank_a is None
        assert row.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-5)
        if x.dim() == 2:
            assert row.rank_b == pytest.approx(plain_rank(y - x), rel=1e-3)
    up = [name for name in a if "up_proj" in name]
    role = next(row for row in found.roles if row.role == "up")
    assert role.tensors == 4 and role.parameters == sum(a[name].numel() for name in up)
    apart = sum(float((b[n] - a[n]).square().sum()) for n in up) / sum(float(a[n].square().sum()) for n in up)
    assert role.relative_norm == pytest.approx(math.sqrt(apart), rel=1e-5)
    cell = next(row for row in found.cells if (row.role, row.layer) == ("up", 2))
    assert cell.relative_norm == rows["model.layers.2.mlp.up_proj.weight"].relative_norm
    assert found.total.parameters == sum(tensor.numel() for tensor in a.values())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(8, 40), st.integers(8, 40), st.integers(0, 999))
def test_equal_directions(rank, rows, columns, seed):
    """A matrix of `rank` equal singular values has that effective rank, tall or wide, whatever is held of it."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in (rows, columns))
    x_MN = 7.5 * left @ right.T

    def bands():
        for at in range(0, rows, 5):
            yield at, [x_MN[at : at + 5], torch.zeros(len(x_MN[at : at + 5]), columns)]

    least = 4 * min(rows, columns) ** 2 * 4
    for memory in (least, 1 << 20):
        assert effective_ranks(bands, rows, columns, 2, memory) == pytest.approx([rank, 0], abs=1e-3)
    assert effective_ranks(bands, rows, columns, 2, least - 1) is None


def test_same(llama):
    """A model and itself; a tied one and its copy with a stored head."""
    a = llama("a", tied=True)
    found = yeam.compare(a, a, base=a, device="cpu").total
    assert (found.relative_norm, found.update_a, found.cosine, found.rank_a) == (0, 0, None, 0)
    assert yeam.compare(a, a, device="cpu").total.cosine == pytest.approx(1)
    embedding = load_file(a / "model.safetensors")["model.embed_tokens.weight"]
    untied = llama(
        "u", seed=sum(b"a"), tied=True, change={"lm_head.weight": 2 * embedding}, config={"tie_word_embeddings": False}
    )
    found = yeam.compare(untied, a, device="cpu")
    head = next(row for row in found.tensors if row.name == "lm_head.weight")
    assert head.relative_norm == pytest.approx(0.5) and head.cosine == pytest.approx(1) and found.only_a == ()


@pytest.mark.parametrize("first", [0, 1])
def test_tied_with_untied(first, llama):
    """A head of its own is compared with the embedding that the other's is tied to, whichever comes first."""
    tied, own = llama("a", tied=True), llama("b", tied=False)
    found = yeam.compare(*((tied, own) if first else (own, tied)), spectrum=False)
    assert {row.name for row in found.tensors} == set(load_file(own / WEIGHTS)) and not found.only_a + found.only_b


def test_bad_input(llama, refused, tmp_path):
    """Different shapes, NaN, tensors of one side: said, and left out; nothing in common: refused."""
    a = llama("a")
    wide = llama("wide", hidden=32)
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    bad = llama("bad", change={
        name: torch.full((32, 16), math.nan), other: torch.zeros(8, 16), "model.extra.weight": torch.ones(4), "lm_head.weight": None,
    })  # fmt: skip
    found = yeam.compare(a, bad, device="cpu")
    assert name not in {row.name for row in found.tensors} and any(f"NaN or Inf in {name!r}" in n for n in found.notes)
    assert any(other in note and "[32, 16] / [8, 16]" in note for note in found.notes)
    assert (found.only_a, found.only_b) == (("lm_head.weight",), ("model.extra.weight",))
    assert math.isfinite(found.total.relative_norm)
    refused(["compare", a, wide], "have no tensor in common", inputs=[a, wide])
    refused(["compare", a, tmp_path / "none"], "there is no such folder")
    refused(["compare", a, a, "--plot", tmp_path / "x.gif"], "is no picture")
    refused(["compare", a, a, "--plot", tmp_path / "nowhere" / "x.html"], "there is no folder")


def test_plot_without_matplotlib(llama, refused, tmp_path, monkeypatch):
    """What is missing is said before any work, with a way out."""
    monkeypatch.setattr("yeam.report.files.find_spec", lambda name: None)
    a = llama("a")
    refused(["compare", a, a, "--plot", tmp_path / "x.png"], "needs matplotlib", "yeam[plots]")


def test_command(llama, tmp_path):
    """Tables, one JSON object, a PNG and a page at once; names are text in all of them."""
    a, b = llama("a"), llama("b<img src=x onerror=alert(1)>$\\frac")
    plots = [tmp_path / "p.png", tmp_path / "p.svg", tmp_path / "p.html"]
    runner = CliRunner()
    result = runner.invoke(app, ["compare", str(a), str(b), "--plot", *map(str, plots), "--tensors"])
    assert result.exit_code == 0, result.stderr
    assert "model.layers.1.mlp.down_proj.weight" in result.stdout and "rank B−A" in result.stdout
    assert plots[0].read_bytes().startswith(b"\x89PNG\r\n") and "</svg>" in plots[1].read_text()
    assert "<img" not in plots[2].read_text() and "&lt;img" in plots[2].read_text()
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: seen.append(tag)  # type: ignore[method-assign]
    parser.feed(plots[2].read_text())
    assert seen.count("svg") == 4 and not {"script", "img", "link", "iframe"} & set(seen)
    found = runner.invoke(app, ["compare", str(a), str(a), "--base", str(b), "--json", "--no-spectrum"])
    data = json.loads(found.stdout, parse_constant=pytest.fail)
    assert found.stderr == "" and data["total"]["cosine"] == pytest.approx(1) and data["total"]["rank_a"] is None
    assert Path(data["base"]).name.startswith("b<img")
