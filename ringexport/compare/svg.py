"""Small charts as inline SVG, without a drawing library; colours come from the page's CSS."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Line", "RangeRow", "bar_chart", "heat_map", "line_chart", "range_chart"]

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 72, 28, 14, 44
_MAX_LABELS = 16
BLIND = 'class="blind"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar: label below it, value, CSS class, and the text that shows on hovering."""

    label: str
    value: float
    style: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart: points (x, y) in rising x, and CSS class."""

    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRow:
    """One row of a range chart.

    Attributes:
        label: at its left.
        ranges: CSS class -> values, all positive, drawn as dots on a bar from least to largest.
    """

    label: str
    ranges: dict[str, Sequence[float]]


def bar_chart(bars: Sequence[Bar], *, y_title: str, x_title: str) -> str:
    """Draw vertical bars from 0."""
    top = _nice_top(max((bar.value for bar in bars), default=0.0))
    y = _linear(0.0, top, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(bars))
    skip = -(-len(bars) // (2 * _MAX_LABELS))
    parts = [_y_axis([top * i / 4 for i in range(5)], y, y_title), _x_title(x_title)]
    for index, bar in enumerate(bars):
        x = LEFT + step * index
        height = max(0.0, HEIGHT - BOTTOM - y(bar.value))
        parts.append(
            f'<rect class="{bar.style}" x="{x + step * 0.15:.1f}" y="{y(bar.value):.1f}" '
            f'width="{step * 0.7:.1f}" height="{height:.1f}" rx="2">'
            f"<title>{escape(bar.title)}</title></rect>"
        )
        if index % skip == 0:
            parts.append(_text(x + step / 2, HEIGHT - BOTTOM + 16, bar.label, "middle"))
    return _svg(HEIGHT, parts, f"{y_title} by {x_title}")


def line_chart(lines: Sequence[Line], *, y_title: str, x_title: str) -> str:
    """Draw lines over a common x axis that starts at 0."""
    right = max((x for line in lines for x, _ in line.points), default=1.0)
    top = _nice_top(max((y for line in lines for _, y in line.points), default=0.0))
    x, y = _linear(0.0, right, LEFT, WIDTH - RIGHT), _linear(0.0, top, HEIGHT - BOTTOM, TOP)
    parts = [_y_axis([top * i / 4 for i in range(5)], y, y_title), _x_title(x_title)]
    for i in range(9):
        value = right * i / 8
        parts.append(_text(x(value), HEIGHT - BOTTOM + 16, f"{value:,.0f}", "middle"))
    for line in lines:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        parts.append(f'<polyline class="line {line.style}" points="{points}"/>')
    return _svg(HEIGHT, parts, f"{y_title} by {x_title}")


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]], *, x_title: str, describe: Callable[[float], str]
) -> str:
    """Draw one cell per value, stronger for larger on a log scale; a value of 0 is marked.

    Args:
        rows: label and values.
        x_title: what the columns are.
        describe: text of a value that shows on hovering.
    """
    found = [math.log(value) for _, values in rows for value in values if value > 0]
    low, high = min(found, default=0.0), max(found, default=0.0)
    columns = max((len(values) for _, values in rows), default=1)
    cell = (WIDTH - LEFT - RIGHT) / max(1, columns)
    row_height = max(14.0, min(28.0, cell))
    bottom = TOP + row_height * len(rows)
    parts = []
    for index, (label, values) in enumerate(rows):
        top = TOP + row_height * index
        parts.append(_text(LEFT - 8, top + row_height / 2 + 4, label, "end"))
        for column, value in enumerate(values):
            share = (math.log(value) - low) / (high - low) if value > 0 and high > low else 1.0
            style = f'class="cell" fill-opacity="{0.12 + 0.88 * share:.3f}"'
            parts.append(
                f"<rect {style if value else BLIND} x="
                f'"{LEFT + cell * column:.2f}" y="{top:.1f}" width="{max(0.5, cell - 1):.2f}" '
                f'height="{row_height - 1:.1f}"><title>{escape(label)}, {column}: '
                f"{escape(describe(value))}</title></rect>"
            )
    skip = max(1, -(-columns // _MAX_LABELS))
    parts += [
        _text(LEFT + cell * (column + 0.5), bottom + 16, str(column), "middle")
        for column in range(0, columns, skip)
    ]
    height = int(bottom + BOTTOM)
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 8, x_title, "middle", "title"))
    return _svg(height, parts, x_title)


def range_chart(rows: Sequence[RangeRow], *, x_title: str) -> str:
    """Draw, per row and CSS class, a bar from the smallest to the largest value, on a log axis."""
    values = [v for row in rows for found in row.ranges.values() for v in found if v > 0]
    low = math.floor(math.log10(min(values))) if values else 0
    high = max(low + 1, math.ceil(math.log10(max(values)))) if values else 1
    left, row_height = 230, 34
    bottom = TOP + row_height * len(rows)
    x = _linear(float(low), float(high), left, WIDTH - RIGHT)
    parts = []
    for power in range(low, high + 1):
        place = x(power)
        parts.append(f'<path class="grid" d="M{place:.1f} {TOP}V{bottom}"/>')
        parts.append(_text(place, bottom + 16, f"{10.0**power:g}", "middle"))
    for index, row in enumerate(rows):
        top = TOP + row_height * index
        parts.append(_text(left - 10, top + row_height / 2 + 4, row.label, "end"))
        for number, (style, found) in enumerate(row.ranges.items()):
            places = sorted(x(math.log10(value)) for value in found if value > 0)
            y = top + row_height * (number + 1) / (len(row.ranges) + 1)
            if places:
                title = f"{row.label}: {min(found):.3g} to {max(found):.3g}"
                parts.append(_range(places, y, style, title))
    height = bottom + BOTTOM
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 8, x_title, "middle", "title"))
    return _svg(height, parts, x_title)


def _range(places: Sequence[float], y: float, style: str, title: str) -> str:
    width = max(places[-1] - places[0], 1.0)
    bar = (
        f'<rect class="{style}" fill-opacity="0.25" x="{places[0]:.1f}" y="{y - 3:.1f}" '
        f'width="{width:.1f}" height="6" rx="3"/>'
    )
    dots = "".join(
        f'<circle class="{style}" cx="{place:.1f}" cy="{y:.1f}" r="2.2"/>' for place in places
    )
    return f"<g><title>{escape(title)}</title>{bar}{dots}</g>"


def _linear(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    factor = (stop - start) / (high - low if high > low else 1.0)
    return lambda value: start + (value - low) * factor


def _nice_top(largest: float) -> float:
    """Return a round number at or above `largest` that four ticks divide well."""
    if largest <= 0 or not math.isfinite(largest):
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(
        power * step for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if power * step >= largest
    )


def _y_axis(ticks: Sequence[float], y: Callable[[float], float], title: str) -> str:
    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y(tick) + 4, f"{tick:.3g}", "end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="title" text-anchor="middle" transform="translate(14 {middle:.1f}) '
        f'rotate(-90)">{escape(title)}</text>'
    )
    return "".join(parts)


def _x_title(title: str) -> str:
    return _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, title, "middle", "title")


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}'
        "</text>"
    )


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
