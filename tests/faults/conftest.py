"""What the tests of faults share: directors that may be hurt, and lines that hurt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from .proxy import Line

if sys.platform == "win32":
    pytest.skip("executors do not run on Windows", allow_module_level=True)


@pytest.fixture(scope="session", autouse=True)
def of_this_machine(own_cache: None) -> None:
    """Nodes here keep nothing where their user does."""


@pytest.fixture
def line() -> Iterator[Callable[..., Line]]:
    """Lines to a port, closed at the end."""
    made: list[Line] = []

    def make(*args: object, **options: object) -> Line:
        made.append(Line(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()
