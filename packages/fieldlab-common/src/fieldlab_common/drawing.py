"""Drawings of steps and the edges between them: as SVG, for Mermaid and for Graphviz.

A ``Drawing`` is boxes and lines, and knows nothing of where they come from: a DAG as it is defined, the graph of a
deployment, or that graph with how its steps stand. All text in it may come from others (a graph is a blob, a reason
a node's): it is escaped here for each of the three languages, and characters that none of them can hold are replaced.

What a line means is told by its dashes and by a word, not by its colour alone; so is how a step stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fieldlab_common import paths
from fieldlab_common.deployment import Graph, Need, On
from fieldlab_common.errors import UnsupportedError
from fieldlab_common.layout import Layout, arrange, points_needed
from fieldlab_common.lifecycle import StepState

__all__ = [
    "COLOURS",
    "FAINT",
    "INK",
    "Box",
    "Drawing",
    "Kind",
    "Line",
    "Standing",
    "Svg",
    "drawing_of",
    "lines_to",
    "svg_text",
    "xml",
]


class Kind(StrEnum):
    """What a line means."""

    DATA = "data"  # a value goes along it, when the first has succeeded
    SUCCESS = "success"  # the second starts when the first has succeeded
    FAILURE = "failure"  # when the first has failed
    ALWAYS = "always"  # when the first has ended
    DURING = "during"  # the second runs while the first, a background step, runs
    CONDITION = "if"  # a condition on the first's value says whether the second runs


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a step of a run stands; ``note`` is a word or two, such as how long it took."""

    state: StepState
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Box:
    """One step. ``notes``: what is special about it. ``inside``: the steps of one that is a DAG; SVG tells how many."""

    name: str
    notes: tuple[str, ...] = ()
    background: bool = False
    several: bool = False  # repeated, or mapped
    standing: Standing | None = None
    inside: Drawing | None = None

    def small_print(self) -> str:
        """The line under its name."""
        found = [*self.notes]
        if self.standing is not None:
            found += [self.standing.state.value, self.standing.note]
        return " · ".join(part for part in found if part)


@dataclass(frozen=True, kw_only=True)
class Line:
    """An edge, from the step that is needed to the one that needs it."""

    source: str
    target: str
    kind: Kind


class Svg(str):
    """An SVG document as text; a notebook shows the picture."""

    __slots__ = ()

    def _repr_svg_(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f'<div style="overflow:auto;max-height:80vh">{self}</div>'


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Boxes, in an order in which each stands after all that lead to it, and lines."""

    title: str
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...] = field(default=())

    def to_svg(self) -> Svg:
        """The picture, laid out from top to bottom, as one SVG document.

        Raises:
            UnsupportedError: it has so many boxes or long lines that nobody could read it.
        """
        return _Picture(self).svg()

    def to_mermaid(self) -> str:
        """A Mermaid flowchart, as Markdown on GitHub and elsewhere shows it; a step that is a DAG is a frame."""
        out = ["flowchart TD", *_mermaid_body(self, "n", "    ")]
        every = list(_numbered(self, "n"))
        states: dict[StepState, list[str]] = {}
        for number, box in every:
            if box.standing is not None:
                states.setdefault(box.standing.state, []).append(number)
        for state, members in states.items():
            fill, edge = COLOURS[state]
            out.append(f"    classDef {state.value} fill:{fill},stroke:{edge},color:{INK}")
            out.append(f"    class {','.join(members)} {state.value}")
        if background := [number for number, box in every if box.background]:
            out.append("    classDef background stroke-dasharray:5 3")
            out.append(f"    class {','.join(background)} background")
        return "\n".join(out) + "\n"

    def to_dot(self) -> str:
        """A graph in the DOT language, for Graphviz; a step that is a DAG is a cluster."""
        out = [f"digraph {_dot(self.title)} {{", '    node [shape=box, style="rounded,filled", fillcolor="#ffffff"];']
        out += ["    compound=true;"] if any(box.inside for box in self.boxes) else []
        return "\n".join([*out, *_dot_body(self, "n", "    "), "}"]) + "\n"


def _numbered(drawing: Drawing, prefix: str) -> Iterator[tuple[str, Box]]:
    """Every box with its id, those inside of one after it."""
    for index, box in enumerate(drawing.boxes):
        yield f"{prefix}{index}", box
        if box.inside is not None:
            yield from _numbered(box.inside, f"{prefix}{index}_")


# --- what is drawn ----------------------------------------------------------------------------------------------------


def lines_to(name: str, needs: Iterable[Need], during: Iterable[str], condition: str | None) -> Iterator[Line]:
    """The lines that lead to a step: each edge once, as the most telling of what it is."""
    for need in needs:
        if need.step == condition:
            kind = Kind.CONDITION
        elif need.data and need.on is On.SUCCESS:
            kind = Kind.DATA
        else:
            kind = Kind(need.on.value)
        yield Line(source=need.step, target=name, kind=kind)
    for other in dict.fromkeys(during):
        yield Line(source=other, target=name, kind=Kind.DURING)


def notes_of(
    *, background: bool, repeated: bool, mapped: bool, need: str, inside: Sequence[int] = ()
) -> tuple[str, ...]:
    """What is special about a step, in words. ``inside``: the steps of the DAG that it is, or of each it may be."""
    said = {"background": background, "repeated": repeated, "for each item": mapped, "any one edge": need == "any"}
    shape = f"one of {len(inside)} DAGs"
    if len(inside) == 1:
        shape = f"DAG of {inside[0]} step{'s' if inside[0] != 1 else ''}"
    return (*((shape,) if inside else ()), *(word for word, holds in said.items() if holds))


def drawing_of(graph: Graph, standings: Mapping[str, Standing] | None = None, scope: str = "") -> Drawing:
    """The drawing of a deployment's graph; with ``standings``, by plain path, of how its steps stand."""
    boxes = [
        Box(
            name=step.name,
            notes=notes_of(
                background=step.background is not None,
                repeated=step.repeat is not None,
                mapped=step.over is not None,
                need=step.need,
                inside=(len(step.graph.steps),) if step.graph is not None else (),
            ),
            background=step.background is not None,
            several=step.repeat is not None or step.over is not None,
            standing=(standings or {}).get(path),
            inside=drawing_of(step.graph, standings, path) if step.graph is not None else None,
        )
        for step, path in ((step, paths.join(scope, step.name)) for step in graph.steps)
    ]
    lines = [
        line
        for step in graph.steps
        for line in lines_to(step.name, step.needs, step.during, step.when.step if step.when is not None else None)
    ]
    return Drawing(title=graph.name, boxes=tuple(boxes), lines=tuple(lines))


# --- Mermaid and DOT --------------------------------------------------------------------------------------------------

INK = "#1f2937"
FAINT = "#5b6675"
COLOURS: Mapping[StepState, tuple[str, str]] = {  # inside, edge
    StepState.WAITING: ("#ffffff", "#8a94a3"),
    StepState.RUNNING: ("#dbeafe", "#2563eb"),
    StepState.SUCCEEDED: ("#dcfce7", "#15803d"),
    StepState.FAILED: ("#fee2e2", "#b91c1c"),
    StepState.SKIPPED: ("#eef0f3", "#8a94a3"),
    StepState.CANCELLED: ("#ffedd5", "#c2410c"),
}

_MERMAID: Mapping[Kind, str] = {
    Kind.DATA: "-->",
    Kind.SUCCESS: "-.->",
    Kind.FAILURE: '-. "failure" .->',
    Kind.ALWAYS: '-. "always" .->',
    Kind.DURING: '== "during" ==>',
    Kind.CONDITION: '-- "if" -->',
}

_DOT: Mapping[Kind, str] = {
    Kind.DATA: "style=solid",
    Kind.SUCCESS: "style=dashed",
    Kind.FAILURE: 'style=dashed, color="#b91c1c", label="failure"',
    Kind.ALWAYS: 'style=dashed, label="always"',
    Kind.DURING: 'style=dotted, penwidth=2, label="during"',
    Kind.CONDITION: 'style=solid, arrowhead=empty, label="if"',
}

# What XML cannot hold, line ends, and the marks that reorder a line.
_UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def _plain(text: str) -> str:
    return _UNFIT.sub("\ufffd", text)


def _mermaid(text: str) -> str:
    """Text in a Mermaid label: all but letters, digits, blanks, and -_. between them, as entities."""
    kept = r"[^\W_]|[ ·]|(?<=[^\W_])[-_.](?=[^\W_])"
    return re.sub(rf"({kept})|(.)", lambda m: m[1] or f"#{ord(m[2])};", _plain(text))


def _mermaid_body(drawing: Drawing, prefix: str, indent: str) -> Iterator[str]:
    number = {box.name: f"{prefix}{i}" for i, box in enumerate(drawing.boxes)}
    for box in drawing.boxes:
        if box.inside is None:
            yield f"{indent}{number[box.name]}{_mermaid_box(box)}"
            continue
        yield f'{indent}subgraph {number[box.name]}["{_mermaid_label(box)}"]'
        yield from _mermaid_body(box.inside, f"{number[box.name]}_", f"{indent}    ")
        yield f"{indent}end"
    for line in drawing.lines:
        yield f"{indent}{number[line.source]} {_MERMAID[line.kind]} {number[line.target]}"


def _mermaid_label(box: Box) -> str:
    small = box.small_print()
    return _mermaid(box.name) + (f"<br/>{_mermaid(small)}" if small else "")


def _mermaid_box(box: Box) -> str:
    label = _mermaid_label(box)
    left, right = ("[[", "]]") if box.several else ("([", "])") if box.background else ("[", "]")
    return f'{left}"{label}"{right}'


def _dot(text: str) -> str:
    escaped = _plain(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _dot_body(drawing: Drawing, prefix: str, indent: str) -> Iterator[str]:
    number = {box.name: f"{prefix}{i}" for i, box in enumerate(drawing.boxes)}
    for box in drawing.boxes:
        if box.inside is None:
            yield f"{indent}{number[box.name]} [{_dot_box(box)}];"
            continue
        yield f"{indent}subgraph cluster_{number[box.name]} {{"
        yield from (f"{indent}    {told};" for told in _dot_told(box))
        yield from _dot_body(box.inside, f"{number[box.name]}_", f"{indent}    ")
        yield f"{indent}}}"
    whole = {box.name: box for box in drawing.boxes if box.inside is not None}
    for line in drawing.lines:
        ends = [_dot_end(number[name], whole.get(name)) for name in (line.source, line.target)]
        told = [_DOT[line.kind]]
        told += [f"ltail=cluster_{number[line.source]}"] if line.source in whole else []
        told += [f"lhead=cluster_{number[line.target]}"] if line.target in whole else []
        yield f"{indent}{ends[0]} -> {ends[1]} [{', '.join(told)}];"


def _dot_end(number: str, box: Box | None) -> str:
    """Where a line to a box ends; of a cluster, at a box in it (DOT draws it to the edge of the cluster)."""
    while box is not None and box.inside is not None and box.inside.boxes:
        number, box = f"{number}_0", box.inside.boxes[0]
    return number


def _dot_box(box: Box) -> str:
    return ", ".join(_dot_told(box))


def _dot_told(box: Box) -> list[str]:
    small = box.small_print()
    label = _dot(box.name)[:-1] + (r"\n" + _dot(small)[1:-1] if small else "") + '"'
    told = [f"label={label}"]
    if box.standing is not None:
        fill, edge = COLOURS[box.standing.state]
        told += [f'fillcolor="{fill}"', f'color="{edge}"']
    if box.background:
        told.append('style="rounded,filled,dashed"')
    if box.several:
        told.append("peripheries=2")
    return told


# --- SVG --------------------------------------------------------------------------------------------------------------

MOST_BOXES = 1_000
MOST_POINTS = 8_000
LETTER, SMALL_LETTER = 7.4, 6.0  # the width of a letter of the name and of the small print, taken wide
LONGEST = 30  # letters of a name that are shown; all of it is in the tooltip
HEIGHT, ROW = 40.0, 92.0  # of a box, and from one layer to the next
MARGIN, HEAD, FOOT = 16.0, 34.0, 34.0
ARROW = 8.0

_STYLE: Mapping[Kind, tuple[str, str, float]] = {  # colour, dashes, width
    Kind.DATA: (INK, "", 1.6),
    Kind.SUCCESS: (FAINT, "7 4", 1.4),
    Kind.FAILURE: ("#b91c1c", "4 3", 1.6),
    Kind.ALWAYS: ("#6d28d9", "9 3 2 3", 1.5),
    Kind.DURING: ("#0e7490", "1.5 4", 2.4),
    Kind.CONDITION: ("#a16207", "12 3", 1.5),
}


def _short(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


def xml(text: str) -> str:
    """``text`` for a document of XML: escaped, and without what none can hold."""
    return _plain(text).translate(_ENTITIES)


def svg_text(x: float, y: float, text: str, size: int, colour: str, anchor: str = "middle", more: str = "") -> str:
    """A line of text in an SVG; ``more`` are attributes."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{more}>'
        f"{xml(text)}</text>"
    )


def _rect(x: float, y: float, width: float, colours: tuple[str, str], dashes: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT:.0f}" rx="7" fill="{colours[0]}" '
        f'stroke="{colours[1]}" stroke-width="1.5"{dashes}/>'
    )


class _Picture:
    """A drawing that was laid out."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        names = [box.name for box in drawing.boxes]
        pairs = [(line.source, line.target, line.kind.value) for line in drawing.lines]
        if len(names) > MOST_BOXES or len(pairs) > MOST_POINTS or points_needed(names, pairs) > MOST_POINTS:
            raise UnsupportedError(
                f"{drawing.title!r:.100} is too large for a picture ({len(names)} steps, {len(pairs)} edges).",
                advice="Use .to_dot() and Graphviz, or look at parts of it.",
            )
        self.widths = {box.name: self._width(box) for box in drawing.boxes}
        self.layout: Layout = arrange(names, self.widths, pairs)
        self.kinds = [kind for kind in Kind if any(line.kind is kind for line in drawing.lines)]
        self.tops = _ports(drawing.lines, self.layout, self.widths, into=True)
        self.bottoms = _ports(drawing.lines, self.layout, self.widths, into=False)

    @staticmethod
    def _width(box: Box) -> float:
        name, small = len(_short(box.name)) * LETTER, len(_short(box.small_print(), LONGEST + 10)) * SMALL_LETTER
        return max(64.0, name + 20, small + 20)

    def svg(self) -> Svg:
        """The document."""
        key = 104.0 * len(self.kinds)
        width = max(self.layout.width, key, len(_short(self.drawing.title)) * 9.0) + 2 * MARGIN
        self.left = (width - self.layout.width) / 2
        height = HEAD + self.layout.layers * ROW - (ROW - HEIGHT) + MARGIN + (FOOT if self.kinds else 0)
        size = f'width="{width:.0f}" height="{height:.0f}"'
        view = f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="Helvetica, Arial, sans-serif"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view}>',
            f"<title>{xml(self.drawing.title)}</title>",
            f'<rect {size} fill="#ffffff"/>',
            svg_text(MARGIN, 22, _short(self.drawing.title), 14, INK, "start", ' font-weight="bold"'),
            *(self._line(number, line) for number, line in enumerate(self.drawing.lines)),
            *(self._box(box) for box in self.drawing.boxes),
            *self._key(height - FOOT / 2),
            "</svg>",
        ]
        return Svg("\n".join(parts) + "\n")

    def _top(self, layer: int) -> float:
        return HEAD + layer * ROW

    def _box(self, box: Box) -> str:
        centre, layer = self.layout.boxes[box.name]
        centre, top, width = centre + self.left, self._top(layer), self.widths[box.name]
        colours = COLOURS[box.standing.state] if box.standing else ("#f8fafc", FAINT)
        skipped = box.standing is not None and box.standing.state is StepState.SKIPPED
        dashes = ' stroke-dasharray="6 3"' if box.background else ""
        small = box.small_print()
        told = f"{box.name}: {small}" if small else box.name
        ink = FAINT if skipped else INK
        parts = [f"<g><title>{xml(told)}</title>"]
        if box.several:
            parts.append(_rect(centre - width / 2 + 4, top + 4, width, colours, dashes))
        parts.append(_rect(centre - width / 2, top, width, colours, dashes))
        parts.append(svg_text(centre, top + (17 if small else 25), _short(box.name), 13, ink))
        if small:
            parts.append(svg_text(centre, top + 32, _short(small, LONGEST + 10), 11, FAINT))
        return "".join(parts) + "</g>"

    def _line(self, number: int, line: Line) -> str:
        path = self.layout.lines[number]
        first = self.layout.boxes[line.source][1]
        x, y = self.left + self.bottoms[number], self._top(first) + HEIGHT
        drawn = [f"M{x:.1f} {y:.1f}"]
        for step, place in enumerate(path[1:], 1):
            last = step == len(path) - 1
            at = self.left + (self.tops[number] if last else place)
            top = self._top(first + step) - (ARROW - 1 if last else 0)
            bend = (top - y) / 2
            drawn.append(f"C{x:.1f} {y + bend:.1f} {at:.1f} {top - bend:.1f} {at:.1f} {top:.1f}")
            x, y = at, top
            if not last:
                y += HEIGHT
                drawn.append(f"V{y:.1f}")
        told = xml(f"{line.source} → {line.target}: {line.kind.value}")
        return f"<g><title>{told}</title>{_stroke(' '.join(drawn), line.kind)}{_head(x, y, line.kind)}</g>"

    def _key(self, y: float) -> Iterator[str]:
        for number, kind in enumerate(self.kinds):
            x = MARGIN + number * 104.0
            yield _stroke(f"M{x:.1f} {y:.1f} H{x + 40:.1f}", kind)
            yield svg_text(x + 46, y + 4, kind.value, 11, FAINT, "start")


def _stroke(path: str, kind: Kind) -> str:
    colour, dashes, width = _STYLE[kind]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _head(x: float, y: float, kind: Kind) -> str:
    return f'<path d="M{x - 4:.1f} {y:.1f} h8 l-4 {ARROW:.0f} z" fill="{_STYLE[kind][0]}"/>'


def _ports(lines: Sequence[Line], layout: Layout, widths: Mapping[str, float], *, into: bool) -> dict[int, float]:
    """Where each line meets its box: side by side over the middle of it, in the order in which they come or go."""
    end = -2 if into else 1
    meeting: dict[str, dict[int, tuple[float, int, Kind]]] = {}
    for number, line in enumerate(lines):
        met = layout.lines[number][end], layout.points[number][end], line.kind
        meeting.setdefault(line.target if into else line.source, {})[number] = met
    found: dict[int, float] = {}
    for name, met_by in meeting.items():
        places = {met: place for place, met in enumerate(sorted(set(met_by.values())))}
        room = min((widths[name] - 24) / max(1, len(places) - 1), 18.0)
        for number, met in met_by.items():
            found[number] = layout.boxes[name][0] + (places[met] - (len(places) - 1) / 2) * room
    return found
