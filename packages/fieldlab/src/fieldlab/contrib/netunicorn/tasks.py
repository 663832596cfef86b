"""netunicorn's tasks and dispatchers as tasks of ours."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fieldlab_common import payload
from fieldlab_common.errors import DefinitionError
from fieldlab_common.node import Node
from fieldlab_common.selector import Selector, Verdict
from fieldlab_common.task import FunctionTask, Implementation, Task, TaskSettings
from netunicorn.base import Architecture, TaskDispatcher
from netunicorn.base import Node as TheirNode
from netunicorn.base import Task as TheirTask

from fieldlab.contrib.netunicorn import node as node_side
from fieldlab.contrib.netunicorn.requirements import base_packages, requirements_of

__all__ = ["Dispatcher", "from_task", "step_name", "their_node", "their_task"]

payload.send_by_value(sys.modules[node_side.__name__])

_ARCHITECTURES = {"windows/amd64": "win/amd64", "windows/arm64": "win/arm64"}
_PRELOAD = ("netunicorn.base", "http.server")
_KNOWN = frozenset(member.value for member in Architecture)


def from_task(task: TheirTask | TaskDispatcher, *, install: bool = True) -> Task[Any]:
    """A task of ours that runs a netunicorn task, or what a dispatcher gives for the node, unchanged.

    Calling it, without arguments, makes a step. It succeeds with the task's value; it fails where the task returns a
    ``Failure`` or raises. Steps of such tasks see each other's results in ``previous_steps``, share one working folder
    on the node, and use the experiment's events as netunicorn's flags.

    ``install``: the task's ``requirements`` and netunicorn-base are made part of the environment. With False they are
    expected to be there, as netunicorn's local executor expects it; the environment is then ``Host``.

    Raises:
        DefinitionError: ``task`` is neither a task nor a dispatcher of netunicorn.
    """
    return wrapped(task, install=install)


def wrapped(
    task: object, *, install: bool, commands: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Task[Any]:
    """As ``from_task``, with more commands for the environment, and with variables."""
    making = _Making(install, tuple(commands), dict(env or {}))
    if isinstance(task, TaskDispatcher):
        return Dispatcher(task, making)
    if not isinstance(task, TheirTask):
        raise DefinitionError(
            f"{task!r:.100} is neither a task nor a dispatcher of netunicorn.",
            advice="Give an instance of netunicorn.base.Task or TaskDispatcher.",
        )
    return FunctionTask(node_side.Call(task, step_name(task.name)), making.settings(task), None)


@dataclass(frozen=True)
class _Making:
    """How settings are made of a netunicorn task."""

    install: bool
    commands: tuple[str, ...]
    env: Mapping[str, str]

    def settings(self, task: TheirTask) -> TaskSettings:
        """The settings of a task that runs ``task``."""
        if not self.install:
            return TaskSettings(env=self.env, preload=_PRELOAD, keep_processes=True, isolation="process")
        needs = requirements_of([*self.commands, *task.requirements])
        return TaskSettings(
            packages=(*base_packages(), *needs.packages),
            system_packages=needs.system_packages,
            setup=needs.setup,
            env=self.env,
            preload=_PRELOAD,
            keep_processes=True,
            isolation="process",
        )


class _Asked:
    """A dispatcher, and what it said of the nodes that it was asked about."""

    def __init__(self, dispatcher: TaskDispatcher) -> None:
        self.dispatcher = dispatcher
        self._known: dict[int, tuple[Node, TheirTask | None, str]] = {}  # by the node's id

    def gives(self, node: Node) -> tuple[TheirTask | None, str]:
        """What it gives for ``node``, or None where it raises; and that in words."""
        if id(node) not in self._known:
            kind = type(self.dispatcher).__name__
            try:
                task = self.dispatcher.dispatch(their_node(node))
            except Exception as error:  # noqa: BLE001 - it is how a dispatcher says that it has nothing for a node
                self._known[id(node)] = node, None, f"{kind}.dispatch() raised {type(error).__name__}: {error}"
            else:
                self._known[id(node)] = node, task, f"{kind}.dispatch() gave {type(task).__name__}"
        return self._known[id(node)][1:]


@dataclass(frozen=True, eq=False)
class _Gave(Selector):
    """Holds for the nodes for which a dispatcher gave ``task``."""

    asked: _Asked
    task: TheirTask | None

    def explain(self, node: Node) -> Verdict:
        task, words = self.asked.gives(node)
        return Verdict(task is not None and task is self.task, words)

    def __str__(self) -> str:
        return f"{type(self.asked.dispatcher).__name__}.dispatch()"


class Dispatcher(FunctionTask[..., Any]):
    """A netunicorn dispatcher: it is asked for each node, on the client, and what it gives is the implementation."""

    def __init__(self, dispatcher: TaskDispatcher, making: _Making) -> None:
        super().__init__(node_side.Call(None, step_name(dispatcher.name)), making.settings(_Nothing()), None)
        self.dispatcher = dispatcher
        self._making = making
        self._asked = _Asked(dispatcher)
        self._given: list[TheirTask | None] = []  # None: it refused a node
        self._ways: list[Implementation] = []

    def implementations_for(self, node: Node) -> tuple[Implementation, ...]:
        task = self._asked.gives(node)[0]
        if not any(task is known for known in self._given):
            self._given.append(task)
            self._ways.append(self._made_of(task))
        return tuple(self._ways)

    def _made_of(self, task: TheirTask | None) -> Implementation:
        when = _Gave(self._asked, task)
        if task is None:
            base = self.implementations()[0]
            return Implementation(name="", when=when, call=base.call, settings=base.settings)
        same = sum(type(one) is type(task) for one in self._given)
        return Implementation(
            name=type(task).__name__ + (f"-{same}" if same > 1 else ""),
            when=when,
            call=node_side.Call(task, step_name(task.name)),
            settings=self._making.settings(task),
        )


class _Nothing(TheirTask):
    """Stands for what a dispatcher has not given yet."""

    def run(self) -> None:
        """Do nothing."""


def their_task(task: object) -> TheirTask | TaskDispatcher | None:
    """The netunicorn task or dispatcher that a task of ours runs; None if it runs none."""
    if isinstance(task, Dispatcher):
        return task.dispatcher
    call: object = task.fn if isinstance(task, FunctionTask) else None
    return call.task if isinstance(call, node_side.Call) else None


def their_node(node: Node) -> TheirNode:
    """A node as netunicorn's dispatchers know nodes."""
    value = _ARCHITECTURES.get(node.architecture, node.architecture)
    architecture = Architecture(value) if value in _KNOWN else Architecture.UNKNOWN
    return TheirNode(name=node.name, properties=dict(node.properties), architecture=architecture)


def step_name(name: object) -> str:
    """The name of a step for something that netunicorn names as it likes."""
    return re.sub(r"[^A-Za-z0-9_.#@+-]", "_", str(name)).lstrip(".#@+-")[:180] or "step"
