"""The report's drawings as inline SVG: values by step, scores by split, boxes over a picture.

Colours come from the page's style sheet.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from ..metrics.boxes import GRID, LabelledBox
from .pages import text

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 14, 44
_MOST_POINTS = 240
_BAR, _GROUP = 26, 34
_OVERLAY = 1000
_MOST_CLASSES = 20

Point = tuple[float, float]


def finite_points(log_history: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Return (step, value) of the log entries that have a finite number under `key`, by step."""
    points = []
    for entry in log_history:
        value, step = entry.get(key), entry.get("step")
        if isinstance(value, int | float) and isinstance(step, int | float) and math.isfinite(value):
            points.append((float(step), float(value)))
    return sorted(points)


def step_chart(title: str, series: Mapping[str, Sequence[Point]]) -> Markup:
    """Return values by step as lines, from 0 upwards.

    Long runs are drawn as the means of up to 240 groups of neighbouring steps.

    Args:
        title: What is drawn, for those who cannot see it.
        series: From a line's name, its class in the style sheet (train, held-out or score), to (step, value); at least
            one of them has a point.
    """
    lines = {name: _averaged(points) for name, points in series.items() if points}
    points = [point for line in lines.values() for point in line]
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    # Straight to the edge of the steps there are, but up to a whole tick in height.
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1

    def place(point: Point) -> Point:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return x, y

    parts = []
    for tick in y_ticks:
        _, y = place((x_low, tick))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place((tick, y_low))
            # In the middle of its tick, but not beyond the edge: a digit is some 8 wide.
            x = min(x, _WIDTH - 4 * len(f"{tick:g}"))
            parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
    for name, line in lines.items():
        placed = [place(point) for point in line]
        if len(placed) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline class="line {name}" points="{path}"/>')
        if len(placed) == 1 or name != "train":
            parts += [f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in placed]
    last = ", ".join(f"{name} {line[-1][1]:.3f}" for name, line in lines.items())
    return _svg(_HEIGHT, f"{title} by step; at the end {last}", parts)


def bar_chart(
    title: str, groups: Mapping[str, Sequence[tuple[str, float, tuple[float, float] | None]]], digits: int
) -> Markup:
    """Return scores as bars.

    Args:
        title: What is drawn, for those who cannot see it.
        groups: From a split to (name of the bar, score, 95 % interval if known), not empty. A bar's name is its class
            in the style sheet: after, before or blind.
        digits: Of the numbers, after the point.
    """
    bars = [bar for group in groups.values() for bar in group]
    high = _ticks(0.0, max([0.1, *(max(value, *(interval or (0.0,))) for _, value, interval in bars)]))[-1]
    left, right = 62, 58
    scale = (_WIDTH - left - right) / high
    parts, y = [], 0.0
    for split, group in groups.items():
        parts.append(f'<text class="name" x="0" y="{y + 18:.0f}">{text(split)}</text>')
        y += _GROUP - 6
        for name, value, interval in group:
            middle = y + _BAR / 2
            width = max(value * scale, 1.0)
            label = f'x="{left - 8}" y="{middle + 4.5:.1f}" text-anchor="end">{text(name)}'
            parts.append(f'<text class="tick" {label}</text>')
            box = f'x="{left}" y="{y + 3:.1f}" width="{width:.1f}" height="{_BAR - 6}" rx="2"'
            parts.append(f'<rect class="bar {text(name)}" {box}/>')
            end = width
            if interval is not None:
                low_x, high_x = left + interval[0] * scale, left + interval[1] * scale
                end = max(width, high_x - left)
                parts.append(
                    f'<path class="whisker" d="M{low_x:.1f} {middle:.1f}H{high_x:.1f}'
                    f'M{low_x:.1f} {middle - 4:.1f}v8M{high_x:.1f} {middle - 4:.1f}v8"/>'
                )
            parts.append(
                f'<text class="value" x="{left + end + 7:.1f}" y="{middle + 4.5:.1f}">{value:.{digits}f}</text>'
            )
            y += _BAR
        y += 12
    said = [
        f"{split}: " + ", ".join(f"{name} {value:.{digits}f}" for name, value, _ in group)
        for split, group in groups.items()
    ]
    return _svg(max(y - 8, 40), f"{title} by split. {'; '.join(said)}", parts)


def scale_chart(title: str, series: Mapping[str, Sequence[Point]]) -> Markup:
    """Return a drawing that stands for itself, without a page's style sheet: scores by scale, 0..1, a line each.

    Args:
        title: What is drawn.
        series: From a line's name to (scale, score); at least one.
    """
    colours = ("#1f6feb", "#d9822b", "#1a7f4b", "#b3382c", "#8250df", "#5b6472")
    high = _ticks(0.0, max([0.1, *(y for points in series.values() for _, y in points)]))[-1]
    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT + 20 * len(series)}" fill="#fff"/>']
    style = 'font-family="sans-serif" font-size="13" fill="#444"'
    for tick in _ticks(0.0, high):
        y = _HEIGHT - _BOTTOM - tick / high * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#dde1e7"/>')
        parts.append(f'<text {style} x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    width = _WIDTH - _LEFT - _RIGHT - 8
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x = _LEFT + tick * width
        parts.append(f'<text {style} x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text {style} x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">scale of the adapter</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = colours[number % len(colours)]
        placed = [(_LEFT + x * width, _HEIGHT - _BOTTOM - y / high * (_HEIGHT - _TOP - _BOTTOM)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        y = _HEIGHT + 20 * number + 10
        parts.append(f'<rect x="{_LEFT}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text {style} x="{_LEFT + 16}" y="{y}">{text(name)}</text>')
    drawn = _svg(_HEIGHT + 20 * len(series), title, parts)
    return Markup(str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def confusion_chart(title: str, counts: Mapping[tuple[str, str], int]) -> Markup:
    """Return which class was taken for which: a row for each true class, a column for each that was said.

    Of more than 20 classes those are drawn that are confused most often.

    Args:
        title: What is drawn, for those who cannot see it.
        counts: From (true class, said class) to rows, not empty.
    """
    wrong: Counter[str] = Counter()
    for (true, said), count in counts.items():
        wrong.update({true: 0, said: 0} if true == said else {true: count, said: count})
    most = wrong.most_common(_MOST_CLASSES)
    names = sorted(name for name, _ in most)
    left, right, top = 116, 56, 74
    side = min(72, (_WIDTH - left - right) / len(names))
    parts = []
    for row, true in enumerate(names):
        y = top + row * side
        of_row = sum(count for (name, _), count in counts.items() if name == true)
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + side / 2 + 4:.1f}" text-anchor="end">{_cut(true)}</text>'
        )
        x = left + row * side + side / 2
        turned = f'transform="rotate(-45 {x:.1f} {top - 6})"'
        parts.append(f'<text class="tick" x="{x:.1f}" y="{top - 6}" {turned}>{_cut(true, 12)}</text>')
        for column, said in enumerate(names):
            count = counts.get((true, said), 0)
            box = f'x="{left + column * side:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}"'
            share = count / of_row if of_row else 0.0
            kind = "after" if true == said else "wrong"
            parts.append(f'<rect class="cell {kind}" {box} fill-opacity="{0.85 * share:.3f}"><title>{text(true)}: ')
            parts.append(f"{count} of {of_row} taken for {text(said)}</title></rect>")
            if count:
                x = left + (column + 0.5) * side
                parts.append(f'<text class="tick" x="{x:.1f}" y="{y + side / 2 + 4:.1f}" text-anchor="middle">')
                parts.append(f"{count}</text>")
    same = sum(count for (true, said), count in counts.items() if true == said)
    label = f"{title}: {same} of {sum(counts.values())} rows on the diagonal"
    return _svg(top + len(names) * side + 6, label, parts)


def _cut(name: str, width: int = 16) -> str:
    return str(text(name if len(name) <= width else name[: width - 1] + "\u2026"))


@dataclass(frozen=True)
class Measured:
    """A mean with its interval at some x, and the single runs behind it.

    Args:
        x: Where it stands.
        y: Mean.
        interval: 95 %; None when it is not known.
        runs: What was averaged.
    """

    x: float
    y: float
    interval: tuple[float, float] | None = None
    runs: tuple[float, ...] = ()


def curve_chart(
    title: str,
    x_name: str,
    series: Mapping[str, Sequence[Measured]],
    levels: Mapping[str, float] | None = None,
    *,
    is_log: bool = True,
    is_joined: bool = True,
) -> Markup:
    """Return means over an axis: a line and a band for each series, and a dot for each run.

    Args:
        title: What is drawn, for those who cannot see it.
        x_name: Below the axis.
        series: From a name to its points; the n-th (from 0) has the class `series-n` in the style sheet, at most
            `SERIES` of them. At least one has a point.
        levels: From a name to a value that no x belongs to, drawn as a dashed line; they go on counting classes.
        is_log: Whether the axis is logarithmic, and every x above 0.
        is_joined: Whether lines join the points of a series.
    """
    points = [point for line in series.values() for point in line]
    levels = levels or {}
    seen = [value for point in points for value in (point.y, *point.runs)] + list(levels.values())
    y_ticks = _ticks(min(0.0, *seen), max(*seen, 1e-9))
    y_low, y_high = y_ticks[0], y_ticks[-1]
    scale, unscale = (math.log, math.exp) if is_log else (float, float)
    x_low, x_high = scale(min(point.x for point in points)), scale(max(point.x for point in points))
    margin = 0.06 * (x_high - x_low) or 1.0
    x_low, x_high = x_low - margin, x_high + margin

    def place(x: float, y: float) -> str:
        across = _LEFT + (scale(x) - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        # An interval may reach beyond all that was scored.
        down = _HEIGHT - _BOTTOM - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    left, right = unscale(x_low), unscale(x_high)
    parts = []
    for tick in y_ticks:
        y = place(left, tick).partition(",")[2]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    shown = sorted({point.x for point in points})
    ticks = _log_ticks(left, right, shown) if is_log else [x for x in _ticks(shown[0], shown[-1]) if left <= x <= right]
    for tick in ticks:
        x = place(tick, y_low).partition(",")[0]
        parts.append(f'<text class="tick" x="{x}" y="{_HEIGHT - 24}" text-anchor="middle">{_short(tick)}</text>')
    axis = f'x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle"'
    parts.append(f'<text class="tick" {axis}>{text(x_name)}</text>')
    for number, line in enumerate(series.values()):
        known = [(point, point.interval) for point in line if point.interval is not None]
        if len(known) > 1:
            edges = [place(point.x, high) for point, (_, high) in known]
            edges += [place(point.x, low) for point, (low, _) in reversed(known)]
            parts.append(f'<polygon class="band series-{number}" points="{" ".join(edges)}"/>')
        for point, interval in known if len(known) == 1 else ():
            ends = " L".join(place(point.x, end) for end in interval)
            parts.append(f'<path class="spread series-{number}" d="M{ends}"/>')
        if len(line) > 1 and is_joined:
            path = " ".join(place(point.x, point.y) for point in line)
            parts.append(f'<polyline class="line series-{number}" points="{path}"/>')
        for point in line:
            dots = [(run, 2.0) for run in point.runs if len(point.runs) > 1] + [(point.y, 3.5)]
            for value, radius in dots:
                x, y = place(point.x, value).split(",")
                parts.append(f'<circle class="dot series-{number}" cx="{x}" cy="{y}" r="{radius}"/>')
    for number, value in enumerate(levels.values(), len(series)):
        ends = f"{place(left, value)} {place(right, value)}"
        parts.append(f'<polyline class="line level series-{number}" points="{ends}"/>')
    last = [f"{name} {line[-1].y:.3f}" for name, line in series.items() if line]
    last += [f"{name} {value:.3f}" for name, value in levels.items()]
    return _svg(_HEIGHT, f"{title} over {x_name}; at the end {', '.join(last)}", parts)


SERIES = 8
"""Series that the style sheet has colours for."""


def _log_ticks(low: float, high: float, values: Sequence[float]) -> list[float]:
    """Return the values themselves if they are few, else 1, 2 and 5 times powers of ten, from `low` to `high`."""
    if len(values) <= 6 and all(after / before >= 1.3 for before, after in pairwise(values)):
        return list(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) <= 8 else [tick for tick in ticks if f"{tick:e}".startswith("1.")]


def _short(value: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if name == 'k' else size):.3g}{name}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def box_overlay(predicted: Sequence[LabelledBox], references: Sequence[LabelledBox], width: int, height: int) -> Markup:
    """Return boxes to be laid over a picture of that size, scaled as `object-fit: contain` scales it.

    Predicted boxes have their label above, true ones, where no predicted box has the same label, below. Each has a
    light edge, so that it is seen on any picture.
    """
    scale = _OVERLAY / max(width, height)
    width, height = round(width * scale), round(height * scale)
    named = {each.label for each in predicted}
    parts = []
    for name, boxes in (("reference", references), ("predicted", predicted)):
        for each in boxes:
            left, top, right, bottom = each.box[0], each.box[1], each.box[2] + 1, each.box[3] + 1
            x1, x2 = (round(value / GRID * width) for value in (left, right))
            y1, y2 = (round(value / GRID * height) for value in (top, bottom))
            box = f'x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"'
            parts += [f'<rect class="edge" {box}/>', f'<rect class="{name}" {box}/>']
            if name == "predicted" or each.label not in named:
                y = min(max(y1 - 14 if name == "predicted" else y2 + 46, 46), height - 16)
                # Towards the middle of the picture, where there is room.
                x, anchor = (x1, "start") if x1 + x2 < width else (x2, "end")
                parts.append(f'<text class="{name}" x="{x}" y="{y}" text-anchor="{anchor}">{text(each.label)}</text>')
    said = [f"{len(predicted)} boxes predicted", f"{len(references)} true"]
    label = text(", ".join(said))
    return Markup(
        f'<svg class="boxes" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _svg(height: float, label: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{text(label)}">'
        f"<title>{text(label)}</title>{''.join(parts)}</svg>"
    )


def _averaged(points: Sequence[Point]) -> list[Point]:
    size = math.ceil(len(points) / _MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about five round numbers, 1, 2 or 5 times a power of ten apart, from `low` or below to `high` or above."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
