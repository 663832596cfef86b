"""The executor's own command line, run by a keeper to its end: what it said is kept; it never outlives its caller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from fieldlab_common.errors import ConnectorError

__all__ = ["Command", "Said"]

BREAK_GRACE = 3.0  # seconds for a command that is broken off to end what it started
MOST_OUTPUT = 256 * 1024  # bytes kept of what a command says
_TAIL = 2000


@dataclass(frozen=True)
class Said:
    """What came of a command: its exit code, its output, and what it said on standard error."""

    code: int
    output: str
    errors: str

    @property
    def tail(self) -> str:
        """The end of what it said, for people."""
        return self.errors.strip()[-_TAIL:] or "It said nothing."


class Command:
    """A command line, to which each call adds its arguments. Of what it says the last ``most`` bytes are kept."""

    def __init__(self, words: Sequence[str], most: int = MOST_OUTPUT) -> None:
        self.words = tuple(words)
        self._most = most

    async def output(self, *arguments: str) -> str:
        """What it prints.

        Raises:
            ConnectorError: it ended with an error; its last lines are in it.
        """
        said = await self.run(*arguments)
        if said.code != 0:
            raise ConnectorError(f"The executor's {arguments[0]} ended with code {said.code}:\n{said.tail}")
        return said.output

    async def run(self, *arguments: str) -> Said:
        """Run it to its end; one that is broken off is told to end, and then ended.

        Raises:
            ConnectorError: it cannot be started.
        """
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *self.words,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
            )
        except OSError as error:
            raise ConnectorError(f"{self.words[0]} cannot be started: {error}.", transient=False) from error
        assert process.stdout is not None  # PIPE was asked for
        assert process.stderr is not None
        try:
            output, errors = await asyncio.gather(_last(process.stdout, self._most), _last(process.stderr, self._most))
            code = await process.wait()
        finally:
            if process.returncode is None:
                await _break_off(process)
        return Said(code, output, errors)


async def _break_off(process: asyncio.subprocess.Process) -> None:
    """End a command and what it started: it is told to, so that it can find what got away from it, and then forced."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BREAK_GRACE):
                await process.wait()
        os.killpg(process.pid, signal.SIGKILL)


async def _last(stream: asyncio.StreamReader, most: int) -> str:
    """The last part of what a stream brings."""
    kept = b""
    while chunk := await stream.read(65536):
        kept = (kept + chunk)[-most:]
    return kept.decode(errors="replace")
