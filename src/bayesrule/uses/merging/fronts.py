"""The picture of a Pareto front. Needs matplotlib, which ``pip install "bayesrule[cli]"`` brings."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from ..charts import COLORS, looks, svg
from .previews import Point, Preview

GRAY = "#999"
ROOM = (0.14, 0.05)
"""Parts of the axes that a word takes."""


def front_chart(preview: Preview, tasks: tuple[int, int] = (0, 1)) -> str:
    """Losses of two tasks against one another: the weightings on the front joined, with their weights, the others as circles.

    Args:
        preview: Of :func:`bayesrule.preview`.
        tasks: Numbers of the two.

    Returns:
        The text of an SVG file.

    Raises:
        ValueError: There are no two such tasks.
    """
    first, second = tasks
    if first == second or not all(0 <= task < len(preview.names) for task in tasks):
        raise ValueError(f"tasks must be the numbers of two of {len(preview.names)} tasks, counted from 0, got {tasks}")
    front = sorted(preview.front, key=lambda point: (point.losses[first], point.losses[second]))
    others = [point for point in preview.points if not point.on_front]

    def at(points: Sequence[Point]) -> tuple[list[float], list[float]]:
        return [point.losses[first] for point in points], [point.losses[second] for point in points]

    def apart(points: Sequence[Point]) -> list[Point]:
        """Those that have room for a word."""
        kept: list[Point] = []
        wide, high = (max(values) - min(values) or 1.0 for values in at(preview.points))
        for point in points:
            (x, y), (last_x, last_y) = ((p.losses[first], p.losses[second]) for p in (point, (kept or [point])[-1]))
            if not kept or abs(x - last_x) > ROOM[0] * wide or abs(y - last_y) > ROOM[1] * high:
                kept.append(point)
        return kept

    def draw(axes: Axes) -> None:
        axes.plot(*at(others), color=GRAY, marker="o", fillstyle="none", linestyle="none", gid="others")
        axes.plot(*at(front), color=COLORS[0], marker="o", linewidth=1.6, gid="front")
        for point in apart(front):
            label = " : ".join(f"{a:g}" for a in point.alphas)
            axes.annotate(label, (point.losses[first], point.losses[second]), (6, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel=f"loss of {preview.names[first]}", ylabel=f"loss of {preview.names[second]}")
        axes.margins(0.12)

    with looks():
        return svg(4.8, 3.6, draw)
