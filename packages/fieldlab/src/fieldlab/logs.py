"""Log lines, put together from the chunks in which they travel.

A chunk ends wherever the node's buffer did; a line is what its writer ended. What a node had to drop appears as a line
of its own, in the place where it was. Nothing here grows with the log: of a million records, a page is in memory, and
of lines that were begun and never ended as much as ``MAX_OPEN``.
"""

from __future__ import annotations

import datetime as dt
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

from fieldlab_common import paths
from fieldlab_common import protocol as p
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import DefinitionError, InvalidMessage
from fieldlab_common.wire import decode

from fieldlab.text import clean, one_line, size

__all__ = ["Assembler", "LogFilter", "LogLine", "Logs", "Since", "assemble", "moment"]

MAX_LINE = 64 * 1024  # a longer line is handed out in pieces
MAX_OPEN = 4 * 1024 * 1024  # characters of lines that were not ended yet; beyond, the oldest is handed out as it is
STREAMS = ("stdout", "stderr", "log", "executor", "gap")
SHOWN = 20  # lines that are shown when logs are printed by ``repr``

Since: TypeAlias = float | str | dt.datetime | dt.timedelta


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """One line of output. ``text`` is as the node wrote it; ``str()`` of the line is harmless in a terminal.

    ``stream`` is ``stdout``, ``stderr``, ``log`` (``ctx.log``), ``executor`` (its own remarks) or ``gap`` (lines were
    dropped here). ``at`` is in seconds since the epoch, by the node's clock. ``late``: it came after its deployment
    had been given up.
    """

    deployment: str
    step: str
    text: str
    stream: str = "stdout"
    at: float = 0.0
    attempt: int = 1
    iteration: int | None = None
    late: bool = False

    def __str__(self) -> str:
        where = f"{self.deployment}/{self.step}" if self.step else self.deployment
        return f"[{one_line(where, 80)}{', late' if self.late else ''}] {clean(self.text)}"


class Logs(Sequence[LogLine]):
    """Log lines in order, read anew each time that they are gone through, page by page.

    So a million lines are no more in memory than a page of them; an index, a slice and ``len`` go through them too.
    ``str()`` is their text, all of it; ``tail(n)`` the last of them.
    """

    def __init__(self, lines: Iterable[LogLine] | Callable[[], Iterable[LogLine]] = ()) -> None:
        kept: Iterable[LogLine] = () if callable(lines) else tuple(lines)
        self._read: Callable[[], Iterable[LogLine]] = lines if callable(lines) else lambda: kept

    def __iter__(self) -> Iterator[LogLine]:
        return iter(self._read())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None

    @overload
    def __getitem__(self, index: int) -> LogLine: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LogLine, ...]: ...
    def __getitem__(self, index: int | slice) -> LogLine | tuple[LogLine, ...]:
        if isinstance(index, slice):
            return tuple(self)[index]
        found = self.tail(-index) if index < 0 else tuple(itertools.islice(self, index, index + 1))
        if len(found) < max(1, -index):
            raise IndexError(f"There is no line {index}.")
        return found[0]

    def tail(self, count: int = SHOWN) -> tuple[LogLine, ...]:
        """The last ``count`` lines."""
        return tuple(deque(self, maxlen=count))

    def __str__(self) -> str:
        return "\n".join(clean(line.text) for line in self)

    def __repr__(self) -> str:
        count, last = 0, deque[LogLine](maxlen=SHOWN)
        for line in self:
            count += 1
            last.append(line)
        head = f"<{count} log lines>" if count <= SHOWN else f"<{count} log lines, the last {SHOWN}>"
        return "\n".join([head, *(clean(line.text) for line in last)])


def moment(since: Since | None, now: Callable[[], float] = time.time) -> float | None:
    """The time, in seconds since the epoch, that ``since`` means.

    A number is one already; a text such as ``"10m"``, or a timedelta, is so long before now.

    Raises:
        DefinitionError: it is no time, or one without a time zone.
    """
    if since is None or (isinstance(since, int | float) and not isinstance(since, bool)):
        return since
    if isinstance(since, dt.timedelta):
        return now() - since.total_seconds()
    if isinstance(since, dt.datetime) and since.tzinfo is not None:
        return since.timestamp()
    if isinstance(since, str):
        return now() - parse_duration(since)
    raise DefinitionError(
        f"since={since!r:.80} is no time.",
        advice='Give seconds since the epoch, a datetime with a time zone, or how long ago: since="10m".',
    )


@dataclass(frozen=True, kw_only=True)
class LogFilter:
    """Which lines are wanted; None: all. Those of a step that is a DAG are those of the steps inside of it.

    ``since`` is in seconds since the epoch, by the nodes' clocks.

    Raises:
        DefinitionError: there is no such stream.
    """

    deployments: frozenset[str] | None = None
    step: str | None = None
    stream: str | None = None
    since: float | None = None

    def __post_init__(self) -> None:
        if self.stream not in (None, *STREAMS):
            raise DefinitionError(f"stream={self.stream!r:.80}: it is one of {', '.join(STREAMS)}.")

    def takes(self, line: LogLine) -> bool:
        """Whether the line is wanted. Gaps are, wherever their deployment is."""
        if self.deployments is not None and line.deployment not in self.deployments:
            return False
        if self.since is not None and line.at < self.since:
            return False
        if line.stream == "gap":
            return True
        return (self.step is None or paths.below(line.step, self.step)) and self.stream in (None, line.stream)


_Key = tuple[str, str, str, int, int | None]


class Assembler:
    """Puts lines together as records of the bulk lane come in."""

    def __init__(self) -> None:
        self._open: dict[_Key, LogLine] = {}  # the one that grew last stands last
        self._held = 0  # characters in them

    def add(self, entry: p.RecordEntry) -> Iterator[LogLine]:
        """The lines that ``entry`` completes. What is no record of a log is passed over."""
        try:
            if entry.record.kind == "gap":
                yield _gap(entry)
            elif entry.record.kind == "log":
                yield from self._lines(entry, decode(p.LogRecord, dict(entry.record.body)))
        except InvalidMessage:  # of a node that is newer, or broken
            return

    def rest(self) -> Iterator[LogLine]:
        """What was begun and never ended by a line break."""
        yield from self._open.values()
        self._open.clear()
        self._held = 0

    def _lines(self, entry: p.RecordEntry, log: p.LogRecord) -> Iterator[LogLine]:
        key = (entry.deployment, log.step, log.stream, log.attempt, log.iteration)
        begun = self._open.pop(key, None)
        self._held -= len(begun.text) if begun else 0
        *whole, rest = ((begun.text if begun else "") + log.text).split("\n")
        at = begun.at if begun else entry.record.at
        for index, text in enumerate(whole):
            for piece in _pieces(text.removesuffix("\r")):
                yield _line(entry, log, piece, at if index == 0 else entry.record.at)
        last_at = entry.record.at if whole else at
        *full, rest = _pieces(rest)
        for piece in full:
            yield _line(entry, log, piece, last_at)
        if rest:
            self._open[key] = _line(entry, log, rest, last_at)
            self._held += len(rest)
        while self._held > MAX_OPEN:
            oldest = self._open.pop(next(iter(self._open)))
            self._held -= len(oldest.text)
            yield oldest


def _pieces(text: str) -> list[str]:
    return [text[start : start + MAX_LINE] for start in range(0, len(text), MAX_LINE)] or [""]


def assemble(entries: Iterable[p.RecordEntry]) -> Iterator[LogLine]:
    """Whole lines from the records of the bulk lane; what was never ended by a line break comes last."""
    assembler = Assembler()
    for entry in entries:
        yield from assembler.add(entry)
    yield from assembler.rest()


def _gap(entry: p.RecordEntry) -> LogLine:
    gap = decode(p.GapRecord, dict(entry.record.body))
    count = gap.last - gap.first + 1
    if gap.reason:
        text = f"… {count} chunks of log missing: {gap.reason} …"
    else:
        text = f"… {count} chunks of log ({size(gap.bytes)}) were dropped on the node for want of space …"
    return LogLine(deployment=entry.deployment, step="", text=text, stream="gap", at=entry.record.at, late=entry.late)


def _line(entry: p.RecordEntry, log: p.LogRecord, text: str, at: float) -> LogLine:
    return LogLine(
        deployment=entry.deployment,
        step=log.step,
        text=text,
        stream=log.stream,
        at=at,
        attempt=log.attempt,
        iteration=log.iteration,
        late=entry.late,
    )
