"""One attempt, in a process of its own: load, call, encode, answer once, and be gone.

A child is forked ahead of its job and waits for one frame. A *shared* job makes a worker of it (``workers``): if it
leaves nothing behind, the child waits for the next. It is the only place where user code runs, and the only one that
opens what users sealed. What it has to say goes over its socket: requests of the task's context while it runs
(``context``), and one result frame at the end. A child that ends without one has failed, whatever its exit code:
that is for the supervisor to say, so ``sys.exit`` and ``os._exit`` need no care here.

Values stay on the node as files under ``values/`` or, small ones, inside the frames. A *handle* says where:
``{"j": document}``, ``{"x": file}`` with a document, ``{"a": file}`` with a document and parts, ``{"b": base64}`` or
``{"p": file}`` with a pickle, or null for None. The value of a step that is a DAG is put together of those inside:
``{"l": [handles]}``, ``{"d": {name: handle}}``.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _thread
import atexit
import base64
import contextlib
import gc
import json
import logging
import os
import resource
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from fieldlab_common import payload
from fieldlab_common.errors import FieldlabError, UnpicklableError

from fieldlab_executor import frames

if TYPE_CHECKING:
    from fieldlab_executor.context import Connection, Context

__all__ = ["HANDLE_BYTES", "Quiet", "serve"]

HANDLE_BYTES = 1024  # a larger value goes to the next step through a file
MAX_ERROR = 64 * 1024  # characters of a traceback that are kept: its beginning and its end
MAX_MESSAGE = 2000
MAX_DESCRIPTOR = 1 << 16
MAX_ITEMS = 100_000
MAX_WARM = 256  # tasks whose code a worker keeps loaded
_REASONS = {"command_failed": "exit_code", "barrier_broken": "barrier_broken"}


class _Failure(Exception):
    """The attempt failed for ``reason``; ``error`` is the traceback as text; ``code``: of a command that ended so."""

    def __init__(self, reason: str, message: str, error: str = "", code: object = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.error = reason, message, error
        self.code = code if isinstance(code, int) else None


# --- values on the node ----------------------------------------------------------------------------------------------


class Values:
    """Opens handles, and makes them."""

    def __init__(self, root: str, inline: int) -> None:
        self._folder = f"{root}/values"
        self._inline = inline
        self.kept_out: dict[str, str] = {}  # the secrets that the step got

    def open(self, handle: Mapping[str, Any] | None) -> Any:
        """The value that a handle stands for."""
        if handle is None:
            return None
        if "j" in handle:
            return payload.decode_value("json", handle["j"])
        if "x" in handle:
            return payload.decode_value("json", json.loads(self._read(handle["x"])))
        if "a" in handle:
            return payload.decode_value("parts", data=self._read_once(handle["a"]))
        if "l" in handle:
            return [self.open(one) for one in handle["l"]]
        if "d" in handle:
            return {name: self.open(one) for name, one in handle["d"].items()}
        return payload.loads_local(base64.b64decode(handle["b"]) if "b" in handle else self._read(handle["p"]))

    def open_input(self, given: Mapping[str, Any]) -> Any:
        """The value of a step; of an iterated one, the list of its iterations' values."""
        handles = given["handles"]
        if given.get("many"):
            return [self.open(handle) for handle in handles]
        return self.open(handles[0]) if handles else None

    def keep(self, value: Any, name: str) -> tuple[Any, dict[str, Any], bytes]:
        """A handle for ``value``, and what the client gets: the fields of a ValueRef and, inline, its bytes."""
        encoded = payload.encode_value(value)
        self._keep_out(encoded)
        inline = encoded.size <= (self._inline if encoded.format == "json" else self._inline * 3 // 4)
        reference: dict[str, Any] = {"format": encoded.format, "size": encoded.size, "summary": encoded.summary}
        if not inline:
            reference["file"] = f"{name}.value"
            reference["sha256"] = self._write_hashed(reference["file"], encoded)
        if not encoded.exact:
            handle: Any = self.keep_local(value, name)
        elif encoded.format == "json" and encoded.size <= HANDLE_BYTES:
            handle = {"j": encoded.json}
        else:
            file = reference.get("file") or self._write(f"{name}.value", encoded.body)
            handle = {"x" if encoded.format == "json" else "a": file}
        return handle, reference, encoded.body if inline else b""

    def _keep_out(self, encoded: payload.EncodedValue) -> None:
        if not self.kept_out:
            return
        from fieldlab_executor.secrets import Search, Secrets

        search = Search(Secrets(self.kept_out))
        encoded.write(search.feed)
        if search.found:
            raise _Failure(
                "bad_result",
                f"It holds the secret {search.found!r}, which must not leave the node. Return something else.",
            )

    def keep_local(self, value: Any, name: str) -> dict[str, Any]:
        """A handle for ``value`` that never leaves the node."""
        data = payload.dumps_local(value)
        if len(data) <= HANDLE_BYTES:
            return {"b": base64.b64encode(data).decode()}
        return {"p": self._write(f"{name}.local", data)}

    def keep_exact(self, value: Any, name: str) -> dict[str, Any]:
        """A handle for ``value`` for the node alone, as data where that gives precisely the same."""
        encoded = payload.encode_value(value)
        if encoded.exact and encoded.format == "json" and encoded.size <= HANDLE_BYTES:
            return {"j": encoded.json}
        return self.keep_local(value, name)

    def _read(self, name: str) -> bytes:
        return read_file(f"{self._folder}/{name}")

    def _read_once(self, name: str) -> bytearray:
        """The content of a file that may be large, in memory that the value is to keep."""
        path = f"{self._folder}/{name}"
        data = bytearray(os.path.getsize(path))
        with open(path, "rb", buffering=0) as file:
            view = memoryview(data)
            while view and (count := file.readinto(view)):
                view = view[count:]
        return data

    def _write_hashed(self, name: str, encoded: payload.EncodedValue) -> str:
        """Write a file without gathering its content in memory; its SHA-256."""
        import hashlib  # it brings a library with it that most steps do not need

        digest = hashlib.sha256()
        with open(f"{self._folder}/{name}", "wb") as file:

            def write(piece: Any) -> None:
                digest.update(piece)
                file.write(piece)

            encoded.write(write)
        return digest.hexdigest()

    def _write(self, name: str, data: bytes) -> str:
        with open(f"{self._folder}/{name}", "wb") as file:
            file.write(data)
        return name


def read_file(path: str) -> bytes:
    """The content of a file; less machinery than ``open`` has, for what every step does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(fd, os.fstat(fd).st_size + 1)]
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


# --- the job ---------------------------------------------------------------------------------------------------------


class _Job:
    def __init__(
        self, root: str, job: dict[str, Any], fd: int, values: Values, connection: Connection | None = None
    ) -> None:
        self.root = root
        self.job = job
        self.values = values
        self._fd = fd
        self._connection = connection
        self._context: Context | None = None
        self._inputs: dict[str, Any] = job.get("inputs") or {}
        self._opened: dict[str, Any] = {}

    @property
    def connection(self) -> Connection:
        """For questions to the supervisor, made when there is the first."""
        if self._connection is None:
            from fieldlab_executor.context import Connection

            self._connection = Connection(self._fd)
        return self._connection

    def finish(self, answer: dict[str, Any], data: bytes) -> None:
        """Send the result frame."""
        if self._connection is not None:
            self._connection.write(answer, data)
            return
        frame = frames.pack(answer, data)
        while frame:
            frame = frame[os.write(self._fd, frame) :]

    def blob(self, digest: str) -> bytes:
        """The bytes of a blob of the deployment."""
        return read_file(f"{self.root}/blobs/{digest}")

    def resolve(self, reference: tuple[Any, ...]) -> Any:
        """What a reference in sealed code or arguments stands for."""
        kind = reference[0]
        if kind == "step":
            return self._of_step(*reference[1:])
        if kind == "item":
            return self.values.open(self.job["item"])
        if kind == "context":
            return self.ctx()
        if kind == "node":
            return self.ctx().node[reference[1]]
        if kind == "file":
            return self._file(reference[1], reference[2])
        if kind == "secret":
            return self.secret(reference[1])
        raise LookupError(f"the reference {reference!r} is of a kind that this executor does not know")

    def secret(self, name: str) -> str:
        """The text of a secret, from the supervisor."""
        value = str(self.connection.ask("secret", name=name)["value"])
        self.values.kept_out[name] = value
        return value

    def ctx(self) -> Context:
        """The task's context, made when it is first needed."""
        if self._context is None:
            from fieldlab_executor.context import Context

            self._context = Context(self.root, self.job, self.connection, self.values)
        return self._context

    def _of_step(self, name: str, attribute: str, path: Iterable[Any]) -> Any:
        given = self._inputs.get(name)
        if given is None:
            given = self._inputs[name] = self.connection.ask("input", name=name)["input"]
        if attribute == "status":
            return given["status"]
        if attribute == "error":
            return given["error"] or None
        if name not in self._opened:
            self._opened[name] = self.values.open_input(given)
        return follow(self._opened[name], path)

    def _file(self, digest: str, name: str) -> str:
        folder = os.path.join(self.root, "files", digest)
        path = os.path.join(folder, name)
        os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(os.path.join(self.root, "blobs", digest), path)
        return path


def follow(value: Any, path: Iterable[Any]) -> Any:
    """The part of ``value`` that a path of keys and indexes leads to."""
    for key in path:
        value = value[key]
    return value


def _load(job: _Job, what: str, sealed: str) -> Any:
    """Open sealed code or arguments; every failure of it is LOAD_FAILED."""
    try:
        # As deployment.inlined has it, whose module is more than a child wants to load.
        data = base64.b64decode(sealed[1:]) if sealed.startswith("=") else job.blob(sealed)
        return payload.unseal(data, job.resolve)
    except Exception as error:  # it runs user code, which raises anything
        advice = ""
        if isinstance(error, ModuleNotFoundError):
            advice = f" Name the distribution that has {error.name!r} in the task's packages=[...]."
        message = f"{what} could not be loaded on the node: {_say(error)}.{advice}"
        reason = "out_of_memory" if isinstance(error, MemoryError) else "load_failed"
        raise _Failure(reason, message, _trace(error)) from error


_WARM: dict[str, Any] = {}  # in a worker: the code that it has loaded


def _call(job: _Job) -> tuple[dict[str, Any], bytes]:
    """Run a step; the result frame."""
    spec, step = job.job, job.job["step"]
    _enter(job)
    call = _WARM.get(spec["code"])
    if call is None:
        call = _load(job, f"The code of step {step!r}", spec["code"])
        if spec["shared"] and len(_WARM) < MAX_WARM:
            _WARM[spec["code"]] = call
    args, kwargs = _load(job, f"An argument of step {step!r}", spec["args"])
    try:
        value = call(*args, **kwargs)
    except SystemExit:
        raise
    except BaseException as error:  # whatever user code raises is the attempt's failure
        code = getattr(error, "exit_code", getattr(error, "returncode", None))
        raise _Failure(_reason(error), _say(error), _trace(error), code) from error
    try:
        handle, reference, data = job.values.keep(value, str(spec["id"]))
    except UnpicklableError as error:
        message = f"The result of step {step!r} cannot leave its process. {error}"
        raise _Failure("bad_result", message[:MAX_MESSAGE]) from error
    return {"op": "result", "handle": handle, "value": reference}, data


def _enter(job: _Job) -> None:
    """Take on the step's variables and folder. One that has a time limit says where it was when that is over."""
    if job.job.get("traced"):
        import faulthandler

        faulthandler.register(_signal.SIGTERM, file=2, chain=True)
    folder, cwd, env = job.job["folder"], job.job["cwd"], job.job["env"]
    if env:
        os.environ.update(env)
    for name, stored in job.job.get("secret_env", {}).items():
        os.environ[name] = job.secret(stored)
    try:
        os.chdir(os.path.join(folder, os.path.expanduser(cwd)) if cwd else folder)
    except OSError as error:
        where = f"The step's cwd={cwd!r}" if cwd else f"The step's folder {folder}"
        raise _Failure("load_failed", f"{where} cannot be entered: {error.strerror}.") from error


def _evaluate(job: _Job) -> tuple[dict[str, Any], bytes]:
    """Answer a question of the machine's: a condition's truth, or a list's length and items."""
    spec = job.job
    try:
        if spec["what"] == "retry_if":
            value: Any = spec["text"]
        else:
            value = follow(job.values.open_input(spec["input"]), spec["path"])
        if spec["what"] == "length":
            return {"op": "result", **_items(job, value)}, b""
        call = payload.unseal(job.blob(spec["code"]), job.resolve)
        return {"op": "result", "answer": bool(call(value))}, b""
    except SystemExit:
        raise
    except BaseException as error:  # as in _call
        raise _Failure("raised", _say(error), _trace(error)) from error


def _items(job: _Job, value: Any) -> dict[str, Any]:
    """The length of a list, and a handle for each of its items: no iteration has to open the whole list."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"a fan-out is over a list of items, not over a {type(value).__name__}")
    items = list(value)
    if len(items) > MAX_ITEMS:
        return {"answer": len(items), "items": []}
    name = f"{job.job['id']}-item"
    return {
        "answer": len(items),
        "items": [job.values.keep_exact(item, f"{name}{index}") for index, item in enumerate(items)],
    }


# --- errors as text --------------------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):  # its own limit, not the kernel, refused: there was no memory either way
        _make_room()
        return "out_of_memory"
    return _REASONS.get(error.code, "raised") if isinstance(error, FieldlabError) else "raised"


def _text(error: BaseException) -> str:
    """What an exception says, also when its own methods fail."""
    for speak in (str, repr):
        try:
            return speak(error)
        except Exception:  # noqa: BLE001 - a user's __str__ or __repr__ raises anything
            continue
    return "(its text cannot be had: its __str__ and __repr__ fail)"


def _say(error: BaseException) -> str:
    said = _text(error)
    if isinstance(error, FieldlabError):
        return said[:MAX_MESSAGE]
    return f"{type(error).__name__}: {said}"[:MAX_MESSAGE] if said else type(error).__name__


def _trace(error: BaseException) -> str:
    """The traceback, without the frames of this module that called the user's code."""
    try:
        found = error.__traceback__
        while found is not None and found.tb_frame.f_code.co_filename == __file__ and found.tb_next is not None:
            found = found.tb_next
        text = "".join(traceback.format_exception(type(error), error, found))
    except Exception:  # noqa: BLE001 - formatting calls the user's methods
        text = "".join(traceback.format_tb(error.__traceback__)) + _say(error)
    if len(text) <= MAX_ERROR:
        return text
    return f"{text[: MAX_ERROR // 2]}\n[{len(text) - MAX_ERROR} characters left out]\n{text[-MAX_ERROR // 2 :]}"


# --- the process -----------------------------------------------------------------------------------------------------


class Quiet:
    """What an interpreter has to do at its end before any user code ran; if it has no more to do then, nothing is done.

    Running it costs more than an empty step.
    """

    def __init__(self) -> None:
        self._marks = self._now()

    @staticmethod
    def _now() -> tuple[int, int, int]:
        return _thread._count(), atexit._ncallbacks(), len(logging._handlerList)  # type: ignore[attr-defined]

    def still(self) -> bool:
        """Whether user code left threads, exit functions or log handlers."""
        return self._now() == self._marks


def serve(fd: int, root: str, inline: int, quiet: Quiet) -> NoReturn:
    """Wait for a job on the socket ``fd``, do it, and end the process; after a shared job, if it can, wait for more.

    ``root`` is the deployment's folder; values up to ``inline`` bytes travel inside the result.
    """
    frame = frames.receive(fd)
    if frame is None:
        os._exit(0)
    gc.enable()
    values = Values(root, inline)
    header: dict[str, Any] | None = frame[0]
    connection: Connection | None = None
    while header is not None:
        job = _Job(root, header, fd, values, connection)
        if not header["shared"]:
            _do_one(job, fd, quiet)
        _do_another(job, quiet)
        connection = job.connection
        header = connection.next_job()
    os._exit(0)


def _do_one(job: _Job, fd: int, quiet: Quiet) -> NoReturn:
    """Do the job in this process, which ends with it."""
    answer, data = _answer(job, quiet)
    if _end(quiet) and _alone():
        answer["usage"] = _usage()
        os.closerange(3, fd)
        os.closerange(fd + 1, MAX_DESCRIPTOR)
    with contextlib.suppress(OSError):  # the supervisor is gone: the spawner's sweep follows
        job.finish(answer, data)
    os._exit(0)


def _do_another(job: _Job, quiet: Quiet) -> None:
    """Do the job as a worker; return when it has left nothing behind, and end the process when it has."""
    place = _Place()
    answer, data = _answer(job, quiet)
    if place.restored(job.connection.threads):
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        answer["usage"] = place.usage()
        with contextlib.suppress(OSError):
            job.finish(answer, data)
        return
    _end(quiet)
    with contextlib.suppress(OSError):
        job.finish(answer, data)
    os._exit(0)


def _answer(job: _Job, quiet: Quiet) -> tuple[dict[str, Any], bytes]:
    """The result frame; a job that calls ``sys.exit`` ends its process."""
    try:
        return _guarded(job)
    except SystemExit as leave:
        _end(quiet)
        os._exit(_exit_code(leave))


class _Place:
    """What a worker was before a job, so that the next finds it like that; and what the job used."""

    def __init__(self) -> None:
        self._env = dict(_variables())
        self._children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"5")  # the peak of memory is counted anew (proc(5))
        self._cpu = _usage()[0]

    def restored(self, threads: int) -> bool:
        """Put back what can be put back; False if the job left threads, or had processes below it."""
        if _variables() != self._env:
            os.environ.clear()
            os.environ.update({os.fsdecode(name): os.fsdecode(value) for name, value in self._env.items()})
        if _thread._count() != threads or _signal.getsignal(_signal.SIGCHLD):
            return False
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt == self._children and not _has_children()

    def usage(self) -> list[float]:
        """CPU seconds of the job, and the peak of memory in bytes while it ran."""
        cpu, peak = _usage()
        return [max(0.0, cpu - self._cpu), peak]


def _variables() -> dict[bytes, bytes]:
    """The environment variables as ``os.environ`` keeps them: to decode all of them costs more than an empty step."""
    return os.environ._data  # type: ignore[attr-defined,no-any-return]


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _alone() -> bool:
    """Whether this process never had another below it, so that with it all is gone that it started.

    Such a process has ended for everybody else when its descriptors are closed: no thread is left, no user code can
    run. What the kernel still has to clean up takes longer than an empty step, and need not be waited for.
    """
    if resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt or _signal.getsignal(_signal.SIGCHLD):
        return False
    try:
        threads = os.stat("/proc/self/task").st_nlink - 2  # a folder for each (proc(5))
    except OSError:
        return False
    return threads == 1 and not _has_children()


def _usage() -> list[float]:
    """CPU seconds, and the peak memory in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return [used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]


def _guarded(job: _Job) -> tuple[dict[str, Any], bytes]:
    try:
        return (_evaluate if job.job["kind"] == "evaluate" else _call)(job)
    except _Failure as failure:
        found = failure
    except MemoryError as error:  # its value could not be encoded
        found = _Failure(_reason(error), _say(error), _trace(error))
    answer = {"op": "result", "reason": found.reason, "message": found.message[:MAX_MESSAGE], "error": found.error}
    return answer if found.code is None else {**answer, "code": found.code}, b""


def _make_room() -> None:
    """Lift a limit of memory that was reached to what was held back, so that this much can be said of it."""
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _end(quiet: Quiet) -> bool:
    """What an interpreter does at its end: wait for threads, call what atexit has, write out what is buffered.

    Whether there was nothing but output.
    """
    still = quiet.still()
    if not still:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    return still


def _flush(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or replaced by the user
        stream.flush()


def _exit_code(leave: SystemExit) -> int:
    if leave.code is None:
        return 0
    if isinstance(leave.code, int):
        return leave.code & 0xFF
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{_text(leave)}\n")
    return 1
