"""What the machine decides, rule by rule."""

import sys
from typing import Any

import pytest
from fieldlab_common.deployment import Background, Condition, Graph, Need, On, Repeat, Retry, StepSpec
from fieldlab_common.errors import IllegalTransition, InvalidMessage
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_common.protocol import ValueRef
from fieldlab_executor.machine import (
    MAX_ITEMS,
    AttemptBegan,
    AttemptEnded,
    AttemptReady,
    AttemptWaits,
    CancelRequested,
    Evaluate,
    Evaluated,
    Finish,
    Input,
    Key,
    Machine,
    Measuring,
    Outcome,
    Refused,
    Report,
    SetTimer,
    StartAttempt,
    StopAttempt,
    Terminated,
    TimerFired,
)

from .play import CANCELLED, FAILED, OK, Play, step

BACKGROUND = Background(signal=2, grace=10.0)
ANNOUNCED = Background(signal=None, grace=10.0, announces=True)
SUCCESS = Finish(state=DeploymentState.SUCCEEDED, reason=Reason.COMPLETED)


def test_the_effects_of_a_chain_are_exactly_these() -> None:
    play = Play(step("a"), step("b", Need(step="a", data=True)))
    play.now = 1.5
    effects = play.end("a", OK, handle="h", started=0.5, ended=1.0)
    assert [type(e).__name__ for e in effects] == ["Report", "Report", "StartAttempt"]
    assert play.settled("a").started == 0.5
    assert play.settled("a").ended == 1.0
    assert effects[-1] == StartAttempt(key=Key(step="b"), inputs={"a": Input(handles=("h",), status="succeeded")})
    play.ok("b")
    assert play.settled("b").ended == 1.5
    assert play.finish == SUCCESS
    assert play.machine.done


def test_an_empty_graph_has_ended_when_it_starts() -> None:
    assert Play().finish == SUCCESS


def test_after_the_end_nothing_is_done_any_more() -> None:
    play = Play(step("a"))
    play.ok("a")
    assert play.send(CancelRequested(reason="late")) == []
    assert play.send(TimerFired(name="x")) == []


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edge", "state", "expected"),
    [
        ("a", OK, "running"),
        ("a", FAILED, "skipped"),
        ("a!", OK, "skipped"),
        ("a!", FAILED, "running"),
        ("a?", OK, "running"),
        ("a?", FAILED, "running"),
    ],
)
def test_an_edge_waits_for_its_end(edge: str, state: StepState, expected: str) -> None:
    play = Play(step("a"), step("b", edge))
    assert play.states["b"] == "waiting"
    play.end("a", state)
    assert play.states["b"] == expected


@pytest.mark.parametrize(("edge", "expected"), [("b", "skipped"), ("b!", "skipped"), ("b?", "running")])
def test_a_skipped_step_has_ended_and_neither_succeeded_nor_failed(edge: str, expected: str) -> None:
    play = Play(step("a"), step("b", "a!"), step("c", edge))
    play.ok("a")
    assert play.states == {"a": "succeeded", "b": "skipped", "c": expected}


def test_all_waits_for_every_edge_and_one_impossible_is_enough_to_skip() -> None:
    play = Play(step("a"), step("b"), step("c", "a", "b"), step("d", "a!", "b"))
    play.ok("a")
    assert play.states["c"] == "waiting"
    assert play.states["d"] == "skipped"
    play.ok("b")
    assert play.runs == ["c"]


def test_any_takes_the_first_and_is_skipped_when_none_is_left() -> None:
    play = Play(step("a"), step("b"), step("c", "a", "b", need="any"), step("d", "a!", "b!", need="any"))
    play.fail("a")
    assert play.states["c"] == "waiting"
    assert play.runs == ["b", "d"]
    play.ok("b")
    assert play.runs == ["c", "d"]
    skipped = Play(step("a"), step("b"), step("c", "a", "b", need="any"))
    skipped.fail("a", "b")
    assert skipped.reason("c") is Reason.UPSTREAM


def test_skips_say_why() -> None:
    play = Play(step("a"), step("b", "a"))
    play.fail("a")
    assert play.settled("b").message == "It needs 'a' to succeed, which ended as failed."


def test_inputs_tell_of_values_errors_and_states() -> None:
    needs = [Need(step=name, on=On.ALWAYS, data=True) for name in "abc"]
    late = Need(step="late", data=True)
    play = Play(step("a"), step("b"), step("c", "a!"), step("late"), step("d", *needs, late, need="any"))
    play.ok("a")
    assert play.running[play.key("d")].inputs == {
        "a": Input(handles=("value of a",), status="succeeded"),
        "b": Input(status="running"),
        "c": Input(status="skipped", error="It needs 'a' to fail, which ended as succeeded."),
        "late": Input(status="running"),
    }


def test_inputs_have_the_error_of_what_failed() -> None:
    play = Play(step("a"), step("b", Need(step="a", on=On.FAILURE, data=True)))
    play.fail("a")
    assert play.running[play.key("b")].inputs == {"a": Input(error="traceback of a", status="failed")}


# --- conditions -------------------------------------------------------------------------------------------------------


def when(name: str = "a") -> Condition:
    return Condition(step=name, code="c0de", path=("loss",))


def test_a_condition_is_asked_with_the_value_and_decides() -> None:
    play = Play(step("a"), step("b", "a", when=when()), step("c", "b"))
    play.ok("a")
    question = play.answer("when", True)
    assert (question.code, question.handle, question.path, question.many) == ("c0de", "value of a", ("loss",), False)
    assert play.runs == ["b"]


def test_a_false_condition_skips_and_what_needs_it_too() -> None:
    play = Play(step("a"), step("b", "a", when=when()), step("c", "b"))
    play.ok("a")
    play.answer("when", False)
    assert (play.reason("b"), play.reason("c")) == (Reason.CONDITION, Reason.UPSTREAM)
    assert play.finish == SUCCESS


def test_a_condition_that_raises_fails_the_step() -> None:
    play = Play(step("a"), step("b", "a", when=when()))
    play.ok("a")
    play.answer("when", error="KeyError: 'loss'")
    assert play.settled("b").state is FAILED
    assert play.settled("b").error == "KeyError: 'loss'"


def test_a_condition_on_what_has_no_value_skips() -> None:
    play = Play(step("a"), step("b", when=when()))
    play.fail("a")
    assert play.reason("b") is Reason.UPSTREAM


def test_a_condition_on_an_iterated_step_gets_all_its_values() -> None:
    play = Play(step("a", repeat=Repeat(times=2)), step("b", "a", when=when()))
    play.ok("a#0", "a#1")
    question = play.answer("when", True)
    assert (question.handle, question.many) == (("value of a#0", "value of a#1"), True)


# --- attempts ---------------------------------------------------------------------------------------------------------


def test_a_failed_attempt_is_tried_again_after_growing_delays() -> None:
    play = Play(step("a", retry=Retry(times=2, delay=10.0, backoff=3.0)))
    play.fail("a")
    assert play.runs == []
    play.wait(9.9)
    assert play.runs == []
    play.wait(10.0)
    assert play.runs == ["a@2"]
    play.fail("a")
    play.wait(39.9)
    assert play.runs == []
    play.wait(40.0)
    play.fail("a")
    assert [(r.attempt, r.settled) for r in play.records if r.state is FAILED] == [(1, False), (2, False), (3, True)]
    assert play.finish is not None
    assert play.finish.message == "Step 'a' failed: It raised."


def test_a_retry_that_succeeds_is_a_success() -> None:
    play = Play(step("a", retry=Retry(times=1)))
    play.fail("a")
    play.ok("a")
    assert play.settled("a").attempt == 2
    assert play.finish == SUCCESS


@pytest.mark.parametrize(("answer", "runs"), [({"value": True}, ["a@2"]), ({"value": False}, []), ({"error": "x"}, [])])
def test_the_retry_condition_is_asked_with_the_error(answer: dict[str, Any], runs: list[str]) -> None:
    play = Play(step("a", retry=Retry(times=1, condition="c0de")))
    play.fail("a")
    question = play.answer("retry_if", **answer)
    assert (question.code, question.text) == ("c0de", "traceback of a")
    assert play.runs == runs
    if answer.get("error"):
        assert "could not be evaluated: x" in play.settled("a").message


def test_delays_stay_finite_however_often_they_grow() -> None:
    play = Play(step("a", retry=Retry(times=5000, delay=1.0, backoff=10.0)))
    for _ in range(2000):
        play.fail("a")
        play.wait(play.now + 7 * 86_400.0)
    assert len(play.running) == 1


def test_an_attempt_that_takes_too_long_is_stopped_then_killed_and_has_failed_whatever_it_returns() -> None:
    play = Play(step("a", timeout=30.0))
    play.wait(29.9)
    assert not play.stopping
    play.wait(30.0)
    assert play.stopping == {Key(step="a"): 15}
    play.wait(34.9)
    assert play.killed == []
    play.wait(35.0)
    assert play.killed == [Key(step="a")]
    play.ok("a")
    assert (play.settled("a").state, play.reason("a")) == (FAILED, Reason.TIMEOUT)
    assert play.settled("a").message == "It took longer than 30 s."


def test_its_time_does_not_run_while_an_attempt_waits_for_a_process() -> None:
    play = Play(step("a", timeout=30.0), begins=False)
    play.wait(1000.0)
    play.send(AttemptBegan(key=Key(step="a")))
    play.wait(1029.9)
    assert not play.stopping
    play.wait(1030.0)
    assert play.stopping == {Key(step="a"): 15}


def test_each_attempt_has_its_own_timeout_and_leaves_no_timer() -> None:
    play = Play(step("a", timeout=30.0, retry=Retry(times=1)))
    play.wait(30.0)
    play.fail("a")
    assert play.runs == ["a@2"]
    assert list(play.timers.values()) == [60.0]
    play.ok("a")
    assert play.timers == {}
    assert play.finish == SUCCESS


def test_an_end_that_nobody_waits_for_is_refused() -> None:
    play = Play(step("a"))
    with pytest.raises(IllegalTransition, match="'b'"):
        play.send(AttemptEnded(key=Key(step="b"), outcome=Outcome(state=OK)))


# --- repeat -----------------------------------------------------------------------------------------------------------


def test_a_repeated_step_has_the_list_of_its_values() -> None:
    play = Play(step("a", repeat=Repeat(times=3)), step("b", Need(step="a", data=True)))
    play.ok("a#0", "a#1", "a#2")
    values = ("value of a#0", "value of a#1", "value of a#2")
    assert play.running[play.key("b")].inputs == {"a": Input(handles=values, many=True, status="succeeded")}
    assert play.settled("a").iterations == 3
    assert play.settled("a").value is None
    assert [r.iteration for r in play.iterations("a")] == [0, 1, 2]


def test_every_is_the_time_between_two_starts() -> None:
    play = Play(step("a", repeat=Repeat(every=60.0, times=4)))
    play.wait(10.0)
    play.ok("a#0")
    assert list(play.timers.values()) == [60.0]
    play.wait(60.0)
    play.wait(150.0)  # this one takes longer, and delays the next
    play.ok("a#1")
    assert play.runs == ["a#2"]
    play.wait(151.0)
    play.ok("a#2")
    assert list(play.timers.values()) == [210.0]


def test_a_late_timer_does_not_shift_the_schedule() -> None:
    play = Play(step("a", repeat=Repeat(every=60.0)))
    play.ok("a#0")
    play.now = 60.2
    name, _ = play.timers.popitem()
    play.send(TimerFired(name=name))
    play.ok("a#1")
    assert list(play.timers.values()) == [120.0]


def test_an_iteration_that_waited_for_its_turn_is_followed_after_the_whole_interval() -> None:
    play = Play(step("x"), step("a", repeat=Repeat(every=60.0)), max_parallel=1)
    play.wait(50.0)
    play.ok("x")
    play.ok("a#0")
    assert list(play.timers.values()) == [110.0]


@pytest.mark.parametrize(
    ("every", "duration", "expected"),
    [(60.0, 120.0, 2), (3600.0, 86_400.0, 24), (0.1, 2.0, 20), (60.0, 130.0, 3), (60.0, 30.0, 1)],
)
@pytest.mark.parametrize("began", [0.0, 1_795_000_000.123456])  # sums of times since the epoch are rounded
def test_iterations_start_before_the_duration_has_passed(
    every: float, duration: float, expected: int, began: float
) -> None:
    play = Play(step("a", repeat=Repeat(every=every, duration=duration)), start=False)
    play.begin(began)
    for iteration in range(expected):
        assert play.finish is None
        play.ok(f"a#{iteration}")
        play.wait(play.now + 1.01 * every)
    assert play.settled("a").iterations == expected
    assert play.finish == SUCCESS


@pytest.mark.parametrize(("answer", "expected"), [({"value": True}, "succeeded"), ({"error": "x"}, "failed")])
def test_until_is_asked_with_each_value(answer: dict[str, Any], expected: str) -> None:
    play = Play(step("a", repeat=Repeat(until="c0de")))
    play.ok("a#0")
    assert play.answer("until", False).handle == "value of a#0"
    play.ok("a#1")
    play.answer("until", **answer)
    assert play.states["a"] == expected


def test_a_failed_iteration_fails_the_step_unless_it_keeps_going() -> None:
    play = Play(step("a", repeat=Repeat(times=2)), step("b", repeat=Repeat(times=2, until="c0de", keep_going=True)))
    play.fail("a#0", "b#0")
    assert play.settled("a").state is FAILED
    assert play.settled("a").error == "traceback of a#0"
    assert "until" not in play.questions
    play.ok("b#1")
    assert play.machine.states["b"] is OK
    assert [r.state for r in play.iterations("b")] == [FAILED, OK]


def test_iterations_are_retried_each() -> None:
    play = Play(step("a", repeat=Repeat(times=2), retry=Retry(times=1)))
    play.fail("a#0")
    assert play.runs == ["a#0@2"]
    play.ok("a#0")
    assert play.runs == ["a#1"]
    play.fail("a#1")
    play.ok("a#1")
    assert play.finish == SUCCESS


# --- fan-out ----------------------------------------------------------------------------------------------------------


def fan(**fields: Any) -> StepSpec:
    return step("b", Need(step="a", data=True), over="a", **fields)


def test_a_fan_out_runs_all_items_at_once_and_keeps_their_order() -> None:
    play = Play(step("a"), fan(over_path=("urls",)), step("c", Need(step="b", data=True)))
    play.ok("a")
    question = play.answer("length", 3)
    assert (question.handle, question.path) == ("value of a", ("urls",))
    assert play.runs == ["b#0", "b#1", "b#2"]
    assert play.running[play.key("b#2")].inputs == {"a": Input(handles=("value of a",), status="succeeded")}
    play.ok("b#2", "b#0", "b#1")
    assert play.running[play.key("c")].inputs["b"].handles == ("value of b#0", "value of b#1", "value of b#2")


def test_an_empty_fan_out_succeeds() -> None:
    play = Play(step("a"), fan(), step("c", "b"))
    play.ok("a")
    play.answer("length", 0)
    assert play.settled("b").iterations == 0
    assert play.runs == ["c"]


def test_the_length_of_an_iterated_step_is_known() -> None:
    play = Play(step("a", repeat=Repeat(times=2)), fan())
    play.ok("a#0", "a#1")
    assert play.questions == {}
    assert play.runs == ["b#0", "b#1"]


@pytest.mark.parametrize("answer", [{"error": "TypeError: not a list"}, {"value": None}, {"value": MAX_ITEMS + 1}])
def test_a_list_that_cannot_be_had_fails_the_step(answer: dict[str, Any]) -> None:
    play = Play(step("a"), fan())
    play.ok("a")
    play.answer("length", **answer)
    assert play.reason("b") is Reason.BAD_RESULT


def test_items_share_max_parallel() -> None:
    play = Play(step("a"), fan(), max_parallel=2)
    play.ok("a")
    play.answer("length", 4)
    assert play.runs == ["b#0", "b#1"]
    play.ok("b#1")
    assert play.runs == ["b#0", "b#2"]


def test_without_stop_on_failure_the_other_items_run_to_their_end() -> None:
    play = Play(step("a"), fan())
    play.ok("a")
    play.answer("length", 3)
    play.fail("b#1")
    play.ok("b#0", "b#2")
    assert play.settled("b").state is FAILED
    assert play.settled("b").error == "traceback of b#1"
    assert play.settled("b").iterations == 3


def test_with_stop_on_failure_they_are_stopped() -> None:
    play = Play(step("a"), fan(), stop_on_failure=True, max_parallel=2)
    play.ok("a")
    play.answer("length", 3)
    play.fail("b#1")
    assert list(play.stopping) == [Key(step="b", iteration=0)]
    play.fail("b#0")
    assert play.settled("b").error == "traceback of b#1"
    assert [r.state for r in play.iterations("b")] == [FAILED, CANCELLED]


# --- background steps -------------------------------------------------------------------------------------------------


def test_a_background_step_runs_beside_what_is_during_it_and_is_then_asked_to_stop() -> None:
    play = Play(step("bg", background=BACKGROUND), step("a", during=("bg",)), step("c", "bg"))
    assert play.started == ["bg", "a"]
    play.ok("a")
    assert play.stopping == {Key(step="bg"): 2}
    play.fail("bg")  # the signal ended it: asked to stop and ended, in whatever way
    assert (play.settled("bg").state, play.reason("bg"), play.settled("bg").error) == (OK, Reason.STOPPED, "")
    assert play.runs == ["c"]


def test_it_keeps_the_value_that_it_returned() -> None:
    play = Play(step("bg", background=BACKGROUND), step("a", during=("bg",)), step("c", Need(step="bg", data=True)))
    play.ok("a")
    play.ok("bg")
    assert play.running[play.key("c")].inputs["bg"].handles == ("value of bg",)


def test_what_is_during_it_waits_until_it_announces_itself() -> None:
    play = Play(step("bg", background=ANNOUNCED), step("a", during=("bg",)))
    assert play.runs == ["bg"]
    play.ready("bg")
    play.ready("bg")
    assert play.runs == ["a", "bg"]
    play.ok("a")
    assert play.stopping == {Key(step="bg"): None}


def test_what_does_not_stop_within_its_grace_is_killed_and_has_failed() -> None:
    play = Play(step("bg", background=BACKGROUND), step("a", during=("bg",)))
    play.ok("a")
    play.wait(9.9)
    assert play.killed == []
    play.wait(10.0)
    assert play.killed == [Key(step="bg")]
    play.fail("bg", reason=Reason.SIGNAL, message="Signal 9 ended it.")
    assert (play.settled("bg").state, play.reason("bg")) == (FAILED, Reason.SIGNAL)
    assert play.settled("bg").message == "It was asked to stop, and was killed when it did not. Signal 9 ended it."


def test_one_that_nothing_is_during_runs_until_all_others_ended_that_do_not_descend_from_it() -> None:
    play = Play(step("bg", background=BACKGROUND), step("a"), step("b"), step("c", "bg"), step("d", "c"))
    play.ok("a")
    assert not play.stopping
    play.fail("b")
    assert Key(step="bg") in play.stopping
    play.ok("bg")
    assert play.runs == ["c"]


def test_alone_in_its_graph_it_is_started_and_asked_to_stop() -> None:
    play = Play(step("bg", background=BACKGROUND))
    assert [type(e) for e in play.effects] == [Report, StartAttempt, StopAttempt, SetTimer]
    play.ok("bg")
    assert play.finish == SUCCESS


def test_one_that_announces_itself_after_it_was_asked_to_stop_still_ends() -> None:
    play = Play(step("bg", background=ANNOUNCED), step("a", "bg"))
    play.ready("bg")
    play.ok("bg")
    assert play.runs == ["a"]


def test_early_failure_stops_what_runs_during_it_and_skips_what_waits() -> None:
    play = Play(
        step("bg", background=BACKGROUND), step("a", during=("bg",)), step("b", "a", during=("bg",)), step("c", "b?")
    )
    play.fail("bg")
    assert play.reason("b") is Reason.UPSTREAM
    assert play.stopping == {Key(step="a"): 15}
    play.wait(5.0)
    assert play.killed == [Key(step="a")]
    play.ok("a")
    assert (play.settled("a").state, play.reason("a")) == (FAILED, Reason.EARLY_END)


def test_early_return_lets_run_what_runs_and_skips_what_waits() -> None:
    play = Play(step("bg", background=BACKGROUND), step("a", during=("bg",)), step("b", "a", during=("bg",)))
    play.ok("bg")
    assert play.reason("bg") is Reason.RETURNED
    assert play.reason("b") is Reason.EARLY_END
    assert play.runs == ["a"]
    play.ok("a")
    assert play.finish == SUCCESS


def test_what_is_during_a_skipped_background_step_is_skipped() -> None:
    play = Play(step("x"), step("bg", "x", background=BACKGROUND), step("a", during=("bg",)))
    play.fail("x")
    assert play.reason("a") is Reason.UPSTREAM


def test_while_it_is_tried_again_nothing_new_starts_during_it() -> None:
    spec = step("bg", background=BACKGROUND, retry=Retry(times=1, delay=10.0))
    play = Play(spec, step("a", during=("bg",)), step("b", "a", during=("bg",)))
    play.fail("bg")
    play.ok("a")
    assert play.runs == []
    play.wait(10.0)
    assert play.runs == ["b", "bg@2"]


def test_one_that_failed_and_was_to_be_tried_again_did_not_stop_well() -> None:
    play = Play(step("bg", background=BACKGROUND, retry=Retry(times=1, delay=10.0)), step("a", during=("bg",)))
    play.fail("bg")
    play.ok("a")
    assert play.settled("bg").state is FAILED
    assert play.timers == {}


def test_a_repeated_background_step_ends_between_two_iterations() -> None:
    play = Play(step("bg", background=BACKGROUND, repeat=Repeat(every=60.0)), step("a", during=("bg",)))
    play.ok("bg#0")
    play.ok("a")
    assert (play.settled("bg").state, play.reason("bg"), play.settled("bg").iterations) == (OK, Reason.STOPPED, 1)
    assert play.timers == {}
    assert play.finish == SUCCESS


def test_a_fan_out_in_the_background_is_ready_when_all_its_items_are() -> None:
    play = Play(step("a"), fan(background=ANNOUNCED), step("c", during=("b",)))
    play.ok("a")
    play.answer("length", 2)
    play.ready("b#0")
    assert "c" not in play.runs
    play.ready("b#1")
    assert "c" in play.runs


def test_background_steps_that_wait_for_each_others_end_are_asked_when_nothing_else_can_move() -> None:
    play = Play(
        step("p", background=BACKGROUND), step("q", background=BACKGROUND), step("x", "p?", "q?"), step("y", "q?", "p?")
    )
    assert set(play.stopping) == {Key(step="p"), Key(step="q")}
    play.ok("p", "q", "x", "y")
    assert play.finish == SUCCESS


def test_a_resource_that_a_background_step_holds_does_not_hang_the_run() -> None:
    play = Play(step("bg", background=BACKGROUND, exclusive=("nic",)), step("a", during=("bg",), exclusive=("nic",)))
    assert set(play.stopping) == {Key(step="bg")}
    play.ok("bg")
    assert play.reason("a") is Reason.EARLY_END
    assert play.finish is not None


# --- who may run ------------------------------------------------------------------------------------------------------


def test_max_parallel_counts_what_runs_first_come_first_served() -> None:
    play = Play(*(step(name) for name in "abcd"), step("gate", slot=False), max_parallel=2)
    assert play.runs == ["a", "b", "gate"]
    play.ok("b")
    assert play.started[-1] == "c"
    play.ok("a")
    assert play.started[-1] == "d"


def test_background_steps_take_no_slot() -> None:
    play = Play(step("bg", background=BACKGROUND), step("a", during=("bg",)), max_parallel=1)
    assert play.runs == ["a", "bg"]


def test_the_delay_before_a_retry_takes_no_slot() -> None:
    play = Play(step("a", retry=Retry(times=1, delay=5.0)), step("b"), max_parallel=1)
    play.fail("a")
    assert play.runs == ["b"]
    play.wait(5.0)
    assert play.runs == ["b"]
    play.ok("b")
    assert play.runs == ["a@2"]


def test_exclusive_steps_run_one_at_a_time_and_do_not_hold_others_up() -> None:
    play = Play(step("a", exclusive=("nic",)), step("b", exclusive=("nic",)), step("c", exclusive=("disk",)), step("d"))
    assert play.runs == ["a", "c", "d"]
    play.ok("a")
    assert play.started[-1] == "b"


def test_several_resources_are_taken_all_or_none() -> None:
    play = Play(
        step("a", exclusive=("x",)),
        step("b", exclusive=("y",)),
        step("c", exclusive=("x", "y")),
        step("d", exclusive=("x",)),
    )
    play.ok("a")
    assert play.runs == ["b", "d"]  # c cannot have both, and does not keep d from the one
    play.ok("d")
    assert play.runs == ["b"]
    play.ok("b")
    assert play.runs == ["c"]


def test_a_cancelled_waiter_passes_its_turn_on() -> None:
    bg = step("bg", background=BACKGROUND, exclusive=("nic",))
    play = Play(
        bg,
        step("host", background=BACKGROUND),
        step("a", during=("host",), exclusive=("nic",)),
        step("b", exclusive=("nic",)),
    )
    play.ok("host")
    assert play.reason("a") is Reason.EARLY_END
    play.ok("bg")
    assert play.runs == ["b"]


def test_no_more_shared_steps_run_than_there_are_workers_and_others_are_not_held_up() -> None:
    shared = [step(name, isolation="shared") for name in "abc"]
    play = Play(*shared, step("d"), workers=2)
    assert play.runs == ["a", "b", "d"]
    play.ok("b")
    assert play.runs == ["a", "c", "d"]


def test_a_shared_step_that_waits_for_an_event_lends_its_place() -> None:
    play = Play(*(step(name, isolation="shared") for name in "abcd"), workers=1)
    play.send(AttemptWaits(key=Key(step="a"), waits=True))
    assert play.runs == ["a", "b"]
    play.send(AttemptWaits(key=Key(step="a"), waits=False))
    play.ok("b")
    assert play.runs == ["a"], "the one that waited has its place back"
    play.ok("a")
    assert play.runs == ["c"]


def test_a_shared_step_that_ends_while_it_waits_gives_no_second_place_away() -> None:
    play = Play(*(step(name, isolation="shared") for name in "abcd"), workers=1)
    play.send(AttemptWaits(key=Key(step="a"), waits=True))
    play.ok("a")
    assert play.runs == ["b"]


def test_what_is_evaluated_for_a_shared_step_is_evaluated_in_a_worker() -> None:
    play = Play(step("a"), step("b", "a", isolation="shared", when=Condition(step="a", code="c")))
    play.ok("a")
    assert [effect.shared for effect in play.effects if isinstance(effect, Evaluate)] == [True]


def test_it_is_quiet_before_what_is_measured_starts_and_until_it_has_ended() -> None:
    play = Play(step("a"), step("b", measured=True))
    kinds = [type(effect) for effect in play.effects]
    assert kinds.index(Measuring) < kinds.index(StartAttempt)
    last = [type(effect) for effect in play.end("b", OK)]
    assert last.index(Report) < last.index(Measuring)


def test_measuring_is_told_when_it_begins_and_ends() -> None:
    play = Play(step("a", measured=True), step("b", "a", measured=True), step("c", "b"))
    assert play.measuring == [True]
    play.ok("a")
    assert play.measuring == [True]
    play.ok("b")
    assert play.measuring == [True, False]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_that_nothing_handles_stops_everything() -> None:
    play = Play(step("a"), step("b"), step("c", "b"), stop_on_failure=True)
    play.fail("a")
    assert play.stopping == {Key(step="b"): 15}
    assert (play.settled("c").state, play.reason("c")) == (CANCELLED, Reason.STOP_ON_FAILURE)
    play.wait(5.0)
    assert play.killed == [Key(step="b")]
    play.fail("b")
    assert (play.settled("b").state, play.reason("b")) == (CANCELLED, Reason.STOP_ON_FAILURE)
    assert play.finish == Finish(
        state=DeploymentState.FAILED, reason=Reason.STEP_FAILED, message="Step 'a' failed: It raised."
    )


@pytest.mark.parametrize("edge", ["a!", "a?"])
def test_a_failure_that_is_waited_for_stops_nothing_and_is_handled_by_a_success(edge: str) -> None:
    play = Play(step("a"), step("b"), step("c", edge), stop_on_failure=True)
    play.fail("a")
    assert play.runs == ["b", "c"]
    play.ok("b", "c")
    assert play.finish == SUCCESS


def test_a_handler_that_fails_has_handled_nothing() -> None:
    play = Play(step("a"), step("c", "a!"))
    play.fail("a", "c")
    assert play.finish is not None
    assert play.finish.message == "Step 'a' failed (and 1 more): It raised."


def test_a_failure_while_stopping_changes_nothing() -> None:
    play = Play(step("a", retry=Retry(times=5)), step("b"), stop_on_failure=True)
    play.fail("b")
    play.fail("a")
    assert play.settled("a").state is CANCELLED
    assert play.runs == []


# --- told to stop -----------------------------------------------------------------------------------------------------


def test_a_cancel_stops_what_runs_and_cancels_what_waits() -> None:
    play = Play(
        step("a", timeout=60.0),
        step("b", "a"),
        step("r", repeat=Repeat(every=60.0)),
        step("t", retry=Retry(times=1, delay=60.0)),
        step("bg", background=BACKGROUND),
    )
    play.ok("r#0")
    play.fail("t")
    play.send(CancelRequested(reason="wrong site"))
    assert play.stopping == {Key(step="a"): 15, Key(step="bg"): BACKGROUND.signal}
    assert play.states == {"a": "running", "b": "cancelled", "r": "cancelled", "t": "cancelled", "bg": "running"}
    assert set(play.timers.values()) == {5.0}
    play.ok("a")
    play.fail("bg")
    assert play.settled("a").state is CANCELLED
    assert play.settled("a").message == "wrong site"
    assert play.finish == Finish(state=DeploymentState.CANCELLED, reason=Reason.CANCELLED, message="wrong site")


def test_what_was_returned_before_the_cancel_reached_it_is_kept() -> None:
    play = Play(step("a"))
    play.send(CancelRequested())
    play.end("a", OK, value=ValueRef(json=1))
    assert play.settled("a").value == ValueRef(json=1)


def test_a_cancel_shortens_the_grace_of_a_background_step_that_is_stopping() -> None:
    play = Play(step("bg", background=BACKGROUND), step("a", during=("bg",)), step("c", "bg"))
    play.ok("a")
    play.wait(2.0)
    play.send(CancelRequested())
    assert play.stopping == {Key(step="bg"): BACKGROUND.signal}
    assert list(play.timers.values()) == [7.0]
    play.ok("bg")
    assert play.settled("bg").state is OK  # the first order counts
    assert play.finish is not None
    assert play.finish.state is DeploymentState.CANCELLED


def test_a_second_cancel_adds_nothing() -> None:
    play = Play(step("a"))
    play.send(CancelRequested(reason="first"))
    assert play.send(CancelRequested(reason="second")) == []
    assert play.send(Terminated(message="third")) == []
    play.fail("a")
    assert play.finish is not None
    assert play.finish.message == "first"


def test_an_executor_that_is_told_to_stop_has_failed() -> None:
    play = Play(step("a"), step("b", "a"))
    play.send(Terminated(message="The walltime is over."))
    play.fail("a")
    assert play.reason("b") is Reason.TERMINATED
    assert play.finish == Finish(
        state=DeploymentState.FAILED, reason=Reason.TERMINATED, message="The walltime is over."
    )


def test_answers_that_come_after_the_cancel_are_ignored() -> None:
    play = Play(step("x"), step("a"), step("b", "a", when=when()), step("u", repeat=Repeat(until="c0de")))
    play.ok("a", "u#0")
    play.send(CancelRequested())
    assert play.states["u"] == "cancelled"
    for question in play.questions.values():
        assert play.send(Evaluated(id=question.id, value=True)) == []
    assert play.send(AttemptReady(key=Key(step="a"))) == []


def test_a_refused_record_fails_its_running_step() -> None:
    play = Play(step("a", retry=Retry(times=3)), step("b", "a?"))
    play.send(Refused(step="a", message="too large"))
    assert play.stopping == {Key(step="a"): 15}
    play.ok("a")
    assert (play.settled("a").state, play.reason("a")) == (FAILED, Reason.REFUSED)
    play.ok("b")
    assert play.finish == SUCCESS


def test_a_refused_record_of_an_ended_step_is_replaced_and_fails_the_deployment() -> None:
    play = Play(step("a"), step("b"))
    play.ok("a")
    for _ in range(3):
        play.send(Refused(step="a", message="too large"))
    first, second = [r for r in play.records if r.step == "a" and r.settled]
    assert (first.state, second.state, second.reason) == (OK, FAILED, Reason.REFUSED)
    assert play.states["a"] == "succeeded"
    play.ok("b")
    assert play.finish is not None
    assert (play.finish.state, play.finish.reason) == (DeploymentState.FAILED, Reason.REFUSED)


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "graph",
    [
        Graph(name="g", steps=(step("a", "b"), step("b"))),
        Graph(name="g", steps=(step("a"), step("a"))),
        Graph(name="g", steps=(step("a", "nobody"),)),
        Graph(name="g", steps=(step("a"), step("b", during=("a",)))),
        Graph(name="g", steps=(step("b", over="a"),)),
        Graph(name="g", steps=(step("b", when=when("a")),)),
        Graph(name="g", steps=(step("a"), step("b", "a", need="most"))),
        Graph(name="g", steps=(step("a"), step("b", over="a", repeat=Repeat(times=1)))),
        Graph(name="g", steps=(step("a"),), max_parallel=0),
    ],
)
def test_a_graph_that_might_never_end_is_refused(graph: Graph) -> None:
    with pytest.raises(InvalidMessage):
        Machine(graph, now=0.0)


def calls(*steps: StepSpec) -> int:
    """How many Python functions the machine calls to run these."""
    count = 0

    def count_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    machine = Machine(Graph(name="g", steps=steps, max_parallel=3), now=0.0)
    sys.setprofile(count_call)
    try:
        effects = machine.start(0.0)
        position = 0
        while position < len(effects):
            if isinstance(effect := effects[position], StartAttempt):
                effects += machine.handle(AttemptEnded(key=effect.key, outcome=Outcome(state=OK)), 0.0)
            position += 1
    finally:
        sys.setprofile(None)
    assert machine.done
    return count


def chain(n: int) -> list[StepSpec]:
    return [step("s0"), *(step(f"s{i}", Need(step=f"s{i - 1}", data=True)) for i in range(1, n))]


def wide(n: int) -> list[StepSpec]:
    middle = [step(f"s{i}", "a", exclusive=("nic",)) for i in range(n)]
    return [step("a"), *middle, step("z", *(Need(step=s.name, data=True) for s in middle))]


def beside(n: int) -> list[StepSpec]:
    hosts = [step(f"bg{i}", background=BACKGROUND) for i in range(n)]
    return [*hosts, *(step(f"s{i}", during=(f"bg{i}",)) for i in range(n))]


def alone(n: int) -> list[StepSpec]:
    return [*(step(f"bg{i}", background=BACKGROUND) for i in range(n)), *(step(f"s{i}") for i in range(n))]


@pytest.mark.parametrize("shape", [chain, wide, beside, alone])
def test_the_cost_grows_with_the_graph_and_no_faster(shape: Any) -> None:
    assert calls(*shape(2000)) < 2.2 * calls(*shape(1000))
