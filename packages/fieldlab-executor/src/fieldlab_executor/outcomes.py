"""What came of an attempt, as a function of its result frame and its exit.

A result that came decides; without one the attempt has failed, whatever its exit code, and the end of its standard
error stands for the traceback: where Python could, it wrote one there as it was ended. The child is not believed where
it matters: what it sent is checked, and is a failure of its own if it is not what our code sends.
"""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

from fieldlab_common.lifecycle import Reason, StepState
from fieldlab_common.protocol import Usage, ValueRef

from fieldlab_executor.attempt import Attempt
from fieldlab_executor.instructions import Outcome
from fieldlab_executor.limits import Limits

__all__ = ["Large", "judge", "sudden_end"]


_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # as subprocess and as a shell tell that a command was killed
_CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)


class Large(NamedTuple):
    """A value that travels as an artifact: the name of its file among the values."""

    sha256: str
    size: int
    file: str


def judge(attempt: Attempt, limits: Limits, now: float) -> tuple[Outcome, Large | None]:
    """How the attempt ended, and the file to announce for a value that is too large for the journal."""
    result = attempt.result
    given: dict[str, Any] = {"usage": _usage(attempt), "started": attempt.started or None, "ended": now}
    if result is None:
        reason, message = sudden_end(attempt, limits, now)
        return Outcome(state=StepState.FAILED, reason=reason, message=message, error=attempt.errors, **given), None
    try:
        if "reason" in result:
            reason, message, error = _failure(attempt, result, limits, now)
            return Outcome(state=StepState.FAILED, reason=reason, message=message, error=error, **given), None
        if "value" not in result:
            value, large, handle = ValueRef(format="json", size=4, summary="None"), None, None
        else:
            value, large = _value(attempt.data, result["value"])
            handle = result.get("handle", {"j": value.json})
    except (KeyError, TypeError, ValueError) as wrong:
        message = f"The process gave a malformed result: {wrong!r:.200}."
        return Outcome(state=StepState.FAILED, reason=Reason.BAD_RESULT, message=message, **given), None
    return Outcome(state=StepState.SUCCEEDED, reason=Reason.RETURNED, value=value, handle=handle, **given), large


def _failure(attempt: Attempt, result: Mapping[str, Any], limits: Limits, now: float) -> tuple[Reason, str, str]:
    """Why it failed by its own account, and what is known besides where that was for want of memory."""
    reason, message, error = Reason(result["reason"]), str(result["message"]), str(result["error"])
    if reason is Reason.OUT_OF_MEMORY:
        message = f"{message.rstrip('.')}.{limits.refused(_peak(attempt))}"
    elif result.get("code") in _KILLED and limits.oom.happened(now):
        reason, message = Reason.OUT_OF_MEMORY, f"{message} {limits.ended(_peak(attempt))}"
    return reason, message, error


def _peak(attempt: Attempt) -> int:
    return attempt.exit.peak if attempt.exit is not None else 0


def _value(data: bytes, given: Mapping[str, Any]) -> tuple[ValueRef, Large | None]:
    """The client's reference to the value."""
    format_, size, summary = str(given["format"]), int(given["size"]), str(given["summary"])[:200]
    if "sha256" in given:
        large = Large(str(given["sha256"]), size, os.path.basename(str(given["file"])))
        return ValueRef(format=format_, sha256=large.sha256, size=size, summary=summary), large
    if format_ == "json":
        return ValueRef(format=format_, json=json.loads(data), size=size, summary=summary), None
    return ValueRef(format=format_, data=base64.b64encode(data).decode(), size=size, summary=summary), None


def sudden_end(attempt: Attempt, limits: Limits, now: float) -> tuple[Reason, str]:
    """Why there is no result."""
    if attempt.over:
        return Reason.OUT_OF_MEMORY, attempt.over
    if attempt.fault:
        return Reason.BAD_RESULT, f"What the process sent is no message: {attempt.fault}"
    if attempt.exit is None:
        return Reason.INTERNAL, attempt.note or "The process was not started."
    status = attempt.exit.status
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGKILL and not attempt.killed and limits.oom.happened(now):
            return Reason.OUT_OF_MEMORY, limits.ended(attempt.exit.peak)
        said = f"{_signal_name(number)} ended the process before it gave a result."
        if number in _CRASHES and limits.near(attempt.exit.peak):  # as code does that cannot be told that there is none
            return Reason.OUT_OF_MEMORY, said + limits.refused(attempt.exit.peak)
        return Reason.SIGNAL, said
    code = os.WEXITSTATUS(status)
    if attempt.cut:
        return Reason.BAD_RESULT, f"The process ended with exit code {code} amid its result: {attempt.cut} bytes came."
    return Reason.EXITED, f"The process ended with exit code {code} without giving a result; return a value instead."


def _usage(attempt: Attempt) -> Usage | None:
    if attempt.exit is None:
        return None
    status = attempt.exit.status
    return Usage(
        cpu=round(attempt.exit.cpu, 6),
        peak_memory=attempt.exit.peak,
        exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
