"""The results as a picture."""

from __future__ import annotations

from pathlib import Path

from quality.report import Result, grouped, mean_of, rivals_of, value


def draw(cells: list[Result], path: Path) -> None:
    """Left: mean recovery of every method, default and tuned. Right: YeAM against the best tuned rival, a point a cell."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rivals = rivals_of(cells)
    methods = sorted(rivals, key=lambda m: mean_of(cells, m, "tuned", "mean").value)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.25, 1), layout="constrained")

    for setting, colour, offset in (("default", "#b9c4d0", 0.2), ("tuned", "#5b7ea6", -0.2)):
        found = [mean_of(cells, m, setting, "mean") for m in methods]
        places = [at + offset for at in range(len(methods))]
        errors = [0.0 if f.error != f.error else f.error for f in found]
        left.barh(places, [f.value for f in found], 0.38, xerr=errors, color=colour, label=setting, ecolor="#444")
    ours = mean_of(cells, "yeam", "default", "mean")
    left.axvline(ours.value, color="#c2410c", lw=2, label="YeAM, default")
    if ours.error == ours.error:
        left.axvspan(ours.value - ours.error, ours.value + ours.error, color="#c2410c", alpha=0.15, lw=0)
    left.set_yticks(range(len(methods)), methods)
    left.axvline(0, color="#444", lw=0.8)
    left.set_xlim(left=max(-1.0, left.get_xlim()[0]))
    left.set_xlabel("mean recovery (0: base, 1: own expert)")
    left.legend(frameon=False, loc="lower right")

    for label, group in grouped(cells, lambda c: f"{c['family']} {c['regime']}").items():
        best = [max(value(c, m, "tuned", "mean") for m in rivals) for c in group]
        right.scatter(best, [value(c, "yeam", "default", "mean") for c in group], s=22, label=label)
    ends = [min(right.get_xlim()[0], right.get_ylim()[0]), max(right.get_xlim()[1], right.get_ylim()[1])]
    right.plot(ends, ends, color="#444", lw=0.8)
    right.set(xlim=ends, ylim=ends, xlabel="best tuned rival of the cell", ylabel="YeAM, default")
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
