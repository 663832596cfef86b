"""What the tests of the executor share: one cache of unpacked executors, and executors that are ended with the test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .hub import Bench, Executor, Hub


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launch(tmp_path: Path, cache: Path) -> Iterator[Callable[..., Executor]]:
    """Start an executor for a bench; it is killed when the test ends."""
    started: list[Executor] = []

    def start(bench: Bench, *, hub: Hub | None = None, command: tuple[str, ...] = (), **settings: Any) -> Executor:
        made = Executor(tmp_path / f"run-{len(started)}", hub or Hub(bench, **settings), cache, command)
        started.append(made)
        return made

    yield start
    for executor in started:
        executor.process.kill()
        executor.process.wait()


@pytest.fixture
def run(launch: Callable[..., Executor]) -> Callable[..., Hub]:
    """Run a bench to its end; the hub, with all that was reported."""

    def start(bench: Bench, **settings: Any) -> Hub:
        executor = launch(bench, **settings)
        assert executor.wait() == 0
        return executor.hub

    return start
