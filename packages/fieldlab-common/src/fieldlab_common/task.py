"""Tasks: what a user writes.

A task is a Python callable with its requirements; calling it never runs it, it always makes a ``Step``: one use of
the task in a DAG, with the arguments it will get. Arguments are checked against the signature of every
implementation there and then, at the user's line.

Invariant: what an attempt needs besides its arguments stands in ``TaskSettings``, checked when the task is declared.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, ParamSpec, Protocol, cast, overload

from fieldlab_common.context import TaskContext
from fieldlab_common.environment import Requirements, check_packages, parse_duration
from fieldlab_common.errors import ArgumentError, DefinitionError
from fieldlab_common.node import Node
from fieldlab_common.selector import Selector, as_selector
from fieldlab_common.step import Secret, Step

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    R = TypeVar("R", default=Any, covariant=True)
else:
    from typing import TypeVar

    R = TypeVar("R")

P = ParamSpec("P")
_UNSET: Any = ...  # as the task has it
When = Selector | Callable[[Node], bool] | None
Isolation = Literal["process", "shared"] | None

__all__ = [
    "FunctionTask",
    "Implementation",
    "Isolation",
    "Task",
    "TaskSettings",
    "When",
    "arguments_for",
    "check_isolation",
    "context_parameters",
    "sendable",
    "task",
    "task_of",
]

# --- settings and implementations ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How attempts of a task are made. Times are in seconds.

    ``packages`` None: nothing is said about Python packages; a tuple, also an empty one, asks for a ``Venv`` if it has
    entries. ``retry_if`` is asked with the error's text before an attempt is repeated. ``preload``: modules that are
    imported once for all steps of the deployment, and not anew in each of their processes. ``keep_processes``: what a
    step has started and left running ends with the deployment, and not with the step. ``isolation``: ``"process"``
    gives every attempt a process of its own, ``"shared"`` lets attempts run one after another in warm workers; None: as
    the DAG says.
    """

    packages: tuple[str, ...] | None = None
    system_packages: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env: Mapping[str, str | Secret] = dataclasses.field(default_factory=dict)
    timeout: float | None = None
    retries: int = 0
    retry_delay: float = 0.0
    retry_backoff: float = 1.0
    retry_if: Callable[[str], bool] | None = None
    cwd: str | None = None
    preload: tuple[str, ...] = ()
    keep_processes: bool = False
    isolation: Isolation = None

    def __post_init__(self) -> None:
        check_isolation(self.isolation)
        check_packages(self.packages or ())
        if not all(isinstance(value, str | Secret) for value in self.env.values()):
            raise DefinitionError(f"env={dict(self.env)!r:.200}: values are text, or fl.secret(...).")
        if self.retry_if is not None and not callable(self.retry_if):
            raise DefinitionError(f"retry_if={self.retry_if!r:.80}: it is a function of the error's text.")
        if not isinstance(self.retries, int):
            raise DefinitionError(f"retries={self.retries!r}: it is a whole number.")
        if self.timeout is not None and self.timeout <= 0:
            raise DefinitionError(f"timeout={self.timeout!r}: it must be more than zero seconds.")
        if self.retries < 0 or self.retry_delay < 0 or self.retry_backoff < 1:
            raise DefinitionError("retries and retry_delay cannot be negative, and retry_backoff is at least 1.")
        if self.keep_processes and self.isolation == "shared":
            raise DefinitionError(
                "keep_processes is for isolation='process': a warm worker ends what its steps leave running.",
                advice="Leave one of them out.",
            )

    @property
    def requirements(self) -> Requirements:
        """What goes into the deployment's environment."""
        return Requirements(packages=self.packages or (), system_packages=self.system_packages, setup=self.setup)


def check_isolation(isolation: object) -> None:
    """Refuse what is no isolation."""
    if isolation not in (None, "process", "shared"):
        raise DefinitionError(
            f"isolation={isolation!r}: it is 'process' (a process for each attempt) or 'shared' (warm workers)."
        )


_SETTINGS = tuple(f.name for f in dataclasses.fields(TaskSettings))


def _settings(given: Mapping[str, Any], base: TaskSettings | None = None) -> TaskSettings:
    values = {k: v for k, v in given.items() if v is not ...}
    for name in ("packages", "system_packages", "setup", "preload"):
        if isinstance(values.get(name), str):
            raise DefinitionError(f"{name}={values[name]!r} is text; give a list of texts.")
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    for name in ("timeout", "retry_delay"):
        if values.get(name) is not None:
            values[name] = parse_duration(values[name])
    return dataclasses.replace(base, **values) if base else TaskSettings(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """One of several ways to do a task: ``call`` does it on nodes for which ``when`` holds."""

    name: str
    when: Selector
    call: Callable[..., Any]
    settings: TaskSettings


# --- tasks -----------------------------------------------------------------------------------------------------------


class Task(Generic[R]):
    """A unit of work. Subclass it for a task with settings of its own: ``run`` does the work, ``__init__`` is yours.

    What ``@task`` takes as keywords, a subclass has as class attributes: ``packages``, ``system_packages``, ``setup``,
    ``env``, ``timeout``, ``retries``, ``retry_delay``, ``retry_backoff``, ``retry_if``, ``cwd``, ``preload``,
    ``keep_processes``, ``isolation``; and ``when``, a selector of the nodes that can run it. Calling one makes a step.
    """

    when: When = None

    def run(self, *args: Any, **kwargs: Any) -> R:
        """Do the work, on the node."""
        raise NotImplementedError

    @property
    def task_name(self) -> str:
        """What steps of it are called by default."""
        return type(self).__name__

    def implementations(self) -> tuple[Implementation, ...]:
        """The ways to do it, in the order in which they are tried; the base one is last."""
        if type(self).run is Task.run:
            raise DefinitionError(f"{type(self).__name__} has no run method.", advice="Define def run(self, ...).")
        given = {name: getattr(type(self), name) for name in _SETTINGS if hasattr(type(self), name)}
        return (Implementation(name="", when=as_selector(self.when), call=self.run, settings=_settings(given)),)

    def implementations_for(self, node: Node) -> tuple[Implementation, ...]:
        """Those to choose from for ``node``.

        A task that makes implementations up for nodes overrides it, and adds to what it gave before: an implementation
        keeps its place, so that nodes which choose the same share it. They take the arguments of ``implementations``.
        """
        return self.implementations()

    def __call__(self, *args: Any, **kwargs: Any) -> Step[R]:
        """Make a step that will call the task with these arguments.

        Raises:
            ArgumentError: the signature does not take them, or one is a task and not a step.
        """
        for given in (*args, *kwargs.values()):
            if isinstance(given, Task) or (isinstance(given, type) and issubclass(given, Task)):
                raise ArgumentError(
                    f"{self.task_name} got {given!r:.80}, which is no step.", advice="Call it: task(...)."
                )
        ctx: set[str] = set()
        for implementation in self.implementations():
            ctx |= _bind(self.task_name, implementation.call, args, kwargs)
        return Step(self, args, kwargs, takes_context=bool(ctx))

    def __repr__(self) -> str:
        return f"<task {self.task_name}>"


def task_of(step: Step[Any]) -> Task[Any]:
    """The task of a step: only tasks make steps; ``TaskLike`` is for the direction of imports."""
    task = step.task
    assert isinstance(task, Task)
    return task


class FunctionTask(Task[R], Generic[P, R]):
    """The task that ``@task`` makes of a function; ``fn`` is the plain function, with its signature."""

    def __init__(self, fn: Callable[P, R], settings: TaskSettings, when: When) -> None:
        self.fn: Callable[P, R] = fn
        self._settings = settings
        self._when = as_selector(when)
        self._others: list[Implementation] = []
        functools.update_wrapper(cast(Callable[..., Any], self), fn, updated=())

    @property
    def task_name(self) -> str:
        return getattr(self.fn, "__name__", "task").strip("<>") or "task"

    def run(self, *args: Any, **kwargs: Any) -> R:
        """Call the plain function."""
        return cast(Callable[..., R], self.fn)(*args, **kwargs)

    def implementation(
        self,
        *,
        when: Selector | Callable[[Node], bool],
        packages: Sequence[str] | None = _UNSET,
        system_packages: Sequence[str] = _UNSET,
        setup: Sequence[str] = _UNSET,
        env: Mapping[str, str | Secret] = _UNSET,
        timeout: float | str | None = _UNSET,
        retries: int = _UNSET,
        retry_delay: float | str = _UNSET,
        retry_backoff: float = _UNSET,
        retry_if: Callable[[str], bool] | None = _UNSET,
        cwd: str | None = _UNSET,
        preload: Sequence[str] = _UNSET,
        keep_processes: bool = _UNSET,
        isolation: Isolation = _UNSET,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Declare another way to do the task, for nodes for which ``when`` holds; tried in the order of declaration.

        What is not given is as the task has it. The decorated function stays a plain function.
        """
        given = {name: value for name, value in locals().items() if name in _SETTINGS}

        def declare(fn: Callable[P, R]) -> Callable[P, R]:
            name = getattr(fn, "__name__", f"implementation-{len(self._others) + 1}")
            if any(other.name == name for other in self._others):
                raise DefinitionError(f"Task {self.task_name!r} has an implementation {name!r} already.")
            settings = _settings(given, self._settings)
            self._others.append(Implementation(name=name, when=as_selector(when), call=fn, settings=settings))
            return fn

        return declare

    def implementations(self) -> tuple[Implementation, ...]:
        base = Implementation(name="", when=self._when, call=self.fn, settings=self._settings)
        return (*self._others, base)

    def __get__(self, instance: object, owner: type | None = None) -> FunctionTask[P, R]:
        if instance is not None:
            raise DefinitionError(
                f"@task on the method {self.task_name!r} cannot know its object.",
                advice="Write a class task instead: class X(fl.Task) with __init__ and run.",
            )
        return self


class _Loaded(Protocol):
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _load(module: str, qualname: str, implementation: str) -> _Loaded:
    __import__(module)
    found: Any = sys.modules[module]
    for name in qualname.split("."):
        found = getattr(found, name)
    for one in found.implementations():
        if one.name == implementation:
            return cast(_Loaded, one.call)
    raise LookupError(f"{module}.{qualname} has no implementation {implementation!r}")


class ImportedCall:
    """Stands for an implementation of a module's task when its code is sealed: the name travels, not the code."""

    def __init__(self, module: str, qualname: str, implementation: str) -> None:
        self._parts = (module, qualname, implementation)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, self._parts


def sendable(owner: Task[Any], implementation: Implementation) -> tuple[Any, bool]:
    """What to seal for an implementation, and whether its code travels by value (else its module is imported)."""
    if not isinstance(owner, FunctionTask):
        return implementation.call, _in_main(type(owner))
    fn = owner.fn
    module, qualname = getattr(fn, "__module__", "__main__"), getattr(fn, "__qualname__", "<locals>")
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if found is owner and module != "__main__":
        return ImportedCall(module, qualname, implementation.name), False
    return implementation.call, True


def _in_main(cls: type) -> bool:
    return cls.__module__ == "__main__" or "<locals>" in cls.__qualname__


@overload
def task(fn: Callable[P, R], /) -> FunctionTask[P, R]: ...
@overload
def task(
    *,
    when: When = None,
    packages: Sequence[str] | None = None,
    system_packages: Sequence[str] = (),
    setup: Sequence[str] = (),
    env: Mapping[str, str | Secret] = ...,
    timeout: float | str | None = None,
    retries: int = 0,
    retry_delay: float | str = 0.0,
    retry_backoff: float = 1.0,
    retry_if: Callable[[str], bool] | None = None,
    cwd: str | None = None,
    preload: Sequence[str] = (),
    keep_processes: bool = False,
    isolation: Isolation = None,
) -> Callable[[Callable[P, R]], FunctionTask[P, R]]: ...
def task(fn: Callable[..., Any] | None = None, /, *, when: When = None, **settings: Any) -> Any:
    """Make a task of a function.

    ``when`` selects the nodes that can run it; ``packages`` are Python requirements (the environment is then a
    ``Venv`` unless told otherwise); ``system_packages`` and ``setup`` commands are for the node; ``env`` is added to
    the process's variables; ``timeout`` (seconds, or ``"5m"``) is for each attempt; ``retries`` more attempts follow a
    failed one, after ``retry_delay`` times ``retry_backoff`` for each further one, if ``retry_if(error text)`` agrees.
    ``preload`` names installed modules that are slow to import (``"numpy"``): they are imported once on the node, and
    every step's process is forked with them. ``keep_processes``: what it leaves running is not ended with the step but
    with the deployment; for what should run beside other steps, ``fl.background`` is the better way.
    ``isolation="shared"``: its attempts run one after another in warm workers, for tiny steps; a worker keeps what was
    imported and what modules remember.
    """
    unknown = settings.keys() - set(_SETTINGS)
    if unknown:
        raise ArgumentError(f"task() takes no {', '.join(sorted(unknown))}; it takes when, {', '.join(_SETTINGS)}.")
    made = _settings(settings)

    def declare(function: Callable[..., Any]) -> FunctionTask[..., Any]:
        if isinstance(function, Task) or not callable(function):
            raise DefinitionError(f"@task decorates a plain function, not {function!r}.")
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise DefinitionError(f"{function!r} is asynchronous.", advice="Call asyncio.run inside a plain function.")
        return FunctionTask(function, made, when)

    return declare if fn is None else declare(fn)


# --- arguments -------------------------------------------------------------------------------------------------------


class _Signature(NamedTuple):
    whole: inspect.Signature
    given: inspect.Signature  # of what users give: without the parameters annotated TaskContext
    ctx: tuple[str, ...]  # the names of those


@functools.lru_cache(maxsize=4096)
def _signature(call: Callable[..., Any]) -> _Signature | None:
    """What there is to know of a call's parameters; None: it does not say."""
    try:
        signature = inspect.signature(call)
    except (ValueError, TypeError):
        return None
    try:
        hints = typing.get_type_hints(call)
    except Exception:  # noqa: BLE001 - annotations are any expression of the user's; then their text is all there is
        hints = {}
    found = []
    for name, parameter in signature.parameters.items():
        hint = hints.get(name, parameter.annotation)
        text = hint if isinstance(hint, str) else ""
        if hint is TaskContext or text.rpartition(".")[2].strip("'\" ") == "TaskContext":
            found.append(name)
    left = [parameter for name, parameter in signature.parameters.items() if name not in found]
    return _Signature(signature, signature.replace(parameters=left), tuple(found))


def context_parameters(call: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the parameters that receive the TaskContext."""
    signature = _signature(call)
    return signature.ctx if signature is not None else ()


def _bind(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[str]:
    signature = _signature(call)
    if signature is None:
        return set()
    given = set(signature.ctx) & set(kwargs)
    if given:
        raise ArgumentError(f"{name}(): {', '.join(given)} is filled in by fieldlab; leave it out.")
    try:
        signature.given.bind(*args, **kwargs)
    except TypeError as error:
        whole = f"{name}{signature.whole}"
        raise ArgumentError(f"{whole}: {error}.", advice="Give the arguments that run takes.") from None
    return set(signature.ctx)


def arguments_for(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the context's place held by a reference."""
    signature = _signature(call)
    if signature is None or not signature.ctx:
        return args, dict(kwargs)
    bound, ctx = signature.given.bind(*args, **kwargs), signature.ctx
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in signature.whole.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(bound.arguments.get(parameter.name, ()))
        elif parameter.kind is parameter.VAR_KEYWORD:
            named.update(bound.arguments.get(parameter.name, {}))
        elif parameter.name in ctx or parameter.name in bound.arguments:
            value = _Context() if parameter.name in ctx else bound.arguments[parameter.name]
            if parameter.kind is parameter.KEYWORD_ONLY or named:
                named[parameter.name] = value
            else:
                positional.append(value)
        elif parameter.kind is not parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            positional.append(parameter.default)
    return tuple(positional), named


class _Context:
    def __fieldlab_reference__(self) -> tuple[str]:
        return ("context",)
