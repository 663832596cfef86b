"""The director's log: one JSON object a line, with the id of the request that it belongs to.

It goes to a file in the data folder, which begins anew at a size; what is a warning or worse also goes to standard
error, where whoever started the director sees it. No token and no body is ever logged.

Every request is a line, so a line must cost little: structlog's own loggers write it without a detour through
``logging`` (which took a fifth of a small request's processor time), and the libraries' ``logging`` is led here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import structlog

__all__ = ["configure"]

MOST = 16 * 1024 * 1024  # bytes of one file
KEPT = 3

_ENCODE = msgspec.json.Encoder(enc_hook=repr).encode


class LogFile:
    """Lines in the file ``path``; at ``most`` bytes it becomes ``path.1``, and so on up to ``kept``, and begins anew.

    May be used by several threads. A disk that takes no line (it is full) loses it: nobody's request fails for that.
    """

    def __init__(self, path: Path, *, most: int = MOST, kept: int = KEPT) -> None:
        self._path, self._most, self._kept = path, most, kept
        self._lock = threading.Lock()
        self._open()

    def write(self, line: bytes) -> None:
        """Add a line."""
        with self._lock, contextlib.suppress(OSError):
            if self._size + len(line) >= self._most and self._size:
                self._set_aside()
            self._size += os.write(self._file, line + b"\n")

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def _set_aside(self) -> None:
        for number in range(self._kept, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            with contextlib.suppress(FileNotFoundError):
                os.replace(older, self._path.with_name(f"{self._path.name}.{number}"))
        os.close(self._file)
        self._open()


class _Lines:
    """What structlog's loggers hand a line to: one for each name."""

    def __init__(self, file: LogFile, name: str = "") -> None:
        self._file, self.name = file, name

    def info(self, line: bytes) -> None:
        self._file.write(line)

    debug = info

    def warning(self, line: bytes) -> None:
        self._file.write(line)
        sys.stderr.write(line.decode() + "\n")

    error = critical = exception = warning


class _Handler(logging.Handler):
    """What the libraries log with ``logging``, as lines of the same kind."""

    def __init__(self, file: LogFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        event: dict[str, Any] = {"event": record.getMessage(), "exc_info": record.exc_info}
        lines, level = _Lines(self._file, record.name), record.levelname.lower()
        for processor in _PROCESSORS:
            event = processor(lines, level, event)  # type: ignore[assignment]
        write = lines.warning if record.levelno >= logging.WARNING else lines.info
        write(_line(lines, level, event))


def _line(logger: Any, method: str, event: Any) -> bytes:
    return _ENCODE(event)


_PROCESSORS: tuple[structlog.typing.Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
)


def configure(path: Path) -> None:
    """Send what structlog and ``logging`` get to ``path``, in a folder that is there, and to standard error.

    Called once, by the program.
    """
    file = LogFile(path)
    logging.basicConfig(level=logging.INFO, handlers=[_Handler(file)], force=True)
    structlog.configure(
        processors=[*_PROCESSORS, _line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *names: _Lines(file, *names),
        cache_logger_on_first_use=True,
    )
