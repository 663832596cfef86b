"""The handle on a run: wait for it, watch it, read what it gives, talk to it, stop it.

A run is read by cursor: each reader keeps its own place and asks for what comes after it, held by the source until
there is something (a long-poll). So nothing is missed or read twice, whatever happens to the connection or to the
director in between; while the director does not answer, readers keep asking for ``source.PATIENCE`` seconds.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TextIO, overload

from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.deployment import Graph
from fieldlab_common.errors import RunFailed, UnknownNameError, WaitTimeout
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState
from fieldlab_common.node import Node
from fieldlab_common.protocol import Lane

from fieldlab import artifacts as _artifacts
from fieldlab.events import RunEvents
from fieldlab.forks import made_anew
from fieldlab.ledger import Ledger
from fieldlab.logs import Assembler, LogFilter, LogLine, Logs, Since, assemble, moment
from fieldlab.results import DeploymentResults, Reader, Results
from fieldlab.source import LONG_POLL, Source
from fieldlab.standing import standing
from fieldlab.text import clean, closest, counted, html_table, instant, listed, one_line, table
from fieldlab.timeline import Timeline, timeline_of

__all__ = ["Deployments", "Run"]

SETTLING = 0.25  # seconds between looks when all deployments have ended and the run is about to
DRAINING = 5.0  # seconds for which logs of a run that has ended are waited for, since the last that came
FEED_PAGES = 5  # pages of logs that a watcher takes at once, so that it comes to see the states in between


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
    """An experiment that was submitted, or that runs here. It may be used from several threads."""

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
        self.after_fork()
        made_anew(self)

    def after_fork(self) -> None:
        """Begin with a lock that nobody holds."""
        self._lock = threading.Lock()

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

    def cancel(
        self, reason: str = "", deployments: Sequence[str] = (), *, nodes: str | Node | Iterable[str | Node] = ()
    ) -> Run:
        """Ask for it to be stopped, or only some deployments of it: those named, or those on ``nodes``.

        The run, or what was named of it (all of it is the run), ends as ``cancelled``, whatever its tasks do; what was
        recorded is kept, and ``wait`` waits for the end. Returns the run.

        Raises:
            NotFound: it has no such deployment.
            UnknownNameError: none of its deployments is on such a node.
        """
        wanted = [deployments] if isinstance(deployments, str) else list(deployments)
        there = [nodes] if isinstance(nodes, str | Node) else list(nodes)
        if there:
            wanted += self._on_nodes([one.name if isinstance(one, Node) else one for one in there])
        whole = bool(wanted) and {one.name for one in self._info.deployments} == set(wanted)
        self._info = self._source.cancel(reason, [] if whole else list(dict.fromkeys(wanted)))
        return self

    def _on_nodes(self, nodes: Sequence[str]) -> list[str]:
        """The names of its deployments on those nodes."""
        by_node: dict[str, list[str]] = {}
        for one in self._info.deployments or self.info.deployments:
            by_node.setdefault(one.node, []).append(one.name)
        for name in nodes:
            if name not in by_node:
                raise UnknownNameError(
                    f"Run {self.name!r} has nothing on a node {clean(name)!r}.{closest(name, by_node)}",
                    advice=f"Its nodes are: {listed(by_node)}.",
                )
        return [deployment for name in nodes for deployment in by_node[name]]

    def rerun(self, *, start: bool = True) -> Run:
        """Run it once more, as ``name#2`` and so on; returns the new run.

        Its deployments, their code and settings are as they were, and nothing is sent again; ``start_at`` is left out,
        for it is past. ``start=False`` prepares it only: see ``start``.

        Raises:
            NotFound: one of its nodes, or a secret that it takes, is not there any more.
            UnsupportedError: it is a run here.
        """
        source, info = self._source.rerun(start)
        return Run(source, info, steps=self._steps)

    def delete(self, *, force: bool = False) -> None:
        """Let it go with all that it gave: records, events, artifacts. Its name can be used again at once.

        ``force`` cancels it first if it has not ended. What it has on nodes is cleaned up all the same.

        Raises:
            IllegalState: it has not ended, and ``force`` is false.
        """
        self._source.delete(force)

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
                    f"Run {self.name!r} did not end within {timeout:g} s; it is {info.state.value}: {standing(info)}.",
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

        return watch(self, self.log_feed() if logs else None, file=file)

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
        node: str | None = ...,
        step: str | None = ...,
        stream: str | None = ...,
        since: Since | None = ...,
    ) -> Logs: ...

    @overload
    def logs(
        self,
        *,
        follow: Literal[True],
        deployment: str | None = ...,
        node: str | None = ...,
        step: str | None = ...,
        stream: str | None = ...,
        since: Since | None = ...,
    ) -> Iterator[LogLine]: ...

    @overload
    def logs(
        self,
        *,
        follow: bool,
        deployment: str | None = ...,
        node: str | None = ...,
        step: str | None = ...,
        stream: str | None = ...,
        since: Since | None = ...,
    ) -> Iterator[LogLine] | Logs: ...

    def logs(
        self,
        *,
        follow: bool = False,
        deployment: str | None = None,
        node: str | None = None,
        step: str | None = None,
        stream: str | None = None,
        since: Since | None = None,
    ) -> Iterator[LogLine] | Logs:
        """Its output so far (``Logs``), or with ``follow`` an iterator that goes on until the run has ended.

        Of a run that has ended it is all, but for what comes later than a few seconds after the last. Both are read
        page by page: of a million lines, few are in memory.

        ``node``: of the deployments there; ``stream``: ``stdout``, ``stderr``, ``log`` or ``executor``; ``since``: a
        time (seconds since the epoch, or a datetime with its zone), or how long ago (``"10m"``, or a timedelta), by
        the nodes' clocks.

        Raises:
            UnknownNameError: it has no such deployment, or nothing on that node.
            DefinitionError: there is no such stream.
        """
        wanted = LogFilter(deployments=self._named(deployment, node), step=step, stream=stream, since=moment(since))
        (only,) = wanted.deployments if wanted.deployments and len(wanted.deployments) == 1 else ("",)

        def lines() -> Iterator[LogLine]:
            return (line for line in assemble(self._log_records(follow, only)) if wanted.takes(line))

        return lines() if follow else Logs(lines)

    def _named(self, deployment: str | None, node: str | None) -> frozenset[str] | None:
        names = None if node is None else frozenset(self._on_nodes([node]))
        if deployment is None:
            return names
        known = [one.name for one in self._info.deployments or self.info.deployments]
        if deployment not in known:
            raise UnknownNameError(
                f"Run {self.name!r} has no deployment {clean(deployment)!r}.{closest(deployment, known)}",
                advice=f"There are: {listed(known)}.",
            )
        return frozenset({deployment}) if names is None else names & {deployment}

    def timeline(self) -> Timeline:
        """Every change of state so far: of the run, its deployments and steps, with attempts and iterations.

        A table in a terminal, a picture in a notebook, ``.rows()`` for pandas. Steps' times are by the nodes' clocks.
        """
        info = self.results.info
        return timeline_of(info, self._ledger, self.events.so_far())

    def close(self) -> None:
        """Let go of what it holds open: for a run here, its folder with the artifacts."""
        self._source.close()

    # --- reading ---

    def _read_page(self, wait: float) -> bool:
        cursor = self._cursor
        page = self._source.records(Lane.CONTROL, cursor, wait)
        with self._lock:  # one thread may wait for a page while another takes in the same
            if self._cursor == cursor:
                for entry in page.records:
                    self._ledger.add(entry.deployment, entry.record, late=entry.late)
                self._cursor = page.cursor
        return bool(page.records)

    def _log_records(self, follow: bool, deployment: str) -> Iterator[p.RecordEntry]:
        cursor, quiet_since = 0, self._clock()
        ended = False
        while True:
            wait = 1.0 if ended else (LONG_POLL if follow else 0.0)
            page = self._source.records(Lane.BULK, cursor, wait, deployment)
            yield from page.records
            cursor = page.cursor
            if page.records:
                quiet_since = self._clock()
                continue
            ended = page.state.terminal  # then what is still on its way is waited for, for a while
            if not (ended or follow) or (ended and (self._drained() or self._clock() - quiet_since > DRAINING)):
                return

    def log_feed(self) -> Callable[[bool], Iterator[LogLine]]:
        """A function that gives the log lines since it was last called, without waiting.

        Given true, all of them, and what was never ended by a line break; else a few pages at most.
        """
        assembler, cursor = Assembler(), 0

        def read(whole: bool) -> Iterator[LogLine]:
            nonlocal cursor
            for _ in itertools.count() if whole else range(FEED_PAGES):
                page = self._source.records(Lane.BULK, cursor, 0.0)
                cursor = page.cursor
                for entry in page.records:
                    yield from assembler.add(entry)
                if not page.records:
                    break
            if whole:
                yield from assembler.rest()

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


def _why(deployment: DeploymentResults) -> str:
    if deployment.state is DeploymentState.SUCCEEDED:
        return ""
    reason = f" ({deployment.reason.value})" if deployment.reason else ""
    head = f"{clean(deployment.name)}: {deployment.state.value}{reason} {one_line(deployment.message, 300)}".rstrip()
    failed = [deployment[s] for s in deployment if deployment[s].status is StepState.FAILED]
    return "\n  ".join([head, *(repr(step) for step in itertools.islice(failed, 3))])
