"""The line for nodes: against any order of submits, ends and cancels."""

from __future__ import annotations

from collections import Counter

import pytest
from fieldlab_common.reservation import PREPARE_AHEAD, Claims, Wish, grants, line_time
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


def wish(run: str, *places: str) -> Wish:
    return Wish(run=run, needs=Counter(places))


def one(place: object) -> int:
    return 1


@pytest.mark.parametrize(
    ("line", "held", "expected"),
    [
        ([wish("a", "x", "y")], {}, ["a"]),
        ([wish("a", "x", "y")], {"y": 1}, []),
        ([wish("a", "x"), wish("b", "x")], {}, ["a"]),
        ([wish("wide", "x", "y"), wish("b", "x")], {"y": 1}, []),  # x is kept free for the wide one
        ([wish("wide", "x", "y"), wish("b", "z")], {"y": 1}, ["b"]),  # it cannot delay the wide one
        ([wish("wide", "x", "y"), wish("b", "x", "z"), wish("c", "z")], {"y": 1}, []),  # nor may c delay b
    ],
)
def test_who_gets_its_nodes(line: list[Wish], held: dict[str, int], expected: list[str]) -> None:
    assert grants(line, held, one) == expected


def test_a_shareable_node_is_shared_up_to_its_slots_and_not_beyond_those_wanted_before() -> None:
    line = [wish("wide", "x", "y"), wish("b", "x"), wish("c", "x")]
    assert grants(line, {"y": 1}, {"x": 2, "y": 1}.__getitem__) == ["b"]


def test_a_run_that_wants_more_than_there_is_has_the_place_when_it_is_alone() -> None:
    big = wish("big", *["cloud"] * 5)
    assert grants([big], {"cloud": 1}, lambda place: 3) == []
    assert grants([big, wish("next", "cloud")], {}, lambda place: 3) == ["big"]


def test_what_is_lacking_is_named() -> None:
    claims = Claims(one, Counter(y=1))
    assert claims.lacks(wish("a", "x", "y")) == ("y",)


def test_a_run_with_a_time_is_in_the_line_from_shortly_before_it() -> None:
    assert line_time(100.0, None) == 100.0
    assert line_time(100.0, 5000.0) == 5000.0 - PREPARE_AHEAD
    assert line_time(4900.0, 5000.0) == 4900.0


NODES = ("p", "q", "r", "s")
SLOTS = {"p": 1, "q": 1, "r": 1, "s": 2}


class Lab(RuleBasedStateMachine):
    """Runs come, end node by node, and are cancelled; who gets nodes is asked anew each time, of what is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.line: dict[str, frozenset[str]] = {}
        self.holds: dict[str, set[str]] = {}
        self.before: dict[str, set[str]] = {}  # who was there when a run came

    @rule(nodes=st.sets(st.sampled_from(NODES), min_size=1))
    def submit(self, nodes: set[str]) -> None:
        self.count += 1
        run = f"run-{self.count}"
        self.before[run] = {*self.line, *self.holds}
        self.line[run] = frozenset(nodes)
        self.serve()

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def end_on_one_node(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(sorted(self.holds)))
        self.holds[run].discard(data.draw(st.sampled_from(sorted(self.holds[run]))))
        if not self.holds[run]:
            del self.holds[run]
        self.serve()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        del self.line[data.draw(st.sampled_from(sorted(self.line)))]
        self.serve()

    def serve(self) -> None:
        line = [Wish(run=run, needs=Counter(nodes)) for run, nodes in self.line.items()]
        held = Counter(node for nodes in self.holds.values() for node in nodes)
        for run in grants(line, held, SLOTS.__getitem__):
            self.passed(run)
            self.holds[run] = set(self.line.pop(run))

    def passed(self, run: str) -> None:
        """Whoever is passed in the line finds what it waits for as free as it was."""
        for other in list(self.line):
            if other == run:
                break
            for node in self.line[other] & self.line[run]:
                earlier = [nodes for nodes in self.holds.values() if node in nodes]
                before = [w for w in list(self.line)[: list(self.line).index(other) + 1] if node in self.line[w]]
                assert len(earlier) + len(before) + 1 <= SLOTS[node]

    @invariant()
    def no_node_is_held_beyond_its_slots(self) -> None:
        held = Counter(node for nodes in self.holds.values() for node in nodes)
        assert all(count <= SLOTS[node] for node, count in held.items())

    @invariant()
    def the_first_in_line_waits_for_held_nodes_alone(self) -> None:
        if self.line:
            run, nodes = next(iter(self.line.items()))
            held = Counter(node for held in self.holds.values() for node in held)
            assert any(held[node] >= SLOTS[node] for node in nodes), run

    @invariant()
    def nobody_waits_for_who_came_later_on_its_nodes(self) -> None:
        for run, nodes in self.line.items():
            later = {other for other in self.holds if other not in self.before[run]}
            blocked = [node for node in nodes if SLOTS[node] == 1 and any(node in self.holds[one] for one in later)]
            assert not blocked

    def teardown(self) -> None:
        """Everybody is served in the end: runs that hold nodes end, and the line gets shorter each time."""
        while self.line:
            length = len(self.line)
            self.holds.clear()
            self.serve()
            assert len(self.line) < length


TestLab = Lab.TestCase
TestLab.settings = settings(max_examples=50)


@given(st.permutations(["a", "b", "c"]))
def test_the_answer_does_not_hang_on_the_order_in_which_places_are_named(order: list[str]) -> None:
    assert grants([wish("one", *order)], {}, one) == ["one"]
