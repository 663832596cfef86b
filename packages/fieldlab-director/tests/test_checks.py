"""What is made of trials: how far a clock is off, and whether there is any hope for an infrastructure."""

from __future__ import annotations

import pytest
from fieldlab_common.keeping import Checked
from fieldlab_common.protocol import CheckLine
from fieldlab_director.connectors.kept import clock_line


@pytest.mark.parametrize(
    ("times", "ok", "said"),
    [
        ((100.0, 100.1, 100.3, 100.4), True, "0.00 s behind the director's, give or take 0.10 s."),
        ((100.0, 160.1, 160.3, 100.4), False, "60.00 s ahead of the director's, give or take 0.10 s."),
        ((100.0, 98.0, 98.0, 100.0), False, "2.00 s behind the director's, give or take 0.00 s."),
        ((100.0, 102.0, 102.0, 104.0), True, "0.00 s behind the director's, give or take 2.00 s."),
    ],
)
def test_a_clock_is_compared_by_half_of_the_round_trip(times: tuple[float, ...], ok: bool, said: str) -> None:
    line = clock_line(*times)
    assert (line.ok, line.said, bool(line.advice)) == (ok, said, not ok)


def test_a_slow_trip_is_not_held_against_a_clock() -> None:
    assert clock_line(100.0, 108.0, 108.0, 110.0).ok


def test_an_executor_that_tells_no_time_is_not_held_against_its_node() -> None:
    assert clock_line(100.0, None, None, 100.1).ok


def line(node: str, ok: bool = True, needed: bool = True) -> CheckLine:
    return CheckLine(node=node, what="executor", ok=ok, said=f"{node} says so", needed=needed)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ((), None),
        ((line("a"),), None),
        ((line("a", ok=False), line("b")), None),
        ((line("a", ok=False, needed=False),), None),
        ((line("a", ok=False), line("b"), line("b", ok=False)), "a says so"),
    ],
)
def test_there_is_no_hope_when_each_node_lacks_what_it_needs(lines: tuple[CheckLine, ...], why: str | None) -> None:
    found = Checked(lines=lines).hopeless()
    assert (found.said if found else None) == why
