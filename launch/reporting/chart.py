"""A line chart as inline SVG: coloured by the page's style sheet, so that it is right in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 46
NUM_STYLES = 8
"""Colours and dashes in the page's style sheet: classes s0, s1, ..."""
Point = tuple[float, float]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span low..high."""
    step = 10 ** math.floor(math.log10((high - low) / count or 1.0))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Point]],
    horizontal: tuple[str, float] | None = None,
) -> Markup:
    """An <svg> of lines; the legend is the page's.

    Args:
        series: name -> points (x, y), all finite; the n-th has the class s{n}.
        horizontal: a name and the y of a dashed line across.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        return Markup("")
    ys = [y for _, y in points] + ([horizontal[1]] if horizontal else [])
    x_ticks = ticks(0.0, max(x for x, _ in points) or 1.0)
    y_ticks = ticks(min(ys), max(ys) if max(ys) > min(ys) else min(ys) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        Markup('<svg role="img" viewBox="0 0 {} {}" aria-label="{}">').format(
            WIDTH, HEIGHT, f"{title}: {y_label} over {x_label}; lines: {', '.join(series)}"
        ),
        _text(LEFT, 18, title, "start", "title"),
    ]
    for tick in y_ticks:
        (x, y), (end, _) = at(x_ticks[0], tick), at(x_ticks[-1], tick)
        parts += [_line([(x, y), (end, y)], "grid"), _text(x - 6, y + 4, f"{tick:g}", "end")]
    for tick in x_ticks:
        x, y = at(tick, y_ticks[0])
        parts += [_line([(x, y), (x, y + 4)], "axis"), _text(x, y + 17, f"{tick:g}", "middle")]
    parts += [
        _line([at(x_ticks[0], y_ticks[0]), at(x_ticks[-1], y_ticks[0])], "axis"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"),
        Markup('<text transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (TOP + HEIGHT - BOTTOM) / 2, y_label
        ),
    ]
    if horizontal:
        y = horizontal[1]
        parts.append(_line([at(x_ticks[0], y), at(x_ticks[-1], y)], "teacher"))
    for number, line in enumerate(series.values()):
        style = f"s s{number % NUM_STYLES}"
        parts.append(_line([at(*point) for point in line], style))
        if len(line) < 30:
            parts += [
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(style, *at(*point))
                for point in line
            ]
    return Markup("").join([*parts, Markup("</svg>")])


def _line(points: Sequence[tuple[float, float]], style: str) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(style, path)


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        style, x, y, anchor, text
    )
