"""A timeline as a picture: a lane for each deployment and each step, a bar for each span in a state.

Two halves: ``lanes_of`` makes spans of changes, the picture draws them. All text may come from nodes: it is escaped,
and cut. What a bar means is told by a word in its tip and, of the last, at the lane's end, not by its colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fieldlab_common import paths
from fieldlab_common.drawing import COLOURS, FAINT, INK, Svg, svg_text, xml
from fieldlab_common.errors import UnsupportedError
from fieldlab_common.lifecycle import DeploymentState, StepState

from fieldlab.text import duration, one_line

if TYPE_CHECKING:
    from fieldlab.timeline import Row, Timeline

__all__ = ["Bar", "Lane", "gantt", "lanes_of"]

MOST_LANES = 400
MOST_BARS = 5000
_LABEL, _WIDTH, _END, _LANE, _TOP = 220.0, 640.0, 110.0, 20.0, 44.0
_LONGEST = 1e11  # seconds; clocks that are further off are not followed
_NARROWEST = 1.5  # a bar that takes no time is seen all the same

_D = DeploymentState
_PALE = ("#eef0f3", "#8a94a3")
_DEPLOYMENTS = {
    _D.PENDING: _PALE,
    _D.PREPARING: ("#ede9fe", "#6d28d9"),
    _D.READY: _PALE,
    _D.LAUNCHING: ("#ede9fe", "#6d28d9"),
    _D.RUNNING: COLOURS[StepState.RUNNING],
    _D.UNREACHABLE: COLOURS[StepState.CANCELLED],
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A span in one state, or an attempt that ended in one; ``end`` None: it has not ended."""

    start: float
    end: float | None
    state: StepState | DeploymentState
    what: str = ""
    iteration: int | None = None


@dataclass(slots=True)
class Lane:
    """A deployment, or a step of one (``step``), with its bars, and how it stands at last."""

    deployment: str
    step: str | None
    bars: list[Bar] = field(default_factory=list)
    state: StepState | DeploymentState | None = None


def lanes_of(timeline: Sequence[Row]) -> list[Lane]:
    """The lanes of a timeline: deployments in their order, each with its steps below it; iterations share a lane."""
    lanes: dict[tuple[str, str | None], Lane] = {}
    begun: dict[tuple[object, ...], Row] = {}
    last: dict[tuple[str, str], Row] = {}
    for row in timeline:
        if row.deployment is None:
            continue
        lane = lanes.setdefault(_place(row), Lane(*_place(row)))
        lane.state = _state(row)
        which: tuple[object, ...] = (row.deployment, row.step, row.attempt, row.iteration)
        if row.step is None:
            before = begun.pop(which := (row.deployment,), None)
            lane.bars += [_bar(before, row.at, before)] if before is not None else []
        elif row.state is not StepState.RUNNING:
            before = begun.pop(which, last.get((row.deployment, row.step)))
            lane.bars += [_bar(before, row.at, row)] if before is not None else []
        if not row.state.terminal:
            begun[which] = row
        if row.step is not None:
            last[row.deployment, row.step] = row  # an iteration whose beginning is not told began after the one before
    for row in begun.values():
        lanes[_place(row)].bars.append(_bar(row, None, row))
    for lane in lanes.values():
        lane.bars.sort(key=lambda bar: (bar.start, -math.inf if bar.end is None else -bar.end))  # the short above
    order = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in lanes))}
    return sorted(lanes.values(), key=lambda lane: (order[lane.deployment], lane.step is not None))


def _place(row: Row) -> tuple[str, str | None]:
    return row.deployment or "", paths.plain(row.step) if row.step is not None else None


def _bar(begun: Row, end: float | None, row: Row) -> Bar:
    which = f"[{row.iteration}]" if row.iteration is not None else ""
    which += f", attempt {row.attempt}" if row.attempt > 1 else ""
    why = f" ({row.reason.value})" if row.reason is not None else ""
    took = duration(end - begun.at) if end is not None else "not ended"
    what = f"{row.deployment}{'/' + row.step if row.step else ''}{which}: {row.state.value}{why}, {took}"
    return Bar(begun.at, end, _state(row), one_line(what, 200), row.iteration)


def _state(row: Row) -> StepState | DeploymentState:
    assert isinstance(row.state, StepState | DeploymentState)
    return row.state


def gantt(timeline: Timeline) -> Svg:
    """The picture of a timeline. With too many steps for one, only the deployments are drawn, which it says.

    Raises:
        UnsupportedError: even so there is too much.
    """
    lanes, note = lanes_of(timeline), ""
    if _too_many(lanes):
        steps = sum(lane.step is not None for lane in lanes)
        lanes = [lane for lane in lanes if lane.step is None]
        note = f"{steps} steps are not drawn: take those of one deployment, .of(name)"
    if _too_many(lanes):
        raise UnsupportedError(
            f"A picture of {len(lanes)} deployments could not be read.",
            advice='Take a part of it: timeline.of("pi-1").',
        )
    return _Picture(lanes, note).svg()


def _too_many(lanes: list[Lane]) -> bool:
    return len(lanes) > MOST_LANES or sum(len(lane.bars) for lane in lanes) > MOST_BARS


class _Picture:
    def __init__(self, lanes: list[Lane], note: str) -> None:
        self._lanes, self._note = lanes, note
        ends = [time for lane in lanes for bar in lane.bars for time in (bar.start, bar.end) if time is not None]
        times = [max(-_LONGEST, min(time, _LONGEST)) for time in ends]
        self._begin = min(times, default=0.0)
        self._span = max(max(times, default=1.0) - self._begin, 1e-6)

    def svg(self) -> Svg:
        height = _TOP + _LANE * len(self._lanes) + 16
        width = _LABEL + _WIDTH + _END
        size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
            svg_text(8, 16, self._note, 11, FAINT, "start") if self._note else "",
            *self._ticks(height),
            *(self._lane(number, lane) for number, lane in enumerate(self._lanes)),
            "</svg>",
        ]
        return Svg("\n".join(part for part in parts if part) + "\n")

    def _x(self, time: float) -> float:
        return _LABEL + max(0.0, min((time - self._begin) / self._span, 1.0)) * _WIDTH

    def _ticks(self, height: float) -> Iterator[str]:
        step = _round(self._span / 8)
        first = math.ceil(self._begin / step)
        for number in range(first, first + 10):
            time = number * step
            if time > self._begin + self._span:
                return
            x = self._x(time)
            yield f'<path d="M{x:.1f} {_TOP - 8:.0f} V{height - 10:.0f}" stroke="#e5e7eb" stroke-width="1"/>'
            yield svg_text(x, _TOP - 14, duration(time) if time else "0", 10, FAINT)

    def _lane(self, number: int, lane: Lane) -> str:
        y = _TOP + _LANE * number
        name = lane.deployment if lane.step is None else lane.step
        bold = ' font-weight="bold"' if lane.step is None else ""
        iterated = any(bar.iteration is not None for bar in lane.bars)
        label = svg_text(8 if lane.step is None else 22, y + 14, one_line(name, 30), 12, INK, "start", bold)
        state = svg_text(_LABEL + _WIDTH + 8, y + 14, lane.state.value if lane.state else "", 11, FAINT, "start")
        return label + "".join(self._bar(y, bar, iterated) for bar in lane.bars) + state

    def _bar(self, y: float, bar: Bar, iterated: bool) -> str:
        start, end = self._x(bar.start), self._x(self._begin + self._span if bar.end is None else bar.end)
        fill, edge = COLOURS[bar.state] if isinstance(bar.state, StepState) else _DEPLOYMENTS.get(bar.state, _PALE)
        dashes = ' stroke-dasharray="3 2"' if bar.end is None else ""
        if iterated and bar.iteration is None:  # the whole, behind its iterations
            dashes += ' opacity="0.45"'
        width = max(end - start, _NARROWEST)
        return (
            f'<rect x="{start:.1f}" y="{y + 3:.1f}" width="{width:.1f}" height="{_LANE - 6:.0f}" '
            f'rx="2" fill="{fill}" stroke="{edge}"{dashes}><title>{xml(bar.what)}</title></rect>'
        )


def _round(seconds: float) -> float:
    """The next span above that people count in."""
    for unit in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0):
        for times in (1, 2, 5):
            if unit * times >= seconds:
                return unit * times
    for whole in (10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200):
        if whole >= seconds:
            return float(whole)
    days = 86_400.0
    return days * max(1.0, -(-seconds // days))
