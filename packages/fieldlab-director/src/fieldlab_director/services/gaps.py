"""Holes in what an executor reported, made into gaps that readers see: each says why what is missing will not come.

In the lane of logs a gap is a record of its own (``GapRecord``). The control lane has none: what is refused there fails
its step visibly; only what a restored director lacks, and no node has any more, concerns no step that could still fail.
So it is said in the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

from fieldlab_common.protocol import GapRecord, Lane, Record, Refusal
from fieldlab_common.wire import dumps, encode

from fieldlab_director.services.intake import Entry
from fieldlab_director.services.outcome import append_log
from fieldlab_director.store.base import Tx
from fieldlab_director.store.rows import DeploymentRow

__all__ = ["after_restore", "stored"]

Taken = Entry | Refusal
_RESTORED = "the director was restored from a backup that was made before it had them"
_MOST = 500  # characters of a reason


def stored(lane: Lane, taken: Iterable[Taken], now: float) -> list[Entry]:
    """What of an upload is stored: a record of the log that was refused is a gap."""
    logs = lane is Lane.BULK
    return [
        _refused(each, now) if isinstance(each, Refusal) else each for each in taken if logs or isinstance(each, Entry)
    ]


def after_restore(tx: Tx, row: DeploymentRow, lane: Lane, taken: Sequence[Taken]) -> tuple[list[Taken], bool]:
    """What a journal sent first to a director that was restored, with the reason why something of it is missing.

    The executor was told that it is where the director is, and has sent gaps for what had left its disk. Also: whether
    this was the last of them.
    """
    if lane is Lane.BULK:
        return [_explained(each) for each in taken], bool(taken)
    lost = list(takewhile(lambda each: isinstance(each, Refusal), taken))
    if lost:
        what = f"Records {lost[0].number} to {lost[-1].number} of the lane {lane.value!r} are lost"
        append_log(tx, row, f"{what}: {_RESTORED}.\n")
    return list(taken), len(lost) < len(taken)


def _explained(each: Taken) -> Taken:
    if not (isinstance(each, Entry) and isinstance(each.body, GapRecord)) or each.body.bytes or each.body.reason:
        return each  # a gap that has bytes is of what the node dropped
    body = replace(each.body, reason=_RESTORED)
    return replace(each, body=body, data=_gap(each.at, body))


def _refused(refusal: Refusal, now: float) -> Entry:
    number = refusal.number
    body = GapRecord(first=number, last=number, reason=refusal.message[:_MOST])
    return Entry(number=number, through=number, at=now, data=_gap(now, body), body=body)


def _gap(at: float, body: GapRecord) -> bytes:
    return dumps(Record(kind="gap", at=at, body=encode(body)))
