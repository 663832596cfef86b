"""What travels to a node: a DAG with everything chosen, and the deployment around it.

A ``Graph`` is what ``resolve`` makes of a DAG for one kind of node; its JSON is a blob like any other, named by its
SHA-256, so that a hundred nodes that resolve alike share one. It holds no code and no large value: those are blobs it
names.
The executor's machine reads it; the director stores it unread.

Invariants, checked once where a graph is made (``dag`` and ``resolve``) and relied on afterwards: step names are
unique; every name that an edge mentions is a step of the graph; edges form no circle; steps stand in an order in
which everything a step needs stands before it. A step that is a DAG itself has that graph in ``StepSpec.graph``, for
which the same holds, at most ``MAX_DEPTH`` deep.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fieldlab_common import paths
from fieldlab_common.environment import Environment, Resources
from fieldlab_common.node import Node

__all__ = [
    "MAX_DEPTH",
    "MAX_INLINE",
    "Background",
    "Condition",
    "Deployment",
    "Graph",
    "Need",
    "On",
    "Repeat",
    "Retry",
    "StepSpec",
    "inline",
    "inlined",
]

MAX_DEPTH = 8  # so many DAGs may stand around a step besides the outermost one


class On(StrEnum):
    """Which end of a step an edge waits for."""

    SUCCESS = "success"  # it succeeded
    FAILURE = "failure"  # it failed (a skipped or cancelled step is not a failed one)
    ALWAYS = "always"  # it ended, in whatever way


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """An edge: the step needs ``step`` to end as ``on`` says. ``data``: its value (or error) is an argument."""

    step: str
    on: On = On.SUCCESS
    data: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """The step runs until nothing is ``during`` it any more, and is then asked to stop.

    ``signal`` is sent to its processes (None: only ``ctx.stopping`` is set); ``grace`` seconds later what is left is
    killed. A timeout, a cancel and a failure end it with the same signal (SIGTERM for None), and sooner. ``announces``:
    it is ready when it calls ``ctx.ready()``; otherwise as soon as it runs.
    """

    signal: int | None = None
    grace: float = 10.0
    announces: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """``times`` more attempts after a failed one; ``delay`` seconds before the first, times ``backoff`` for each next.

    ``condition`` is the digest of a callable ``(error_text) -> bool`` that is asked first, or None.
    """

    times: int = 0
    delay: float = 0.0
    backoff: float = 1.0
    condition: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """The step runs only if the callable in blob ``code``, given the value of ``step``, returns something true."""

    step: str
    code: str
    path: tuple[str | int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """The step runs again and again; its value is the list of its iterations' values.

    It ends after ``times`` iterations, or when the next would not start before ``duration`` seconds after the first,
    or when the callable in blob ``until``, given the last value, returns something true. ``every`` is the time between
    two starts in seconds (0: one after the other; an iteration that takes longer than that delays the next).
    ``keep_going``: a failed iteration has the value None and the next runs; otherwise the step fails.
    """

    every: float = 0.0
    duration: float | None = None
    times: int | None = None
    until: str | None = None
    keep_going: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpec:
    """One step, ready to run. ``code`` and ``args`` are digests of blobs that only a node's child process opens.

    Short arguments, as most are, stand here themselves (``inline``): a blob for each step of a long DAG would be sent,
    asked for and stored one by one.

    ``needs`` and ``need`` (``all`` or ``any``) say when it may start; ``during``: background steps that must be ready,
    and still run. ``over``: it is a fan-out over the value of that step (one iteration an item), with the path into
    the value in ``over_path``. ``slot``: it counts for ``max_parallel`` (waiting steps do not). ``files``: digests of
    the blobs that its arguments name as files. ``timeout`` is in seconds, for each attempt from when it has a process.
    ``isolation``: ``process`` or ``shared`` (in a warm worker, with what it evaluates). ``keep_processes``: what it
    leaves running ends with the deployment. ``secrets``: the names of those that it gets; ``secret_env``: variables by
    the secret that they have.

    ``graph``: the step is a DAG, run once for each attempt and iteration; ``code`` and ``args`` are then empty, because
    what it was called with stands in the arguments of the steps inside of it. ``outer``: what those refer to in the
    DAGs around: ``^name`` a step of the DAG around, ``^`` the item that this is mapped over, ``^^`` one further out.
    """

    name: str
    task: str
    code: str
    args: str
    implementation: str = ""
    needs: tuple[Need, ...] = ()
    need: str = "all"
    during: tuple[str, ...] = ()
    background: Background | None = None
    timeout: float | None = None
    retry: Retry = Retry()
    when: Condition | None = None
    repeat: Repeat | None = None
    over: str | None = None
    over_path: tuple[str | int, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    measured: bool = False
    exclusive: tuple[str, ...] = ()
    isolation: str = "process"
    slot: bool = True
    files: tuple[str, ...] = ()
    keep_processes: bool = False
    secrets: tuple[str, ...] = ()
    secret_env: Mapping[str, str] = field(default_factory=dict)
    outer: tuple[str, ...] = ()
    graph: Graph | None = None


MAX_INLINE = 1024  # bytes of sealed arguments that stand in the graph
_INLINE = "="  # no digest begins with it


def inline(data: bytes) -> str:
    """Sealed arguments as they stand in ``StepSpec.args``."""
    return _INLINE + base64.b64encode(data).decode()


def inlined(args: str) -> bytes | None:
    """The sealed arguments that stand in ``StepSpec.args``; None: it is the digest of a blob.

    Raises:
        ValueError: it is neither.
    """
    return base64.b64decode(args[1:], validate=True) if args.startswith(_INLINE) else None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A DAG with everything chosen. ``bundles``: digests of the source bundles (zip files) that go on ``sys.path``.

    ``preload``: modules that are imported once, before steps are forked.
    """

    name: str
    steps: tuple[StepSpec, ...]
    max_parallel: int | None = None
    stop_on_failure: bool = True
    bundles: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()

    def blobs(self) -> tuple[str, ...]:
        """The digests of every blob that running the graph takes, each once, in order of first use."""
        found: dict[str, None] = dict.fromkeys(self.bundles)
        for _, step in self.walk():
            args = () if inlined(step.args) is not None else (step.args,)
            extra = (step.retry.condition, step.when and step.when.code, step.repeat and step.repeat.until)
            found.update(dict.fromkeys(one for one in (step.code, *args, *step.files, *extra) if one))
        return tuple(found)

    def secrets(self) -> tuple[str, ...]:
        """The names of the secrets that its steps get, each once."""
        return tuple(dict.fromkeys(name for _, step in self.walk() for name in step.secrets))

    def walk(self, scope: str = "") -> Iterator[tuple[str, StepSpec]]:
        """Every step with its plain path, those inside of a step that is a DAG right after it."""
        for step in self.steps:
            path = paths.join(scope, step.name)
            yield path, step
            if step.graph is not None:
                yield from step.graph.walk(path)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One DAG, fully resolved for one node. ``name`` is unique in its experiment; ``python`` is the client's ``3.11``.

    ``python`` is empty when no code travels by value, and any interpreter of the node will do.
    """

    name: str
    node: Node
    graph: Graph
    environment: Environment
    resources: Resources = field(default_factory=Resources)
    role: str | None = None
    python: str = ""
