"""The model card that comes with a merge."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence

import yaml

from yeam._version import __version__
from yeam.planning.jobs import Plan
from yeam.recipe import LoadedRecipe, ModelRef, StageRef
from yeam.report.licence import Licensing

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(
    plan: Plan,
    loaded: LoadedRecipe,
    name: str,
    licensing: Licensing | None = None,
    findings: Sequence[str] = (),
    *,
    library: str = "transformers",
) -> str:
    """README.md of the output: front matter for the Hub, what was merged and how, and the recipe.

    findings: sentences about what the merge came to. library: by which the Hub loads the model. Names are escaped, so that a hostile
    model name cannot bring HTML or Markdown of its own.
    """
    refs = loaded.sources()
    parts = [part for ref in refs for part in (ref, ref.lora) if part is not None and not isinstance(part, StageRef)]
    hub = list(dict.fromkeys(part.path for part in parts if not part.is_local() and _HUB_ID.fullmatch(part.path)))
    front = {"library_name": library, "tags": ["merge", "yeam"], **(licensing.front if licensing else {})}
    if hub:
        front = {"base_model": hub, "base_model_relation": "merge", **front}
    base = loaded.recipe.base_model
    count = len([ref for ref in refs if ref != base])
    methods = f"method `{plan.method}`"
    if plan.stages:
        methods = f"in {len(plan.stages) + 1} stages, methods " + ", ".join(
            f"`{method}`" for method in dict.fromkeys([*(stage.plan.method for stage in plan.stages), plan.method])
        )
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        f"# {plain_text(name)}",
        "",
        f"A merge of {count} model{'s' * (count != 1)} made with YeAM {__version__}, {methods}"
        + (f", on the base model {_link(base)}." if base is not None else "."),
        "",
        "## Models",
        "",
        *_stages(plan, loaded),
        "",
        *(["## Findings", "", *(f"- {plain_text(finding)}" for finding in findings), ""] if findings else []),
        *(_licence(licensing) if licensing else ()),
        "## Recipe",
        "",
        _fenced(loaded.text, "yaml"),
        "",
        f"{plan.total_parameters:,} parameters in {len(plan.jobs)} tensors. `yeam_report.json` has "
        "every tensor's method, norms and checksum; `yeam_config.yaml` is the recipe.",
        "",
    ]
    return "\n".join(lines)


def _stages(plan: Plan, loaded: LoadedRecipe) -> list[str]:
    """A table of the models for each stage, with a heading where there are several."""
    lines: list[str] = []
    for stage, document in zip([*(stage.plan for stage in plan.stages), plan], loaded.documents):
        if plan.stages:
            title = "Result" if stage is plan else f"Stage {_code(document.name)}"
            lines += [*([""] if lines else []), f"### {title}, method `{stage.method}`", ""]
        refs = list(dict.fromkeys(ref for _, ref in document.recipe.references()))
        lines += _sources(stage, refs, document.recipe.base_model)
    return lines


def _licence(licensing: Licensing) -> list[str]:
    """What the inputs' cards say, and what follows."""
    lines = [
        "## Licence",
        "",
        *([f"`{licensing.result.label}`", ""] if licensing.result else ()),
        "| model | licence |",
        "|---|---|",
    ]
    for ref, licence in licensing.inputs:
        name = _link(ref).replace("|", "\\|")  # a bar ends a cell, even in code
        lines.append(f"| {name} | {plain_text(licence.label) if licence else 'not named in its card'} |")
    return [*lines, "", licensing.sentence, ""]


def _sources(plan: Plan, refs: Sequence[ModelRef], base: ModelRef | None) -> list[str]:
    """A table of the models in the order of the plan's: what each was used as, and in how many of the tensors."""
    lines = ["| model | used as | tensors |", "|---|---|---|"]
    sources = Counter(index for job in plan.jobs for index in {source.model for source in job.sources})
    bases = Counter(job.base.model for job in plan.jobs if job.base is not None)
    for index, model in enumerate(plan.models):  # the recipe's models first, then those that plugins named
        ref = refs[index] if index < len(refs) else None
        merged, under = sources[index], bases[index]
        roles = ["base"] if under or (ref is not None and ref == base) else []
        roles += ["source"] if merged else []
        roles += ["tokenizer"] if index == plan.tokenizer_donor and len(plan.models) > 1 else []
        name = (_code(model.label) if ref is None else _link(ref)).replace(
            "|", "\\|"
        )  # a bar ends a cell, even in code
        lines.append(f"| {name} | {', '.join(roles) or 'not used'} | {max(merged, under):,} of {len(plan.jobs):,} |")
    return lines


def _link(ref: ModelRef) -> str:
    if isinstance(ref, StageRef):
        return f"stage {_code(ref.path)}" + (f" + {_link(ref.lora)}" if ref.lora is not None else "")
    if not ref.is_local() and _HUB_ID.fullmatch(ref.path) and ref.lora is None:
        return f"[{plain_text(ref.path)}](https://huggingface.co/{ref.path})"
    return _code(ref.short)


def _code(name: str) -> str:
    return f"`{html.escape(' '.join(name.split()), quote=False).replace('`', '')}`"


def plain_text(text: str) -> str:
    """Text on one line for Markdown, in a table or out of one: what would be markup, or HTML, is escaped."""
    return re.sub(r"([\\\[\]*_#|`~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
