"""Out of memory: what the kernel ends is told apart from what somebody killed; real control groups, and their files."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import pytest
from fieldlab_common.lifecycle import Reason
from fieldlab_executor.oom import OutOfMemory

from .hub import Bench, Executor

cloudpickle.register_pickle_by_value(sys.modules[__name__])

GROUPS = Path("/sys/fs/cgroup")
LIMIT = 192 << 20
ENTER = 'echo $$ > "$0" && exec "$@"'


def _parent() -> tuple[Path, str] | None:
    """Where a group with a limit of memory can be made below this process's own, and the name of its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines() if sys.platform == "linux" else ():
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            return GROUPS / "memory" / group.lstrip("/"), "memory.limit_in_bytes"
        given = GROUPS / "cgroup.subtree_control"
        if not controllers and given.exists() and "memory" in given.read_text().split():
            return GROUPS, "memory.max"
    return None


@pytest.fixture
def limited() -> Iterator[tuple[str, ...]]:
    """A command that runs another within a limit of memory."""
    found = _parent()
    if found is None or not os.access(found[0], os.W_OK):
        pytest.skip("no control group for memory can be made here")
    group = found[0] / f"fieldlab-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / found[1]).write_text(str(LIMIT))
        yield "/bin/sh", "-c", ENTER, str(group / "cgroup.procs")
    finally:
        group.rmdir()


def fills_memory() -> int:
    return sum(len(chunk) for chunk in [b"x" * (16 << 20) for _ in range(64)])


def test_a_step_that_the_kernel_ends_for_want_of_memory_says_so_and_the_others_go_on(
    launch: Callable[..., Executor], limited: tuple[str, ...]
) -> None:
    bench = Bench()
    bench.step("fills", fills_memory)
    bench.step("killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
    bench.step("well", lambda: 42)
    executor = launch(bench, command=(*limited, sys.executable, "-P", "-m", "fieldlab_executor"))
    assert executor.wait() == 0
    assert executor.hub.settled("fills").reason is Reason.OUT_OF_MEMORY
    assert executor.hub.settled("killed").reason is Reason.SIGNAL
    assert executor.hub.value("well") == 42


@pytest.mark.parametrize(
    ("line", "counters"),
    [
        ("0::/lab", "lab/memory.events"),
        ("4:memory:/lab", "memory/lab/memory.oom_control"),
        ("4:cpu,cpuacct:/lab", None),
    ],
)
def test_the_counter_of_the_own_group_is_believed_before_the_machines(
    tmp_path: Path, line: str, counters: str | None
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    machine = tmp_path / "proc" / "vmstat"
    own = tmp_path / "groups" / (counters or "none")
    own.parent.mkdir(parents=True)
    for file in (machine, own):
        file.write_text("oom_kill 3\n")
    seen = OutOfMemory(proc=tmp_path / "proc", cgroups=tmp_path / "groups")
    assert not seen.happened(0.0)
    machine.write_text("oom_kill 4\n")
    assert seen.happened(10.0) is (counters is None)
    own.write_text("low 0\noom_kill 4\n")
    assert seen.happened(20.0) is (counters is not None)


def test_several_that_the_kernel_ends_at_once_are_all_told_so_and_a_later_one_is_not(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("oom 2\noom_kill 0\n")
    seen = OutOfMemory(events)
    events.write_text("oom 4\noom_kill 2\n")
    assert [seen.happened(now) for now in (5.0, 5.1, 60.0)] == [True, True, False]
