"""Charts as SVG text: no script, no file beside the page, colours from the page's style sheet.

Every colour is a class (line-tuned, bar-base, ...), so that a chart follows light, dark and print.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from lorasmith.evaluation.statistics import Count

_MOST_POINTS = 400
_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart; ``look`` is the end of its CSS class."""

    name: str
    look: str
    points: Sequence[tuple[float, float]]


def draw_lines(lines: Sequence[Line], *, x_label: str, y_label: str, from_zero: bool = True) -> Markup:
    """Return a line chart with ticks, and the lines named below it where there are several."""
    points = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not points:
        return Markup("")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = _ticks(0 if from_zero else min(y for _, y in points), max(y for _, y in points))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low or 1)
        up = (y - y_low) / (y_high - y_low or 1)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in _ticks(x_low, x_high, inside=True):
        x, _ = place(tick, y_low)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for line in lines:
        kept = [place(*point) for point in _thin(line.points) if math.isfinite(point[1])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)
        parts.append(f'<polyline class="line line-{line.look}" points="{path}"/>')
        if len(kept) <= 12:
            parts += [
                f'<circle class="dot dot-{line.look}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in kept
            ]
    names = ", ".join(line.name for line in lines)
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)}: {escape(names)}">'
        f"{''.join(parts)}</svg>"
    )
    legend = "".join(
        f'<span><i class="key key-{line.look}"></i>{escape(line.name)}</span>'
        for line in lines
        if len(lines) > 1
    )
    return Markup(
        f'<figure><figcaption>{escape(y_label)}</figcaption>{svg}<p class="legend">{legend}</p></figure>'
    )


def draw_share(count: Count, look: str) -> Markup:
    """Return a bar from 0 to 100% with the share filled and its 95% interval as a bracket."""
    low, high = (100 * bound for bound in count.interval())
    share = 100 * count.share
    return Markup(
        f'<svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(str(count))}, 95% interval {low:.0f} to {high:.0f}%">'
        f'<rect class="track" width="100" height="10"/><rect class="bar-{look}" width="{share:.1f}" height="10"/>'
        f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="5" y2="5"/>'
        f'<line class="whisker" x1="{low:.1f}" x2="{low:.1f}" y1="2" y2="8"/>'
        f'<line class="whisker" x1="{high:.1f}" x2="{high:.1f}" y1="2" y2="8"/></svg>'
    )


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of some texts, in words."""

    name: str
    look: str
    words: Sequence[int]


def draw_lengths(groups: Sequence[Lengths], *, num_bins: int = 24) -> Markup:
    """Return one row of bars a group over a common scale of words, so that the shapes can be compared."""
    longest = max((max(group.words, default=0) for group in groups), default=0)
    ticks = _ticks(0, max(4, longest))
    top, row, left = ticks[-1], 56, 96
    width = _WIDTH - left - _RIGHT
    height = row * len(groups) + 30
    parts = []
    for number, group in enumerate(groups):
        floor = row * (number + 1) - 8
        counts = [0] * num_bins
        for words in group.words:
            counts[min(num_bins - 1, int(words / top * num_bins))] += 1
        highest = max(counts, default=0) or 1
        parts.append(
            f'<text class="name" x="{left - 10}" y="{floor - 8}" text-anchor="end">{escape(group.name)}</text>'
        )
        parts.append(f'<line class="grid" x1="{left}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
        for place, count in enumerate(counts):
            tall = (row - 16) * count / highest
            parts.append(
                f'<rect class="bar-{group.look}" x="{left + place * width / num_bins + 1:.1f}" y="{floor - tall:.1f}" '
                f'width="{width / num_bins - 2:.1f}" height="{tall:.1f}"/>'
            )
    for tick in ticks:
        x = left + tick / top * width
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 16}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{left + width / 2}" y="{height - 2}" text-anchor="middle">words</text>'
    )
    return Markup(
        f'<figure><svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="lengths of answers in words">'
        f"{''.join(parts)}</svg></figure>"
    )


def _ticks(low: float, high: float, *, inside: bool = False) -> list[float]:
    """Return round numbers from at most ``low`` to at least ``high``; ``inside``: between them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if inside:
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 12) for number in range(first, last + 1)]


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return at most some 400 of the points, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(number * step)] for number in range(_MOST_POINTS)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
