"""The director's log: one JSON object a line, with the id of the request that it belongs to.

It goes to a file in the data folder, which begins anew at a size; what is a warning or worse also goes to standard
error, where whoever started the director sees it. No token and no body is ever logged.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path

import structlog

__all__ = ["configure"]

MOST = 16 * 1024 * 1024  # bytes of one file
KEPT = 3


def configure(path: Path) -> None:
    """Send what structlog and ``logging`` get to ``path`` and to standard error. Called once, by the program."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
    file = logging.handlers.RotatingFileHandler(path, maxBytes=MOST, backupCount=KEPT, encoding="utf-8")
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    for handler in (file, terminal):
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[file, terminal], force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
