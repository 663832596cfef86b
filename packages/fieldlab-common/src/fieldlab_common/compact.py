"""JSON in one line, written by what ``json`` itself is made of, without loading ``json``.

The process from which steps are forked is kept small, because every fork copies the tables of its memory: ``json``
brings ``re`` and ``enum``, a third of all that is left there. Reading JSON is for processes that need not be small.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["to_ascii", "to_text"]


def _unknown(value: object) -> object:
    raise TypeError(f"an object of type {type(value).__name__} is not JSON")


def _writer(ascii_only: bool) -> Callable[[Any], str]:
    try:
        from _json import encode_basestring, encode_basestring_ascii, make_encoder
    except ImportError:  # another Python than CPython
        import json

        return json.JSONEncoder(separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=False).encode
    quote = encode_basestring_ascii if ascii_only else encode_basestring
    write = make_encoder(None, _unknown, quote, None, ":", ",", False, False, False)

    def run(document: Any) -> str:
        if type(document) is str:
            return quote(document)
        return "".join(write(document, 0))

    return run


to_text = _writer(False)  # of any characters, also halves of such that no encoding knows
to_ascii = _writer(True)
