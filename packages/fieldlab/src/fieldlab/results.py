"""What a run has to show: results by deployment, then step, of what its records were folded into (``ledger``).

A step that is a DAG has the results of the steps inside of it: ``results["outer"]["inner"]``, and of one that is
repeated or mapped, by iteration: ``results["outer"][3]["inner"]``.

Results are data. Printing them shows states and the one-line summaries that nodes wrote; values are decoded only when
they are asked for, and a pickle is opened only by ``.trust()``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, overload

from fieldlab_common import paths
from fieldlab_common import protocol as p
from fieldlab_common.deployment import Graph
from fieldlab_common.drawing import Drawing, Standing, drawing_of
from fieldlab_common.errors import BadAnswer, ResultNotReady, StepFailed, UnknownNameError, UntrustedValue
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState

from fieldlab.ledger import Attempt, DeploymentLedger, Ledger, StepLedger
from fieldlab.logs import Logs
from fieldlab.rows import rows_of, took
from fieldlab.text import clean, duration, html_table, instant, one_line, table
from fieldlab.values import open_value
from fieldlab.views import Drawn, Named

__all__ = ["DeploymentResults", "InnerResults", "Reader", "Results", "StepResult"]


# --- what is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """What results ask for when something beside the records is needed: blobs, graphs by digest, logs, artifacts."""

    blob: Callable[[str, int], bytes | bytearray]
    graph: Callable[[str], Graph]
    logs: Callable[[str, str], Logs]
    artifacts: Callable[[str, str], list[Any]]


_UNSETTLED = {StepState.RUNNING: StepState.FAILED, StepState.WAITING: StepState.CANCELLED}


class StepResult:
    """How one step of one deployment stands, and what it gave."""

    def __init__(self, name: str, deployment: DeploymentResults, ledger: StepLedger) -> None:
        self.name = name
        self._deployment, self.ledger = deployment, ledger  # the ledger is what the records say of it
        self._opened: dict[bool, Any] = {}

    @property
    def deployment(self) -> str:
        """The name of its deployment."""
        return self._deployment.name

    @property
    def status(self) -> StepState:
        """Its state. A step that was under way when its deployment ended without it counts as failed."""
        ledger = self.ledger
        if ledger.settled is not None:
            return ledger.settled.state
        state = StepState.RUNNING if ledger.running else StepState.WAITING
        around = self._around
        if around is not None and around.status is StepState.SKIPPED:
            return StepState.SKIPPED
        ended = self._deployment.state.terminal or (around is not None and around.status.terminal)
        return _UNSETTLED[state] if ended else state

    @property
    def _around(self) -> StepResult | None:
        """The step that is the DAG it is in."""
        parts = paths.parts_of(paths.split(self.name)[0])
        if not parts:
            return None
        scope = paths.split(paths.split(self.name)[0])[0]
        return self._deployment[paths.join(scope, parts[-1][0])]

    # --- a step that is a DAG ---

    @property
    def nested(self) -> bool:
        """Whether it is a DAG: there are steps inside of it."""
        return self._deployment.has_inside(self.name)

    @property
    def steps(self) -> InnerResults:
        """Of a step that is a DAG, and is neither repeated nor mapped: the steps inside, in its last attempt.

        Raises:
            UnknownNameError: it is no DAG, or it is repeated or mapped: then take them of an iteration, ``step[3]``.
        """
        runs = self._runs()
        if any(iteration is not None for iteration in runs) or self.iterated:
            raise UnknownNameError(
                f"Step {self.name!r} ran {len(runs)} times, and each has steps of its own.",
                advice=f"Say which: [{self.name!r}][0], or all of them: .iterations.",
            )
        return self._deployment.inner(paths.inside(self.name, None, runs.get(None, 1)))

    @property
    def iterations(self) -> list[InnerResults]:
        """Of a step that is a DAG, and is repeated or mapped: the steps inside, of each iteration that began."""
        return [self[iteration] for iteration in sorted(i for i in self._runs() if i is not None)]

    @overload
    def __getitem__(self, key: str) -> StepResult: ...
    @overload
    def __getitem__(self, key: int) -> InnerResults: ...
    def __getitem__(self, key: str | int) -> StepResult | InnerResults:
        """Of a step that is a DAG: a step inside of it, by name; or the steps of an iteration of it, by number.

        Raises:
            UnknownNameError: there is none.
        """
        if isinstance(key, str):
            return self.steps[key]
        runs = self._runs()
        began = sorted(i for i in runs if i is not None)
        number = began[key] if key < 0 and -key <= len(began) else key
        if number not in runs:
            raise UnknownNameError(f"Step {self.name!r} has no iteration {key}; {len(began)} of it began.")
        return self._deployment.inner(paths.inside(self.name, number, runs[number]))

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"Step {self.name!r} cannot be iterated; see .value, .steps and .iterations.")

    def walk(self) -> Iterator[StepResult]:
        """It, and the steps inside of it, of every iteration that began; of each the last attempt."""
        yield self
        if self.nested:
            for iteration, attempt in sorted(self._runs().items(), key=lambda run: -1 if run[0] is None else run[0]):
                for step in self._deployment.inner(paths.inside(self.name, iteration, attempt)).values():
                    yield from step.walk()

    def _runs(self) -> dict[int | None, int]:
        if not self.nested:
            raise UnknownNameError(f"Step {self.name!r} is no DAG: there are no steps inside of it.")
        return self._deployment.runs(self.name)

    @property
    def reason(self) -> Reason | None:
        """Why it ended as it did, for programs; None while it has not."""
        if self.ledger.settled is not None:
            return self.ledger.settled.reason
        return self._deployment.reason if self.status.terminal else None

    @property
    def message(self) -> str:
        """Why it ended as it did, in a sentence (text from the node: ``str()`` of results makes it harmless)."""
        if self.ledger.settled is not None:
            return self.ledger.settled.message
        return f"Its deployment ended without it. {self._deployment.message}".strip() if self.status.terminal else ""

    @property
    def error(self) -> str:
        """The traceback of its last failed attempt, as text; empty if it did not fail."""
        if self.ledger.settled is not None:
            return self.ledger.settled.error
        failed = [one.error for one in self.ledger.history.values() if one.error]
        return failed[-1] if failed else ""

    @property
    def attempts(self) -> int:
        """How many attempts were made; 0 if it never ran."""
        return self.ledger.attempt if self.ledger.running or self.ledger.history else 0

    @property
    def history(self) -> tuple[Attempt, ...]:
        """Every attempt that ended, in the order in which they did; of an iterated step, those of all iterations."""
        return tuple(self.ledger.history.values())

    @property
    def started(self) -> float | None:
        """When its first attempt started: seconds since the epoch, by the node's clock."""
        return self.ledger.started

    @property
    def ended(self) -> float | None:
        """When it ended, likewise."""
        return self.ledger.settled.ended if self.ledger.settled is not None else None

    @property
    def usage(self) -> p.Usage | None:
        """CPU time, peak memory, exit code or signal of the last attempt."""
        return self.ledger.settled.usage if self.ledger.settled is not None else None

    @property
    def late(self) -> bool:
        """Whether its result came after its deployment had been given up."""
        return self.ledger.late

    @property
    def iterated(self) -> bool:
        """Whether it is a repeated or mapped step: its value is a list."""
        settled = self.ledger.settled
        return bool(self.ledger.iterations) or (settled is not None and settled.iterations is not None)

    @property
    def summary(self) -> str:
        """What its value is, in one line, without opening it."""
        settled = self.ledger.settled
        if self.iterated:
            return f"{len(self.ledger.iterations)} iterations"
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
            settled = self.ledger.settled
            if self.iterated:
                done = [self.ledger.iterations[i] for i in sorted(self.ledger.iterations)]
                self._opened[trust] = [self.open_one(one.value, trust) for one in done]
            else:
                self._opened[trust] = self.open_one(settled.value if settled else None, trust)
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

    def open_one(self, ref: p.ValueRef | None, trust: bool) -> Any:
        """The value that ``ref``, of one of its attempts, refers to."""
        if ref is None:
            return None
        if ref.format == "step":
            return self._inner_value(ref.json, trust)
        if ref.format == "steps":
            named = ref.json if isinstance(ref.json, dict) else {}
            return {name: None if path is None else self._inner_value(path, trust) for name, path in named.items()}
        try:
            return open_value(ref, self._deployment.reader.blob, trust=trust)
        except UntrustedValue as error:
            error.message = f"The value of step {self.name!r} of {clean(self.deployment)!r}: {error.message}"
            raise

    def _inner_value(self, path: object, trust: bool) -> Any:
        if isinstance(path, str) and len(path) > len(self.name) and paths.below(path, self.name):
            with contextlib.suppress(UnknownNameError):
                return self._deployment[path]._open(trust=trust)
        raise BadAnswer(f"Step {self.name!r} is said to have the value of {path!r:.100}, which is not inside of it.")

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


class DeploymentResults(Named, Drawn):
    """The results of one deployment, by step, in the order of its DAG."""

    _what = "step"

    def __init__(
        self, info: p.DeploymentInfo, ledger: DeploymentLedger, steps: tuple[str, ...], reader: Reader
    ) -> None:
        self.info, self.reader = info, reader
        self._ledger = ledger
        self._names: dict[str, dict[str, None]] = {"": {}}  # of the steps, by the plain path of the scope they are in
        for path in (*steps, *map(paths.plain, list(ledger.steps))):
            scope, name = paths.split(path)
            self._names.setdefault(scope, {})[name] = None
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
        """A step, by name; one inside of a DAG also by path: ``results["outer[3]/inner"]``."""
        if name not in self._made:
            scope, bare = paths.split(name)
            if bare not in self._names.get(paths.plain(scope), {}) or paths.parts_of(name) is None:
                raise self._unknown(name)
            ledger = self._ledger.steps.get(name)
            if ledger is None:  # of one that may never be, nothing is kept
                return StepResult(name, self, StepLedger())
            self._made[name] = StepResult(name, self, ledger)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names[""])

    def __len__(self) -> int:
        return len(self._names[""])

    def walk(self) -> Iterator[StepResult]:
        """Every step, those inside of steps that are DAGs after them, of every iteration that began."""
        for name in self:
            yield from self[name].walk()

    @property
    def running(self) -> tuple[str, ...]:
        """The paths of the steps that run now; of one that is a DAG, those inside of it that do."""
        found = tuple(self._ledger.running)
        outer = {scope for path in found for scope in _enclosing(path)}
        return tuple(path for path in found if path not in outer)

    def inner(self, scope: str) -> InnerResults:
        """The steps of one run of a DAG that is a step."""
        return InnerResults(self, scope, tuple(self._names[paths.plain(scope)]))

    def has_inside(self, path: str) -> bool:
        """Whether the step is a DAG."""
        return paths.plain(path) in self._names

    def runs(self, path: str) -> dict[int | None, int]:
        """Of a step that is a DAG: which iterations began (None: it is not iterated), and the last attempt of each."""
        return self._ledger.runs.get(path, {})

    def _drawing(self) -> Drawing:
        standings = {paths.plain(one.name): _standing(one) for one in self._plainly()}
        return drawing_of(self.graph(""), standings)

    def graph(self, path: str) -> Graph:
        """Its graph, or that of the step at the plain path ``path``, which is a DAG.

        Raises:
            ResultNotReady: it has no graph, because it was never resolved.
        """
        if not self.info.graph:
            raise ResultNotReady(f"Deployment {clean(self.name)!r} has no graph to draw.")
        whole = self.reader.graph(self.info.graph)
        found = dict(whole.walk())[path].graph if path else whole
        assert found is not None
        return found

    def _plainly(self) -> Iterator[StepResult]:
        """The steps, with those inside of steps that are DAGs and ran but once."""
        return (one for one in self.walk() if "[" not in one.name)

    def rows(self, *, values: bool = True) -> list[dict[str, Any]]:
        """A flat row for each attempt of each step and iteration, also inside of DAGs: for pandas.

        ``last`` tells the attempt that counts; a step that did not run has one row, with ``attempt`` 0. ``value`` is
        None where it is a pickle, or cannot be had; with ``values=False`` none is opened, and so none is fetched.
        """
        return [row for one in self.walk() for row in rows_of(one, self.info, values)]

    def _table(self) -> list[list[object]]:
        return [_shown(one) for one in self._plainly()]

    def __repr__(self) -> str:
        why = f" ({self.reason.value})" if self.reason is not None else ""
        head = f"{one_line(self.name)} on {one_line(self.info.node)}: {self.state.value}{why}"
        if self.message and self.state is not DeploymentState.SUCCEEDED:
            head += f": {one_line(self.message, 200)}"
        return head + "\n" + table(_HEADER, self._table())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._table(), caption=f"{self.name}: {self.state.value}")


def _enclosing(path: str) -> Iterator[str]:
    """The paths of the steps that are the DAGs around a step."""
    parts = paths.parts_of(paths.split(path)[0]) or ()
    scope = ""
    for name, iteration, attempt in parts:
        outer = paths.join(scope, name)
        yield outer
        scope = paths.inside(outer, iteration, attempt)


class InnerResults(Named, Drawn):
    """The steps inside of a step that is a DAG, of one iteration and attempt of it."""

    _what = "step"

    def __init__(self, deployment: DeploymentResults, scope: str, names: tuple[str, ...]) -> None:
        self.scope = scope
        self._deployment, self._names = deployment, names

    def __getitem__(self, name: str) -> StepResult:
        if paths.plain(name).partition(paths.SEPARATOR)[0] not in self._names:
            raise self._unknown(name)
        return self._deployment[paths.join(self.scope, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _drawing(self) -> Drawing:
        return drawing_of(
            self._deployment.graph(paths.plain(self.scope)), {name: _standing(self[name]) for name in self}
        )

    def __repr__(self) -> str:
        return table(_HEADER, [_shown(step) for step in self.values()])

    def _repr_html_(self) -> str:
        return html_table(_HEADER, [_shown(step) for step in self.values()], caption=self.scope)


_HEADER = ("step", "status", "reason", "started", "took", "attempts", "value")


def _standing(step: StepResult) -> Standing:
    why = step.reason.value if step.reason is not None and step.status is not StepState.SUCCEEDED else ""
    return Standing(state=step.status, note=" · ".join(part for part in (why, duration(took(step))) if part))


def _shown(step: StepResult) -> list[object]:
    told = step.summary if step.status is StepState.SUCCEEDED else step.message
    reason = step.reason.value if step.reason is not None else ""
    attempts = step.attempts or ""
    return [step.name, step.status.value, reason, instant(step.started), duration(took(step)), attempts, told]


class Results(Named):
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

    def rows(self, *, values: bool = True) -> list[dict[str, Any]]:
        """A flat row for each attempt of each deployment, step and iteration: see ``DeploymentResults.rows``."""
        return [row for name in self for row in self[name].rows(values=values)]

    def _table(self) -> list[list[object]]:
        return [[name, *_shown(step)] for name in self for step in self[name]._plainly()]

    def __repr__(self) -> str:
        head = f"{one_line(self.info.name)}: {self.info.state.value}"
        return head + "\n" + table(("deployment", *_HEADER), self._table())

    def _repr_html_(self) -> str:
        caption = f"{self.info.name}: {self.info.state.value}"
        return html_table(("deployment", *_HEADER), self._table(), caption=caption)
