"""Log lines, put together from the chunks in which they travel.

A chunk ends wherever the node's buffer did; a line is what its writer ended. What a node had to drop appears as a line
of its own, in the place where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fieldlab_common import paths
from fieldlab_common import protocol as p
from fieldlab_common.wire import decode

from fieldlab.text import clean, one_line, size

__all__ = ["Assembler", "LogFilter", "LogLine", "Logs", "assemble"]

MAX_LINE = 64 * 1024  # a longer line is handed out in pieces


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """One line of output. ``text`` is as the node wrote it; ``str()`` of the line is harmless in a terminal.

    ``stream`` is ``stdout``, ``stderr``, ``log`` (``ctx.log``), ``executor`` (its own remarks) or ``gap`` (lines were
    dropped here). ``at`` is in seconds since the epoch, by the node's clock.
    """

    deployment: str
    step: str
    text: str
    stream: str = "stdout"
    at: float = 0.0
    attempt: int = 1
    iteration: int | None = None

    def __str__(self) -> str:
        where = f"{self.deployment}/{self.step}" if self.step else self.deployment
        return f"[{one_line(where, 80)}] {clean(self.text)}"


class Logs(tuple[LogLine, ...]):
    """Log lines in order; ``str()`` is their text."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(clean(line.text) for line in self)

    def __repr__(self) -> str:
        return f"<{len(self)} log lines>" + (f"\n{self}" if self else "")


@dataclass(frozen=True, kw_only=True)
class LogFilter:
    """Which lines are wanted; None: all. Those of a step that is a DAG are those of the steps inside of it."""

    deployment: str | None = None
    step: str | None = None
    stream: str | None = None

    def takes(self, line: LogLine) -> bool:
        """Whether the line is wanted. Gaps are, wherever their deployment is."""
        if self.deployment is not None and line.deployment != self.deployment:
            return False
        if line.stream == "gap":
            return True
        return (self.step is None or paths.below(line.step, self.step)) and self.stream in (None, line.stream)


_Key = tuple[str, str, str, int, int | None]


class Assembler:
    """Puts lines together as records of the bulk lane come in."""

    def __init__(self) -> None:
        self._open: dict[_Key, LogLine] = {}

    def add(self, entry: p.RecordEntry) -> Iterator[LogLine]:
        """The lines that ``entry`` completes."""
        if entry.record.kind == "gap":
            yield _gap(entry)
        elif entry.record.kind == "log":
            yield from self._lines(entry)

    def rest(self) -> Iterator[LogLine]:
        """What was begun and never ended by a line break."""
        yield from self._open.values()
        self._open.clear()

    def _lines(self, entry: p.RecordEntry) -> Iterator[LogLine]:
        log = decode(p.LogRecord, dict(entry.record.body))
        key = (entry.deployment, log.step, log.stream, log.attempt, log.iteration)
        begun = self._open.pop(key, None)
        *whole, rest = ((begun.text if begun else "") + log.text).split("\n")
        at = begun.at if begun else entry.record.at
        for index, text in enumerate(whole):
            yield _line(entry, log, text.removesuffix("\r"), at if index == 0 else entry.record.at)
        last_at = entry.record.at if whole else at
        while len(rest) > MAX_LINE:
            yield _line(entry, log, rest[:MAX_LINE], last_at)
            rest = rest[MAX_LINE:]
        if rest:
            self._open[key] = _line(entry, log, rest, last_at)


def assemble(entries: Iterable[p.RecordEntry]) -> Iterator[LogLine]:
    """Whole lines from the records of the bulk lane; what was never ended by a line break comes last."""
    assembler = Assembler()
    for entry in entries:
        yield from assembler.add(entry)
    yield from assembler.rest()


def _gap(entry: p.RecordEntry) -> LogLine:
    gap = decode(p.GapRecord, dict(entry.record.body))
    count = gap.last - gap.first + 1
    text = f"… {count} chunks of log ({size(gap.bytes)}) were dropped on the node for want of space …"
    return LogLine(deployment=entry.deployment, step="", text=text, stream="gap", at=entry.record.at)


def _line(entry: p.RecordEntry, log: p.LogRecord, text: str, at: float) -> LogLine:
    return LogLine(
        deployment=entry.deployment,
        step=log.step,
        text=text,
        stream=log.stream,
        at=at,
        attempt=log.attempt,
        iteration=log.iteration,
    )
