"""Steps that are DAGs: what the machine makes of each attempt and iteration of them."""

from typing import Any

import pytest
from fieldlab_common.deployment import MAX_DEPTH, Background, Condition, Graph, Need, Repeat, Retry, StepSpec
from fieldlab_common.errors import InvalidMessage
from fieldlab_common.lifecycle import DeploymentState, Reason
from fieldlab_common.protocol import ValueRef
from fieldlab_executor import nesting
from fieldlab_executor.machine import CancelRequested, Evaluated, Input, Machine, Refused

from .play import CANCELLED, FAILED, OK, SKIPPED, Play, step


def dag(*steps: StepSpec, **fields: Any) -> Graph:
    fields.setdefault("stop_on_failure", False)
    return Graph(name="inner", steps=steps, **fields)


def sub(name: str, *needs: str | Need, graph: Graph, **fields: Any) -> StepSpec:
    return StepSpec(
        **{"name": name, "task": "inner", "code": "", "args": "", "slot": False, "graph": graph, **fields},
        needs=step(name, *needs).needs,
    )


CHAIN = dag(step("a"), step("b", Need(step="a", data=True)))


# --- one run of it ----------------------------------------------------------------------------------------------------


def test_its_steps_run_under_its_name_and_its_end_is_theirs() -> None:
    play = Play(step("x"), sub("s", "x", graph=CHAIN), step("y", "s"))
    play.ok("x")
    assert play.runs == ["s/a"]
    assert play.states["s"] == "running"
    play.ok("s/a")
    assert play.running[play.key("s/b")].inputs["a"].handles == ("value of s/a",)
    play.ok("s/b")
    assert play.states["s"] == "succeeded"
    assert play.runs == ["y"]


def test_its_value_is_that_of_its_sole_last_step_by_reference() -> None:
    play = Play(sub("s", graph=CHAIN), step("y", Need(step="s", data=True)))
    play.ok("s/a")
    play.ok("s/b", value=ValueRef(json=1, summary="1"))
    assert play.settled("s").value == ValueRef(format="step", json="s/b", summary="1")
    assert play.running[play.key("y")].inputs["s"].handles == ("value of s/b",)


def test_its_value_is_a_dict_of_its_last_steps_in_which_a_skipped_one_is_none() -> None:
    inner = dag(step("a"), step("b", "a"), step("c", "a!"), step("m", repeat=Repeat(times=2)))
    play = Play(sub("s", graph=inner), step("y", Need(step="s", data=True)))
    play.ok("s/a", "s/b", "s/m#0", "s/m#1")
    reference = play.settled("s").value
    assert reference is not None
    assert (reference.format, reference.json) == ("steps", {"b": "s/b", "c": None, "m": "s/m"})
    (handle,) = play.running[play.key("y")].inputs["s"].handles
    assert handle == {"d": {"b": "value of s/b", "c": None, "m": {"l": ["value of s/m#0", "value of s/m#1"]}}}


def test_a_background_step_that_others_run_during_is_not_last() -> None:
    inner = dag(step("bg", background=Background()), step("a", during=("bg",)))
    play = Play(sub("s", graph=inner))
    play.ok("s/a", "s/bg")
    assert play.settled("s").value == ValueRef(format="step", json="s/a")


def test_it_fails_when_a_step_of_it_failed_unhandled() -> None:
    play = Play(sub("s", graph=CHAIN), step("y", "s!"))
    play.fail("s/a")
    settled = play.settled("s")
    assert (settled.state, settled.reason, settled.error) == (FAILED, Reason.STEP_FAILED, "traceback of s/a")
    assert settled.message == "Step 'a' failed: It raised."
    assert play.settled("s/b").state is SKIPPED
    assert play.runs == ["y"]


def test_a_failure_that_is_handled_inside_is_none_outside() -> None:
    play = Play(sub("s", graph=dag(step("a"), step("b", "a!"))))
    play.fail("s/a")
    play.ok("s/b")
    assert play.settled("s").state is OK
    assert play.finish is not None
    assert play.finish.state is DeploymentState.SUCCEEDED


def test_stopping_on_failure_is_of_the_dag_that_says_so() -> None:
    inner = dag(step("a"), step("b"), stop_on_failure=True)
    play = Play(sub("s", graph=inner), step("x"), step("y", "s?"))
    play.fail("s/a")
    assert list(play.stopping) == [play.key("s/b")]
    play.fail("s/b")
    assert play.settled("s/b").state is CANCELLED
    assert play.settled("s").state is FAILED
    assert play.runs == ["x", "y"]


def test_the_dag_around_stops_what_is_inside() -> None:
    play = Play(sub("s", graph=CHAIN), step("x"), stop_on_failure=True)
    play.fail("x")
    play.fail("s/a")
    assert [play.settled(name).state for name in ("s/a", "s/b", "s")] == [CANCELLED] * 3
    assert play.reason("s") is Reason.STOP_ON_FAILURE


def test_a_condition_holds_for_all_of_it() -> None:
    play = Play(step("x"), sub("s", "x", graph=CHAIN, when=Condition(step="x", code="c")))
    play.ok("x")
    play.answer("when", False)
    assert play.settled("s").reason is Reason.CONDITION
    assert not [record for record in play.records if record.step.startswith("s/")]


def test_its_conditions_are_asked_as_its_steps() -> None:
    inner = dag(step("a"), step("b", "a", when=Condition(step="a", code="c")))
    play = Play(sub("s", graph=inner, repeat=Repeat(times=2)))
    play.ok("s[0]/a")
    question = play.answer("when", True)
    assert (question.step, question.handle) == ("s[0]/b", "value of s[0]/a")


# --- again and again --------------------------------------------------------------------------------------------------


def test_a_repeated_one_runs_all_of_it_each_time_under_the_iteration() -> None:
    play = Play(sub("s", graph=CHAIN, repeat=Repeat(times=2)), step("y", Need(step="s", data=True)))
    play.ok("s[0]/a", "s[0]/b", "s[1]/a")
    assert play.runs == ["s[1]/b"]
    play.ok("s[1]/b")
    assert [record.iteration for record in play.iterations("s")] == [0, 1]
    assert play.running[play.key("y")].inputs["s"] == Input(
        handles=("value of s[0]/b", "value of s[1]/b"), many=True, status="succeeded"
    )


def test_until_is_asked_with_the_value_of_an_iteration() -> None:
    play = Play(sub("s", graph=CHAIN, repeat=Repeat(times=9, until="u")))
    play.ok("s[0]/a", "s[0]/b")
    assert play.answer("until", True).handle == "value of s[0]/b"
    assert play.settled("s").iterations == 1


def test_a_failed_iteration_ends_it_unless_it_keeps_going() -> None:
    play = Play(
        sub("s", graph=CHAIN, repeat=Repeat(times=2)), sub("k", graph=CHAIN, repeat=Repeat(times=2, keep_going=True))
    )
    play.fail("s[0]/a", "k[0]/a")
    assert play.settled("s").state is FAILED
    play.ok("k[1]/a", "k[1]/b")
    assert play.settled("k").state is OK


def test_mapped_over_a_list_it_runs_for_each_item_which_its_steps_are_given() -> None:
    inner = dag(step("a", outer=("^", "^x")), step("b", "a"))
    needs = (Need(step="l", data=True), Need(step="x", data=True))
    play = Play(step("l"), step("x"), sub("s", *needs, graph=inner, over="l"))
    play.ok("l", "x")
    question = play.questions.pop("length")
    play.send(Evaluated(id=question.id, value=2, items=("item 0", "item 1")))
    assert play.runs == ["s[0]/a", "s[1]/a"]
    inputs = play.running[play.key("s[1]/a")].inputs
    assert inputs["^"].handles == ("item 1",)
    assert inputs["^x"].handles == ("value of x",)
    play.ok("s[1]/a", "s[1]/b", "s[0]/a", "s[0]/b")
    assert play.states["s"] == "succeeded"


def test_what_is_two_dags_further_out_is_reached_through_the_one_between() -> None:
    deep = sub("t", graph=dag(step("a", outer=("^^x",))))
    play = Play(step("x"), sub("s", Need(step="x", data=True), graph=dag(deep)))
    play.ok("x")
    assert play.running[play.key("s/t/a")].inputs["^^x"].handles == ("value of x",)


def test_it_is_tried_again_as_a_whole_under_the_attempt() -> None:
    play = Play(sub("s", graph=CHAIN, retry=Retry(times=1)))
    play.fail("s/a")
    assert play.runs == ["s~2/a"]
    play.ok("s~2/a", "s~2/b")
    assert (play.settled("s").state, play.settled("s").attempt) == (OK, 2)


def test_a_timeout_is_for_all_of_it() -> None:
    play = Play(sub("s", graph=CHAIN, timeout=10.0))
    play.ok("s/a")
    play.wait(10.0)
    assert list(play.stopping) == [play.key("s/b")]
    play.wait(15.0)
    assert play.killed == [play.key("s/b")]
    play.fail("s/b")
    assert (play.settled("s/b").state, play.reason("s/b")) == (CANCELLED, Reason.TIMEOUT)
    assert (play.settled("s").state, play.reason("s")) == (FAILED, Reason.TIMEOUT)
    assert not play.timers


# --- what is shared ---------------------------------------------------------------------------------------------------


def test_its_steps_take_the_slots_of_every_dag_around_them_and_it_takes_none() -> None:
    inner = dag(step("a"), step("b"), max_parallel=1)
    play = Play(sub("s", graph=inner), sub("t", graph=inner), step("x"), max_parallel=2)
    assert len(play.runs) == 2
    assert play.runs != ["s/a", "s/b"]
    for _ in range(5):
        play.ok(play.runs[0])
        assert len(play.runs) <= 2
    assert play.finish is not None


def test_with_few_slots_the_first_items_end_before_the_last_begin() -> None:
    play = Play(step("l"), sub("s", Need(step="l", data=True), graph=CHAIN, over="l"), max_parallel=1)
    play.ok("l")
    play.answer("length", 3)
    for name in ("s[0]/a", "s[0]/b", "s[1]/a", "s[1]/b", "s[2]/a", "s[2]/b"):
        assert play.runs == [name]
        play.ok(name)


def test_an_exclusive_resource_is_one_for_the_whole_deployment() -> None:
    inner = dag(step("a", exclusive=("nic",)))
    play = Play(sub("s", graph=inner), step("x", exclusive=("nic",)))
    assert len(play.runs) == 1
    play.ok(play.runs[0])
    assert len(play.runs) == 1


def test_steps_inside_of_one_that_holds_a_resource_share_it() -> None:
    inner = dag(step("a", exclusive=("nic",)), step("b", exclusive=("nic",)))
    play = Play(sub("s", graph=inner, exclusive=("nic",)), step("x", exclusive=("nic",)))
    assert play.runs == ["s/a"]
    play.ok("s/a")
    assert play.runs == ["s/b"]
    play.ok("s/b")
    assert play.runs == ["x"]


def test_a_measured_one_measures_from_its_first_step_to_its_last() -> None:
    play = Play(sub("s", graph=CHAIN, measured=True), step("y", "s"))
    assert play.measuring == [True]
    play.ok("s/a")
    assert play.measuring == [True]
    play.ok("s/b")
    assert play.measuring == [True, False]


def test_it_runs_during_a_background_step() -> None:
    play = Play(step("bg", background=Background()), sub("s", graph=CHAIN, during=("bg",)))
    play.ok("s/a")
    assert not play.stopping
    play.ok("s/b")
    assert list(play.stopping) == [play.key("bg")]


def test_it_is_not_held_up_by_other_dags_when_only_background_steps_are_left_of_it() -> None:
    inner = dag(
        step("p", background=Background()), step("q", background=Background()), step("a", "p?"), step("b", "q?")
    )
    play = Play(sub("s", graph=inner), step("long"))
    assert {key.step for key in play.stopping} == {"s/p", "s/q"}
    play.ok("s/p", "s/q", "s/a", "s/b")
    assert play.states == {"s": "succeeded", "long": "running"}


def test_a_resource_that_a_background_step_of_another_dag_holds_does_not_hang_the_run() -> None:
    inner = dag(step("a", exclusive=("nic",)))
    play = Play(step("bg", background=Background(), exclusive=("nic",)), step("z", "bg?"), sub("s", graph=inner))
    assert list(play.stopping) == [play.key("bg")]
    play.ok("bg")
    assert play.runs == ["s/a", "z"]


def test_only_so_many_are_open_at_a_time() -> None:
    play = Play(step("l"), sub("s", Need(step="l", data=True), graph=CHAIN, over="l"))
    play.ok("l")
    play.answer("length", nesting.MAX_OPEN + 1)
    assert len(play.runs) == nesting.MAX_OPEN
    play.ok("s[7]/a", "s[7]/b")
    assert f"s[{nesting.MAX_OPEN}]/a" in play.runs


# --- from outside -----------------------------------------------------------------------------------------------------


def test_a_cancel_reaches_every_depth() -> None:
    play = Play(sub("s", graph=dag(sub("t", graph=CHAIN), step("c"))))
    play.send(CancelRequested(reason="stop"))
    assert {key.step for key in play.stopping} == {"s/t/a", "s/c"}
    play.fail("s/t/a", "s/c")
    assert [play.settled(name).state for name in ("s/t/a", "s/t/b", "s/t", "s")] == [CANCELLED] * 4
    assert play.finish is not None
    assert play.finish.state is DeploymentState.CANCELLED


def test_a_refused_record_fails_the_step_inside_and_so_the_dag() -> None:
    play = Play(sub("s", graph=CHAIN, repeat=Repeat(times=2)))
    play.send(Refused(step="s[0]/a", message="too long"))
    play.fail("s[0]/a")
    assert play.reason("s[0]/a") is Reason.REFUSED
    assert play.reason("s") is Reason.STEP_FAILED


def test_a_refused_record_of_an_iteration_that_is_over_fails_the_deployment() -> None:
    play = Play(sub("s", graph=CHAIN, repeat=Repeat(times=2)))
    play.ok("s[0]/a", "s[0]/b")
    play.send(Refused(step="s[0]/b", message="too long"))
    play.send(Refused(step="s[0]/unheard-of", message="x"))
    assert [record.step for record in play.records if record.reason is Reason.REFUSED] == ["s[0]/b"]
    play.ok("s[1]/a", "s[1]/b")
    assert play.finish is not None
    assert play.finish.reason is Reason.REFUSED


def deep(depth: int) -> Graph:
    graph = dag(step("a"))
    for _ in range(depth):
        graph = dag(sub("s", graph=graph))
    return graph


def test_dags_can_be_inside_of_each_other_so_deep_and_no_deeper() -> None:
    Machine(deep(MAX_DEPTH), now=0.0)
    with pytest.raises(InvalidMessage, match="more than 8"):
        Machine(deep(MAX_DEPTH + 1), now=0.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (sub("s", graph=CHAIN, background=Background()), "background"),
        (sub("s", graph=dag()), "must have steps"),
        (sub("s", graph=dag(step("a", outer=("^^x",)))), "not there"),
        (sub("s", graph=dag(step("a", "b"))), "does not stand before"),
    ],
)
def test_a_graph_that_could_fail_in_the_middle_is_refused(spec: StepSpec, message: str) -> None:
    with pytest.raises(InvalidMessage, match=message):
        Machine(Graph(name="g", steps=(spec,)), now=0.0)
