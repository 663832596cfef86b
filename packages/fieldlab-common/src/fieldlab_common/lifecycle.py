"""The states of experiments, deployments and steps, and the only way from one to the next.

The tables are data; ``advance`` is the one function that moves, and refuses everything that a table does not have.
Invariant: a terminal state has no way out. ``docs/lifecycle.md`` shows these tables and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from fieldlab_common.errors import IllegalTransition

__all__ = ["TRANSITIONS", "DeploymentState", "ExperimentState", "Reason", "StepState", "advance"]


class ExperimentState(StrEnum):
    """Where an experiment stands."""

    PREPARING = "preparing"  # accepted; it waits for its nodes, or they are being made ready
    READY = "ready"  # every deployment that will run is ready; it waits for its start
    RUNNING = "running"  # its executors were launched and begin together; at least one deployment has not ended
    CANCELLING = "cancelling"  # a cancel was accepted; deployments are being stopped
    SUCCEEDED = "succeeded"  # every deployment succeeded
    FAILED = "failed"  # at least one did not; every result that arrived is kept
    CANCELLED = "cancelled"  # stopped on request

    @property
    def terminal(self) -> bool:
        """Whether nothing changes it any more."""
        return not TRANSITIONS[type(self)][self]


class DeploymentState(StrEnum):
    """Where the part of an experiment stands that runs on one node."""

    PENDING = "pending"  # accepted; its run waits for its nodes, and nothing was done there yet
    PREPARING = "preparing"  # its environment is being made on the node
    READY = "ready"  # could start now
    LAUNCHING = "launching"  # an executor was asked for, under a new epoch, and has not claimed it yet
    RUNNING = "running"  # an executor claimed it and was heard of recently
    UNREACHABLE = "unreachable"  # claimed, and silent for longer than it should be; not dead for that
    SUCCEEDED = "succeeded"  # every step that failed was handled
    FAILED = "failed"  # a step failed unhandled, or it could not be prepared, launched or kept alive
    CANCELLED = "cancelled"  # stopped on request
    LOST = "lost"  # silent for longer than the experiment's lost_after

    @property
    def terminal(self) -> bool:
        """Whether nothing changes it any more."""
        return not TRANSITIONS[type(self)][self]


class StepState(StrEnum):
    """Where a step stands on its node."""

    WAITING = "waiting"  # something it needs has not come to pass
    RUNNING = "running"  # an attempt is under way, or the next one waits for its delay
    SUCCEEDED = "succeeded"  # it ended well and has a value
    FAILED = "failed"  # its last attempt failed
    SKIPPED = "skipped"  # what it needs can no longer come to pass, or its condition was false
    CANCELLED = "cancelled"  # stopped on request, or with its deployment

    @property
    def terminal(self) -> bool:
        """Whether nothing changes it any more."""
        return not TRANSITIONS[type(self)][self]


class Reason(StrEnum):
    """Why something ended as it did; the machine-readable half of it, beside a sentence for people."""

    RETURNED = "returned"  # the step's function returned a value
    STOPPED = "stopped"  # a background step was asked to stop, and did
    RAISED = "raised"  # the step's function raised an exception
    TIMEOUT = "timeout"  # the attempt took longer than it may
    SIGNAL = "signal"  # a signal ended the process
    OUT_OF_MEMORY = "out_of_memory"  # no memory was left: the kernel ended the process, or its limit refused it more
    EXITED = "exited"  # the process ended without giving a result, whatever its exit code
    BAD_RESULT = "bad_result"  # the result was cut, malformed, or nothing that can travel
    LOAD_FAILED = "load_failed"  # the user's code or an argument could not be loaded on the node
    EXIT_CODE = "exit_code"  # a command ended with a code that is not among its ok_codes
    BARRIER_BROKEN = "barrier_broken"  # a barrier can no longer fill
    REFUSED = "refused"  # the director refused a record of the step (malformed, or over a limit)
    CONDITION = "condition"  # the step's condition was false
    UPSTREAM = "upstream"  # what the step needs did not come to pass
    EARLY_END = "early_end"  # a background step ended before those that need it while it runs
    STOP_ON_FAILURE = "stop_on_failure"  # another step failed, and the DAG stops on failure
    CANCELLED = "cancelled"  # a person or a program asked for it
    TERMINATED = "terminated"  # the executor itself was told to stop (SIGTERM, walltime)
    COMPLETED = "completed"  # the deployment ended and every failure was handled
    STEP_FAILED = "step_failed"  # the deployment, or the DAG that the step is, has a failed step that nothing handled
    PREPARE_FAILED = "prepare_failed"  # the environment could not be made
    LAUNCH_FAILED = "launch_failed"  # no executor could be started
    EXECUTOR_LOST = "executor_lost"  # the executor died without ending its deployment
    SILENT = "silent"  # nothing was heard for longer than lost_after
    INTERNAL = "internal"  # a fault of fieldlab's own


_E, _D, _S = ExperimentState, DeploymentState, StepState
_D_ENDS = frozenset({_D.SUCCEEDED, _D.FAILED, _D.CANCELLED, _D.LOST})

# One table a kind: members of different kinds with the same text are equal, and would be one key.
TRANSITIONS: Mapping[type[StrEnum], Mapping[StrEnum, frozenset[StrEnum]]] = {
    _E: {
        _E.PREPARING: frozenset({_E.READY, _E.CANCELLING, _E.FAILED}),
        _E.READY: frozenset({_E.RUNNING, _E.CANCELLING}),
        _E.RUNNING: frozenset({_E.SUCCEEDED, _E.FAILED, _E.CANCELLING}),
        _E.CANCELLING: frozenset({_E.CANCELLED}),
        _E.SUCCEEDED: frozenset(),
        _E.FAILED: frozenset(),
        _E.CANCELLED: frozenset(),
    },
    _D: {
        _D.PENDING: frozenset({_D.PREPARING, _D.CANCELLED, _D.FAILED}),
        _D.PREPARING: frozenset({_D.READY, _D.FAILED, _D.CANCELLED}),
        _D.READY: frozenset({_D.LAUNCHING, _D.CANCELLED, _D.FAILED}),
        _D.LAUNCHING: frozenset({_D.RUNNING, _D.FAILED, _D.CANCELLED, _D.LOST}),
        _D.RUNNING: frozenset({_D.UNREACHABLE} | _D_ENDS),
        _D.UNREACHABLE: frozenset({_D.RUNNING} | _D_ENDS),
        _D.SUCCEEDED: frozenset(),
        _D.FAILED: frozenset(),
        _D.CANCELLED: frozenset(),
        _D.LOST: frozenset(),
    },
    _S: {
        _S.WAITING: frozenset({_S.RUNNING, _S.SKIPPED, _S.CANCELLED, _S.FAILED}),
        _S.RUNNING: frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
        _S.SUCCEEDED: frozenset(),
        _S.FAILED: frozenset(),
        _S.SKIPPED: frozenset(),
        _S.CANCELLED: frozenset(),
    },
}

State = TypeVar("State", ExperimentState, DeploymentState, StepState)


def advance(current: State, new: State) -> State:
    """Return ``new`` if the tables have the way from ``current`` to it.

    Raises:
        IllegalTransition: naming both states; also when they are the same.
    """
    row = TRANSITIONS[type(current)][current]
    if type(new) is type(current) and new in row:
        return new
    allowed = ", ".join(sorted(str(s.value) for s in row)) or "nothing: it is terminal"
    raise IllegalTransition(
        f"{type(current).__name__} {current.value!r} cannot become {new.value!r}; from there it can become {allowed}.",
        details={"from": current.value, "to": new.value},
    )
