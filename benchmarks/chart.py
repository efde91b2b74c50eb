"""The chart: how many times as fast as each peer nbdsnap is, cell by cell, as a stand-alone SVG.

A dot is the median of the per-round ratios, its line their range, on a logarithmic axis; right of the line at 1 nbdsnap
is ahead.  Drawn by hand, because a few lines of SVG need no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.report import OURS, Line, Summary

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#4d4d4d", "#a5aa99")
"""Told apart by the colour-blind, too (Okabe and Ito), and dark enough for white paper."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 250, 30, 64, 34
_PLOT = 640
_STEP = 11
"""Pixels between two contenders' dots in a cell."""

_GAP = 12
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
"""The axis ends at one of them; what lies beyond the outermost is drawn at the edge."""


def svg(summaries: Sequence[Summary], caption: str = "") -> str:
    """The chart of all cells in which nbdsnap and somebody else were measured; ValueError where there is none."""
    rows = [(summary, [line for line in summary.lines if line.ratio is not None]) for summary in summaries]
    rows = [(summary, lines) for summary, lines in rows if lines]
    if not rows:
        raise ValueError("no cell has both nbdsnap and another contender: there is nothing to draw")
    axis = _Axis([line for _summary, lines in rows for line in lines])
    colours = _colours(rows)
    height = _TOP + sum(_row_height(lines) for _summary, lines in rows) + _BOTTOM
    width = _LEFT + _PLOT + _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="600">Speed of {OURS} over that of the others</text>',
        *_legend(colours),
    ]
    marks, top = [], _TOP
    for index, (summary, lines) in enumerate(rows):
        if index % 2 == 0:
            parts.append(f'<rect x="0" y="{top}" width="{width}" height="{_row_height(lines)}" fill="#f6f6f6"/>')
        marks += _row(summary, lines, top, axis, colours)
        top += _row_height(lines)
    parts += [*_grid(axis, height), *marks]
    if caption:
        parts.append(f'<text x="12" y="{height - 6}" font-size="10" fill="#666">{escape(caption)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """Ratios to pixels, logarithmically, from the lowest to the highest range and always across 1."""

    def __init__(self, lines: Sequence[Line]) -> None:
        lows = [line.ratio.low for line in lines if line.ratio is not None]
        highs = [line.ratio.high for line in lines if line.ratio is not None]
        self.low = max(_TICKS[0], max((tick for tick in _TICKS if tick <= min(lows)), default=_TICKS[0]))
        self.high = min((tick for tick in _TICKS if tick >= max(highs)), default=_TICKS[-1])
        self.low, self.high = min(self.low, 0.5), max(self.high, 2)

    def x(self, ratio: float) -> float:
        inside = min(max(ratio, self.low), self.high)
        return round(_LEFT + _PLOT * math.log(inside / self.low) / math.log(self.high / self.low), 1)

    def ticks(self) -> list[float]:
        return [tick for tick in _TICKS if self.low <= tick <= self.high]


def _colours(rows: Sequence[tuple[Summary, list[Line]]]) -> dict[str, str]:
    names = dict.fromkeys(line.contender for _summary, lines in rows for line in lines)
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}


def _row_height(lines: Sequence[Line]) -> int:
    return _STEP * len(lines) + _GAP


def _legend(colours: dict[str, str]) -> list[str]:
    parts, x = [], 12
    for name, colour in colours.items():
        parts.append(f'<circle cx="{x + 5}" cy="40" r="4.5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="44" fill="#333">{escape(name)}</text>')
        x += 26 + 7 * len(name)
    return parts


def _grid(axis: _Axis, height: int) -> list[str]:
    parts = []
    for tick in axis.ticks():
        x, even = axis.x(tick), tick == 1
        style = 'stroke="#444" stroke-width="1.5"' if even else 'stroke="#ddd"'
        parts.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{height - _BOTTOM}" {style}/>')
        parts.append(f'<text x="{x}" y="{height - _BOTTOM + 14}" text-anchor="middle" fill="#444">{tick:g}x</text>')
    return parts


def _row(summary: Summary, lines: Sequence[Line], top: int, axis: _Axis, colours: dict[str, str]) -> list[str]:
    parts = []
    middle = top + _row_height(lines) / 2 + 4
    parts.append(
        f'<text x="{_LEFT - 12}" y="{middle}" text-anchor="end" fill="#111">{escape(summary.cell.name)}</text>'
    )
    for index, line in enumerate(lines):
        if line.ratio is None:
            continue
        y = top + _GAP / 2 + _STEP * (index + 0.5)
        colour = colours[line.contender]
        title = f"{line.contender}: {line.ratio.median:.2f}x ({line.ratio.low:.2f} to {line.ratio.high:.2f})"
        parts.append(
            f"<g><title>{escape(title)}</title>"
            f'<line x1="{axis.x(line.ratio.low)}" y1="{y}" x2="{axis.x(line.ratio.high)}" y2="{y}" '
            f'stroke="{colour}" stroke-width="2" stroke-opacity="0.5"/>'
            f'<circle cx="{axis.x(line.ratio.median)}" cy="{y}" r="4" fill="{colour}"/></g>'
        )
    return parts
