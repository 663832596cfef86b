"""What ``Resources`` hold a deployment's steps to: by a control group, and without one.

Groups of version 2 with a limit of memory can seldom be made on the machine that tests run on, so those tests start
one: a User-Mode Linux (Debian's package user-mode-linux), whose kernel runs as an ordinary process with this machine's
file system. What is checked in it is in ``in_a_machine.py``.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from fieldlab_common.environment import Resources
from fieldlab_common.lifecycle import Reason, StepState
from fieldlab_common.protocol import Lane
from fieldlab_executor import cgroups, zipapp
from fieldlab_executor.__main__ import main
from fieldlab_executor.limits import Limits, size

from .hub import CTX, Bench, Hub

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Run = Callable[..., Hub]
LIMIT = 96 << 20


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Any]:
    """What was found in a machine with control groups. It is slow: what it runs is unpacked and compiled out here."""
    linux = shutil.which("linux.uml")
    if linux is None:
        pytest.skip("there is no linux.uml (the package user-mode-linux)")
    site = zipapp.unpacked(cache)
    folder = tmp_path_factory.mktemp("machine")
    program = f"PYTHONPATH={site} exec {sys.executable} -P {Path(__file__).with_name('in_a_machine.py')}"
    (folder / "init").write_text(f"#!/bin/sh\n{program}\n")
    (folder / "init").chmod(0o755)
    words = ["mem=768M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "con=null"]
    run = subprocess.run(
        [linux, *words, "con0=null,fd:1", f"init={folder / 'init'}", f"uml_dir={folder}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=110,
        check=False,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    found = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert found, run.stdout[-4000:] + run.stderr[-4000:]
    return dict(json.loads(found[-1]))


# --- by a control group -----------------------------------------------------------------------------------------------


def test_in_a_group_a_step_that_goes_over_is_out_of_memory_and_says_the_limit_the_use_and_what_to_do(
    machine: dict[str, Any],
) -> None:
    state, reason, message = machine["steps"]["hog"]
    assert (state, reason) == ("failed", "out_of_memory")
    assert "all steps of the deployment together may use 96 MiB" in message
    assert "had used up to 9" in message  # 96 MiB, or a little less
    assert "fl.Resources(memory=...)" in message


def test_in_a_group_a_command_that_goes_over_makes_its_step_out_of_memory(machine: dict[str, Any]) -> None:
    state, reason, message = machine["steps"]["command"]
    assert (state, reason) == ("failed", "out_of_memory")
    assert "ended with code -9" in message


def test_in_a_group_is_also_what_a_step_has_put_into_a_session_of_its_own_and_other_steps_go_on(
    machine: dict[str, Any],
) -> None:
    state, _, group = machine["steps"]["stray"]
    assert state == "succeeded"
    assert group.startswith(f"0::/{cgroups.PREFIX}")


def test_the_log_says_first_that_a_group_holds_memory_and_cpus(machine: dict[str, Any]) -> None:
    assert machine["log"] == (
        "Memory: 96 MiB for all steps together, held by a control group (memory.max). "
        "CPUs: 2, held by a control group (cpu.max).\n"
    )


def test_the_group_is_gone_when_the_deployment_has_ended_and_so_is_one_that_a_killed_executor_left(
    machine: dict[str, Any],
) -> None:
    assert machine["left"] == []


@pytest.mark.parametrize("place", ["slice", "container"])
def test_a_group_is_made_below_a_users_own_slice_and_in_a_container(machine: dict[str, Any], place: str) -> None:
    assert machine[place] == {"memory.max": str(LIMIT), "cpu.max": "50000 100000", "ended": -9}


def test_no_group_is_made_beside_one_that_is_limited_itself(machine: dict[str, Any]) -> None:
    assert machine["limited"] is None


# --- by process -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_groups() -> None:
    """Only where this machine has none is what is done without one seen."""
    if cgroups.parent() is not None:
        pytest.skip("this machine has control groups of version 2")


def fill(count: int) -> int:
    return len(bytearray(count))


@pytest.mark.parametrize("isolation", ["process", "shared"])
def test_without_a_group_a_step_that_goes_over_is_refused_more_and_says_so(
    run: Run, no_groups: None, isolation: str
) -> None:
    bench = Bench()
    bench.step("hog", fill, 2 * LIMIT, isolation=isolation)
    bench.step("well", fill, LIMIT // 8, isolation=isolation)
    hub = run(bench, resources=Resources(memory=LIMIT))
    hog = hub.settled("hog")
    assert (hog.state, hog.reason) == (StepState.FAILED, Reason.OUT_OF_MEMORY)
    assert "MemoryError. Its process may use 96 MiB, as Resources(memory=...) says, and had used up to" in hog.message
    assert "bytearray(count)" in hog.error
    assert hub.value("well") == LIMIT // 8
    assert hub.logs("", "executor").startswith("Memory: 96 MiB for each process of the steps (RLIMIT_DATA)")


def test_without_a_group_a_step_that_fills_memory_bit_by_bit_can_still_say_so(run: Run, no_groups: None) -> None:
    bench = Bench()
    bench.step("hog", lambda: [b"x" * 1000 for _ in range(10**6)])
    bench.step("result", lambda: "x" * (LIMIT // 3))  # which fits, and its encoding does not
    hub = run(bench, resources=Resources(memory=LIMIT))
    assert hub.settled("hog").reason is Reason.OUT_OF_MEMORY
    assert hub.settled("result").reason is Reason.OUT_OF_MEMORY


def test_without_a_group_what_a_step_starts_has_the_same_limit_and_cannot_lift_it(run: Run, no_groups: None) -> None:
    def limits() -> list[int]:
        code = "import resource; print(*resource.getrlimit(resource.RLIMIT_DATA))"
        done = subprocess.run(["setsid", sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        return [int(word) for word in done.stdout.split()]

    bench = Bench()
    bench.step("limits", limits)
    soft, hard = run(bench, resources=Resources(memory=LIMIT)).value("limits")
    assert (soft, hard - soft) == (LIMIT, 16 << 20)


def hold(ctx: Any, processes: int, each: int) -> None:
    code = f"import time; held = bytearray({each}); print(flush=True); time.sleep(600)"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(processes)]
    for one in started:
        assert one.stdout is not None
        one.stdout.readline()
    ctx.events.send("full")
    ctx.stopping.wait()


def test_without_a_group_the_step_that_uses_most_is_ended_when_all_together_are_over(run: Run, no_groups: None) -> None:
    bench = Bench()
    bench.step("many", hold, CTX, 3, LIMIT // 2)
    bench.step("one", fill, LIMIT // 8)
    hub = run(bench, resources=Resources(memory=LIMIT))
    many = hub.settled("many")
    assert (many.state, many.reason) == (StepState.FAILED, Reason.OUT_OF_MEMORY)
    assert "All steps of the deployment together may use 96 MiB" in many.message
    assert hub.settled("one").state is StepState.SUCCEEDED


def test_the_sum_is_not_looked_at_while_a_measured_step_runs(run: Run, no_groups: None) -> None:
    def measured(ctx: Any) -> None:
        ctx.events.wait("full")
        ctx.stopping.wait(3.0)  # several times as long as between two looks

    bench = Bench()
    bench.step("measured", measured, CTX, measured=True)
    bench.step("many", hold, CTX, 3, LIMIT // 2)
    hub = run(bench, resources=Resources(memory=LIMIT))
    assert hub.settled("measured").state is StepState.SUCCEEDED
    many = hub.settled("many")
    assert many.reason is Reason.OUT_OF_MEMORY  # from then on it is
    assert (many.ended or 0.0) >= (hub.settled("measured").ended or 0.0) > 0.0


# --- what both have in common -----------------------------------------------------------------------------------------


def test_who_asks_for_no_limit_has_none_and_is_told_nothing(run: Run) -> None:
    bench = Bench()
    bench.step("limits", lambda: list(resource.getrlimit(resource.RLIMIT_DATA)))
    hub = run(bench)
    assert hub.value("limits") == list(resource.getrlimit(resource.RLIMIT_DATA))
    assert hub.bodies("log", Lane.BULK) == []


def test_a_system_that_can_hold_no_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(cgroups, "parent", lambda *args, **kwargs: None)
    limits = Limits(Resources(memory="1 GiB", cpus=2))
    assert limits.of_process is None
    assert limits.told().startswith("Memory: 1 GiB is not held: this system has no way for it. CPUs: 2, as so many")


class Tree:
    """A process's view of the hierarchy, made of files."""

    def __init__(self, folder: Path, own: str, root: str = "/") -> None:
        self.proc, self.top = folder / "proc", folder / "groups"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(f"4:memory:/elsewhere\n0::{own}\n")
        (self.proc / "self" / "mountinfo").write_text(
            f"30 1 0:2 / /proc rw - proc proc rw\n31 1 0:3 {root} {self.top} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
        )
        self.top.mkdir()

    def add(self, path: str, *, gives: str = "", procs: str = "", root: bool = False, **files: str) -> Path:
        folder = self.top / path
        folder.mkdir(parents=True, exist_ok=True)
        files = {"cgroup.controllers": "cpu memory", "cgroup.subtree_control": gives, "cgroup.procs": procs, **files}
        if not root:
            files["cgroup.type"] = "domain"
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder

    def parent(self) -> Path | None:
        return cgroups.parent(proc=self.proc)


def test_the_nearest_group_that_gives_limits_to_those_below_is_taken(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "/user.slice/app.slice/shell.scope")
    tree.add("", gives="cpu memory", root=True)
    tree.add("user.slice", gives="cpu memory")
    wanted = tree.add("user.slice/app.slice", gives="cpu memory")
    tree.add("user.slice/app.slice/shell.scope", procs="1\n2\n")
    assert tree.parent() == wanted


def test_nothing_is_taken_above_a_group_that_has_a_limit_itself(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "/system.slice/agent.service")
    tree.add("", gives="memory", root=True)
    tree.add("system.slice", gives="memory")
    tree.add("system.slice/agent.service", procs="1\n2\n", **{"pids.max": "4000"})
    assert tree.parent() is None


def test_the_own_group_is_taken_when_nobody_else_is_in_it(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "/one.scope")
    tree.add("", root=True, **{"cgroup.controllers": ""})
    own = tree.add("one.scope", procs=f"{os.getpid()}\n")
    assert tree.parent() == own
    (own / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    assert tree.parent() is None


def test_what_is_outside_of_the_namespace_or_of_the_mount_is_not_looked_for(tmp_path: Path) -> None:
    assert Tree(tmp_path / "a", "/../other").parent() is None
    assert Tree(tmp_path / "b", "/elsewhere", root="/machine").parent() is None
    tree = Tree(tmp_path / "c", "/machine", root="/machine")
    assert tree.parent() is None
    top = tree.add("", gives="memory")
    assert tree.parent() == top


@pytest.mark.parametrize(
    ("count", "said"), [(96 << 20, "96 MiB"), (1 << 30, "1 GiB"), (1536, "1.5 KiB"), (7, "7 bytes")]
)
def test_a_size_is_told_as_people_write_it(count: int, said: str) -> None:
    assert size(count) == said


def test_an_executor_on_another_system_says_so_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert main(["run", str(tmp_path)]) == 1
    assert "runs on Linux so far, and this node is darwin. Run it in a container" in capsys.readouterr().err
