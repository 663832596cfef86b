"""When a barrier opens, and when it never will."""

from fieldlab_common.events import BARRIER, DEPLOYMENT, Event, Member, barrier_view

MEMBERS = (
    Member(deployment="a", role="client"),
    Member(deployment="b", role="client"),
    Member(deployment="s", role="server"),
)


def came(who, name="start", step="barrier", iteration=0):
    return Event(name=BARRIER, data={"barrier": name}, sender=who, step=step, iteration=iteration)


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
