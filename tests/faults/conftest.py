"""What the tests of faults share: directors that may be hurt, and lines that hurt."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fieldlab as fl
import pytest
from fieldlab_common.protocol import Lane, RecordEntry

from .proxy import Line

if sys.platform == "win32":
    pytest.skip("executors do not run on Windows", allow_module_level=True)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What nodes on this machine keep between deployments is not their user's; and they have the checkout's uv."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIELDLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        uv = Path(__file__).parents[2] / ".uv" / "bin"
        patch.setenv("PATH", os.pathsep.join([str(uv), *os.get_exec_path()]))
        yield


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


@pytest.fixture(scope="session")
def records() -> Callable[[fl.Run, Lane], list[RecordEntry]]:
    """Every record of a lane of a run, in order."""

    def read(run: fl.Run, lane: Lane) -> list[RecordEntry]:
        found: list[RecordEntry] = []
        cursor = 0
        while (page := run._source.records(lane, cursor, 0.0)).records:
            found += page.records
            cursor = page.cursor
        return found

    return read
