"""Draws what `tknp bench decode` measured: how speed grows with the number of ranks, and where it pays.

Needs matplotlib: `pip install 'tknp[bench]'`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.setups import Setup

Rows = Sequence[dict[str, Any]]
Line = list[tuple[int, float]]
"""(number of ranks, efficiency)."""


def scaling(rows: Rows) -> dict[tuple[str, int], Line]:
    """Of `t1pP`, by shape and context: tokens per second of each GPU, over those of `t1p1`, each at its best batch.

    1 is what P replicas with a batch of their own would reach, if their weights left them room for it.
    """
    best: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        setup = Setup.parse(row["setup"])
        if row["setup"] == f"t1p{setup.num_gpus}":
            of_ranks = best.setdefault((row["shape"], row["context"]), {})
            each = row["tokens_per_second"] / setup.num_gpus
            of_ranks[setup.num_gpus] = max(each, of_ranks.get(setup.num_gpus, 0.0))
    return {
        key: [(ranks, each / of_ranks[1]) for ranks, each in sorted(of_ranks.items())]
        for key, of_ranks in sorted(best.items())
        if 1 in of_ranks and len(of_ranks) > 1
    }


def ratios(rows: Rows) -> dict[tuple[str, str], dict[tuple[int, int], float]]:
    """Of each shape and setup of ours: the ratio to the best alternative by (batch, context)."""
    found: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row in rows:
        if row["ratio_to_best_alternative"] is not None and Setup.parse(row["setup"]).is_whole:
            cells = found.setdefault((row["shape"], row["setup"]), {})
            cells[row["batch"], row["context"]] = row["ratio_to_best_alternative"]
    return found


def draw(rows: Rows, path: Path) -> None:
    """One figure: lines of `scaling`, and a heat map for each of `ratios`. The file's ending says its format.

    Raises:
        ValueError: there is nothing to draw.
    """
    lines, maps = scaling(rows), ratios(rows)
    if not lines and not maps:
        raise ValueError("nothing to draw: no row of ours has an alternative on as many GPUs, nor t1p1 beside it")
    from matplotlib.figure import Figure

    panels = len(maps) + bool(lines)
    figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    if lines:
        _draw_scaling(next(axes), lines)
    for (shape, setup), cells in sorted(maps.items()):
        _draw_ratios(next(axes), f"{shape}, {setup}: tokens/s\nof the best alternative's", cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _draw_scaling(axes: Any, lines: dict[tuple[str, int], Line]) -> None:
    for (shape, context), points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{shape}, {context:,} tokens")
    ranks = sorted({number for points in lines.values() for number, _ in points})
    axes.set(xticks=ranks, xlabel="token-parallel ranks P", ylabel="tokens/s of each GPU, over t1p1's", ylim=(0, None))
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_title("Efficiency, each at its best batch")
    axes.legend(fontsize="small")


def _draw_ratios(axes: Any, title: str, cells: dict[tuple[int, int], float]) -> None:
    batches, contexts = _sorted(batch for batch, _ in cells), _sorted(context for _, context in cells)
    grid = [[cells.get((batch, context), float("nan")) for batch in batches] for context in contexts]
    # Even is yellow, on a scale that is the same in every panel.
    axes.imshow(grid, cmap="RdYlGn", vmin=0.5, vmax=1.5, origin="lower", aspect="auto")
    for y, row in enumerate(grid):
        for x, ratio in enumerate(row):
            axes.text(x, y, f"{ratio:.2f}" if ratio == ratio else "", ha="center", va="center", fontsize="small")
    axes.set(xticks=range(len(batches)), xticklabels=batches, xlabel="batch")
    axes.set(
        yticks=range(len(contexts)), yticklabels=[f"{context:,}" for context in contexts], ylabel="context, tokens"
    )
    axes.set_title(title)


def _sorted(values: Iterable[int]) -> list[int]:
    return sorted(set(values))
