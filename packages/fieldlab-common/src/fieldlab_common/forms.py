"""What a step can be besides run once: in the background, repeated, or mapped over a list.

Invariant: a step has at most one of these forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from fieldlab_common.builtin import value
from fieldlab_common.dag import DAG, Choice, DagTask
from fieldlab_common.deployment import Background
from fieldlab_common.environment import check_count, parse_duration
from fieldlab_common.errors import DefinitionError
from fieldlab_common.step import Arg, Item, Pick, Step, check_step, current_dag
from fieldlab_common.task import Task, task_of

__all__ = ["background", "map_", "repeat"]

R = TypeVar("R")


def background(step: Step[R], *, stop: int | None = None, grace: float | str = 10.0) -> Step[R]:
    """Let a step run in the background: until nothing is ``during`` it any more.

    It is then asked to stop: ``ctx.stopping`` is set, and its processes get the signal ``stop`` (None: SIGTERM if the
    task takes no context, else no signal). What is left after ``grace`` seconds is killed. A timeout, a cancel and a
    failure send the same signal (SIGTERM if there is none), so that a capture leaves a whole file; it then has 5 s.

    Raises:
        DefinitionError: the step is a DAG, which ends when its steps have.
    """
    if isinstance(check_step(step).task, DagTask):
        raise DefinitionError(
            f"{step!r} is a DAG and cannot run in the background.",
            advice="Let those of its steps run in the background that others are `during`.",
        )
    if any(one.settings.isolation == "shared" for one in task_of(step).implementations()):
        raise DefinitionError(
            f"{step!r} is isolation='shared' and cannot run in the background: it would keep a worker from all others.",
            advice="Leave isolation out; a background step has a process of its own.",
        )
    if stop is not None and not (isinstance(stop, int) and 0 < stop < 65):
        raise DefinitionError(f"stop={stop!r} is no signal.", advice="Give one of signal's, such as signal.SIGINT.")
    signal = int(stop) if stop is not None else (None if step.takes_context else 15)
    step.background = Background(signal=signal, grace=parse_duration(grace), announces=step.takes_context)
    return step


def repeat(
    step: Step[R],
    *,
    every: float | str = 0.0,
    duration: float | str | None = None,
    times: int | None = None,
    until: Callable[[R], bool] | None = None,
    on_failure: Literal["fail", "continue"] = "fail",
) -> Step[list[R]]:
    """Run a step (a DAG, too) again and again; its value is the list of what each iteration gave.

    ``every``: time between two starts; it ends after ``times`` iterations, or when the next would not start before
    ``duration`` has passed (``every=3600, duration=86400``: 24 of them), or when ``until`` is true of the last value.
    ``on_failure="continue"``: a failed iteration gives None and the next runs.

    Raises:
        DefinitionError: nothing says when it ends.
    """
    check_step(step)
    if times is None and duration is None and until is None:
        raise DefinitionError(f"{step!r} would repeat for ever.", advice="Give times=, duration= or until=.")
    if on_failure not in ("fail", "continue"):
        raise DefinitionError(f"on_failure={on_failure!r}: it is 'fail' or 'continue'.")
    check_count("times", times)
    if until is not None and not callable(until):
        raise DefinitionError(f"until={until!r:.80}: it is a function of the last value.")
    if step.over is not None or step.background is not None:
        raise DefinitionError(f"{step!r} is mapped or in the background and cannot repeat.")
    step.repetition = {
        "every": parse_duration(every),
        "duration": None if duration is None else parse_duration(duration),
        "times": times,
        "until": until,
        "keep_going": on_failure == "continue",
    }
    return step  # type: ignore[return-value]


def map_(task: Task[R] | DAG | Choice, items: Step[Any] | Pick | Arg, *args: Any, **kwargs: Any) -> Step[list[R]]:
    """Call ``task(item, *args, **kwargs)`` for each item of a list that is known only when it runs.

    ``task`` may be a DAG: all of it then runs for each item. ``items`` may be a parameter of the DAG being defined.
    """
    if isinstance(items, Arg):
        items = value(items)
    if not isinstance(items, Step | Pick):
        raise DefinitionError(
            f"fl.map takes a task and a step, not {items!r:.80}.",
            advice="For a list that is known now: [task(x) for x in items].",
        )
    if not isinstance(task, Task | DAG | Choice):
        raise DefinitionError(f"fl.map takes a task or a DAG to call for each item, not {task!r:.80}.")
    token = current_dag.set(None)
    try:
        step = task(Item(), *args, **kwargs)
    finally:
        current_dag.reset(token)
    step.over = items
    owner = current_dag.get() or (items.dag if isinstance(items, Step) else items.step.dag)
    if owner is not None:
        owner.add(step)
    return step  # type: ignore[return-value]
