"""The sync comes before the word: seen in the system calls of a real executor and a real director (strace).

An executor sends nothing that its disk does not have yet, and a director acknowledges nothing that its disk does not
have yet. What is followed is one event: from the step's process into the executor's journal, and on to the director.
"""

from __future__ import annotations

import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fieldlab as fl
import pytest
from fieldlab_common.protocol import Lane, RecordEntry
from fieldlab_director import Embedded, embedded

CALLS = "write,pwrite64,fdatasync,fsync,sendto,sendmsg,recvfrom,read"
Records = Callable[[fl.Run, Lane], list[RecordEntry]]

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


class Call(NamedTuple):
    """A system call: where in the trace it began and ended, and what it was."""

    begun: int
    ended: int
    text: str


@contextmanager
def traced(pid: int, path: Path) -> Iterator[None]:
    """Follow a process and all of its threads; the trace is in ``path`` afterwards."""
    command = ["strace", "-f", "-y", "-s", "20000", "-e", f"trace={CALLS}", "-o", str(path), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        assert "attached" in said, said
        yield
        strace.send_signal(signal.SIGINT)
        strace.stderr.read()


def calls(path: Path) -> list[Call]:
    """The calls that ended; one that was interrupted by another thread's is put together again."""
    begun: dict[str, tuple[int, str]] = {}
    found: list[Call] = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines()):
        pid, _, text = line.partition(" ")
        if text.endswith("<unfinished ...>"):
            begun[pid] = (number, text.removesuffix("<unfinished ...>").rstrip())
        elif match := re.match(r"\s*<\.\.\. \w+ resumed>(.*)", text):
            start, head = begun.pop(pid, (number, ""))
            found.append(Call(start, number, head + match[1]))
        else:
            found.append(Call(number, number, text.lstrip()))
    return found


def first(found: list[Call], pattern: str, after: int = -1) -> Call:
    """The first call that matches, of those that began after a line."""
    matching = (call for call in found if call.begun > after and re.match(pattern, call.text, re.DOTALL))
    call = next(matching, None)
    assert call is not None, f"nothing matches {pattern!r}"
    return call


@fl.task
def speak(marker: str, *, ctx: fl.TaskContext) -> None:
    ctx.events.send("here")
    ctx.events.wait("go", timeout=100)
    ctx.events.send("spoken", marker)
    ctx.events.wait("enough", timeout=100)


@pytest.fixture(scope="module")
def director(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with embedded(tmp_path_factory.mktemp("syncs") / "director", nodes=["a"]) as running:
        yield running


def test_nothing_is_sent_or_acknowledged_before_it_is_synced(
    director: Embedded, records: Records, tmp_path: Path
) -> None:
    marker = f"marker-{secrets.token_hex(8)}"
    with fl.DAG("speaking") as dag:
        speak(marker)
    with fl.Client(director.url, token=director.token) as client:
        run = client.submit(fl.Experiment("syncs").map(dag, client.nodes()))
        run.events.wait("here", timeout=60)
        started = next(e.record.body for e in records(run, Lane.CONTROL) if e.record.kind == "started")
        with traced(started["pid"], tmp_path / "executor"), traced(director.pid, tmp_path / "director"):
            run.events.send("go")
            run.events.wait("spoken", timeout=60)
        run.events.send("enough")
        assert run.wait(timeout=60) is fl.ExperimentState.SUCCEEDED

    executor = calls(tmp_path / "executor")
    journalled = first(executor, rf"write\(\d+<[^>]*/control/\d+\.seg>.*{marker}")
    synced = first(executor, r"f(data)?sync\(\d+<[^>]*/control/\d+\.seg>\)\s+= 0", after=journalled.ended)
    sent = first(executor, rf"(sendto|sendmsg|write)\(\d+<(socket|TCP).*{marker}")
    assert journalled.ended < synced.begun <= synced.ended < sent.begun

    served = calls(tmp_path / "director")
    received = first(served, rf"(recvfrom|read)\(\d+<(socket|TCP).*{marker}")
    stored = first(served, rf"pwrite64\(\d+<[^>]*-wal>.*{marker}", after=received.begun)
    committed = first(served, r"f(data)?sync\(\d+<[^>]*-wal>\)\s+= 0", after=stored.ended)
    acknowledged = first(served, r"(sendto|sendmsg|write)\(\d+<(socket|TCP).*acked", after=received.begun)
    told = first(served, rf"(sendto|sendmsg|write)\(\d+<(socket|TCP).*{marker}", after=received.begun)
    assert committed.ended < acknowledged.begun
    assert committed.ended < told.begun
