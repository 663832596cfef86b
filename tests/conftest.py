"""What the tests that start real nodes share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fieldlab as fl
import pytest
from fieldlab_common.protocol import Lane, RecordEntry


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What nodes on this machine keep between deployments is not their user's; and they have the checkout's uv."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIELDLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        uv = Path(__file__).parents[1] / ".uv" / "bin"
        patch.setenv("PATH", os.pathsep.join([str(uv), *os.get_exec_path()]))
        yield


@pytest.fixture
def records() -> Callable[[fl.Run, Lane], list[RecordEntry]]:
    """Every record of a lane of a run, in order."""

    def read(run: fl.Run, lane: Lane) -> list[RecordEntry]:
        found: list[RecordEntry] = []
        cursor = 0
        while page := run._source.records(lane, cursor, 0.0):
            if not page.records:
                break
            found += page.records
            cursor = page.cursor
        return found

    return read
