"""One attempt, in a process of its own: load, call, encode, answer once, and be gone.

A child is forked ahead of its job and waits for one frame. A *shared* job makes a worker of it (``worker``): if it
leaves nothing behind, the child waits for the next. It is the only place where user code runs, and the only one that
opens what users sealed. What it has to say goes over its socket: requests of the task's context while it runs
(``context``), and one result frame at the end. A child that ends without one has failed, whatever its exit code:
that is for the supervisor to say, so ``sys.exit`` and ``os._exit`` need no care here.

Why it is written as it is: a child shares its parent's memory until one of them writes, and Python writes a reference
count whenever it looks at an object. So each function, each module and each constant that is used between fork and end
is a page of memory to be copied, and these copies are most of what an empty step costs. Here are few functions, and
few things for them to look at; what is rarely needed is elsewhere.
"""

from __future__ import annotations

import _socket
import atexit
import os
import sys
from _signal import SIGCHLD, SIGTERM, getsignal  # type: ignore[import-not-found]
from _thread import _count
from gc import enable as collect_garbage
from os import O_RDONLY, _exit, chdir, close, closerange, read, stat, write
from os import open as open_file
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from sys import modules

from fieldlab_common import payload
from fieldlab_common.errors import UnpicklableError
from fieldlab_common.payload import NO_ARGUMENTS, unseal

from fieldlab_executor import ahead, frames
from fieldlab_executor.failures import MAX_MESSAGE, Failure, reason_of, say, text_of, trace
from fieldlab_executor.frames import CALL, NONE, SHARED, receive
from fieldlab_executor.given import Given, follow

TYPE_CHECKING = False  # nothing is loaded here that an empty step does not need (``spawner``)
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["Quiet", "answer", "end", "has_children", "rehearse", "serve"]

MAX_DESCRIPTOR = 1 << 16
MAX_ITEMS = 100_000
REHEARSALS = 24  # Python 3.11 settles on how it runs a function within the first 16 calls


# --- the job ---------------------------------------------------------------------------------------------------------


def _load(given: Given, what: str, sealed: bytes | str) -> Any:
    """Open sealed code or arguments, or those of a blob; every failure of it is LOAD_FAILED."""
    try:
        return unseal(sealed if type(sealed) is bytes else given.blob(str(sealed)), given.resolve)
    except Exception as error:  # it runs user code, which raises anything
        advice = ""
        if isinstance(error, ModuleNotFoundError):
            advice = f" Name the distribution that has {error.name!r} in the task's packages=[...]."
        reason = reason_of(error) if isinstance(error, MemoryError) else "load_failed"
        message = f"{what} of step {given.step!r} could not be loaded on the node: {say(error)}.{advice}"
        raise Failure(reason, message, trace(error, __file__)) from error


def _call(given: Given, warm: dict[Any, Any] | None = None) -> tuple[dict[str, Any], bytes]:
    """Run a step; the result frame. ``warm``: in a worker, the code that it has loaded."""
    try:
        if given.more:
            _enter(given, given.more)
        else:
            chdir(given.folder)
    except OSError as error:
        raise Failure(
            "load_failed", f"The step's folder {given.folder} cannot be entered: {error.strerror}."
        ) from error
    call = warm.get(given.code) if warm is not None else None
    if call is None:
        call = _load(given, "The code", given.code)
        if warm is not None:
            warm[given.code] = call
    try:
        if given.args == NO_ARGUMENTS:
            value = call()
        else:
            args, kwargs = _load(given, "An argument", given.args)
            value = call(*args, **kwargs)
    except (SystemExit, Failure):
        raise
    except BaseException as error:  # whatever user code raises is the attempt's failure
        code = getattr(error, "exit_code", getattr(error, "returncode", None))
        raise Failure(reason_of(error), say(error), trace(error, __file__), code) from error
    if value is None:
        return {}, b"null"
    try:
        return given.values.keep(value, str(given.number))
    except UnpicklableError as error:
        message = f"The result of step {given.step!r} cannot leave its process. {error}"
        raise Failure("bad_result", message[:MAX_MESSAGE]) from error


def _enter(given: Given, more: dict[str, Any]) -> None:
    """Take on the step's variables and folder. One that has a time limit says where it was when that is over."""
    if "traced" in more:
        import faulthandler

        faulthandler.register(SIGTERM, file=2, chain=True)
    if "env" in more:
        os.environ.update(more["env"])
    if "secret_env" in more:
        for name, stored in more["secret_env"].items():
            os.environ[name] = given.secret(stored)
    cwd = more.get("cwd") or ""
    try:
        os.chdir(os.path.join(given.folder, os.path.expanduser(cwd)))
    except OSError as error:
        if not cwd:
            raise
        raise Failure("load_failed", f"The step's cwd={cwd!r} cannot be entered: {error.strerror}.") from error


def _evaluate(given: Given) -> tuple[dict[str, Any], bytes]:
    """Answer a question of the machine's: a condition's truth, or a list's length and items."""
    ask = given.more or {}
    try:
        if ask["what"] == "retry_if":
            value: Any = ask["text"]
        else:
            value = follow(given.values.open_input(ask["input"]), ask["path"])
        if ask["what"] == "length":
            return _items(given, value), b""
        call = payload.unseal(given.blob(ask["code"]), given.resolve)
        return {"answer": bool(call(value))}, b""
    except SystemExit:
        raise
    except BaseException as error:  # as in _call
        raise Failure("raised", say(error), trace(error, __file__)) from error


def _items(given: Given, value: Any) -> dict[str, Any]:
    """The length of a list, and a handle for each of its items: no iteration has to open the whole list."""
    from collections.abc import Iterable, Mapping

    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"a fan-out is over a list of items, not over a {type(value).__name__}")
    items = list(value)
    if len(items) > MAX_ITEMS:
        return {"answer": len(items), "items": []}
    name = f"{given.number}-item"
    return {
        "answer": len(items),
        "items": [given.values.keep_exact(item, f"{name}{index}") for index, item in enumerate(items)],
    }


def answer(given: Given, quiet: Quiet, warm: dict[Any, Any] | None = None) -> tuple[dict[str, Any], bytes]:
    """What is to be said of the job: the header of the result frame, and its bytes. An empty header: it returned None.

    A job that calls ``sys.exit`` ends its process.
    """
    try:
        return _call(given, warm) if given.kind & CALL else _evaluate(given)
    except Failure as failure:
        return _failed(failure)
    except MemoryError as error:  # its value could not be encoded
        return _failed(Failure(reason_of(error), say(error), trace(error, __file__)))
    except SystemExit as leave:
        end(quiet)
        _exit(_exit_code(leave))


def _failed(failure: Failure) -> tuple[dict[str, Any], bytes]:
    answer = {"reason": failure.reason, "message": failure.message[:MAX_MESSAGE], "error": failure.error}
    return answer if failure.code is None else {**answer, "code": failure.code}, b""


# --- the process -----------------------------------------------------------------------------------------------------


class Quiet:
    """What an interpreter has to do at its end before any user code ran; if it has no more to do then, nothing is done.

    Running it costs more than an empty step.
    """

    __slots__ = ("_exits", "_marks", "count", "modules")

    def __init__(self) -> None:
        self._exits = _marks()[1]
        self.look()

    def look(self) -> None:
        """Take what is there now, in the parent of all steps, for what is there before any user code ran."""
        self._marks = _marks()
        self.modules = frozenset(sys.modules)
        self.count = len(sys.modules)

    def still(self) -> bool:
        """Whether user code left nothing to do: neither threads nor exit functions nor log handlers."""
        return _marks() == self._marks and self._marks[1] == self._exits


def _marks() -> tuple[int, int, int]:
    exits, handlers = atexit._ncallbacks(), 0
    if logging := sys.modules.get("logging"):
        exits, handlers = exits - 1, len(logging._handlerList)  # its own exit function does nothing without them
    return _count(), exits, handlers


def serve(given: Given, quiet: Quiet, process: int) -> NoReturn:
    """Wait for a job on the socket, do it, and end the process; after a shared job, if it can, wait for more.

    ``process`` is the id of this process.
    """
    job = receive(given.fd)
    if job is None:
        _exit(0)
    collect_garbage()
    if job[0] & SHARED:
        from fieldlab_executor import worker

        given.take(job)
        worker.serve(given, quiet)
    made, data, usage = _do(given, quiet, process, job)
    if usage is not None:
        closerange(3, given.fd)
        closerange(given.fd + 1, MAX_DESCRIPTOR)
        if not made:
            write(given.fd, NONE % usage)
            _exit(0)
        made["usage"] = usage
    given.finish(made, data)
    _exit(0)


def _do(
    given: Given, quiet: Quiet, process: int, job: frames.Job
) -> tuple[dict[str, Any], bytes, tuple[int, int] | None]:
    """Do a job and end the interpreter: what is to be said, and what the job used if nothing of it is left.

    Such a process has ended for everybody else when its descriptors are closed: no thread is left, no user code can
    run. What the kernel still has to clean up takes longer than an empty step, and need not be waited for.
    """
    given.take(job)
    made, data = answer(given, quiet)
    if len(modules) > quiet.count:
        made["loaded"] = ahead.imported(quiet.modules)
    if not (end(quiet) and _alone(process)):
        return made, data, None
    used = getrusage(RUSAGE_SELF)
    return made, data, (int(1e6 * (used[0] + used[1])), used[2])


def rehearse(root: str, inline: int, quiet: Quiet) -> None:
    """In the parent of all steps: do a job that does nothing, several times.

    What an interpreter finds out about code as it runs it, it writes down beside the code: in each child again, if it
    were not done here before, on pages that are copied for it.
    """
    ours, theirs = _socket.socketpair()
    back, process = os.getcwd(), os.getpid()
    given = Given(root, inline)
    given.fd = theirs.fileno()
    frame = frames.tell((CALL, 0, "", 1, None, payload.sample(), NO_ARGUMENTS, root, None))
    for _ in range(REHEARSALS):
        ours.send(frame)
        _, _, usage = _do(given, quiet, process, receive(given.fd))
        write(given.fd, NONE % (usage or (0, 0)))
        ours.recv(len(frame))
    os.chdir(back)
    ours.close()
    theirs.close()


def has_children() -> bool:
    """Whether this process has a child, be it alive or not."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _alone(process: int) -> bool:
    """Whether this process never had another below it, so that with it all is gone that it started."""
    if getrusage(RUSAGE_CHILDREN)[6] or getsignal(SIGCHLD):  # page faults of children that were waited for
        return False
    try:
        threads = stat("/proc/self/task")[3] - 2  # a folder for each (proc(5))
        if threads > 1:
            return False
        listed = open_file(b"/proc/self/task/%d/children" % process, O_RDONLY)
    except OSError:
        return False
    found = read(listed, 16)
    close(listed)
    return not found


def end(quiet: Quiet) -> bool:
    """What an interpreter does at its end: wait for threads, call what atexit has, write out what is buffered.

    Whether there was nothing but output.
    """
    still = quiet.still()
    if not still:
        import threading

        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
    flush(sys.stdout)
    flush(sys.stderr)
    return still


def flush(stream: Any) -> None:
    """Write out what is buffered."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):  # closed, or replaced by the user
        pass


def _exit_code(leave: SystemExit) -> int:
    if leave.code is None:
        return 0
    if isinstance(leave.code, int):
        return leave.code & 0xFF
    try:
        sys.stderr.write(f"{text_of(leave)}\n")
    except (OSError, ValueError, AttributeError):
        pass
    return 1
