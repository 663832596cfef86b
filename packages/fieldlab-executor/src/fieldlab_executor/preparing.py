"""Makes an environment in a process of its own, ``prepare`` of the command line, on a leash.

The builders, and whatever a set-up command starts, are below that process, and it is above all of them (a subreaper):
when it is done, nothing of them is left. It holds its end of the leash, its standard input: when whoever asked for the
environment closes the other end, or dies, it ends everything below itself and then itself.

What it answers is one line of JSON on standard output: ``{"python": path}``, or ``{"error": {"message", "advice",
"transient"}}``. What builders say comes line by line on standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from fieldlab_common.environment import Environment
from fieldlab_common.errors import FieldlabError
from fieldlab_common.protocol import Tagged
from fieldlab_common.wire import dumps, encode

from fieldlab_executor import processes
from fieldlab_executor.builders import Log, PrepareFailed

__all__ = ["Preparation", "guard", "problem", "sweep"]

SWEEP_SECONDS = 5.0
ANSWER, LINE = 1 << 20, 1 << 13  # bytes of an answer, and of a line that a builder says, that are read at once


class Preparation:
    """A process that makes an environment; ``command`` is the executor's command line."""

    def __init__(self, command: Sequence[str], environment: Environment, python: str, log: Log) -> None:
        tagged = Tagged(kind=environment.kind, body=encode(environment))
        words = ["prepare", "--environment", dumps(tagged).decode(), "--python", python, "--leash", "0"]
        self._log = log
        self._process = subprocess.Popen(
            [*command, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> str:
        """The path of the interpreter.

        Raises:
            PrepareFailed: it could not be made, or not in time.
        """
        late = threading.Timer(seconds, self.end)
        late.start()
        try:
            assert self._process.stderr is not None  # PIPE was asked for, twice
            assert self._process.stdout is not None
            for line in iter(lambda stream=self._process.stderr: stream.readline(LINE), b""):  # type: ignore[misc]
                self._log(line.decode(errors="replace").rstrip())
            said = self._process.stdout.read(ANSWER)
            self._process.wait()
        finally:
            late.cancel()
            self.end()
        return _python_of(said)

    def end(self) -> None:
        """Let go of the leash: if it still runs, it ends what it started, and itself."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()


def _python_of(said: bytes) -> str:
    try:
        answer = json.loads(said)
        if "python" in answer:
            return str(answer["python"])
        error = answer["error"]
    except (ValueError, KeyError, TypeError):
        raise PrepareFailed("What makes the environment was ended before it was done.", transient=True) from None
    raise PrepareFailed(str(error["message"]), advice=str(error["advice"]), transient=bool(error["transient"]))


# --- within that process ---------------------------------------------------------------------------------------------


def guard(leash: int | None) -> None:
    """From now on, end everything below this process and itself on SIGTERM, and when ``leash`` is closed.

    Nobody writes to a leash: a byte counts as its end, too.
    """
    processes.become_subreaper()

    def end(*_: Any) -> NoReturn:
        sweep()
        os._exit(128 + signal.SIGTERM)

    def hold(fd: int) -> None:
        with contextlib.suppress(OSError):
            os.read(fd, 1)
        end()

    signal.signal(signal.SIGTERM, end)
    if leash is not None:
        threading.Thread(target=hold, args=(leash,), name="leash", daemon=True).start()


def sweep() -> None:
    """End everything that builders left running."""
    processes.sweep(time.monotonic() + SWEEP_SECONDS)


def problem(error: FieldlabError | OSError) -> dict[str, Any]:
    """What the answer says of a failure."""
    if isinstance(error, FieldlabError):
        transient = isinstance(error, PrepareFailed) and error.transient
        return {"message": error.message, "advice": error.advice, "transient": transient}
    return {"message": f"The environment could not be made: {error}.", "advice": "", "transient": True}
