"""Tasks that fieldlab brings along: commands, gates, barriers and sent events.

They are ordinary tasks on ``TaskContext``: the executor has no special case for any of them. Gates and barriers do
not count for ``max_parallel``, because a waiting step uses nothing.
"""

from __future__ import annotations

import json
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fieldlab_common.context import CommandFailed, TaskContext, check_parties
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import ArgumentError, DefinitionError, InvalidNameError
from fieldlab_common.events import RESERVED_PREFIX
from fieldlab_common.selector import as_selector
from fieldlab_common.step import REQUIRED, Arg, Pick, Secret, Step, check_name, references
from fieldlab_common.task import Implementation, Isolation, Task, TaskSettings, When

__all__ = [
    "Arg",
    "Barrier",
    "Send",
    "Shell",
    "Value",
    "WaitFor",
    "arg",
    "barrier",
    "check_event_name",
    "send",
    "shell",
    "value",
    "wait_for",
]

NOT_FOUND = 127  # what a shell says of a command that is not there
PARSERS: Mapping[str, Callable[[str], Any]] = {
    "text": lambda text: text,
    "json": json.loads,
    "lines": lambda text: text.splitlines(),
}


def arg(name: str, default: Any = REQUIRED) -> Arg:
    """A parameter. As an argument of a step: of the DAG that the step is in, filled in where that DAG is called.

    In the list form of ``shell``: the argument of that name. ``default``: its value if none is given.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidNameError(f"{name!r:.100} cannot be the name of a parameter.", advice='Use a name like "host".')
    if any(isinstance(one, Step | Pick | Arg) for one in references(default)):
        raise DefinitionError(f"The default of parameter {name!r} is, or holds, a step or another parameter.")
    return Arg(name, default)


class Shell(Task[Any]):
    """A command line as a task. It is an argument list: no shell reads it, whatever the arguments hold."""

    def __init__(
        self,
        words: Sequence[str | Arg],
        name: str,
        parse: str | Callable[[str], Any],
        ok_codes: tuple[int, ...],
        fill: bool,
        settings: TaskSettings,
        when: When,
    ) -> None:
        self.words, self.name, self.parse, self.ok_codes, self.fill = tuple(words), name, parse, ok_codes, fill
        self.settings, self.when = settings, when
        self.defaults = {w.name: w.default for w in words if isinstance(w, Arg) and w.default is not REQUIRED}
        self.parameters = tuple(dict.fromkeys(self._parameters()))

    def _parameters(self) -> Iterable[str]:
        for word in self.words:
            if isinstance(word, Arg):
                yield word.name
            elif self.fill:
                yield from (field for _, field, _, _ in string.Formatter().parse(word) if field is not None)

    @property
    def task_name(self) -> str:
        return self.name

    def implementations(self) -> tuple[Implementation, ...]:
        return (Implementation(name="", when=as_selector(self.when), call=self.run, settings=self.settings),)

    def __call__(self, *args: Any, **kwargs: Any) -> Step[Any]:
        if len(args) > len(self.parameters):
            raise ArgumentError(f"{self.name} takes {len(self.parameters)} arguments, not {len(args)}.")
        given = dict(zip(self.parameters, args, strict=False))
        doubled, unknown = given.keys() & kwargs.keys(), kwargs.keys() - set(self.parameters)
        missing = set(self.parameters) - self.defaults.keys() - given.keys() - kwargs.keys()
        if doubled or unknown or missing:
            wrong = ", ".join(sorted(doubled | unknown | missing))
            raise ArgumentError(f"{self.name} takes the arguments ({', '.join(self.parameters)}); wrong: {wrong}.")
        return Step(self, (), {**self.defaults, **given, **kwargs}, takes_context=False)

    def command(self, arguments: Mapping[str, Any]) -> list[str]:
        """The argument list with the placeholders filled in."""
        words = []
        for word in self.words:
            if isinstance(word, Arg):
                words.append(str(arguments[word.name]))
            else:
                words.append(word.format(**arguments) if self.fill else word)
        return words

    def run(self, **arguments: Any) -> Any:
        """Run the command; its standard output, parsed, is the value. What it says on standard error is logged."""
        command = self.command(arguments)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
            )
        except FileNotFoundError:
            text = f"The node has no program {command[0]!r}. Name its package in the task's system_packages=[...]."
            raise CommandFailed(text, exit_code=NOT_FOUND) from None
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:  # the signal that stops a background step went to the command, too
            output, _ = process.communicate()
        sys.stdout.write(output)
        code = process.returncode
        if code not in self.ok_codes:
            raise CommandFailed(
                f"{shlex.join(command)} ended with code {code}; ok are {', '.join(map(str, self.ok_codes))}.",
                exit_code=code,
                output=output[-2000:],
            )
        return PARSERS[self.parse](output) if isinstance(self.parse, str) else self.parse(output)


def _split(command: str) -> list[str | Arg]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise DefinitionError(f"shell({command!r:.80}) cannot be split into arguments: {error}.") from None
    for word in words:
        if word in _OF_A_SHELL:
            raise DefinitionError(
                f"shell({command!r:.80}): no shell reads the {word!r}; it would be an argument.",
                advice='Give a list if that is meant; or ask for a shell: fl.shell(["sh", "-c", "..."]).',
            )
    return [*words]


_OF_A_SHELL = frozenset(("|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1", "&>"))


def shell(
    command: str | Sequence[str | Arg],
    *,
    name: str | None = None,
    parse: str | Callable[[str], Any] = "text",
    ok_codes: Sequence[int] = (0,),
    packages: Sequence[str] | None = None,
    system_packages: Sequence[str] = (),
    setup: Sequence[str] = (),
    env: Mapping[str, str | Secret] | None = None,
    timeout: float | str | None = None,
    retries: int = 0,
    cwd: str | None = None,
    isolation: Isolation = None,
    when: When = None,
) -> Shell:
    """Make a task of a command line. No shell is involved: text is split into an argument list here, once.

    In the text form ``{name}`` is an argument; in the list form only ``fl.arg("name")`` is. ``parse`` makes the value
    of the output: ``"text"``, ``"lines"``, ``"json"`` or a function. ``ok_codes`` are the exit codes of success.
    """
    fill = isinstance(command, str)
    words: list[str | Arg] = _split(command) if isinstance(command, str) else list(command)
    if not words:
        raise DefinitionError("shell() needs a command.")
    if isinstance(parse, str) and parse not in PARSERS:
        raise DefinitionError(f"parse={parse!r}: it is one of {', '.join(PARSERS)}, or a function of the text.")
    settings = TaskSettings(
        packages=None if packages is None else tuple(packages),
        system_packages=tuple(system_packages),
        setup=tuple(setup),
        env=dict(env or {}),
        timeout=None if timeout is None else parse_duration(timeout),
        retries=retries,
        cwd=cwd,
        isolation=isolation,
    )
    program = re.sub(r"[^A-Za-z0-9_.#@+-]", "-", str(words[0]).rpartition("/")[2]).lstrip("-.#@+")
    called = check_name(name, "a step") if name is not None else program or "shell"
    return Shell(words, called, parse, tuple(ok_codes), fill, settings, when)


class WaitFor(Task[Any]):
    """A gate that an event opens; its value is the event's data."""

    @property
    def task_name(self) -> str:
        return "wait_for"

    def run(self, name: str, timeout: float | None, after: int, *, ctx: TaskContext) -> Any:
        """Wait for the event."""
        return ctx.gate(name, after=after, timeout=timeout).data


class Send(Task[None]):
    """Sends an event."""

    @property
    def task_name(self) -> str:
        return "send"

    def run(self, name: str, data: Any, *, ctx: TaskContext) -> None:
        """Send it."""
        ctx.events.send(name, data)


class Barrier(Task[None]):
    """Waits until all parties have come."""

    @property
    def task_name(self) -> str:
        return "barrier"

    def run(self, name: str, parties: int | str, timeout: float | None, *, ctx: TaskContext) -> None:
        """Come to the barrier, and wait for the others."""
        ctx.barrier(name, parties, timeout)


class Value(Task[Any]):
    """A value as a step; ``name`` is what steps of it are called by default."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def task_name(self) -> str:
        return self.name

    def run(self, given: Any) -> Any:
        """Return it."""
        return given


def _waiting(step: Step[Any]) -> Step[Any]:
    step.takes_slot = False
    return step


def check_event_name(name: str) -> str:
    """Return ``name`` if users may send events of that name."""
    if not isinstance(name, str) or not 0 < len(name) <= 200 or name.startswith(RESERVED_PREFIX):
        raise DefinitionError(
            f"{name!r:.100} cannot be the name of an event.",
            advice=f"Use text of 1 to 200 characters that does not begin with {RESERVED_PREFIX!r}.",
        )
    return name


def _event_name(name: str | Arg) -> str | Arg:
    """The same, or a parameter: then the node looks at what was given."""
    return name if isinstance(name, Arg) else check_event_name(name)


def value(given: Any) -> Step[Any]:
    """A step whose value is ``given``: a parameter, a node property, or anything else that can be an argument.

    Where only a step will do: ``.when(fl.value(fl.arg("rate")), lambda rate: rate > 0)``. A parameter gives its name.
    """
    return Value(given.name if isinstance(given, Arg) else "value")(given)


def wait_for(name: str | Arg, *, timeout: float | str | None = None, after: int = 0) -> Step[Any]:
    """A gate: a step that ends when the event comes (also if it came before); its value is the event's data.

    It fails after ``timeout`` seconds. ``after``: only events with a higher number count. In a DAG that is repeated,
    each round waits for an event of its own: the next of that name.
    """
    seconds = None if timeout is None else parse_duration(timeout)
    return _waiting(WaitFor()(_event_name(name), seconds, after))


def send(name: str | Arg, data: Any = None) -> Step[None]:
    """A step that sends an event; ``data`` may hold steps and node properties."""
    return Send()(_event_name(name), data)


def barrier(name: str | Arg, *, parties: int | str = "all", timeout: float | str | None = None) -> Step[None]:
    """A step that ends when all ``parties`` have come: a number, ``"all"`` deployments, or a role.

    It fails with BarrierBroken when it can no longer fill, and after ``timeout`` seconds. A number needs a timeout:
    only of deployments by name is it known that they will not come. In a DAG that is repeated, each round has a barrier
    of its own; the items of ``fl.map`` are several parties of one.
    """
    seconds = None if timeout is None else parse_duration(timeout)
    check_parties(parties, seconds)
    return _waiting(Barrier()(_event_name(name), parties, seconds))
