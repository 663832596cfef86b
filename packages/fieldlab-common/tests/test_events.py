"""When a barrier opens, and when it never will; and both, and gates, in rounds."""

import pytest
from fieldlab_common import paths
from fieldlab_common.events import BARRIER, DEPLOYMENT, Arrivals, Event, Gates, Member, arrival, barrier_view

MEMBERS = (
    Member(deployment="a", role="client"),
    Member(deployment="b", role="client"),
    Member(deployment="s", role="server"),
)


def came(who, name="start", step="barrier", iteration=0, round=()):
    return Event(name=BARRIER, data=arrival(name, round), sender=who, step=step, iteration=iteration)


def ended(who, state="failed"):
    return Event(name=DEPLOYMENT, data={"deployment": who, "state": state})


def test_all_waits_for_every_deployment():
    assert not barrier_view("start", "all", [came("a"), came("b")], MEMBERS).open
    assert barrier_view("start", "all", [came("a"), came("b"), came("s")], MEMBERS).open


def test_a_role_waits_for_the_deployments_of_that_role_only():
    assert barrier_view("start", "client", [came("b"), came("a")], MEMBERS).open


def test_a_party_counts_once_whatever_its_retries():
    assert not barrier_view("start", 2, [came("a"), came("a")], MEMBERS).open
    assert barrier_view("start", 2, [came("a"), came("a", iteration=1)], MEMBERS).open


def test_arrivals_at_another_barrier_do_not_count():
    assert not barrier_view("start", 1, [came("a", name="other")], MEMBERS).open


def test_it_is_broken_as_soon_as_a_party_that_has_not_come_ends_and_says_who():
    view = barrier_view("start", "all", [came("a"), ended("b"), came("s")], MEMBERS)
    assert view.broken
    assert view.missing_for_good == ("b (failed)",)


def test_a_party_that_came_and_then_ended_does_not_break_it():
    view = barrier_view("start", "all", [came("b"), ended("b", "succeeded"), came("a")], MEMBERS)
    assert not view.broken
    assert not view.open


def test_a_role_that_nobody_has_breaks_it():
    assert barrier_view("start", "observer", [came("a")], MEMBERS).broken


def test_a_number_is_broken_only_when_nobody_is_left_who_could_come():
    log = [came("a"), ended("b"), ended("s")]
    assert not barrier_view("start", 2, log, MEMBERS).broken
    assert barrier_view("start", 2, [*log, ended("a")], MEMBERS).broken


def test_every_round_has_a_barrier_of_its_own():
    log = [came("a"), came("b"), came("s"), came("a", round=(1,)), came("b", round=(1,))]
    assert barrier_view("start", "all", log, MEMBERS).open
    assert barrier_view("start", "all", log, MEMBERS, (1,)).arrived == ("a", "b")
    assert not barrier_view("start", "all", log, MEMBERS, (1,)).open
    assert barrier_view("start", 2, log, MEMBERS, (1,)).open


def test_a_party_counts_once_also_when_the_dag_that_it_is_in_is_tried_again():
    log = [came("a", step="sub/barrier"), came("a", step="sub~2/barrier"), came("a", step="other[1]~3/barrier")]
    assert not barrier_view("start", 3, log, MEMBERS).open
    assert barrier_view("start", 2, log, MEMBERS).open


@pytest.mark.parametrize("data", [None, {"barrier": 1}, {"barrier": "start", "round": "x"}, {"round": [1]}])
def test_an_arrival_that_makes_no_sense_counts_for_nothing(data):
    log = [Event(name=BARRIER, data=data, sender="a", step="barrier")]
    assert barrier_view("start", 1, log, MEMBERS).arrived == ()


def test_the_oldest_rounds_are_forgotten_when_too_many_have_come():
    arrivals = Arrivals((came(who, round=(n,)) for n in range(1, 100) for who in "abs"), most=30)
    assert arrivals.view("start", "all", MEMBERS, (99,)).open
    assert arrivals.view("start", "all", MEMBERS, (1,)).arrived == ()
    assert arrivals.has("start", (99,), "a", "barrier~2", 0)
    assert not arrivals.has("start", (99,), "a", "barrier", 1)


@pytest.mark.parametrize(
    ("path", "iteration", "place"),
    [
        ("barrier", None, ("barrier", ())),
        ("repeated", 0, ("repeated", ())),
        ("repeated", 2, ("repeated", (2,))),
        ("mapped", 2, ("mapped[2]", ())),
        ("repeated[2]~3/barrier", None, ("repeated/barrier", (2,))),
        ("mapped[2]/barrier", None, ("mapped[2]/barrier", ())),
        ("repeated[1]/mapped[4]/repeated", 3, ("repeated/mapped[4]/repeated", (1, 3))),
        ("repeated[0]/repeated", 3, ("repeated/repeated", (0, 3))),
        ("repeated[3]/repeated", 0, ("repeated/repeated", (3,))),
    ],
)
def test_a_step_stands_in_the_rounds_of_what_is_repeated_around_it(path, iteration, place):
    assert paths.place(path, iteration, lambda plain: plain.endswith("repeated")) == place


def test_a_gate_looks_behind_what_opened_the_round_before_and_again_from_there_when_it_is_tried_again():
    gates = Gates()
    assert gates.mark("loop/gate", "go", ()) == 0
    gates.opened("loop/gate", "go", 7)
    assert gates.mark("loop/gate", "go", ()) == 0
    assert gates.mark("loop/gate", "go", (1,)) == 7
    assert gates.mark("loop/gate", "go", (2,)) == 7  # nothing opened round 1
    gates.opened("loop/gate", "go", 9)
    assert gates.mark("loop/gate", "go", (1,)) == 7
    assert gates.mark("loop/gate", "go", (3,)) == 9
    assert gates.mark("other", "go", (3,)) == 0
