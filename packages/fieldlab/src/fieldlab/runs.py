"""The handle on a run: wait for it, watch it, read what it gives, talk to it, stop it.

A run is read by cursor: each reader keeps its own place and asks for what comes after it, held by the source until
there is something (a long-poll). So nothing is missed or read twice, whatever happens to the connection or to the
director in between; while the director does not answer, readers keep asking for ``source.PATIENCE`` seconds.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TextIO, overload

from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.builtin import check_event_name
from fieldlab_common.deployment import Graph
from fieldlab_common.errors import DefinitionError, EventTooLarge, RunFailed, WaitTimeout
from fieldlab_common.events import MAX_EVENT_BYTES, Event
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState
from fieldlab_common.protocol import Lane

from fieldlab import artifacts as _artifacts
from fieldlab.ledger import Ledger
from fieldlab.logs import Assembler, LogFilter, LogLine, Logs, assemble
from fieldlab.results import DeploymentResults, Reader, Results
from fieldlab.source import Source
from fieldlab.text import clean, counted, html_table, instant, listed, one_line, table
from fieldlab.transport import json_of

__all__ = ["Deployments", "Run", "RunEvents"]

LONG_POLL = 20.0  # seconds for which one request may be held
SETTLING = 0.25  # seconds between looks when all deployments have ended and the run is about to
DRAINING = 5.0  # seconds for which logs of a run that has ended are waited for, since the last that came


class Deployments(Mapping[str, p.DeploymentInfo]):
    """How the deployments of a run stood when they were asked for, by name; shown as a table."""

    def __init__(self, infos: Sequence[p.DeploymentInfo]) -> None:
        self._infos = {info.name: info for info in infos}

    def __getitem__(self, name: str) -> p.DeploymentInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def _rows(self) -> list[list[object]]:
        return [
            [d.name, d.node, d.role, d.state.value, d.reason.value if d.reason else "", instant(d.started), d.message]
            for d in self._infos.values()
        ]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


_HEADER = ("deployment", "node", "role", "state", "reason", "started", "message")


class Run:
    """An experiment that was submitted, or that runs here."""

    def __init__(
        self,
        source: Source,
        info: p.ExperimentInfo,
        *,
        steps: Mapping[str, tuple[str, ...]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._info, self._clock = source, info, clock
        self._steps = dict(steps or {})
        self._graphs: dict[str, Graph] = {}
        self._ledger, self._cursor, self._seen_events = Ledger(), 0, 0
        self.events = RunEvents(source, clock)
        self.artifacts = _artifacts.Artifacts(source)

    # --- how it stands ---

    @property
    def name(self) -> str:
        """The experiment's name, unique among its owner's."""
        return self._info.name

    @property
    def id(self) -> str:
        """The experiment's id, unique at its director."""
        return self._info.id

    @property
    def info(self) -> p.ExperimentInfo:
        """Everything the source says about it, asked for now."""
        self._info = self._source.info()
        return self._info

    @property
    def state(self) -> ExperimentState:
        """Its state, asked for now."""
        return self.info.state

    @property
    def status(self) -> ExperimentState:
        """The same as ``state``."""
        return self.state

    @property
    def deployments(self) -> Deployments:
        """How each deployment stands, asked for now."""
        return Deployments(self.info.deployments)

    def __repr__(self) -> str:
        count = counted(len(self._info.deployments), "deployment")
        return f"<Run {one_line(self.name)}: {self._info.state.value}, {count}>"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self.deployments._rows(), caption=f"{self.name}: {self._info.state.value}")

    # --- steering ---

    def start(self) -> Run:
        """Start it as soon as it is ready; nothing happens if it was started already. Returns the run."""
        self._info = self._source.start()
        return self

    def cancel(self, reason: str = "", deployments: Sequence[str] = ()) -> Run:
        """Ask for it to be stopped, or only the named deployments of it; ``wait`` then waits for the end.

        It ends as ``cancelled``, whatever its tasks do; what was recorded is kept. Returns the run.
        """
        if isinstance(deployments, str):
            deployments = (deployments,)
        self._info = self._source.cancel(reason, deployments)
        return self

    def wait(self, timeout: float | None = None, *, raise_on_failure: bool = False) -> ExperimentState:
        """Wait until it has ended, and return its final state.

        Raises:
            WaitTimeout: it did not end within ``timeout`` seconds; it goes on running.
            RunFailed: it ended otherwise than well, and ``raise_on_failure`` is true.
        """
        deadline = None if timeout is None else self._clock() + timeout
        info = self.info
        while not info.state.terminal:
            left = LONG_POLL if deadline is None else deadline - self._clock()
            if left <= 0:
                raise WaitTimeout(
                    f"Run {self.name!r} did not end within {timeout:g} s; it is {info.state.value}: {_standing(info)}.",
                    advice="It goes on. Wait longer, look at run.watch(), or stop it with run.cancel().",
                )
            settling = all(d.state.terminal for d in info.deployments)
            page = self._source.events(self._seen_events, min(left, SETTLING if settling else LONG_POLL))
            self._seen_events = page.cursor
            info = self.info
        if raise_on_failure and info.state is not ExperimentState.SUCCEEDED:
            raise self._failure()
        return info.state

    def _failure(self) -> RunFailed:
        results = self.results
        lines = [line for name in results if (line := _why(results[name]))]
        more = f"\n… and {len(lines) - 10} more" if len(lines) > 10 else ""
        return RunFailed(
            f"Run {self.name!r} ended as {self._info.state.value}.\n" + "\n".join(lines[:10]) + more,
            advice="See run.results and run.logs().",
            details={"state": self._info.state.value},
        )

    def watch(self, *, file: TextIO | None = None, logs: bool = True) -> ExperimentState:
        """Show live progress until it ends: deployments, steps and (unless ``logs`` is false) the tail of the log.

        Ctrl-C stops watching; the run goes on. Returns the state then reached.
        """
        from fieldlab.watch import watch

        feed = self.log_feed() if logs else None
        return watch(self, feed, file=file)

    # --- what it gives ---

    @property
    def results(self) -> Results:
        """What it has given so far, by deployment, then step; asked for now."""
        return self.refresh()

    def refresh(self, wait: float = 0.0) -> Results:
        """The same as ``results``, once something new came or ``wait`` seconds have passed."""
        if wait:
            self._read_page(wait)
        info = self.info  # before the records: a deployment that is seen to have ended has all its records
        while self._read_page(0.0):
            pass
        return Results(info, self._ledger, self._steps_of, self._reader())

    @overload
    def logs(
        self,
        *,
        follow: Literal[False] = ...,
        deployment: str | None = ...,
        step: str | None = ...,
        stream: str | None = ...,
    ) -> Logs: ...

    @overload
    def logs(
        self,
        *,
        follow: Literal[True],
        deployment: str | None = ...,
        step: str | None = ...,
        stream: str | None = ...,
    ) -> Iterator[LogLine]: ...

    @overload
    def logs(
        self,
        *,
        follow: bool,
        deployment: str | None = ...,
        step: str | None = ...,
        stream: str | None = ...,
    ) -> Iterator[LogLine] | Logs: ...

    def logs(
        self,
        *,
        follow: bool = False,
        deployment: str | None = None,
        step: str | None = None,
        stream: str | None = None,
    ) -> Iterator[LogLine] | Logs:
        """Its output so far (``Logs``), or with ``follow`` an iterator that goes on until the run has ended.

        Of a run that has ended it is all, but for what comes later than a few seconds after the last.

        ``stream`` is ``stdout``, ``stderr``, ``log`` or ``executor``.
        """
        wanted = LogFilter(deployment=deployment, step=step, stream=stream)
        lines = (line for line in assemble(self._log_records(follow)) if wanted.takes(line))
        return lines if follow else Logs(lines)

    def timeline(self) -> list[dict[str, Any]]:
        """The rows of all results that started, ordered by start: what ran when, by the nodes' clocks."""
        rows = [row for row in self.results.rows() if row["started"] is not None]
        return sorted(rows, key=lambda row: (row["started"], row["deployment"]))

    def close(self) -> None:
        """Let go of what it holds open: for a run here, its folder with the artifacts."""
        self._source.close()

    # --- reading ---

    def _read_page(self, wait: float) -> bool:
        page = self._source.records(Lane.CONTROL, self._cursor, wait)
        for entry in page.records:
            self._ledger.add(entry.deployment, entry.record, late=entry.late)
        self._cursor = page.cursor
        return bool(page.records)

    def _log_records(self, follow: bool) -> Iterator[p.RecordEntry]:
        cursor, quiet_since = 0, self._clock()
        ended = False
        while True:
            wait = 1.0 if ended else (LONG_POLL if follow else 0.0)
            page = self._source.records(Lane.BULK, cursor, wait)
            yield from page.records
            cursor = page.cursor
            if page.records:
                quiet_since = self._clock()
                continue
            ended = page.state.terminal  # then what is still on its way is waited for, for a while
            if not (ended or follow) or (ended and (self._drained() or self._clock() - quiet_since > DRAINING)):
                return

    def log_feed(self) -> Callable[[], list[LogLine]]:
        """A function that gives the log lines since it was last called, without waiting."""
        assembler, cursor = Assembler(), 0

        def read() -> list[LogLine]:
            nonlocal cursor
            lines: list[LogLine] = []
            while (page := self._source.records(Lane.BULK, cursor, 0.0)).records:
                cursor = page.cursor
                lines += [line for entry in page.records for line in assembler.add(entry)]
            return lines + (list(assembler.rest()) if page.state.terminal else [])

        return read

    def _drained(self) -> bool:
        return all(d.drained or d.reason in _NOTHING_COMES or not d.epoch for d in self.info.deployments)

    def _steps_of(self, info: p.DeploymentInfo) -> tuple[str, ...]:
        if info.graph not in self._steps:
            if not info.graph:
                return ()
            self._steps[info.graph] = tuple(path for path, _ in self._graph(info.graph).walk())
        return self._steps[info.graph]

    def _graph(self, digest: str) -> Graph:
        if digest not in self._graphs:
            self._graphs[digest] = wire.loads(Graph, b"".join(self._source.blob(digest, 0)))
        return self._graphs[digest]

    def _reader(self) -> Reader:
        def step_artifacts(deployment: str, step: str) -> list[Any]:
            return self.artifacts.list(deployment=deployment, step=step)

        def step_logs(deployment: str, step: str) -> Logs:
            return self.logs(deployment=deployment, step=step)

        return Reader(
            blob=lambda digest, size: _artifacts.fetch(self._source, digest, size),
            graph=self._graph,
            logs=step_logs,
            artifacts=step_artifacts,
        )


_NOTHING_COMES = (Reason.SILENT, Reason.EXECUTOR_LOST, Reason.LAUNCH_FAILED, Reason.PREPARE_FAILED)


def _standing(info: p.ExperimentInfo) -> str:
    counts: dict[str, int] = {}
    for deployment in info.deployments:
        counts[deployment.state.value] = counts.get(deployment.state.value, 0) + 1
    return ", ".join(f"{n} {state}" for state, n in counts.items()) or "no deployments"


def _why(deployment: DeploymentResults) -> str:
    if deployment.state is DeploymentState.SUCCEEDED:
        return ""
    reason = f" ({deployment.reason.value})" if deployment.reason else ""
    head = f"{clean(deployment.name)}: {deployment.state.value}{reason} {one_line(deployment.message, 300)}".rstrip()
    failed = [deployment[s] for s in deployment if deployment[s].status is StepState.FAILED]
    return "\n  ".join([head, *(repr(step) for step in itertools.islice(failed, 3))])


# --- events -----------------------------------------------------------------------------------------------------------


class RunEvents:
    """The events of a run: one ordered log, numbered from 1."""

    def __init__(self, source: Source, clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock = source, clock

    def send(self, name: str, data: Any = None) -> Event:
        """Send an event into the run; ``data`` is JSON of at most 64 KiB. Returns it with its number.

        Raises:
            DefinitionError: ``data`` is not JSON, or the name is reserved.
            EventTooLarge: ``data`` is over the limit.
            IllegalState: the run has ended.
        """
        try:
            length = len(json_of(data).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise DefinitionError(
                f"The data of event {name!r} is not JSON: {error}.", advice="Send numbers, text, lists and dicts."
            ) from error
        if length > MAX_EVENT_BYTES:
            raise EventTooLarge(f"The data of event {name!r} has {length} bytes; the limit is {MAX_EVENT_BYTES}.")
        return self._source.send(p.SendEvent(name=check_event_name(name), data=data, key=uuid.uuid4().hex))

    def stream(self, *, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """All events numbered above ``after``, then those to come, until the run has ended.

        It also ends when none came for ``timeout`` seconds.
        """
        quiet_since = self._clock()
        while True:
            left = LONG_POLL if timeout is None else timeout - (self._clock() - quiet_since)
            page = self._source.events(after, max(0.0, min(LONG_POLL, left)))
            after = page.cursor
            if page.events:
                yield from page.events
                quiet_since = self._clock()
            elif page.state.terminal or left <= 0:
                return

    def wait(
        self,
        name: str,
        *,
        count: int = 1,
        where: Callable[[Event], bool] | None = None,
        after: int = 0,
        timeout: float | None = None,
    ) -> list[Event]:
        """Wait for ``count`` events of that name (that ``where`` accepts), numbered above ``after``.

        Raises:
            WaitTimeout: fewer came within ``timeout`` seconds, or before the run ended.
        """
        deadline = None if timeout is None else self._clock() + timeout
        found: list[Event] = []
        others: dict[str, None] = {}
        while len(found) < count:
            left = LONG_POLL if deadline is None else deadline - self._clock()
            page = self._source.events(after, max(0.0, min(LONG_POLL, left)))
            after = page.cursor
            for event in page.events:
                if event.name == name and (where is None or where(event)):
                    found.append(event)
                else:
                    others.setdefault(event.name)
            if not page.events and (left <= 0 or page.state.terminal) and len(found) < count:
                raise _missed(name, count, found, list(others), page.state, timeout)
        return found[:count]

    def latest(self, name: str) -> Event | None:
        """The last event of that name so far."""
        last = None
        for event in self._so_far():
            if event.name == name:
                last = event
        return last

    def count(self, name: str) -> int:
        """How many events of that name there are so far."""
        return sum(event.name == name for event in self._so_far())

    def _so_far(self) -> Iterator[Event]:
        after = 0
        while True:
            page = self._source.events(after, 0.0)
            yield from page.events
            after = page.cursor
            if not page.events:
                return


def _missed(
    name: str, count: int, found: list[Event], others: list[str], state: ExperimentState, timeout: float | None
) -> WaitTimeout:
    when = f"before the run ended ({state.value})" if state.terminal else f"within {timeout:g} s"
    return WaitTimeout(
        f"{len(found)} of {count} events {name!r} came {when}; other events: {listed(others)}.",
        advice="Check the name, and run.logs() of what should send it.",
        details={"seen": len(found)},
    )
