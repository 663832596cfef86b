"""The executor as a process, over the pipe, with real children: how steps end, what they may ask, what is left behind.

Functions of this module travel by value: the executor cannot import it.
"""

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
from fieldlab_common.context import CommandFailed
from fieldlab_common.deployment import Background, Condition, Need, On, Repeat, Retry
from fieldlab_common.environment import Resources
from fieldlab_common.events import DEPLOYMENT, Member
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_executor import zipapp

from .hub import CTX, ITEM, Bench, Executor, Hub, Reference, gone, value_of

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked ahead on Linux")

Run = Callable[..., Hub]
Launch = Callable[..., Executor]


def after(name: str, on: On = On.SUCCESS, data: bool = True) -> tuple[Need, ...]:
    return (Need(step=name, on=on, data=data),)


class Odd:
    """Not data, but it can be pickled."""

    def __init__(self, number: int) -> None:
        self.number = number


# --- values -----------------------------------------------------------------------------------------------------------


def test_a_chain_hands_values_on_and_reports_them_in_order(run: Run) -> None:
    bench = Bench()
    bench.step("one", lambda: {"n": [1, 2]})
    bench.step("two", lambda x: x + 1, value_of("one", "n", 1), needs=after("one"))
    hub = run(bench)
    assert hub.value("two") == 3
    kinds = [r.kind for r in next(iter(hub.records.values()))]
    assert kinds[0] == "started"
    assert kinds[-1] == "ended"
    assert hub.ended.state is DeploymentState.SUCCEEDED


def test_what_is_no_data_reaches_the_next_step_as_it_was(run: Run) -> None:
    bench = Bench()
    bench.step("one", lambda: Odd(7))
    bench.step("two", lambda odd: odd.number, value_of("one"), needs=after("one"))
    hub = run(bench)
    assert hub.value("two") == 7
    assert hub.settled("one").value.format == "pickle"


def test_a_large_value_travels_as_an_artifact_and_to_the_next_step_through_a_file(run: Run) -> None:
    bench = Bench()
    bench.step("big", lambda: "x" * 1_000_000)
    bench.step("size", len, value_of("big"), needs=after("big"))
    hub = run(bench)
    reference = hub.settled("big").value
    assert hub.value("size") == 1_000_000
    assert hub.stored[reference.sha256] == b'"' + b"x" * 1_000_000 + b'"'


def test_the_node_and_a_files_path_are_filled_in(run: Run) -> None:
    bench = Bench()
    digest = bench.blobs.put(b"weights")
    read = lambda site, path: (site, path.endswith("/w.bin"), open(path).read())  # noqa: E731, SIM115
    bench.step("read", read, Reference("node", "site"), Reference("file", digest, "w.bin"), files=(digest,))
    assert run(bench).value("read") == ("lab", True, "weights")


def test_more_steps_than_are_forked_or_handed_over_at_once_all_run(run: Run) -> None:
    bench = Bench()
    for number in range(150):
        bench.step(f"s{number}", lambda: None)
    assert run(bench).ended.state is DeploymentState.SUCCEEDED


def test_a_cancel_takes_back_the_steps_that_wait_for_a_process(launch: Launch) -> None:
    bench = Bench()
    for number in range(400):
        bench.step(f"s{number}", lambda: threading.Event().wait())
    executor = launch(bench)
    executor.hub.wait(lambda: executor.hub.bodies("step"), "the first step")
    executor.hub.cancel()
    executor.wait()
    assert executor.hub.ended.state is DeploymentState.CANCELLED
    assert {executor.hub.settled(f"s{number}").state for number in range(400)} == {StepState.CANCELLED}


def test_a_fan_out_gives_each_iteration_its_item(run: Run) -> None:
    bench = Bench()
    bench.step("list", lambda: {"items": [10, Odd(1), "c"]})
    bench.step("each", lambda item: repr(type(item).__name__), ITEM, over="list", over_path=("items",))
    bench.step("all", lambda values: values, value_of("each"), needs=after("each"))
    assert run(bench).value("all") == ["'int'", "'Odd'", "'str'"]


def test_a_repeated_step_ends_when_its_condition_says_so(run: Run) -> None:
    bench = Bench()

    def count(ctx):
        ctx.store["n"] = ctx.store.get("n", 0) + 1
        return ctx.store["n"]

    bench.step("count", count, CTX, repeat=Repeat(until=bench.code(lambda value: value == 3)))
    bench.step("all", lambda values: values, value_of("count"), needs=after("count"))
    assert run(bench).value("all") == [1, 2, 3]


def test_a_condition_that_is_false_skips_the_step_and_one_that_raises_fails_it(run: Run) -> None:
    bench = Bench()
    bench.step("value", lambda: 1)
    bench.step("no", lambda: 1, when=Condition(step="value", code=bench.code(lambda v: v > 1)))
    bench.step("bad", lambda: 1, when=Condition(step="value", code=bench.code(lambda v: v.nothing)))
    hub = run(bench)
    assert hub.settled("no").reason is Reason.CONDITION
    assert hub.settled("bad").state is StepState.FAILED
    assert "AttributeError" in hub.settled("bad").error


class Absent:
    """Pickles as a function of a module that the node does not have."""

    def __call__(self) -> None: ...

    def __reduce__(self) -> tuple[object, ...]:
        return __import__, ("not_there",)


# --- shared workers ---------------------------------------------------------------------------------------------------


def shared(bench: Bench, name: str, function: Callable[..., object], *args: object, **spec: object) -> None:
    bench.step(name, function, *args, isolation="shared", **spec)


def test_shared_steps_run_one_after_another_in_warm_workers_and_what_they_print_stays_theirs(run: Run) -> None:
    bench = Bench()

    def speak(word: str, before: object = None) -> int:
        print(word)
        os.write(2, f"{word} raw\n".encode())
        return os.getpid()

    shared(bench, "a", speak, "one")
    shared(bench, "b", speak, "two", value_of("a"), needs=after("a"))
    shared(bench, "c", speak, "three", value_of("b"), needs=after("b"))
    hub = run(bench)
    assert len({hub.value(name) for name in "abc"}) == 1
    assert [hub.logs(name) for name in "abc"] == ["one\n", "two\n", "three\n"]
    assert [hub.logs(name, "stderr") for name in "abc"] == ["one raw\n", "two raw\n", "three raw\n"]


def test_each_shared_step_has_its_own_folder_variables_and_usage(run: Run) -> None:
    bench = Bench()

    def place(burn: bool, before: object = None) -> tuple[str, str | None]:
        os.environ["LEFT"] = "over"
        assert not os.listdir(".")
        Path("left").touch()
        if burn:
            sum(range(5_000_000))
        return os.getcwd(), os.environ.get("MINE")

    shared(bench, "a", place, True, env={"MINE": "a"})
    shared(bench, "b", lambda burn, before: (*place(burn), os.environ["LEFT"]), False, value_of("a"), needs=after("a"))
    shared(bench, "c", lambda before: ("LEFT" in os.environ, os.getcwd()), value_of("a"), needs=after("a"))
    hub = run(bench)
    (folder, mine), (other, none, _) = hub.value("a"), hub.value("b")
    assert mine == "a"
    assert none is None
    assert folder != other
    assert hub.value("c")[0] is False
    assert hub.settled("a").usage.cpu > hub.settled("c").usage.cpu


def test_the_time_of_shared_steps_is_not_taken_for_the_executors_own(run: Run) -> None:
    bench = Bench()

    def burn(ctx, before=None):
        ctx.events.send("here")
        ctx.events.wait("here", count=4, timeout=30)  # all four at once: more workers than places, some are let go
        sum(range(15_000_000))

    for number in range(4):
        shared(bench, f"first{number}", burn, CTX)
    shared(
        bench, "last", lambda: sum(range(30_000_000)), needs=tuple(Need(step=f"first{number}") for number in range(4))
    )
    hub = run(bench, resources=Resources(cpus=1))
    used = sum(hub.settled(f"first{number}").usage.cpu for number in range(4))
    assert used > 0.05
    assert hub.ended.cpu > 0


def test_a_shared_step_that_dies_takes_no_other_with_it(run: Run) -> None:
    bench = Bench(stop_on_failure=False)
    shared(bench, "die", lambda: os.kill(os.getpid(), signal.SIGKILL))
    shared(bench, "leave", lambda: os._exit(3))
    for number in range(8):
        shared(bench, f"s{number}", lambda: "well")
    hub = run(bench)
    assert hub.settled("die").reason is Reason.SIGNAL
    assert hub.settled("leave").reason is Reason.EXITED
    assert [hub.value(f"s{number}") for number in range(8)] == ["well"] * 8


def test_a_shared_step_that_takes_too_long_ends_and_those_behind_it_go_on(run: Run) -> None:
    bench = Bench(stop_on_failure=False)
    shared(bench, "slow", lambda: threading.Event().wait(), timeout=0.3)
    shared(
        bench, "next", lambda status: status, Reference("step", "slow", "status", ()), needs=after("slow", On.ALWAYS)
    )
    hub = run(bench)
    assert hub.settled("slow").reason is Reason.TIMEOUT
    assert hub.value("next") == "failed"


def test_a_shared_step_that_leaves_a_process_or_a_thread_ends_its_worker(run: Run) -> None:
    bench = Bench()

    def spawn() -> tuple[int, int]:
        left = subprocess.Popen(["sleep", "600"], start_new_session=True)
        return os.getpid(), left.pid

    def start(before: object) -> int:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return os.getpid()

    shared(bench, "process", spawn)
    shared(bench, "thread", start, value_of("process"), needs=after("process"))
    shared(bench, "last", lambda before: os.getpid(), value_of("thread"), needs=after("thread"))
    hub = run(bench)
    (first, left), second, third = hub.value("process"), hub.value("thread"), hub.value("last")
    assert len({first, second, third}) == 3
    assert gone([left], 2.0) == []


def test_shared_steps_that_wait_for_one_another_do_not_keep_each_other_from_running(run: Run) -> None:
    bench = Bench()
    for number in range(6):
        shared(bench, f"wait{number}", lambda ctx: ctx.events.wait("go", timeout=30)[0].data, CTX)
    shared(bench, "send", lambda ctx: ctx.events.send("go", 7), CTX)
    hub = run(bench, resources=Resources(cpus=1))
    assert [hub.value(f"wait{number}") for number in range(6)] == [7] * 6


def test_a_worker_whose_step_used_its_context_is_used_again(run: Run) -> None:
    bench = Bench()

    def use(ctx: object, before: object = None) -> tuple[int, bool]:
        stopped = ctx.stopping.is_set()  # type: ignore[attr-defined]
        ctx.store["n"] = ctx.store.get("n", 0) + 1  # type: ignore[attr-defined]
        return os.getpid(), stopped

    shared(bench, "a", use, CTX)
    shared(bench, "b", use, CTX, value_of("a"), needs=after("a"))
    hub = run(bench)
    assert hub.value("a") == hub.value("b")


def test_a_cancel_ends_shared_steps_and_idle_workers(launch: Launch) -> None:
    bench = Bench()
    shared(bench, "pid", os.getpid)
    shared(
        bench,
        "sleep",
        lambda ctx, pid: (ctx.log.warning("up"), threading.Event().wait()),
        CTX,
        value_of("pid"),
        needs=after("pid"),
    )
    executor = launch(bench)
    executor.hub.wait(lambda: "up" in executor.hub.logs("sleep", "log"), "the step's log")
    executor.hub.cancel()
    executor.wait()
    assert executor.hub.settled("sleep").state is StepState.CANCELLED
    assert gone([executor.hub.value("pid")], 2.0) == []


def test_conditions_of_shared_steps_are_asked_in_workers(run: Run) -> None:
    bench = Bench()
    shared(bench, "a", lambda: os.getpid())
    shared(
        bench,
        "b",
        lambda: "ran",
        when=Condition(step="a", code=bench.code(lambda value: value == os.getpid())),
        needs=after("a"),
    )
    assert run(bench, resources=Resources(cpus=1)).value("b") == "ran"


# --- failures ---------------------------------------------------------------------------------------------------------


def wants_too_much():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    return len(b"x" * (2 << 30))


def kills_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def raises():
    raise ValueError("no such luck")


class Rude(Exception):
    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


def raises_rudely():
    raise Rude


def raises_command_failed():
    raise CommandFailed("false ended with code 1.", exit_code=1)


def raises_what_cannot_be_pickled():
    raise ValueError(threading.Lock(), lambda: None)


def write_to_the_supervisor(data):
    """What no task should do; something else than our code may hold the descriptor, though."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            socket.socket(fileno=os.dup(int(name))).send(data)


def gives_half_a_result():
    write_to_the_supervisor(struct.pack("!II", 100, 100) + b"{}")
    os._exit(0)


def gives_no_result():
    write_to_the_supervisor(b"\xff" * 100)
    signal.pause()


def floods():
    raise ValueError("x" * 1_000_000)


@pytest.mark.parametrize(
    ("function", "reason", "text"),
    [
        (raises, Reason.RAISED, "ValueError: no such luck"),
        (raises_rudely, Reason.RAISED, "its text cannot be had"),
        (floods, Reason.RAISED, "ValueError: xxx"),
        (raises_command_failed, Reason.EXIT_CODE, "false ended with code 1"),
        (wants_too_much, Reason.OUT_OF_MEMORY, "MemoryError"),
        (kills_itself, Reason.SIGNAL, "SIGKILL"),
        (lambda: os._exit(0), Reason.EXITED, "exit code 0"),
        (lambda: sys.exit(3), Reason.EXITED, "exit code 3"),
        (lambda: sys.exit("enough"), Reason.EXITED, "exit code 1"),
        (lambda: {"lock": threading.Lock()}, Reason.BAD_RESULT, "'lock' is a _thread.lock"),
        (raises_what_cannot_be_pickled, Reason.RAISED, "ValueError: (<unlocked _thread.lock"),
        (gives_half_a_result, Reason.BAD_RESULT, "exit code 0 amid its result: 10 bytes came"),
        (gives_no_result, Reason.BAD_RESULT, "is no message"),
    ],
)
def test_a_step_that_ends_badly_has_failed_for_its_reason(
    run: Run, function: Callable[[], object], reason: Reason, text: str
) -> None:
    bench = Bench()
    bench.step("bad", function)
    ended = run(bench).settled("bad")
    assert ended.state is StepState.FAILED
    assert ended.reason is reason
    assert text in ended.message
    assert len(ended.error) <= 70_000


def test_a_traceback_names_the_users_line_and_not_the_executors(run: Run) -> None:
    bench = Bench()
    bench.step("bad", raises)
    error = run(bench).settled("bad").error
    assert "in raises" in error
    assert "fieldlab_executor" not in error


def crashes():
    ctypes.string_at(0)


def leaves_a_word():
    print("the reason", file=sys.stderr)
    os._exit(3)


def hangs():
    signal.pause()


@pytest.mark.parametrize(
    ("function", "timeout", "reason", "error"),
    [
        (crashes, None, Reason.SIGNAL, "in crashes"),
        (hangs, 2.0, Reason.TIMEOUT, "in hangs"),
        (leaves_a_word, None, Reason.EXITED, "the reason"),
    ],
)
def test_a_step_that_ends_suddenly_leaves_where_it_was_or_what_it_said(
    run: Run, function: Callable[[], object], timeout: float | None, reason: Reason, error: str
) -> None:
    bench = Bench()
    bench.step("bad", function, timeout=timeout)
    ended = run(bench).settled("bad")
    assert ended.reason is reason
    assert error in ended.error


def test_code_that_cannot_be_loaded_says_what_to_do(run: Run) -> None:
    bench = Bench()
    bench.step("bad", Absent())
    ended = run(bench).settled("bad")
    assert ended.reason is Reason.LOAD_FAILED
    assert "No module named 'not_there'" in ended.message
    assert "packages=" in ended.message


def test_a_failed_attempt_is_tried_again_if_its_condition_agrees(run: Run) -> None:
    bench = Bench()

    def second_time(ctx):
        if ctx.attempt < 2:
            raise ValueError("again")
        return ctx.attempt

    bench.step("try", second_time, CTX, retry=Retry(times=3, condition=bench.code(lambda text: "again" in text)))
    assert run(bench).value("try") == 2


def test_an_attempt_that_takes_too_long_is_ended(run: Run) -> None:
    bench = Bench()
    bench.step("slow", signal.pause, timeout=0.3)
    assert run(bench).settled("slow").reason is Reason.TIMEOUT


def test_a_claim_that_is_anothers_ends_quietly_and_does_nothing(launch: Launch) -> None:
    bench = Bench()
    bench.step("one", raises)
    hub = Hub(bench)
    hub.refuses = True
    executor = launch(bench, hub=hub)
    assert executor.wait() == 3
    assert not any(hub.records.values())


# --- what a task may ask ----------------------------------------------------------------------------------------------


def test_output_is_kept_by_step_and_stream(run: Run) -> None:
    bench = Bench()

    def talk(ctx):
        print("out")
        print("grüße", file=sys.stderr)
        ctx.log.warning("careful")
        subprocess.run(["echo", "from a command"], check=True)
        print("no newline", end="")

    bench.step("talk", talk, CTX)
    bench.step("flood", lambda: print("x" * 79 + "\n", end="") or ([print("y" * 79) for _ in range(5000)] and None))
    hub = run(bench)
    assert set(hub.logs("talk").split("\n")) == {"out", "from a command", "no newline"}
    assert hub.logs("talk", "stderr") == "grüße\n"
    assert hub.logs("talk", "log") == "WARNING careful\n"
    assert len(hub.logs("flood")) == 5001 * 80


def test_what_a_dying_step_had_printed_is_kept(run: Run) -> None:
    bench = Bench()
    bench.step("dies", lambda: print("last words") or os.kill(os.getpid(), signal.SIGKILL))
    assert run(bench).logs("dies") == "last words\n"


def test_events_of_the_same_executor_are_seen_once_and_those_of_others_in_order(run: Run) -> None:
    bench = Bench()

    def talk(ctx):
        for number in range(3):
            ctx.events.send("tick", number)
        return ctx.events.count("tick"), ctx.events.latest("tick").data, ctx.events.latest("none")

    def listen(ctx):
        found = ctx.events.wait("tick", count=3, where=lambda e: True, timeout=30)
        ctx.events.send("heard")
        ctx.events.wait("go", timeout=30)
        return [event.data for event in found], ctx.events.count("tick")

    bench.step("listen", listen, CTX)
    bench.step("talk", talk, CTX)
    bench.step("go", lambda ctx: ctx.events.wait("heard", timeout=30) and ctx.events.send("go"), CTX)
    hub = run(bench)
    assert hub.value("listen") == ([0, 1, 2], 3)
    assert hub.value("talk") == (3, 2, None)
    assert [e.data for e in hub.events if e.name == "tick"] == [0, 1, 2]


def test_an_event_from_outside_opens_a_wait(launch: Launch) -> None:
    bench = Bench()

    def gate(ctx):
        ctx.events.send("waiting")
        return ctx.events.wait("go", timeout=30)[0].data

    bench.step("gate", gate, CTX)
    executor = launch(bench)
    executor.hub.event("waiting")
    executor.hub.send("go", {"rate": 10})
    assert executor.wait() == 0
    assert executor.hub.value("gate") == {"rate": 10}


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda ctx: ctx.events.wait("never", timeout=0.05), "0 of 1 events 'never' came within"),
        (lambda ctx: ctx.barrier("start", 2, timeout=0.05), "did not fill within"),
        (lambda ctx: ctx.barrier("start", 2), "would wait for ever"),
        (lambda ctx: ctx.artifact("../escape"), "cannot be the name of an artifact"),
        (lambda ctx: ctx.events.send("x", "y" * 70_000), "at most 65536"),
        (lambda ctx: ctx.events.send("fieldlab.deployment", {}), "cannot be the name of an event"),
        (lambda ctx: ctx.events.send("x", {1, 2}), "is not JSON"),
        (lambda ctx: ctx.store["nothing"], "KeyError"),
        (lambda ctx: ctx.results["nothing"], "There is no step 'nothing'"),
    ],
)
def test_a_question_that_cannot_be_answered_is_an_error_that_says_why(
    run: Run, ask: Callable[..., object], said: str
) -> None:
    bench = Bench()
    bench.step("ask", ask, CTX)
    assert said in run(bench).settled("ask").message


def test_a_barrier_opens_for_all_its_parties(run: Run) -> None:
    bench = Bench()
    for name in ("a", "b", "c"):
        bench.step(name, lambda ctx: ctx.barrier("start", 3, timeout=30), CTX)
    assert run(bench).ended.state is DeploymentState.SUCCEEDED


def test_a_barrier_whose_party_has_ended_breaks_and_names_it(launch: Launch) -> None:
    bench = Bench()
    bench.step("come", lambda ctx: ctx.events.send("here") or ctx.barrier("start", "all"), CTX)
    members = (Member(deployment="pi-1"), Member(deployment="pi-2"))
    executor = launch(bench, members=members)
    executor.hub.event("here")
    executor.hub.send(DEPLOYMENT, {"deployment": "pi-2", "state": "failed"})
    assert executor.wait() == 0
    ended = executor.hub.settled("come")
    assert ended.reason is Reason.BARRIER_BROKEN
    assert "pi-2 (failed)" in ended.message


def test_artifacts_are_collected_whether_the_step_ends_well_or_badly(run: Run) -> None:
    bench = Bench()

    def write(ctx, end):
        with open(ctx.artifact("out/trace.csv"), "w") as file:
            file.write(end)
        ctx.artifact("never-written")
        if end == "badly":
            os.kill(os.getpid(), signal.SIGKILL)

    bench.step("well", write, CTX, "well")
    bench.step("bad", write, CTX, "badly")
    hub = run(bench)
    assert {(a.step, a.name): hub.stored[a.sha256] for a in hub.bodies("artifact")} == {
        ("well", "out/trace.csv"): b"well",
        ("bad", "out/trace.csv"): b"badly",
    }
    assert {(a.step, a.name) for a in hub.bodies("artifact_lost")} == {
        ("well", "never-written"),
        ("bad", "never-written"),
    }


def test_a_background_step_runs_while_others_do_and_is_then_asked_to_stop(run: Run) -> None:
    bench = Bench()

    def serve(ctx):
        ctx.store["up"] = True
        ctx.ready()
        ctx.stopping.wait()
        return "served"

    bench.step("server", serve, CTX, background=Background(announces=True))
    bench.step("client", lambda ctx: ctx.store["up"], CTX, during=("server",))
    hub = run(bench)
    assert hub.value("client") is True
    assert hub.settled("server").reason is Reason.STOPPED


def test_the_context_is_for_the_steps_own_process(run: Run) -> None:
    bench = Bench()

    def forks(ctx):
        pid = os.fork()
        if not pid:
            try:
                ctx.events.send("from a fork")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    bench.step("forks", forks, CTX)
    hub = run(bench)
    assert hub.ended.state is DeploymentState.SUCCEEDED
    assert hub.events == []


# --- what is left behind ----------------------------------------------------------------------------------------------

KILL_BOUND = 2.0  # seconds that anything may outlive a killed supervisor or spawner: what is promised

HIDE = "import os, signal; signal.signal(15, signal.SIG_IGN); os.setsid(); os.write(1, b'.'); signal.pause()"


def hide(ctx):
    """Start what is hard to find: a program in a session of its own, one whose parent is gone, and a bare fork."""
    program = subprocess.Popen([sys.executable, "-c", HIDE], stdout=subprocess.PIPE)
    program.stdout.read(1)
    nested = f"import subprocess; p = subprocess.Popen([{sys.executable!r}, '-c', {HIDE!r}], stdout=subprocess.PIPE)"
    orphan = subprocess.run(
        [sys.executable, "-c", nested + "; p.stdout.read(1); print(p.pid)"], stdout=subprocess.PIPE, check=True
    )
    read, write = os.pipe()
    if not os.fork():
        if not os.fork():
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.write(write, str(os.getpid()).encode())
            signal.pause()
        os._exit(0)
    os.wait()
    return [os.getpid(), program.pid, int(orphan.stdout), int(os.read(read, 20))]


def hide_and_stay(ctx):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctx.events.send("pids", hide(ctx))
    while True:
        signal.pause()


def test_what_a_step_leaves_behind_is_ended_before_the_next_begins(run: Run) -> None:
    bench = Bench()

    def look(pids):
        return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]

    bench.step("hide", hide, CTX)
    bench.step("look", look, value_of("hide"), needs=after("hide"))
    hub = run(bench)
    assert hub.value("look") == []
    assert "3 processes that the step left behind" in hub.logs("hide", "executor")


def test_what_another_step_started_is_left_alone(run: Run) -> None:
    bench = Bench()

    def stay(ctx):
        pids = hide(ctx)
        ctx.events.send("hidden")
        ctx.events.wait("other ended", timeout=30)
        return [os.path.exists(f"/proc/{pid}") for pid in pids]

    bench.step("stay", stay, CTX)
    bench.step("other", lambda ctx: ctx.events.wait("hidden", timeout=30) and hide(ctx), CTX)
    bench.step("then", lambda ctx: ctx.events.send("other ended"), CTX, needs=after("other", data=False))
    assert run(bench).value("stay") == [True] * 4


def test_a_cancel_leaves_no_process_alive(launch: Launch) -> None:
    bench = Bench()
    bench.step("stay", hide_and_stay, CTX)
    executor = launch(bench)
    pids = executor.hub.event("pids")
    executor.hub.cancel("enough")
    assert executor.wait() == 0
    assert gone(pids, 0.0) == []
    assert executor.hub.ended.state is DeploymentState.CANCELLED
    cancelled = executor.hub.bodies("cancel")[0]
    assert cancelled.reason == "enough"
    assert cancelled.killed >= 4
    assert cancelled.survivors == ()


either_isolation = pytest.mark.parametrize("isolation", ["process", "shared"])


@either_isolation
def test_a_killed_supervisor_takes_everything_with_it(launch: Launch, isolation: str) -> None:
    bench = Bench()
    bench.step("stay", hide_and_stay, CTX, isolation=isolation)
    executor = launch(bench)
    pids = executor.hub.event("pids")
    executor.signal(signal.SIGKILL)
    assert gone(pids, KILL_BOUND) == []


@either_isolation
def test_a_killed_spawner_fails_its_steps_and_the_next_attempt_runs(launch: Launch, isolation: str) -> None:
    bench = Bench()

    def first_time(ctx):
        if ctx.attempt == 1:
            ctx.events.send("pids", [*hide(ctx), os.getppid()])
            signal.pause()
        return ctx.attempt

    bench.step("stay", first_time, CTX, retry=Retry(times=1), isolation=isolation)
    executor = launch(bench)
    *pids, spawner = executor.hub.event("pids")
    os.kill(spawner, signal.SIGKILL)
    assert gone(pids, KILL_BOUND) == []
    assert executor.wait() == 0
    assert executor.hub.value("stay") == 2


def test_sigterm_stops_the_steps_reports_everything_and_leaves(launch: Launch) -> None:
    bench = Bench()

    def stay(ctx):
        with open(ctx.artifact("partial"), "w") as file:
            file.write("so far")
        print("before the end", flush=True)
        ctx.events.send("pids", hide(ctx))
        signal.pause()

    bench.step("before", lambda: 41)
    bench.step("stay", stay, CTX, needs=after("before"))
    executor = launch(bench)
    pids = executor.hub.event("pids")
    executor.signal(signal.SIGTERM)
    assert executor.wait() == 0
    assert gone(pids, 0.0) == []
    hub = executor.hub
    assert hub.ended.reason is Reason.TERMINATED
    assert hub.settled("stay").state is StepState.CANCELLED
    assert hub.value("before") == 41
    assert hub.logs("stay") == "before the end\n"
    assert [hub.stored[a.sha256] for a in hub.bodies("artifact")] == [b"so far"]


# --- the one file -----------------------------------------------------------------------------------------------------


def test_the_file_runs_alone_and_gives_tasks_the_facade(launch: Launch, tmp_path: Path) -> None:
    bench = Bench()

    def imports():
        import fieldlab as fl

        try:
            fl.run(None)
        except fl.errors.UnsupportedError as error:
            return fl.TaskContext.__name__, fl.__file__.split("/")[-4], error.code

    bench.step("imports", imports)
    built = zipapp.build(tmp_path / "fieldlab.pyz")
    executor = launch(bench, command=(sys.executable, "-I", "-S", str(built)))
    assert executor.wait() == 0
    assert executor.hub.value("imports") == ("TaskContext", "executables", "unsupported")


def test_a_module_of_the_client_can_be_imported_in_a_task_and_says_what_it_is_for_when_it_is_used(run: Run) -> None:
    def imports():
        import fieldlab.artifacts
        import fieldlab.contrib.netunicorn
        from fieldlab.results import StepState as State
        from fieldlab.runs import Run

        class Followed(Run):
            def later(self) -> "Run | None": ...

        return State.__name__, Followed.__bases__ == (object,), repr(fieldlab.artifacts.Artifacts)

    def misuses():
        from fieldlab.runs import Run

        Run()

    bench = Bench()
    bench.step("imports", imports)
    bench.step("misuses", misuses)
    hub = run(bench)
    assert hub.value("imports") == ("StepState", True, "<fieldlab.artifacts.Artifacts, for the client only>")
    assert "fieldlab.runs.Run is for the client" in hub.settled("misuses").message
    assert "in misuses" in hub.settled("misuses").error


def test_the_command_packs_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "fieldlab_executor", "pack", str(tmp_path / "new" / "fieldlab.pyz")]
    subprocess.run(command, check=True)
    assert (tmp_path / "new" / "fieldlab.pyz").read_bytes() == zipapp.build(tmp_path / "b.pyz").read_bytes()


def test_equal_packages_give_equal_bytes(tmp_path: Path) -> None:
    first, second = zipapp.build(tmp_path / "a.pyz"), zipapp.build(tmp_path / "b.pyz")
    assert first.read_bytes() == second.read_bytes()


FEW_FILES = ("/bin/sh", "-c", 'ulimit -n 160 && exec "$@"', "sh", sys.executable, "-P", "-m", "fieldlab_executor")


@pytest.mark.parametrize(
    ("width", "command", "resources", "said"),
    [
        (100, FEW_FILES, None, "room for 21 processes of steps at a time, for want of open files (ulimit -n is 160)"),
        (20, (), Resources(memory="64 MiB"), "room for 12 processes of steps at a time, for want of memory"),
    ],
    ids=["descriptors", "memory"],
)
def test_a_fan_out_that_is_wider_than_there_is_room_for_waits_for_its_turn_and_says_so(
    launch: Launch, width: int, command: tuple[str, ...], resources: Resources | None, said: str
) -> None:
    bench = Bench()
    for number in range(width):
        bench.step(f"w{number}", lambda ctx: ctx.events.wait("go", timeout=60) and None, CTX)
    executor = launch(bench, command=command, resources=resources)
    hub = executor.hub
    hub.wait(lambda: "There is room" in hub.logs("", "executor"), "the remark")
    hub.send("go")
    assert executor.wait() == 0
    assert {hub.settled(f"w{number}").state for number in range(width)} == {StepState.SUCCEEDED}
    assert said in hub.logs("", "executor")


def test_steps_have_the_limit_of_descriptors_that_the_executor_was_started_with(run: Run) -> None:
    bench = Bench()
    bench.step("limit", lambda: list(resource.getrlimit(resource.RLIMIT_NOFILE)))
    assert run(bench).value("limit") == list(resource.getrlimit(resource.RLIMIT_NOFILE))
