"""Where the boxes and lines of a drawing go: a layered layout, from top to bottom.

It is that of Sugiyama, Tagawa and Toda (1981) with the usual simplifications: boxes are given to layers from a
topological order, long lines get a point in each layer that they cross, layers are ordered by barycentres in sweeps
down and up (the order with the fewest crossings is kept), and then every box moves as near to its neighbours as the
order and the gaps allow. The last is a least-squares problem with a chain of constraints, which "pool adjacent
violators" solves exactly.

A layer has a bounded number of boxes, so that a wide fan-out is drawn in several rows. Long lines of one style that
leave one box, or that lead to one box, run together as far as they can. Pure and deterministic: the same boxes and
lines give the same places.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Arrow", "Layout", "arrange", "points_needed"]

Arrow = tuple[str, str, str]  # a line: source, target, and a style

GAP = 22.0  # between two boxes of a layer
LANE = 12.0  # width that a line takes where it passes a layer
ORDER_SWEEPS = 12
PLACE_SWEEPS = 24
CENTRE = 0.02  # how much everything wants to be in the middle
STRAIGHT = 6.0  # how much more a line wants to be straight than a box wants to be near its neighbours


@dataclass(frozen=True)
class Layout:
    """``boxes``: centre and layer of each; ``lines``: for each line, its x at every layer from source to target.

    ``points``: for each line, the numbers of the boxes and points that it runs through; lines that run together share
    them.
    """

    boxes: Mapping[str, tuple[float, int]]
    lines: tuple[tuple[float, ...], ...]
    points: tuple[tuple[int, ...], ...]
    layers: int
    width: float


def points_needed(names: Sequence[str], lines: Sequence[Arrow]) -> int:
    """How many points ``arrange`` has to place at most: boxes, and one for each layer that a line crosses."""
    layers = _layers(names, lines)
    return len(names) + sum(layers[b] - layers[a] - 1 for a, b, _ in lines)


def arrange(names: Sequence[str], widths: Mapping[str, float], lines: Sequence[Arrow]) -> Layout:
    """Lay out boxes, given in topological order with their widths, and the lines between them."""
    layers = _layers(names, lines)
    net = _Net(names, widths, lines, layers)
    rows = net.ordered()
    x = net.placed(rows)
    left = min(x[n] - net.widths[n] / 2 for n in range(len(net.widths)))
    right = max(x[n] + net.widths[n] / 2 for n in range(len(net.widths)))
    return Layout(
        boxes={name: (x[n] - left, layers[name]) for n, name in enumerate(names)},
        lines=tuple(tuple(x[n] - left for n in path) for path in net.paths),
        points=tuple(tuple(path) for path in net.paths),
        layers=len(rows),
        width=right - left,
    )


def _layers(names: Sequence[str], lines: Sequence[Arrow]) -> dict[str, int]:
    """A layer for each box, below all that lead to it; no layer with more boxes than look well."""
    most = max(8, math.ceil(1.3 * math.sqrt(len(names))))
    before: dict[str, list[str]] = {name: [] for name in names}
    after: dict[str, list[str]] = {name: [] for name in names}
    for a, b, _ in lines:
        before[b].append(a)
        after[a].append(b)
    layers: dict[str, int] = {}
    held: dict[int, int] = {}
    for name in names:
        layer = 1 + max((layers[a] for a in before[name]), default=-1)
        while held.get(layer, 0) >= most:
            layer += 1
        layers[name] = layer
        held[layer] = held.get(layer, 0) + 1
    for name in reversed(names):  # what nothing leads to stands right above what it leads to
        if not before[name] and after[name]:
            wanted = min(layers[b] for b in after[name]) - 1
            if held.get(wanted, 0) < most:
                held[layers[name]] -= 1
                layers[name] = wanted
                held[wanted] += 1
    used = {layer: number for number, layer in enumerate(sorted(set(layers.values())))}
    return {name: used[layer] for name, layer in layers.items()}


class _Net:
    """Boxes and the points of long lines as numbers; those below ``len(names)`` are boxes."""

    def __init__(
        self,
        names: Sequence[str],
        widths: Mapping[str, float],
        lines: Sequence[Arrow],
        layers: Mapping[str, int],
    ) -> None:
        self.boxes = len(names)
        self.widths = [widths[name] for name in names]
        self.layer = [layers[name] for name in names]
        self.leans: dict[int, bool] = {}  # point of a line -> whether it stays below its source, or above its target
        self.paths = self._paths({name: n for n, name in enumerate(names)}, lines)
        self.above: list[list[int]] = [[] for _ in self.widths]
        self.below: list[list[int]] = [[] for _ in self.widths]
        self.linked: list[list[int]] = [[] for _ in range(self.boxes)]
        for path in self.paths:
            self.linked[path[0]].append(path[-1])
            self.linked[path[-1]].append(path[0])
        for upper, lower in dict.fromkeys(pair for path in self.paths for pair in pairwise(path)):
            self.below[upper].append(lower)
            self.above[lower].append(upper)

    def _paths(self, number: Mapping[str, int], lines: Sequence[Arrow]) -> list[list[int]]:
        """The points of each line; lines that run together share them."""
        long = [(a, b, style) for a, b, style in lines if self.layer[number[b]] - self.layer[number[a]] > 1]
        leaving = Counter((a, style) for a, _, style in long)
        coming = Counter((b, style) for _, b, style in long)
        points: dict[tuple[bool, str, str, int], int] = {}
        paths: list[list[int]] = []
        for a, b, style in lines:
            source = leaving[a, style] >= coming[b, style]
            path = [number[a]]
            for layer in range(self.layer[number[a]] + 1, self.layer[number[b]]):
                key = (source, a if source else b, style, layer)
                if key not in points:
                    points[key] = len(self.widths)
                    self.leans[points[key]] = source
                    self.layer.append(layer)
                    self.widths.append(LANE)
                path.append(points[key])
            paths.append([*path, number[b]])
        return paths

    # --- the order in each layer ---

    def ordered(self) -> list[list[int]]:
        """The layers, each in an order that has few crossings."""
        rows: list[list[int]] = [[] for _ in range(max(self.layer) + 1)]
        for n in self._reached():
            rows[self.layer[n]].append(n)
        best, fewest = [list(row) for row in rows], self._crossings(rows)
        for sweep in range(ORDER_SWEEPS):
            if not fewest:
                break
            self._sweep(rows, down=sweep % 2 == 0)
            crossings = self._crossings(rows)
            if crossings < fewest:
                best, fewest = [list(row) for row in rows], crossings
        return best

    def _reached(self) -> list[int]:
        """All points, in the order in which a walk along the lines meets them: near ones stand together."""
        seen: dict[int, None] = {}
        stack = [n for n in reversed(range(self.boxes)) if not self.above[n]]
        while stack:
            n = stack.pop()
            if n not in seen:
                seen[n] = None
                stack.extend(reversed(self.below[n]))
        return list(seen)

    def _sweep(self, rows: list[list[int]], *, down: bool) -> None:
        beside = self.above if down else self.below
        at = {n: float(i) for row in rows for i, n in enumerate(row)}
        for row in rows if down else reversed(rows):
            row.sort(key=lambda n: sum(at[m] for m in beside[n]) / len(beside[n]) if beside[n] else at[n])
            at.update((n, float(i)) for i, n in enumerate(row))

    def _crossings(self, rows: Sequence[Sequence[int]]) -> int:
        at = {n: i for row in rows for i, n in enumerate(row)}
        count = 0
        for row in rows:
            passed: list[int] = []
            for n in row:
                ends = sorted(at[m] for m in self.below[n])
                count += sum(len(passed) - bisect_left(passed, end + 1) for end in ends)
                for end in ends:
                    insort(passed, end)
        return count

    # --- the place in each layer ---

    def placed(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The centre of every point: near its neighbours, in the order of its layer, with gaps between."""
        x = [0.0] * len(self.widths)
        for row in rows:
            offsets = self._offsets(row)
            for n, offset in zip(row, offsets, strict=True):
                x[n] = offset - offsets[-1] / 2
        for sweep in range(PLACE_SWEEPS):
            last = sweep == PLACE_SWEEPS - 1
            for row in rows if sweep % 2 == 0 else reversed(rows):
                self._place(row, x, both=last or sweep > 3, down=sweep % 2 == 0)
        return x

    def _offsets(self, row: Sequence[int]) -> list[float]:
        offsets = [0.0]
        for left, right in pairwise(row):
            gap = GAP if left < self.boxes or right < self.boxes else 0.0
            offsets.append(offsets[-1] + (self.widths[left] + self.widths[right]) / 2 + gap)
        return offsets

    def _place(self, row: Sequence[int], x: list[float], *, both: bool, down: bool) -> None:
        offsets = self._offsets(row)
        wanted: list[tuple[float, float]] = []
        for n, offset in zip(row, offsets, strict=True):
            near = self._near(n, both, down)
            weights = [STRAIGHT if n >= self.boxes and m >= self.boxes else 1.0 for m in near]
            weight = sum(weights) + CENTRE  # of the picture: it has x = 0
            aim = sum(w * x[m] for w, m in zip(weights, near, strict=True)) / weight
            wanted.append((aim - offset, weight))
        for n, offset, base in zip(row, offsets, _rising(wanted), strict=True):
            x[n] = base + offset

    def _near(self, n: int, both: bool, down: bool) -> list[int]:
        """What a box or a point wants to be near to."""
        if not both:
            return (self.above if down else self.below)[n]
        if n in self.leans:
            return self.above[n] if self.leans[n] else self.below[n]
        return self.linked[n]


def _rising(wanted: Sequence[tuple[float, float]]) -> list[float]:
    """The numbers nearest to the wanted ones (least squares, with weights) that never fall from one to the next."""
    blocks: list[list[float]] = []  # mean, weight, count
    for aim, weight in wanted:
        blocks.append([aim, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, more, count = blocks.pop()
            one = blocks[-1]
            one[0] = (one[0] * one[1] + mean * more) / (one[1] + more)
            one[1] += more
            one[2] += count
    return [mean for mean, _, count in blocks for _ in range(int(count))]
