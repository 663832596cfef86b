"""Starts executors from a process that has everything loaded: a fork instead of the start of an interpreter.

The keeper's side is ``Starter``; the process is ``fieldlab.pyz starter FD``, which has loaded what an executor loads
and does nothing but fork: each child makes a session of its own, lets go of everything it inherited, and is then an
executor like any other, ``fieldlab.pyz run DIR``. No user code ever runs in the starter, so that what is forked is
clean. It leaves when its socket is closed, and when it was not needed for ``IDLE`` seconds; executors go on. Where
there is no starter (it died, or the executor is one that knows no such command), executors are started as commands.

Invariant: the process is noted beside its folder (``note``) before anybody is told of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from fieldlab_common.errors import ConnectorError

from fieldlab_executor.commands import Command

__all__ = ["Starter", "note", "serve", "start_of", "write_private"]

IDLE = 600.0
ANSWER_WITHIN = 20.0
_PACKET = 65536


def write_private(path: Path, data: bytes) -> None:
    """The whole file or none of it, for this user alone."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb", opener=private) as file:
        file.write(data)
    part.replace(path)


def private(path: str, flags: int) -> int:
    """An opener of files for this user alone."""
    return os.open(path, flags, 0o600)


def start_of(pid: int) -> str:
    """When the process began, as the kernel counts; empty if it does not run (or this is not Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    # proc(5): the state; field 20, its threads; field 22, when it began. One of which a thread is left is not gone yet.
    return "" if fields[0] in (b"Z", b"X") and fields[17] in (b"0", b"1") else fields[19].decode()


def note(folder: Path, pid: int) -> None:
    """Write down, beside its folder, which process an executor is."""
    write_private(folder.with_name(f"{folder.name}.pid"), json.dumps({"pid": pid, "start": start_of(pid)}).encode())


class Starter:
    """Starts executors; ``command`` is the executor's command line."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._lock = asyncio.Lock()
        self._socket: socket.socket | None = None
        self._children: list[subprocess.Popen[bytes]] = []

    def warm_up(self) -> None:
        """Have a starter soon, if there is none."""
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            with theirs, contextlib.suppress(OSError):  # if it cannot be started, neither can executors: they will say
                self._children.append(
                    subprocess.Popen(
                        [*self._command.words, "starter", str(theirs.fileno())],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        start_new_session=True,
                        pass_fds=(theirs.fileno(),),
                    )
                )
            self._socket = ours

    async def start(self, folder: Path, log: Path) -> None:
        """Start the executor of ``folder``, detached, with its output in ``log``; its process is noted.

        Raises:
            ConnectorError: it cannot be started.
        """
        self.reap()
        async with self._lock:
            self.warm_up()
            if not await self._asked({"folder": str(folder), "log": str(log)}):
                self.close()
                await asyncio.to_thread(self._start_command, folder, log)

    def reap(self) -> None:
        """Take note of children that have ended."""
        self._children = [child for child in self._children if child.poll() is None]

    def close(self) -> None:
        """Let the starter go."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _asked(self, request: dict[str, Any]) -> bool:
        """Whether the starter has started it."""
        loop = asyncio.get_running_loop()
        assert self._socket is not None  # it was warmed up
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                await loop.sock_sendall(self._socket, json.dumps(request).encode())
                return await loop.sock_recv(self._socket, _PACKET) == b"started"
        except (OSError, TimeoutError):
            return False

    def _start_command(self, folder: Path, log: Path) -> None:
        try:
            with open(log, "ab", opener=private) as output:
                process = subprocess.Popen(
                    [*self._command.words, "run", str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=folder,
                    start_new_session=True,
                )
        except OSError as error:
            raise ConnectorError(f"{self._command.words[0]} cannot be started: {error}.", transient=False) from error
        self._children.append(process)
        note(folder, process.pid)


# --- the process -----------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Fork executors as the socket ``descriptor`` asks for them."""
    _load()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what ends
    with socket.socket(fileno=descriptor) as requests:
        requests.settimeout(IDLE)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while packet := requests.recv(_PACKET):
                request = json.loads(packet)
                requests.send(b"started" if _fork(Path(request["folder"]), request["log"]) else b"failed")


def _load() -> None:
    """What every executor needs."""
    from fieldlab_executor import cache, session, transport, zipapp  # noqa: F401


def _fork(folder: Path, log: str) -> bool:
    try:
        pid = os.fork()
    except OSError:
        return False
    if not pid:
        _become(folder, log)
    note(folder, pid)
    return True


def _become(folder: Path, log: str) -> NoReturn:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        output = private(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir(folder)
        from fieldlab_executor.__main__ import main

        code = main(["run", str(folder)])
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:  # noqa: BLE001 - an executor that fails must end here, with its traceback where people look
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
