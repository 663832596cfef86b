"""Records of steps as the journal has them, written out by hand.

There are two for each step, of thirteen fields most of which are at their default: ``wire.encode`` goes through all of
them and makes the same of it, at several times the cost (``tests`` compare the two).
"""

from __future__ import annotations

from typing import Any

from fieldlab_common.compact import to_text
from fieldlab_common.protocol import StepRecord
from fieldlab_common.wire import encode

__all__ = ["step_record"]


def step_record(record: StepRecord, at: float) -> bytes:
    """A ``protocol.Record`` of kind ``step``, made at ``at``, as ``wire.dumps`` makes it."""
    body: dict[str, Any] = {"step": record.step, "state": record.state.value}
    if record.settled:
        body["settled"] = True
    if record.attempt != 1:
        body["attempt"] = record.attempt
    if record.iteration is not None:
        body["iteration"] = record.iteration
    if record.iterations is not None:
        body["iterations"] = record.iterations
    if record.reason is not None:
        body["reason"] = record.reason.value
    if record.message:
        body["message"] = record.message
    if record.error:
        body["error"] = record.error
    if record.started is not None:
        body["started"] = record.started
    if record.ended is not None:
        body["ended"] = record.ended
    if record.value is not None:
        body["value"] = encode(record.value)
    if record.usage is not None:
        body["usage"] = encode(record.usage)
    return to_text({"kind": "step", "at": at, "body": body}).encode(errors="replace")
