"""The model card that comes with a merge."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import yaml

from yeam._version import __version__
from yeam.planning.jobs import Plan
from yeam.recipe import LoadedRecipe, ModelRef

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(plan: Plan, loaded: LoadedRecipe, name: str) -> str:
    """README.md of the output: front matter for the Hub, what was merged and how, and the recipe.

    Names are escaped, so that a hostile model name cannot bring HTML or Markdown of its own.
    """
    refs = [ref for _, ref in loaded.recipe.references()]
    hub = list(dict.fromkeys(ref.path for ref in refs if not ref.is_local() and _HUB_ID.fullmatch(ref.path)))
    front = {"library_name": "transformers", "tags": ["merge", "yeam"]}
    if hub:
        front = {"base_model": hub, "base_model_relation": "merge", **front}
    base = loaded.recipe.base_model
    count = len({ref for ref in refs if ref != base})
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        f"# {_plain(name)}",
        "",
        f"A merge of {count} model{'s' * (count != 1)} made with YeAM {__version__}, method `{plan.method}`"
        + (f", on the base model {_link(base)}." if base is not None else "."),
        "",
        "## Models",
        "",
        *(f"* {_link(ref)}" for ref in dict.fromkeys(refs)),
        "",
        "## Recipe",
        "",
        _fenced(loaded.text, "yaml"),
        "",
        f"{plan.total_parameters:,} parameters in {len(plan.jobs)} tensors. `yeam_report.json` has "
        "every tensor's method, norms and checksum; `yeam_config.yaml` is the recipe.",
        "",
    ]
    return "\n".join(lines)


def _link(ref: ModelRef) -> str:
    if not ref.is_local() and _HUB_ID.fullmatch(ref.path) and ref.lora is None:
        return f"[{_plain(ref.path)}](https://huggingface.co/{ref.path})"
    parts = [_name(part) for part in (ref, ref.lora) if part is not None]
    return f"`{html.escape(' '.join('+'.join(parts).split()), quote=False).replace('`', '')}`"


def _name(ref: ModelRef) -> str:
    """A model without its adapter: a folder's place on the author's machine is nobody else's business."""
    name = replace(ref, lora=None).label
    return name if not ref.is_local() or not name.startswith(("/", "~", "..")) else ref.path.rpartition("/")[2]


def _plain(text: str) -> str:
    return re.sub(r"([\\\[\]*_#|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
