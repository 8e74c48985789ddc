"""`yeam report`: a page that stands alone, in light and dark, in which names are nothing but names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import REPOSITORY
from typer.testing import CliRunner

import yeam
from yeam.cli.app import app

FAMILY = REPOSITORY / "examples" / "tiny-family" / "models"
HOSTILE = "<script>document.title='run'</script>\"><img src=http:b onerror=document.title='run'>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "line", "rect", "circle", "polyline", "i", "br"}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge with a hostile model name and an evaluation against another one."""
    home = tmp_path_factory.mktemp("merged")
    named = home / HOSTILE.replace("/", "|")
    named.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(FAMILY / "code", named)
    recipe = {
        "merge_method": "yeam", "base_model": str(FAMILY / "base"),
        "models": [{"model": {"path": str(named)}}, {"model": str(FAMILY / "prose")}],
    }  # fmt: skip
    yeam.merge(recipe, home / "out")
    (home / "text.txt").write_text("One sentence after another. " * 5)
    yeam.evaluate(home / "out", home / "text.txt", against=named, device="cpu", context=64, update_card=True)
    return home / "out"


@pytest.fixture(scope="module")
def page(merged: Path) -> Path:
    result = CliRunner().invoke(app, ["report", str(merged)])
    assert (result.exit_code, result.stdout) == (0, f"{merged / 'yeam_report.html'}\n"), result.stderr
    return merged / "yeam_report.html"


class Elements(HTMLParser):
    """Every element with its attributes, and whether all that were opened were closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page(page):
    """Well-formed, nothing loaded, no script, and everything of the report in it."""
    seen = Elements(page.read_text())
    assert seen.open == []
    assert not {"script", "img", "link", "iframe", "object", "base"} & {tag for tag, _ in seen.found}
    for tag, attrs in seen.found:
        assert not {"src", "href", "srcset"} & attrs.keys() and not any(key.startswith("on") for key in attrs), tag
    assert not re.search(r"url\(|@import", page.read_text())
    report = json.loads((page.parent / "yeam_report.json").read_text())
    assert all(tensor["name"] in seen.text for tensor in report["tensors"])
    for words in (
        "Change",
        "Agreement",
        "Updates",
        "Hidden states",
        "Sparsity",
        "merge_method: yeam",
        "top-1 agreement",
    ):
        assert words in seen.text, words
    cells = [attrs for tag, attrs in seen.found if tag == "rect"]
    assert len(cells) > 4 * 8 * 3 and all(0 <= float(attrs["fill-opacity"]) <= 1 for attrs in cells)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_browser(page, tmp_path):
    """Chromium: light and dark as the system is, no request, no script of a name, nothing wider than the window."""
    probe = (
        "<script>addEventListener('load', () => {const d = document, s = getComputedStyle(d.body);"
        "d.body.dataset.seen = [d.title, s.backgroundColor, performance.getEntriesByType('resource').length,"
        "d.documentElement.scrollWidth <= innerWidth, d.querySelectorAll('svg').length].join('|')})</script>"
    )
    # without the page's own policy, which would stop the probe, and would hide a script that a name brought
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</head>", probe + "</head>")
    (tmp_path / "probe.html").write_text(text)
    colours = []
    for scheme in ("1", "0"):
        words = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,900", f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", (tmp_path / "probe.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        title, colour, requests, fits, pictures = re.search(r'data-seen="([^"]*)"', done.stdout)[1].split("|")
        assert (title, requests, fits) == ("out – YeAM", "0", "true") and int(pictures) >= 6, done.stderr
        colours.append(colour)
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert light > 3 * 200 and dark < 3 * 60


def test_targets(merged, tmp_path, refused):
    """Pictures, and what cannot be rendered."""
    result = CliRunner().invoke(
        app, ["report", str(merged), "--to", str(tmp_path / "a.png"), str(tmp_path / "b.html"), "--json"]
    )
    assert json.loads(result.stdout)["written"] == [str(tmp_path / "a.png"), str(tmp_path / "b.html")], result.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "b.html").stat().st_size > 10_000
    refused(["report", FAMILY / "base"], "there is no yeam_report.json")
    whole = json.loads((merged / "yeam_report.json").read_text())
    for place, wrong in (
        ("tensors", [{"name": 1}]),
        ("totals", {"bytes": "many"}),
        ("method", None),
        ("seconds", []),
        ("models", 3),
    ):
        (tmp_path / "yeam_report.json").write_text(json.dumps({**whole, place: wrong}))
        refused(["report", tmp_path], f"is not the report of a merge: {place}")
    for place, wrong in (("norm", "x"), ("shape", [None]), ("update", {"moved": {}}), ("parts", [1]), ("layer", "0")):
        (tmp_path / "yeam_report.json").write_text(
            json.dumps({**whole, "tensors": [{**whole["tensors"][0], place: wrong}]})
        )
        refused(["report", tmp_path], f"is not the report of a merge: tensors.0.{place}")


def test_methods_without_facts(llama, recipe, tmp_path):
    """A method that notes nothing about updates still has a page: norms by layer and role."""
    out = tmp_path / "out"
    yeam.merge(recipe(llama("a"), llama("b")), out)
    assert CliRunner().invoke(app, ["report", str(out), "-q"]).stdout == ""
    seen = Elements((out / "yeam_report.html").read_text())
    assert "Magnitude" in seen.text and "Agreement" not in seen.text and sum(tag == "svg" for tag, _ in seen.found) == 1
