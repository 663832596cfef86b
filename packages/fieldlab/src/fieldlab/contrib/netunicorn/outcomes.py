"""What came of netunicorn's tasks, in netunicorn's own words: results and flags."""

from __future__ import annotations

from typing import Any

from fieldlab_common.dag import DAG
from fieldlab_common.errors import IllegalState
from fieldlab_common.lifecycle import StepState
from netunicorn.base import FlagValues
from netunicorn.base.types import ExecutionGraphResult
from returns.result import Failure, Result, Success

from fieldlab.contrib.netunicorn.node import FLAG, TaskFailed, read_flag
from fieldlab.contrib.netunicorn.tasks import their_task
from fieldlab.results import DeploymentResults, StepResult
from fieldlab.runs import Run

__all__ = ["get_flag", "result_of", "set_flag"]

_ENDED = (StepState.SUCCEEDED, StepState.FAILED)


def result_of(
    dag: DAG, results: DeploymentResults, *, trust: bool = False
) -> Result[ExecutionGraphResult, ExecutionGraphResult]:
    """The results of a DAG that ``from_graph`` made, as netunicorn's executor gives them.

    By the name of the task, a list of ``Success(value)`` and ``Failure(text)`` in the order in which they came; all in
    a ``Success`` if no task failed, else in a ``Failure``, also where another task was there to handle it. ``trust``
    opens values that travelled as pickles, as netunicorn does with all of them; opening a pickle can run any code.

    Raises:
        IllegalState: it has not ended.
        UntrustedValue: a value is a pickle, and ``trust`` is false.
    """
    if not results.state.terminal:
        raise IllegalState(f"{results.name} is {results.state.value}: it has no results yet.", advice="Wait for it.")
    ended = [(results[step.name], their_task(step.task)) for step in dag.checked()]
    ended.sort(key=lambda pair: pair[0].ended or 0.0)
    found: dict[str, list[Result[Any, Any]]] = {}
    for result, task in ended:
        if task is not None and result.status in _ENDED:
            found.setdefault(task.name, []).append(_outcome(result, trust))
    failed = any(isinstance(one, Failure) for outcomes in found.values() for one in outcomes)
    return Failure(found) if failed else Success(found)


def _outcome(result: StepResult, trust: bool) -> Result[Any, Any]:
    if result.status is StepState.SUCCEEDED:
        return Success(result.trust() if trust else result.value)
    returned = TaskFailed.__name__ in result.error.rstrip().rpartition("\n")[2]
    return Failure(result.message if returned or not result.error else result.error)


def get_flag(run: Run, name: str) -> FlagValues | None:
    """The flag as the run's events make it; None if nobody has set it."""
    value = read_flag(run.events, name)
    return None if value is None else FlagValues(**value)


def set_flag(run: Run, name: str, values: FlagValues) -> None:
    """Set the flag for all tasks of the run.

    Raises:
        IllegalState: the run has ended.
    """
    run.events.send(FLAG + name, {"text_value": values.text_value, "int_value": values.int_value})
