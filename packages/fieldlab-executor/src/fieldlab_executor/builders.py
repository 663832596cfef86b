"""Runs the programs that make an environment: uv, pip, apt-get, setup commands. All of them within one deadline.

What they say is passed on line by line, and the last of it stands in the error when one fails, with what to do next.
A program counts as ended when its process has ended: what it leaves running may keep its output open, and nobody waits.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from fieldlab_common.errors import FieldlabError

from fieldlab_executor import processes

__all__ = ["Builder", "Log", "PrepareFailed"]

Log = Callable[[str], None]

LAST_LINES = 20
LINE = 1 << 13  # characters; a longer line is passed on in parts
LAST_WORDS = 1.0  # seconds for the end of the output, once the process has ended
# What the system, uv, pip and apt-get say when they cannot reach anybody.
_UNREACHED = re.compile(
    r"name resolution|name or service not known|could not resolve|failure resolving|dns error|"
    r"network is unreachable|no route to host|connection refused|connection timed out|connect timeout|"
    r"tcp connect error|client error \(connect\)|failed to establish a new connection|unable to connect",
    re.IGNORECASE,
)


class PrepareFailed(FieldlabError):
    """The environment could not be made; the message has the last lines of what its builder said.

    ``details["transient"]``: trying again, with nothing changed, can help.
    """

    code: ClassVar[str] = "prepare_failed"

    def __init__(
        self, message: str, *, advice: str = "", details: Mapping[str, object] | None = None, transient: bool = False
    ) -> None:
        super().__init__(message, advice=advice, details={"transient": transient, **(details or {})})

    @property
    def transient(self) -> bool:
        """Whether trying again, with nothing changed, can help."""
        return bool(self.details["transient"])


class Builder:
    """``folder`` is where the programs run, ``seconds`` the time that all of them may take together."""

    def __init__(self, log: Log, folder: Path, seconds: float) -> None:
        self._log = log
        self._folder = folder
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def run(self, command: Sequence[str], what: str, *, env: Mapping[str, str] | None = None, advice: str = "") -> None:
        """Run a program to its end. ``what`` it does begins the sentence of the error.

        Raises:
            PrepareFailed: it did not end well, or not in time.
        """
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                text=True,
                errors="replace",
                env={**os.environ, **(env or {})},
            )
        except OSError as error:
            raise PrepareFailed(
                f"{what} failed: {command[0]} cannot be started: {error.strerror}.", advice=advice
            ) from error
        last: deque[str] = deque(maxlen=LAST_LINES)
        reader = threading.Thread(target=self._pass_on, args=(process, last), name="builder", daemon=True)
        reader.start()
        try:
            process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            below = [one.pid for one in processes.descendants(process.pid)]
            processes.send((process.pid, *below), signal.SIGKILL)
            process.wait()
            raise PrepareFailed(
                f"{what} was not done within {self._seconds:.0f} s, and was ended.{_said(last)}", transient=True
            ) from None
        reader.join(LAST_WORDS)
        if process.returncode != 0:
            raise _failure(what, process.returncode, list(last), advice)

    def _pass_on(self, process: subprocess.Popen[str], last: deque[str]) -> None:
        assert process.stdout is not None  # PIPE was asked for
        for line in iter(lambda stream=process.stdout: stream.readline(LINE), ""):  # type: ignore[misc]
            last.append(line.rstrip())
            self._log(line.rstrip())


def _failure(what: str, code: int, last: list[str], advice: str) -> PrepareFailed:
    details = {"lines": last, "exit_code": code}
    unreached = [line for line in last if _UNREACHED.search(line)]
    if unreached:
        return PrepareFailed(
            f"{what} failed: the node does not reach what it would come from.{_said(last)}",
            advice="Connect the node, or have it use a mirror that it reaches (PIP_INDEX_URL, UV_DEFAULT_INDEX, apt's"
            " sources); or prepare while it is connected: an environment that was made once works offline.",
            details=details,
            transient=True,
        )
    how = f"was ended by signal {-code}" if code < 0 else f"exit code {code}"
    return PrepareFailed(f"{what} failed ({how}).{_said(last)}", advice=advice, details=details)


def _said(last: Sequence[str]) -> str:
    return f" Its last words:\n{chr(10).join(last)}\n" if last else " It said nothing."
