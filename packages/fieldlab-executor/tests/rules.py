"""The rules of docs/lifecycle.md, read from its table, for the model that the machine is compared with.

Nothing is known here but how the table is written; what it says is taken from its cells. A row that is not there, a
cell that says something else, or a state that is in neither column, and the reading fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fieldlab_common.deployment import On
from fieldlab_common.lifecycle import StepState

PAGE = Path(__file__).parents[3] / "docs" / "lifecycle.md"
HEADING = "\n## When a step starts, is skipped, and what ends a DAG well\n"
ENDED = frozenset(state for state in StepState if state.terminal)

QUANTIFIERS: Mapping[str, Callable[[Iterable[bool]], bool]] = {
    "every edge": all,
    "one edge": any,
    "no edge": lambda found: not any(found),
}


@dataclass(frozen=True)
class Rules:
    """What the table says. ``edges`` and ``value``: the ends of a step with which they hold; else they never will."""

    edges: Mapping[On, frozenset[StepState]]
    value: frozenset[StepState]
    during_lost: frozenset[StepState]  # the ends of a background step after which what waits to run `during` it cannot
    holds: Mapping[str, Callable[[Iterable[bool]], bool]]  # of the edges together, by need: given which ones hold
    lost: Mapping[str, Callable[[Iterable[bool]], bool]]  # given which ones can hold no more, or still can
    not_started: StepState  # what a step becomes that cannot start
    handling: frozenset[On]  # the edges behind which a failure may be handled
    handled_by: frozenset[StepState]
    well: frozenset[StepState]  # the ends of its steps with which a DAG ends well
    well_if_handled: frozenset[StepState]


def read(text: str) -> Rules:
    """The rules that a page states."""
    rows = _rows(text[text.index(HEADING) :])
    edges = {on: _ends(rows[_only(rows, f'an edge `on="{on.value}"`')]) for on in On}
    start = rows[_only(rows, "the step starts")]
    handled = _only(rows, "a failure is handled")
    behind = frozenset(On(name) for name in re.findall(r'`on="(\w+)"`', rows[handled][0]))
    well, unwell = rows[_only(rows, "a deployment, or a DAG that is a step, ends well")]
    plain, _, conditional = well.rpartition(", or as ")
    if not conditional.endswith("and handled") or _states(conditional) != _states(unwell):
        raise ValueError(f"how a DAG ends: {well!r}, else {unwell!r}")
    (not_started,) = _states(start[1])
    needs = {need: rows[_only(rows, f'the edges together, `need="{need}"`')] for need in ("all", "any")}
    return Rules(
        edges=edges,
        value=_ends(rows[_only(rows, "the value that `.when` looks at")]),
        during_lost=_states(rows[_only(rows, "a background step that it runs `during`")][1]),
        holds={need: _quantified(cells[0], "holds") for need, cells in needs.items()},
        lost={need: _lost(cells[1]) for need, cells in needs.items()},
        not_started=not_started,
        handling=behind,
        handled_by=_ends(rows[handled]),
        well=_states(plain),
        well_if_handled=_states(conditional),
    )


def _rows(text: str) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        if line.startswith("|"):
            rule, holds, lost = (cell.strip() for cell in line.strip("|").split("|"))
            found[rule] = (holds, lost)
        elif found:
            break
    return found


def _only(rows: Mapping[str, tuple[str, str]], beginning: str) -> str:
    (found,) = [rule for rule in rows if rule.startswith(beginning)]
    return found


def _states(cell: str) -> frozenset[StepState]:
    return frozenset(StepState(name) for name in re.findall(r"`(\w+)`", cell))


def _ends(cells: tuple[str, str]) -> frozenset[StepState]:
    """The ends with which a rule holds; with each of the others it must be said that it cannot."""
    holds, lost = _states(cells[0]), _states(cells[1])
    if holds & lost or holds | lost != ENDED or (not lost and cells[1] != "never"):
        raise ValueError(f"each end must be in one of the two columns: {cells}")
    return holds


def _quantified(cell: str, verb: str) -> Callable[[Iterable[bool]], bool]:
    quantifier = cell.removesuffix(f" {verb}")
    return QUANTIFIERS[quantifier]


def _lost(cell: str) -> Callable[[Iterable[bool]], bool]:
    """Given of each edge whether it holds or still can: whether all together can no more."""
    if cell.endswith(" can no longer hold"):
        some = _quantified(cell, "can no longer hold")
        return lambda held: some(not one for one in held)
    return _quantified(cell, "can hold any more")


RULES = read(PAGE.read_text())
