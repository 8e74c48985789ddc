"""`yeam report OUT`: yeam_report.json, with evaluation results if there are any, as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yeam.checkpoint.folder import read_json
from yeam.errors import CheckpointError, UserError
from yeam.families import ROLES
from yeam.report.evaluated import stored
from yeam.report.html import (
    figures,
    folded,
    heading,
    notes,
    numbers,
    page,
    preformatted,
    section,
    shown,
    table,
    version_line,
)
from yeam.report.maps import Curves, HeatMap, heat_map
from yeam.report.merge_fields import misfit
from yeam.report.moved import moved_parts, moved_pictures
from yeam.report.size import human_bytes

REPORT, RECIPE = "yeam_report.json", "yeam_config.yaml"
_FACTS = {"update_norms", "agreement", "base_norm", "moved"}


def read_report(out: Path) -> tuple[Path, dict[str, Any]]:
    """(folder, report) of a merge's folder, or of its yeam_report.json. Raises UserError, CheckpointError for a damaged report."""
    path = out / REPORT if out.is_dir() else out
    if not path.is_file():
        raise UserError(f"{out}: there is no {REPORT}", "name a folder that `yeam merge` wrote")
    report = read_json(path)
    problem = misfit(report)
    if problem is not None:
        raise CheckpointError(f"{path}: is not the report of a merge: {problem}", "merge again, or name another folder")
    return path.parent, report


def render_merge(out: Path) -> str:
    """The page of a merge's folder; see `read_report` for what it raises."""
    folder, report = read_report(out)
    recipe = folder / RECIPE
    entries = stored(folder)
    name = str(report.get("out") or folder.resolve().name)
    rows = _rows(report["tensors"])
    cells = _cells(rows)
    body = [heading(name, _subtitle(report)), numbers(_totals(report)), notes(_texts(report.get("notes")))]
    body += section("Models", _models(report, rows))
    body += section("Evaluation", *_evaluations(entries))
    body += section("Moved updates", *moved_parts(report["tensors"]))
    body += section("Layers and roles", figures([*pictures(cells), _by_layer(rows)]))
    body += section("Roles", _roles(rows))
    if recipe.is_file():
        body += section("Recipe", preformatted(recipe.read_text(encoding="utf-8", errors="replace")))
    body += section("Tensors", folded(f"all {len(rows):,} tensors", _tensors(rows)))
    return page(f"{name} – YeAM", body, version_line(_strings(report.get("versions"))))


def merge_pictures(out: Path) -> list[HeatMap]:
    """The heat maps of a merge's folder."""
    tensors = read_report(out)[1]["tensors"]
    return [*pictures(_cells(_rows(tensors))), *moved_pictures(tensors)]


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _strings(value: object) -> dict[str, str]:
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else {}


def _subtitle(report: Mapping[str, Any]) -> str:
    count = len(_texts(report.get("models")))
    return f"Merged from {count} model{'s' * (count != 1)} with the method {report.get('method')}"


def _totals(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    totals: Mapping[str, Any] = report.get("totals") or {}
    items = [
        ("parameters", f"{totals.get('parameters', 0):,}"),
        ("tensors", f"{totals.get('tensors', len(report['tensors'])):,}"),
        ("size", human_bytes(totals.get("bytes", 0))),
    ]
    if totals.get("relative_change") is not None:
        items.append(("moved from the base", f"{totals['relative_change']:.2%}"))
    if totals.get("mean_agreement") is not None:
        items.append(("agreement of the sources", f"{totals['mean_agreement']:.3f}"))
    if report.get("seconds") is not None:
        items.append(("time", f"{report['seconds']:.1f} s"))
    return items


def _rows(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a tensor: what every method notes, and what updates of a base add to it, as sums of squares that can be added up."""
    rows = []
    for tensor in tensors:
        parts = [p for p in tensor.get("parts", [tensor.get("update") or {}]) if p.keys() >= _FACTS]
        numel = 1
        for size in tensor["shape"]:
            numel *= size
        row: dict[str, Any] = {**tensor, "numel": numel, "square": (tensor.get("norm") or 0.0) ** 2}
        row["base_square"] = sum(p["base_norm"] ** 2 for p in parts)
        row["moved_square"] = sum(p["moved"] ** 2 for p in parts)
        row["update_squares"] = [sum(squares) for squares in zip(*([n * n for n in p["update_norms"]] for p in parts))]
        weight = sum(row["update_squares"])
        weights = [sum(n * n for n in p["update_norms"]) for p in parts]
        row["agreement"] = sum(p["agreement"] * w for p, w in zip(parts, weights)) / weight if weight > 0 else None
        row["scale"] = parts[0].get("scale") if len(parts) == 1 else None
        rows.append(row)
    return rows


def _summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    numel = sum(row["numel"] for row in rows)
    base = sum(row["base_square"] for row in rows)
    agreed = [(row["agreement"], sum(row["update_squares"])) for row in rows if row["agreement"] is not None]
    weight = sum(w for _, w in agreed)
    scales = [row["scale"] for row in rows if row["scale"] is not None]
    return {
        "parameters": numel,
        "rms": (sum(row["square"] for row in rows) / numel) ** 0.5 if numel else None,
        "change": (sum(row["moved_square"] for row in rows) / base) ** 0.5 if base > 0 else None,
        "agreement": sum(a * w for a, w in agreed) / weight if weight > 0 else None,
        "scale": sum(scales) / len(scales) if scales else None,
    }


def _order(role: str) -> int:
    return ROLES.index(role) if role in ROLES else len(ROLES)


def _groups(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: _order(row["role"])):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": r, "layer": n, **_summed(group)} for (r, n), group in _groups(rows, "role", "layer").items()]


def pictures(cells: Sequence[Mapping[str, Any]]) -> list[HeatMap]:
    """Heat maps of what a report knows about each layer and role."""
    found = [
        heat_map("Change", "How far the merge moved from the base, relative to the base's length.", cells, "change"),
        heat_map("Agreement", "0: the sources' updates are unrelated, 1: equal.", cells, "agreement", "share"),
        heat_map(
            "Step", "The length taken of the merged update, relative to what the sources suggest.", cells, "scale"
        ),
        heat_map("Magnitude", "Root mean square of the merged weights.", cells, "rms"),
    ]
    return [picture for picture in found if picture is not None]


def _labels(row: Mapping[str, Any]) -> list[str]:
    return [str(source).rsplit(": ", 1)[0] for source in row["sources"]]


def _by_layer(rows: Sequence[dict[str, Any]]) -> Curves | None:
    """The relative length of every source's update over the layers."""
    sums: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["layer"] is None or not row["update_squares"]:
            continue
        for label, square in zip(_labels(row), row["update_squares"]):
            at = sums.setdefault(label, {}).setdefault(row["layer"], [0.0, 0.0])
            at[0] += square
            at[1] += row["base_square"]
    curves = {
        label: [(float(n), (s / b) ** 0.5) for n, (s, b) in sorted(layers.items()) if b > 0]
        for label, layers in sums.items()
    }
    if not any(curves.values()):
        return None
    return Curves("Updates", "Length of each source's update, relative to the base's, by layer.", "layer", curves)


def _models(report: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for label in _texts(report.get("models")):
        used = [row for row in rows if label in _labels(row)]
        based = [row for row in rows if str(row.get("base") or "").rsplit(": ", 1)[0] == label]
        roles = [word for word, found in (("source", used), ("base", based)) if found]
        squares = [(s, r["base_square"]) for r in used for x, s in zip(_labels(r), r["update_squares"]) if x == label]
        whole = sum(base for _, base in squares)
        moved = (sum(s for s, _ in squares) / whole) ** 0.5 if whole > 0 else None
        count = max(len(used), len(based))
        lines.append((label, " and ".join(roles) or "not used", f"{count:,}", shown(moved, ".3%")))
    return table(("model", "used as", "tensors", "length of its update"), lines, (0, 1))


def _roles(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for (role,), group in _groups(rows, "role").items():
        total = _summed(group)
        methods = ", ".join(dict.fromkeys(str(row["method"]) for row in group))
        change, agreed = shown(total["change"], ".3%"), shown(total["agreement"], ".3f")
        lines.append(
            (role, methods, f"{len(group):,}", f"{total['parameters']:,}", change, agreed, shown(total["rms"]))
        )
    head = ("role", "method", "tensors", "parameters", "change", "agreement", "rms")
    return table(head, lines, (0, 1))


def _tensors(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        total = _summed([row])
        shape = " × ".join(map(str, row["shape"])) or "scalar"
        change, agreed = shown(total["change"], ".3%"), shown(row["agreement"], ".3f")
        lines.append((row["name"], row["method"], shape, row["dtype"], change, agreed, shown(row.get("norm"))))
    return table(("tensor", "method", "shape", "dtype", "change", "agreement", "norm"), lines, (0, 1))


def _evaluations(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    for entry in entries:
        title = "WikiText-2" if entry["protocol"] == "wikitext-2" else ", ".join(_texts(entry["texts"]))
        lines = [("this model", entry), *((a["reference"], a["scores"]) for a in entry["against"])]
        head = (
            f"{title} (context {entry['context']}, stride {entry['stride']})",
            "perplexity",
            "nats a token",
            "bits a byte",
        )
        keys = ("perplexity", "nll_per_token", "bits_per_byte")
        parts.append(table(head, [(label, *(_measured(scores, key) for key in keys)) for label, scores in lines], (0,)))
        for other in entry["against"]:
            parts += _against(other)
    return parts


def _against(other: Mapping[str, Any]) -> list[str]:
    whole = other.get("all")
    if not whole:
        return []
    head = (f"against {other['reference']}", "tokens", "top-1 agreement", "KL (nats)", "loss difference", "entropy")
    keys = ("top1_agreement", "kl", "nll_difference", "entropy")
    lines = [
        (f"{kind} tokens", f"{part['tokens']:,}", *(_measured(part, key) for key in keys))
        for kind in ("all", "easy", "hard")
        if (part := other.get(kind)) and part["tokens"]
    ]
    found, drawn = [table(head, lines, (0,))], []
    for title, key, caption in (
        ("Hidden states", "hidden_norm", "Mean length of the residual stream behind each layer."),
        ("Sparsity", "sparsity", "Mean Hoyer sparsity of the residual stream behind each layer."),
    ):
        curves = {"this model": whole[key], str(other["reference"]): whole[f"reference_{key}"]}
        points = {
            label: [(float(n), v) for n, v in enumerate(values) if v is not None] for label, values in curves.items()
        }
        drawn.append(Curves(title, caption, "layer", points))
    return [*found, figures(drawn)]


def _measured(scores: Mapping[str, Any], key: str) -> str:
    value, error = scores.get(key), scores.get(f"{key}_stderr")
    return shown(value) + ("" if error is None else f" ± {error:.2g}")
