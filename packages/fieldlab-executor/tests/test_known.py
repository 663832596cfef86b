"""What a task may ask of other steps: by scope, and no longer than somebody may ask."""

import pytest
from fieldlab_common.deployment import Graph, Repeat, StepSpec
from fieldlab_common.lifecycle import StepState
from fieldlab_common.protocol import StepRecord
from fieldlab_executor.known import Known

OK, FAILED = StepState.SUCCEEDED, StepState.FAILED


def spec(name: str, graph: Graph | None = None, **fields: object) -> StepSpec:
    return StepSpec(name=name, task="t", code="", args="", graph=graph, **fields)  # type: ignore[arg-type]


INNER = Graph(name="i", steps=(spec("a"), spec("b")))


@pytest.fixture
def known() -> Known:
    steps = (spec("a"), spec("again", INNER, repeat=Repeat(times=9)), spec("once", INNER))
    return Known(Graph(name="g", steps=steps))


def ends(known: Known, path: str, value: object, **fields: object) -> None:
    known.returned(path, None, value)
    known.reported(StepRecord(step=path, state=OK, settled=True, **fields), None)  # type: ignore[arg-type]


def handles(known: Known, asking: str, name: str) -> object:
    found = known.of(asking, name)
    return None if found is None else found["handles"]


def test_the_step_of_its_own_dag_comes_before_one_of_the_same_name_around(known: Known) -> None:
    ends(known, "a", "outer")
    assert handles(known, "once/b", "a") == []
    ends(known, "once/a", "inner")
    assert handles(known, "once/b", "a") == ["inner"]
    assert handles(known, "once/b", "^a") == ["outer"]
    assert handles(known, "again[0]/b", "a") == []
    assert known.of("once/b", "nothing") is None


def test_a_finished_dag_can_be_asked_for_and_looked_into(known: Known) -> None:
    ends(known, "once/a", 1)
    known.reported(StepRecord(step="once", state=OK, settled=True), {"d": {}})
    assert handles(known, "a", "once") == [{"d": {}}]
    assert handles(known, "a", "once/a") == [1]
    assert known.names("a") == ["once"]


def test_an_iteration_that_is_over_takes_what_is_inside_of_it_along(known: Known) -> None:
    for iteration in range(3):
        ends(known, f"again[{iteration}]/a", iteration)
        assert handles(known, f"again[{iteration}]/b", "a") == [iteration]
        known.reported(StepRecord(step="again", state=OK, iteration=iteration), f"value {iteration}")
        assert handles(known, f"again[{iteration}]/b", "a") == []
    known.reported(StepRecord(step="again", state=OK, settled=True, iterations=3), None)
    assert handles(known, "a", "again") == ["value 0", "value 1", "value 2"]


def test_a_failed_attempt_does_not_show_in_the_next(known: Known) -> None:
    ends(known, "once/a", "first")
    known.reported(StepRecord(step="once", state=FAILED), None)
    assert handles(known, "once~2/b", "a") == []
    ends(known, "once~2/a", "second")
    assert handles(known, "once~2/b", "a") == ["second"]
