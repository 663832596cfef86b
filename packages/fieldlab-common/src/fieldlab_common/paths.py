"""Where a step stands when DAGs are steps of DAGs: its name, or the way to it from the outermost DAG.

``collect/fetch`` is step ``fetch`` of the DAG that is step ``collect``; ``collect[3]/fetch`` is that step in iteration
3 of it, and ``collect[3]~2/fetch`` in the second attempt of that iteration (first attempts are not marked). What
stands before the last ``/`` is the *scope*: one run of one DAG. Without its marks a path is *plain*: the name of the
step as it was defined, ``collect/fetch``, whatever the iteration.

Names of steps hold none of ``/[]~`` (``step.check_name``), so no path can be read in two ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = [
    "SEPARATOR",
    "Part",
    "Round",
    "below",
    "inside",
    "iteration_of",
    "join",
    "parts_of",
    "place",
    "plain",
    "split",
    "untried",
]

SEPARATOR = "/"
_MARKS = re.compile(r"(?:\[\d+\])?(?:~\d+)?(?=/|$)")
_TRIES = re.compile(r"~\d+(?=/|$)")
_PART = re.compile(r"([^/\[\]~]+)(?:\[(\d{1,9})\])?(?:~(\d{1,9}))?")

Part = tuple[str, int | None, int]  # a step's name, its iteration, its attempt
Round = tuple[int, ...]  # see ``place``


def join(scope: str, name: str) -> str:
    """The path of step ``name`` in ``scope``; the outermost scope is empty."""
    return f"{scope}{SEPARATOR}{name}" if scope else name


def inside(path: str, iteration: int | None = None, attempt: int = 1) -> str:
    """The scope that one attempt of a step is for the steps inside of it."""
    marked = path if iteration is None else f"{path}[{iteration}]"
    return marked if attempt == 1 else f"{marked}~{attempt}"


def split(path: str) -> tuple[str, str]:
    """The scope, and the name in it."""
    scope, _, name = path.rpartition(SEPARATOR)
    return scope, name


def plain(path: str) -> str:
    """The path without iterations and attempts."""
    return _MARKS.sub("", path) if "[" in path or "~" in path else path


def untried(path: str) -> str:
    """The path without attempts: where a step stands, whichever time the DAGs around it are tried."""
    return _TRIES.sub("", path) if "~" in path else path


def place(path: str, iteration: int | None, repeated: Callable[[str], bool]) -> tuple[str, Round]:
    """Where a step stands among what is repeated: its path without rounds and attempts, and its *round*.

    ``repeated``: whether the step at a plain path is repeated. Each time that such a step runs is a round; the items
    of a fan-out are not, they stand side by side. The round has the number of each repeated step on the way and of
    the step itself, outermost first, and no zeros at its end: the first round is the same as no repeating at all.
    """
    if "[" not in path and not iteration:
        return untried(path), ()
    numbers: list[int] = []
    fixed = plainly = ""
    *around, (name, _, _) = parts_of(path) or ((path, None, 1),)
    for step, number, _ in (*around, (name, iteration, 1)):
        plainly, fixed = join(plainly, step), join(fixed, step)
        if number is not None and repeated(plainly):
            numbers.append(number)
        else:
            fixed = inside(fixed, number)
    while numbers and not numbers[-1]:
        numbers.pop()
    return fixed, tuple(numbers)


def below(path: str, other: str) -> bool:
    """Whether ``path`` is ``other``, or stands inside of it; ``other`` may leave out iterations and attempts."""
    return any(f"{one}/".startswith((f"{other}/", f"{other}[", f"{other}~")) for one in (path, plain(path)))


def iteration_of(path: str) -> int | None:
    """The iteration of the innermost DAG around the step that is repeated or mapped; None: there is none."""
    for _, iteration, _ in reversed(parts_of(split(path)[0]) or ()):
        if iteration is not None:
            return iteration
    return None


def parts_of(path: str) -> tuple[Part, ...] | None:
    """The steps on the way, outermost first; None if it is no path."""
    found: list[Part] = []
    for part in path.split(SEPARATOR) if path else ():
        match = _PART.fullmatch(part)
        if match is None:
            return None
        name, iteration, attempt = match.groups()
        found.append((name, None if iteration is None else int(iteration), 1 if attempt is None else int(attempt)))
    return tuple(found)
