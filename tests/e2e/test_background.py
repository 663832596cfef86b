"""Background steps: what they are asked, and what they may still give."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import fieldlab as fl
import pytest

ASKED = [None, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
CHILD = "import signal; signal.signal(signal.SIGUSR1, lambda *_: exit(7)); print(flush=True); signal.pause()"


@fl.task
def heeds(*, ctx: fl.TaskContext) -> str:
    stopping = ctx.stopping
    ctx.ready()
    stopping.wait()
    return "kept"


@fl.task
def passes_it_on(*, ctx: fl.TaskContext) -> int:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    stopping = ctx.stopping
    ctx.ready()
    stopping.wait()
    return child.wait()


@fl.task
def is_interrupted(*, ctx: fl.TaskContext) -> str:
    try:
        ctx.ready()
        signal.pause()
    except KeyboardInterrupt:
        return "interrupted"
    return "went on"


@fl.task
def nothing() -> int:
    return os.getpid()


@pytest.mark.parametrize("number", ASKED, ids=str)
def test_a_step_that_heeds_the_request_keeps_its_value_whatever_signal_comes_with_it(
    number: signal.Signals | None,
) -> None:
    with fl.DAG("heeding") as dag:
        for _ in range(5):
            nothing().during(fl.background(heeds(), stop=number))
    results = fl.run(dag, timeout=60)
    backgrounds = [results[name] for name in results if name.startswith("heeds")]
    assert [(step.value, step.reason) for step in backgrounds] == [("kept", fl.Reason.STOPPED)] * 5


def test_what_such_a_step_has_started_gets_the_signal() -> None:
    with fl.DAG("passing") as dag:
        nothing().during(fl.background(passes_it_on(), stop=signal.SIGUSR1))
    assert fl.run(dag, timeout=60)["passes_it_on"].value == 7


def test_a_step_that_does_not_look_is_interrupted_and_may_still_give_a_value() -> None:
    with fl.DAG("interrupted") as dag:
        nothing().during(fl.background(is_interrupted(), stop=signal.SIGINT))
    assert fl.run(dag, timeout=60)["is_interrupted"].value == "interrupted"
