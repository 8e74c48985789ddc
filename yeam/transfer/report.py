"""What an alignment found: how well the streams fit, and each layer's heads and neurons; and a sentence that says what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yeam.transfer.stream import LEAST_GATE


@dataclass(frozen=True)
class AlignmentReport:
    """Host and source; `stream`: tier (see `relation.TIERS`), anchors (shared tokens), r2 on held-out ones, r2_by_chance and gate (0 to 1);
    `layers`: for each layer the mean cosine of matched heads' circuits and of matched neurons, their chance level and leads (see
    `LayerAlignment.summary`); `verdict`."""

    host: str
    source: str
    stream: Mapping[str, Any]
    layers: Sequence[Mapping[str, float]]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def alignment_report(
    host: str, source: str, stream: Mapping[str, Any], layers: Sequence[Mapping[str, float]]
) -> AlignmentReport:
    """The report of these facts (those of `AlignedCheckpoint.facts`)."""
    return AlignmentReport(host, source, dict(stream), [dict(layer) for layer in layers], _verdict(stream, layers))


def _verdict(stream: Mapping[str, Any], layers: Sequence[Mapping[str, float]]) -> str:
    heads = _mean(layer["head_score"] for layer in layers)
    neurons = _mean(layer["neuron_score"] for layer in layers)
    if stream["gate"] < LEAST_GATE:
        return (
            f"not alignable: the shared tokens' directions explain {stream['gate']:.0%} of each other beyond chance; "
            "merging these models would mix unrelated coordinates"
        )
    if min(stream["gate"], heads, neurons) > 0.9999:
        return "the same model in other coordinates: aligned exactly, up to rounding"
    if min(stream["gate"], heads, neurons) > 0.98:
        return (
            f"the same model, or close fine-tunes of one: heads match at {heads:.4f}, neurons at {neurons:.4f}; "
            "merging them aligned makes sense"
        )
    if min(heads, neurons) > 0.5:
        return f"related models: heads match at {heads:.2f}, neurons at {neurons:.2f}; merging them aligned makes sense"
    return (
        f"weakly related: the streams fit ({stream['gate']:.2f}), but heads match at {heads:.2f} and neurons at "
        f"{neurons:.2f} only; expect little from merging the weights"
    )


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def plot_alignment(report: AlignmentReport, path: Path) -> None:
    """A picture of the layers' scores. Raises OutputError. `check_picture` tells before whether there can be one."""
    from matplotlib.figure import Figure

    from yeam.report.files import save_picture

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    number = range(len(report.layers))
    for key, label in (("head_score", "heads"), ("head_chance", "heads, chance"), ("neuron_score", "neurons")):
        axes.plot(number, [layer[key] for layer in report.layers], marker=".", label=label)
    axes.set(xlabel="layer", ylabel="mean cosine of matched pairs", ylim=(min(0.0, *axes.get_ylim()), 1.05))
    axes.set_title(f"stream gate {report.stream['gate']:.2f}", fontsize="medium")
    axes.legend(frameon=False)
    save_picture(figure, path)
