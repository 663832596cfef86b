"""An executor with nothing to do: how often it wakes up, what it takes of the processor, and what it holds.

All are watched over the same minute, in turns of none: fieldlab's over HTTP from ``fieldlab.pyz``, fieldlab's over the
pipe as ``fl.run`` starts it, and netunicorn's. Each has one task that sleeps. A wake-up is a switch to a thread of the
process (``/proc/PID/task/*/status``, voluntary and not).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import executor
import programs
from fieldlab_executor import zipapp
from measure import PEERS, PROGRAMS, Row, Unavailable, Versions, ours, peer_environment, work

__all__ = ["idle"]

QUARTER = 15.0  # seconds of a round: four are a minute
START = 60.0  # seconds for a program to say that it is ready


def idle(rounds: int, versions: Versions) -> list[Row]:
    """Wake-ups, processor time and memory over ``rounds`` quarters of a minute."""
    folder, note = work("idle"), ""
    with contextlib.ExitStack() as stack:
        watched = {
            "over HTTP": stack.enter_context(_over_http(folder)),
            "over the pipe": stack.enter_context(_held([sys.executable, PROGRAMS, "idle", str(folder / "pipe")])),
        }
        try:
            theirs = peer_environment("netunicorn-executor", versions)
            place = folder / "netunicorn"
            place.mkdir()
            command = [theirs, PEERS, "netunicorn", "idle", str(place)]
            watched["netunicorn"] = stack.enter_context(_held(command))
        except Unavailable as error:
            note = str(error)
        time.sleep(programs.SETTLE)
        found = _watched(watched, rounds * QUARTER)
    shutil.rmtree(folder)
    return [row for how in list(watched)[:2] for row in _rows(how, found[how], found.get("netunicorn"), note)]


def _rows(how: str, found: dict[str, float], theirs: dict[str, float] | None, note: str) -> list[Row]:
    def row(name: str, key: str, unit: str, aim: float | None = None) -> Row:
        return Row(
            name=f"idle {name}, {how}",
            unit=unit,
            samples=[found[key]],
            peer="netunicorn's executor",
            peer_samples=[theirs[key]] if theirs else [],
            aim=aim,
            note=note,
        )

    return [
        row("supervisor's wake-ups a minute", "wakes", ""),
        row("tree's wake-ups a minute", "tree_wakes", ""),
        row("tree's processor time a minute", "tree_cpu", "ms"),
        row("supervisor (RSS)", "memory", "MB", 30),
        row("tree (RSS)", "tree_memory", "MB"),
    ]


def _watched(pids: dict[str, int], seconds: float) -> dict[str, dict[str, float]]:
    trees = {name: programs.tree_of(pid) for name, pid in pids.items()}
    before = {name: [programs.activity(one) for one in tree] for name, tree in trees.items()}
    time.sleep(seconds)  # what is measured
    minute = 60.0 / seconds
    found: dict[str, dict[str, float]] = {}
    for name, tree in trees.items():
        after = [programs.activity(one) for one in tree]
        wakes = [new[0] - old[0] for old, new in zip(before[name], after, strict=True)]
        cpu = sum(new[1] - old[1] for old, new in zip(before[name], after, strict=True))
        memory = programs.memory(pids[name])
        found[name] = {
            "wakes": wakes[0] * minute,
            "tree_wakes": sum(wakes) * minute,
            "tree_cpu": cpu * minute * 1e-6,
            "memory": memory["supervisor"] / 1e6,
            "tree_memory": memory["tree"] / 1e6,
        }
    return found


@contextlib.contextmanager
def _over_http(folder: Path) -> Iterator[int]:
    place = folder / "http"
    place.mkdir()
    pyz = zipapp.build(folder / "fieldlab.pyz")
    with executor.executor(pyz, place, folder / "cache", programs.asleep()) as (process, standin):
        standin.wait_for_event(programs.UP)
        yield process.pid


@contextlib.contextmanager
def _held(command: Sequence[str | Path]) -> Iterator[int]:
    """A program that prints the process to watch, and holds it until its input is closed."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ours()},
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = _first_line(process.stdout)
        if not line.strip().isdigit():
            raise Unavailable(f"{Path(str(command[1])).name} {command[2]} did not start: {line.strip()!r}")
        yield int(line)
    finally:
        process.stdin.close()
        try:
            process.wait(START)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _first_line(stream: Any) -> str:
    import select

    ready, _, _ = select.select([stream], [], [], START)
    return stream.readline() if ready else ""
