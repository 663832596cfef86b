"""What the tests of the whole share: a real director with nodes on this machine, and eyes for processes left behind."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fieldlab as fl
import pytest
from fieldlab_director import Embedded, embedded

if sys.platform == "win32":
    pytest.skip("executors do not run on Windows", allow_module_level=True)


@pytest.fixture(scope="session", autouse=True)
def of_this_machine(own_cache: None) -> None:
    """Nodes here keep nothing where their user does."""


@pytest.fixture(scope="session")
def director(own_cache: None) -> Iterator[Embedded]:
    """A director with the nodes a, b and c, for all tests that do not hurt it."""
    with embedded(nodes=["a", "b", "c"]) as running:
        yield running


@pytest.fixture
def client(director: Embedded) -> Iterator[fl.Client]:
    with fl.Client(director.url, token=director.token) as made:
        yield made


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for an experiment that no other test uses."""
    return f"{request.node.originalname[:60]}-{secrets.token_hex(4)}"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """Whether a process runs (a zombie does not)."""
    return _alive


@pytest.fixture
def marked() -> tuple[dict[str, str], Callable[[], list[str]]]:
    """An environment that marks every process below one; and what of them is there: their command lines."""
    mark = f"FIELDLAB_TEST_MARK={secrets.token_hex(8)}"
    name, _, value = mark.partition("=")

    def there() -> list[str]:
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and _alive(int(folder.name)):
                try:
                    if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                        found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
        return found

    return {**os.environ, name: value}, there


@pytest.fixture
def until() -> Callable[[fl.Run, Callable[[fl.Results], bool]], fl.Results]:
    """Wait for a run's results to be as a function says: woken by records, not by a clock."""

    def wait(run: fl.Run, holds: Callable[[fl.Results], bool]) -> fl.Results:
        results = run.results
        while not holds(results):
            assert not results.info.state.terminal, f"it ended before:\n{results}"
            results = run.refresh(5.0)
        return results

    return wait
