"""How an attempt failed, as text: what its exception says, and the traceback of the user's own code.

Exceptions are of the user's making: whatever is asked of them may fail itself.
"""

from __future__ import annotations

import resource

from fieldlab_common.errors import FieldlabError

__all__ = ["MAX_MESSAGE", "Failure", "reason_of", "say", "text_of", "trace"]

MAX_ERROR = 64 * 1024  # characters of a traceback that are kept: its beginning and its end
MAX_MESSAGE = 2000
_REASONS = {"command_failed": "exit_code", "barrier_broken": "barrier_broken"}


class Failure(Exception):
    """The attempt failed for ``reason``; ``error`` is the traceback as text; ``code``: of a command that ended so."""

    def __init__(self, reason: str, message: str, error: str = "", code: object = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.error = reason, message, error
        self.code = code if isinstance(code, int) else None


def reason_of(error: BaseException) -> str:
    """The reason that it is for an attempt's failure."""
    if isinstance(error, MemoryError):  # its own limit, not the kernel, refused: there was no memory either way
        _make_room()
        return "out_of_memory"
    return _REASONS.get(error.code, "raised") if isinstance(error, FieldlabError) else "raised"


def _make_room() -> None:
    """Lift a limit of memory that was reached to what was held back, so that this much can be said of it."""
    try:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    except (ValueError, OSError):
        pass


def text_of(error: BaseException) -> str:
    """What an exception says, also when its own methods fail."""
    for speak in (str, repr):
        try:
            return speak(error)
        except Exception:  # noqa: BLE001 - a user's __str__ or __repr__ raises anything
            continue
    return "(its text cannot be had: its __str__ and __repr__ fail)"


def say(error: BaseException) -> str:
    """One line of it, with its type unless it is of ours."""
    said = text_of(error)
    if isinstance(error, FieldlabError):
        return said[:MAX_MESSAGE]
    return f"{type(error).__name__}: {said}"[:MAX_MESSAGE] if said else type(error).__name__


def trace(error: BaseException, own: str) -> str:
    """The traceback, without the frames of the file ``own``, which called the user's code."""
    try:
        import traceback

        found = error.__traceback__
        while found is not None and found.tb_frame.f_code.co_filename == own and found.tb_next is not None:
            found = found.tb_next
        text = "".join(traceback.format_exception(type(error), error, found))
    except MemoryError:
        return say(error)
    except Exception:  # noqa: BLE001 - formatting calls the user's methods
        text = "".join(traceback.format_tb(error.__traceback__)) + say(error)
    if len(text) <= MAX_ERROR:
        return text
    return f"{text[: MAX_ERROR // 2]}\n[{len(text) - MAX_ERROR} characters left out]\n{text[-MAX_ERROR // 2 :]}"
