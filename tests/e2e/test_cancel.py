"""Cancelling ends everything: also what sleeps, hides in sessions of its own, or does not listen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import fieldlab as fl
import pytest

FOREVER = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"

PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {FOREVER!r}], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid)
"""


@fl.task
def sleeps(*, ctx: fl.TaskContext) -> None:
    ctx.events.send("pids", [os.getpid()])
    signal.pause()


@fl.task
def ignores_sigterm(*, ctx: fl.TaskContext) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctx.events.send("pids", [os.getpid()])
    while True:
        signal.pause()


@fl.task
def hides_grandchildren(*, ctx: fl.TaskContext) -> None:
    """A child in a session of its own; a grandchild in another, whose parent is gone; all deaf to SIGTERM."""
    child = subprocess.Popen([sys.executable, "-c", FOREVER], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.readline()
    orphan = int(subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, check=True).stdout)
    ctx.events.send("pids", [os.getpid(), child.pid, orphan])
    signal.pause()


@pytest.mark.parametrize("where", ["here", "director"])
def test_a_cancelled_run_ends_as_cancelled_and_no_process_of_it_is_alive(
    client: fl.Client, name: str, where: str, alive: Callable[[int], bool]
) -> None:
    with fl.DAG("stubborn") as dag:
        sleeps()
        ignores_sigterm()
        hides_grandchildren()
        never = fl.wait_for("never").named("never")
        fl.send("after").after(never)
    exp = fl.Experiment(name).map(dag, client.nodes().take(2))
    run = client.submit(exp) if where == "director" else fl.run(exp, wait=False)
    pids = [pid for event in run.events.wait("pids", count=6, timeout=60) for pid in event.data]
    assert len(pids) == 10
    assert all(map(alive, pids))

    run.cancel(reason="wrong site")
    assert run.wait(timeout=60) is fl.ExperimentState.CANCELLED
    assert not any(map(alive, pids))
    for deployment in run.results.values():
        assert deployment.state is fl.DeploymentState.CANCELLED
        assert deployment.reason is fl.Reason.CANCELLED
        assert {step.status for step in deployment.values()} == {fl.StepState.CANCELLED}
    run.close()


def test_a_cancel_of_one_deployment_leaves_the_others_alone(client: fl.Client, name: str) -> None:
    with fl.DAG("waiting") as dag:
        fl.wait_for("go", timeout=100)
    nodes = client.nodes()
    run = client.submit(fl.Experiment(name).map(dag, [nodes["a"], nodes["b"]]))
    run.events.wait("fieldlab.deployment", count=2, where=lambda e: e.data["state"] == "running", timeout=60)
    run.cancel(deployments=["a"])
    run.events.wait("fieldlab.deployment", where=lambda e: e.data["state"] == "cancelled", timeout=60)
    run.events.send("go", "went")
    assert run.wait(timeout=60).terminal
    assert run.results["a"].state is fl.DeploymentState.CANCELLED
    assert run.results["b"]["wait_for"].value == "went"
