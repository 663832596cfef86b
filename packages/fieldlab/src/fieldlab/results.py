"""What a run has to show: records of the control lane, folded into results by deployment, then step.

The same fold serves runs at a director and runs here. It is a function of the records alone: in whatever pages they
come, and read however often, they give the same results. A late record fills a gap and never changes what is settled.

Results are data. Printing them shows states and the one-line summaries that nodes wrote; values are decoded only when
they are asked for, and a pickle is opened only by ``.trust()``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common import protocol as p
from fieldlab_common.deployment import Graph
from fieldlab_common.drawing import Drawing, Standing, Svg, drawing_of
from fieldlab_common.errors import BadAnswer, ResultNotReady, StepFailed, UnknownNameError, UntrustedValue
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_common.wire import decode

from fieldlab.logs import Logs
from fieldlab.text import clean, closest, duration, html_table, instant, listed, one_line, table

__all__ = ["Attempt", "DeploymentResults", "Ledger", "Reader", "Results", "StepResult"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt of a step (or of one of its iterations), as the node recorded it. Times: seconds since the epoch."""

    attempt: int = 1
    iteration: int | None = None
    state: StepState = StepState.RUNNING
    reason: Reason | None = None
    message: str = ""
    error: str = ""
    started: float | None = None
    ended: float | None = None
    usage: p.Usage | None = None
    value: p.ValueRef | None = field(default=None, repr=False)


def _attempt(record: p.StepRecord) -> Attempt:
    return Attempt(
        attempt=record.attempt,
        iteration=record.iteration,
        state=record.state,
        reason=record.reason,
        message=record.message,
        error=record.error,
        started=record.started,
        ended=record.ended,
        usage=record.usage,
        value=record.value,
    )


# --- the fold ---------------------------------------------------------------------------------------------------------


@dataclass
class StepLedger:
    """What is known of one step."""

    running: bool = False
    settled: p.StepRecord | None = None
    late: bool = False
    attempt: int = 0
    started: float | None = None
    history: dict[tuple[int | None, int], Attempt] = field(default_factory=dict)
    iterations: dict[int, Attempt] = field(default_factory=dict)
    artifacts: dict[str, p.ArtifactRecord] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def add(self, record: p.StepRecord, late: bool) -> None:
        """Take in one record."""
        if self.settled is not None:
            return
        self.attempt = max(self.attempt, record.attempt)
        if self.started is None:
            self.started = record.started
        if record.settled:
            self.settled, self.late = record, late
            if record.iterations is None and record.state is not StepState.SKIPPED:
                self.history[None, record.attempt] = _attempt(record)
        elif record.state is StepState.RUNNING:
            self.running = True
        else:
            self.history[record.iteration, record.attempt] = _attempt(record)
            if record.iteration is not None:
                self.iterations[record.iteration] = _attempt(record)


@dataclass
class DeploymentLedger:
    """What is known of one deployment from its records."""

    steps: dict[str, StepLedger] = field(default_factory=dict)
    started: p.Started | None = None
    ended: p.Ended | None = None
    cancel: p.CancelRecord | None = None

    def step(self, name: str) -> StepLedger:
        """The ledger of a step; made when it is first heard of."""
        return self.steps.setdefault(name, StepLedger())


class Ledger:
    """The fold: give it every record once, in order; kinds that this version does not know are passed over."""

    def __init__(self) -> None:
        self.deployments: dict[str, DeploymentLedger] = {}

    def add(self, deployment: str, record: p.Record, *, late: bool = False) -> None:
        """Take in one record."""
        one = self.deployments.setdefault(deployment, DeploymentLedger())
        cls = p.RECORDS.get(record.kind)
        if cls is None:
            return
        body: Any = decode(cls, dict(record.body))
        if isinstance(body, p.StepRecord):
            one.step(body.step).add(body, late)
        elif isinstance(body, p.ArtifactRecord):
            if not body.value:
                one.step(body.step).artifacts[_artifact_key(body)] = body
        elif isinstance(body, p.ArtifactLost):
            one.step(body.step).lost[body.sha256 or body.name] = body.reason
        elif isinstance(body, p.Started):
            one.started = body
        elif isinstance(body, p.Ended) and one.ended is None:
            one.ended = body
        elif isinstance(body, p.CancelRecord):
            one.cancel = body


def _artifact_key(record: p.ArtifactRecord) -> str:
    return f"{record.iteration}/{record.attempt}/{record.name}"


# --- what is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """What results ask for when something beside the records is needed: blobs, graphs by digest, logs, artifacts."""

    blob: Callable[[str, int], bytes]
    graph: Callable[[str], Graph]
    logs: Callable[[str, str], Logs]
    artifacts: Callable[[str, str], list[Any]]


_UNSETTLED = {StepState.RUNNING: StepState.FAILED, StepState.WAITING: StepState.CANCELLED}


class StepResult:
    """How one step of one deployment stands, and what it gave."""

    def __init__(self, name: str, deployment: DeploymentResults, ledger: StepLedger) -> None:
        self.name = name
        self._deployment, self._ledger = deployment, ledger
        self._opened: dict[bool, Any] = {}

    @property
    def deployment(self) -> str:
        """The name of its deployment."""
        return self._deployment.name

    @property
    def status(self) -> StepState:
        """Its state. A step that was under way when its deployment ended without it counts as failed."""
        ledger = self._ledger
        if ledger.settled is not None:
            return ledger.settled.state
        state = StepState.RUNNING if ledger.running else StepState.WAITING
        return _UNSETTLED[state] if self._deployment.state.terminal else state

    @property
    def reason(self) -> Reason | None:
        """Why it ended as it did, for programs; None while it has not."""
        if self._ledger.settled is not None:
            return self._ledger.settled.reason
        return self._deployment.reason if self.status.terminal else None

    @property
    def message(self) -> str:
        """Why it ended as it did, in a sentence (text from the node: ``str()`` of results makes it harmless)."""
        if self._ledger.settled is not None:
            return self._ledger.settled.message
        return f"Its deployment ended without it. {self._deployment.message}".strip() if self.status.terminal else ""

    @property
    def error(self) -> str:
        """The traceback of its last failed attempt, as text; empty if it did not fail."""
        if self._ledger.settled is not None:
            return self._ledger.settled.error
        failed = [one.error for one in self._ledger.history.values() if one.error]
        return failed[-1] if failed else ""

    @property
    def attempts(self) -> int:
        """How many attempts were made; 0 if it never ran."""
        return self._ledger.attempt if self._ledger.running or self._ledger.history else 0

    @property
    def history(self) -> tuple[Attempt, ...]:
        """Every attempt that ended, in the order in which they did; of an iterated step, those of all iterations."""
        return tuple(self._ledger.history.values())

    @property
    def started(self) -> float | None:
        """When its first attempt started: seconds since the epoch, by the node's clock."""
        return self._ledger.started

    @property
    def ended(self) -> float | None:
        """When it ended, likewise."""
        return self._ledger.settled.ended if self._ledger.settled is not None else None

    @property
    def usage(self) -> p.Usage | None:
        """CPU time, peak memory, exit code or signal of the last attempt."""
        return self._ledger.settled.usage if self._ledger.settled is not None else None

    @property
    def late(self) -> bool:
        """Whether its result came after its deployment had been given up."""
        return self._ledger.late

    @property
    def iterated(self) -> bool:
        """Whether it is a repeated or mapped step: its value is a list."""
        settled = self._ledger.settled
        return bool(self._ledger.iterations) or (settled is not None and settled.iterations is not None)

    @property
    def summary(self) -> str:
        """What its value is, in one line, without opening it."""
        settled = self._ledger.settled
        if self.iterated:
            return f"{len(self._ledger.iterations)} iterations"
        return settled.value.summary if settled is not None and settled.value is not None else ""

    @property
    def value(self) -> Any:
        """What it returned; of a repeated or mapped step, the list of what its iterations returned.

        Raises:
            ResultNotReady: it has not ended.
            StepFailed: it failed, was skipped or was cancelled.
            UntrustedValue: it travelled as a pickle; see ``trust``.
        """
        return self._open(trust=False)

    def trust(self) -> Any:
        """The value, opened also if it is a pickle. Opening a pickle can run any code: ask who ran the node."""
        return self._open(trust=True)

    @property
    def logs(self) -> Logs:
        """Its output so far."""
        return self._deployment.reader.logs(self.deployment, self.name)

    @property
    def artifacts(self) -> list[Any]:
        """The files it produced, as far as they were announced (``fieldlab.artifacts.ArtifactFile``)."""
        return self._deployment.reader.artifacts(self.deployment, self.name)

    def _open(self, *, trust: bool) -> Any:
        if trust not in self._opened:
            self._require_success()
            settled = self._ledger.settled
            if self.iterated:
                done = [self._ledger.iterations[i] for i in sorted(self._ledger.iterations)]
                self._opened[trust] = [self._open_one(one.value, trust) for one in done]
            else:
                self._opened[trust] = self._open_one(settled.value if settled else None, trust)
        return self._opened[trust]

    def _require_success(self) -> None:
        status = self.status
        where = f"Step {self.name!r} of {clean(self.deployment)!r}"
        if not status.terminal:
            raise ResultNotReady(f"{where} is {status.value}: it has no value yet.", advice="Wait for it: run.wait().")
        if status is not StepState.SUCCEEDED:
            why = f" ({self.reason.value})" if self.reason is not None else ""
            text = clean(self.error or self.message, lines=True).strip()
            raise StepFailed(
                f"{where} {_ENDED[status]}{why}, so it has no value." + (f"\n{text}\n" if text else ""),
                advice="See its .error, .message and .logs.",
                details={"status": status.value, "reason": self.reason.value if self.reason else None},
            )

    def _open_one(self, ref: p.ValueRef | None, trust: bool) -> Any:
        if ref is None:
            return None
        try:
            return open_value(ref, self._deployment.reader.blob, trust=trust)
        except UntrustedValue as error:
            error.message = f"The value of step {self.name!r} of {clean(self.deployment)!r}: {error.message}"
            raise

    def __repr__(self) -> str:
        words = [f"<{one_line(self.deployment)}/{one_line(self.name)}: {self.status.value}"]
        if self.reason is not None and self.status is not StepState.SUCCEEDED:
            words.append(f"({self.reason.value})")
        told = self.summary if self.status is StepState.SUCCEEDED else self.message
        return " ".join(words) + (f", {one_line(told, 100)}>" if told else ">")


_ENDED = {
    StepState.FAILED: "failed",
    StepState.SKIPPED: "was skipped",
    StepState.CANCELLED: "was cancelled",
    StepState.SUCCEEDED: "succeeded",
}


def open_value(ref: p.ValueRef, blob: Callable[[str, int], bytes], *, trust: bool = False) -> Any:
    """The value that ``ref`` refers to. ``blob`` gives the bytes of a digest and size, verified.

    Raises:
        UntrustedValue: it is a pickle and ``trust`` is false; nothing is fetched then.
        BadAnswer: the bytes are not what a value looks like.
    """
    from fieldlab_common import payload

    if ref.format == "pickle":
        if not trust:
            return payload.decode_value("pickle")
        data = blob(ref.sha256, ref.size) if ref.sha256 else base64.b64decode(ref.data)
        return payload.decode_value("pickle", data=data, trust=True)
    document = ref.json
    if ref.sha256:
        try:
            document = json.loads(blob(ref.sha256, ref.size))
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"The value with SHA-256 {ref.sha256[:12]}… is not the JSON it should be.") from error
    return payload.decode_value(ref.format, document)


class _Named(Mapping[str, Any]):
    """A mapping by name whose errors suggest the closest one."""

    _what = "entry"

    def _unknown(self, name: object) -> UnknownNameError:
        known = list(self)
        return UnknownNameError(
            f"There is no {self._what} {clean(name)!r}.{closest(str(name), known)}",
            advice=f"There are: {listed(known)}.",
        )


class DeploymentResults(_Named):
    """The results of one deployment, by step, in the order of its DAG."""

    _what = "step"

    def __init__(
        self, info: p.DeploymentInfo, ledger: DeploymentLedger, steps: tuple[str, ...], reader: Reader
    ) -> None:
        self.info, self.reader = info, reader
        self._ledger = ledger
        self._steps = dict.fromkeys((*steps, *ledger.steps))
        self._made: dict[str, StepResult] = {}

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.info.name

    @property
    def state(self) -> DeploymentState:
        """How the deployment stands."""
        return self.info.state

    @property
    def reason(self) -> Reason | None:
        """Why it ended as it did, for programs."""
        return self.info.reason

    @property
    def message(self) -> str:
        """Why it ended as it did, in a sentence."""
        return self.info.message

    @property
    def cost(self) -> p.Ended | None:
        """How it ended by its executor's own account: bytes and requests of control, CPU time; None until then."""
        return self._ledger.ended

    @property
    def cancel(self) -> p.CancelRecord | None:
        """What a cancel did there: processes ended, and those that could not be."""
        return self._ledger.cancel

    def __getitem__(self, name: str) -> StepResult:
        if name not in self._steps:
            raise self._unknown(name)
        if name not in self._made:
            self._made[name] = StepResult(name, self, self._ledger.step(name))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def to_svg(self) -> Svg:
        """A picture of its graph as an SVG document: how each step stands, and how long it took.

        Raises:
            ResultNotReady: it has no graph, because it was never resolved.
            UnsupportedError: it is too large for a picture that somebody could read.
        """
        return self._drawing().to_svg()

    def to_mermaid(self) -> str:
        """The same as a Mermaid flowchart, for Markdown."""
        return self._drawing().to_mermaid()

    def to_dot(self) -> str:
        """The same in the DOT language, for Graphviz."""
        return self._drawing().to_dot()

    def _drawing(self) -> Drawing:
        if not self.info.graph:
            raise ResultNotReady(f"Deployment {clean(self.name)!r} has no graph to draw.")
        return drawing_of(self.reader.graph(self.info.graph), {name: _standing(self[name]) for name in self})

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each step, or for each iteration of an iterated one: for pandas."""
        return [row for name in self for row in _rows(self[name], self.info)]

    def _table(self) -> list[list[object]]:
        return [_shown(self[name]) for name in self]

    def __repr__(self) -> str:
        why = f" ({self.reason.value})" if self.reason is not None else ""
        head = f"{one_line(self.name)} on {one_line(self.info.node)}: {self.state.value}{why}"
        if self.message and self.state is not DeploymentState.SUCCEEDED:
            head += f": {one_line(self.message, 200)}"
        return head + "\n" + table(_HEADER, self._table())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._table(), caption=f"{self.name}: {self.state.value}")


_HEADER = ("step", "status", "reason", "started", "took", "attempts", "value")


def _standing(step: StepResult) -> Standing:
    why = step.reason.value if step.reason is not None and step.status is not StepState.SUCCEEDED else ""
    return Standing(state=step.status, note=" · ".join(part for part in (why, duration(_took(step))) if part))


def _took(one: StepResult | Attempt) -> float | None:
    return one.ended - one.started if one.ended is not None and one.started is not None else None


def _shown(step: StepResult) -> list[object]:
    told = step.summary if step.status is StepState.SUCCEEDED else step.message
    reason = step.reason.value if step.reason is not None else ""
    attempts = step.attempts or ""
    return [step.name, step.status.value, reason, instant(step.started), duration(_took(step)), attempts, told]


def _rows(step: StepResult, info: p.DeploymentInfo) -> Iterator[dict[str, Any]]:
    base = {"deployment": step.deployment, "node": info.node, "role": info.role, "step": step.name}
    if step.iterated:
        for number, one in sorted(step._ledger.iterations.items()):
            yield {**base, "iteration": number, **_row(step, one)}
        return
    last = Attempt(
        attempt=step.attempts,
        state=step.status,
        reason=step.reason,
        message=step.message,
        error=step.error,
        started=step.started,
        ended=step.ended,
        usage=step.usage,
        value=step._ledger.settled.value if step._ledger.settled else None,
    )
    yield {**base, "iteration": None, **_row(step, last)}


def _row(step: StepResult, one: Attempt) -> dict[str, Any]:
    try:
        value = step._open_one(one.value, False) if one.state is StepState.SUCCEEDED else None
    except UntrustedValue:
        value = None  # the row still says what it is, in "summary"
    return {
        "status": one.state.value,
        "reason": one.reason.value if one.reason is not None else None,
        "value": value,
        "summary": one.value.summary if one.value is not None else "",
        "attempts": one.attempt,
        "started": one.started,
        "ended": one.ended,
        "seconds": _took(one),
        "cpu": one.usage.cpu if one.usage is not None else None,
        "peak_memory": one.usage.peak_memory if one.usage is not None else None,
        "message": one.message,
        "error": one.error,
    }


class Results(_Named):
    """The results of a run, by deployment."""

    _what = "deployment"

    def __init__(
        self,
        info: p.ExperimentInfo,
        ledger: Ledger,
        steps: Callable[[p.DeploymentInfo], tuple[str, ...]],
        reader: Reader,
    ) -> None:
        self.info = info
        self._infos = {d.name: d for d in info.deployments}
        self._ledger, self._steps, self._reader = ledger, steps, reader
        self._made: dict[str, DeploymentResults] = {}

    def __getitem__(self, name: str) -> DeploymentResults:
        info = self._infos.get(name)
        if info is None:
            raise self._unknown(name)
        if name not in self._made:
            ledger = self._ledger.deployments.setdefault(name, DeploymentLedger())
            self._made[name] = DeploymentResults(info, ledger, self._steps(info), self._reader)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each step (each iteration of an iterated one) of each deployment: for pandas."""
        return [row for name in self for row in self[name].rows()]

    def _table(self) -> list[list[object]]:
        return [[name, *_shown(self[name][step])] for name in self for step in self[name]]

    def __repr__(self) -> str:
        head = f"{one_line(self.info.name)}: {self.info.state.value}"
        return head + "\n" + table(("deployment", *_HEADER), self._table())

    def _repr_html_(self) -> str:
        caption = f"{self.info.name}: {self.info.state.value}"
        return html_table(("deployment", *_HEADER), self._table(), caption=caption)
