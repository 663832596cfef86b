"""Keeps a deployment's secrets out of what it reports.

They live in the supervisor's memory and reach a child over its socket when the step asks for them. In text, each of
their lines has ``***`` in its place, so that a secret of several lines is hidden whatever way it is printed; lines of
fewer than ``SHORTEST`` characters are not, because they would hide half of everything. A secret that was changed, by
encoding or cutting it, is not recognised: this guards against accidents, not against the tasks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["HIDDEN", "SHORTEST", "Search", "Secrets", "forms"]

HIDDEN = "***"
SHORTEST = 4


class Secrets:
    """The secrets of one deployment, by name."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)
        lines = {line for value in values.values() for line in value.splitlines() if len(line) >= SHORTEST}
        self._lines = sorted(lines, key=len, reverse=True)  # one that holds another goes first

    def __bool__(self) -> bool:
        return bool(self._values)

    def get(self, name: str) -> str | None:
        """The text of one; None: it was not stored."""
        return self._values.get(name)

    def hide(self, text: str) -> str:
        """``text`` with every secret in it hidden."""
        for line in self._lines:
            text = text.replace(line, HIDDEN)
        return text

    def held(self, text: str) -> int:
        """How many characters at the end of ``text`` may be the beginning of a secret that is still being written."""
        longest = max((len(line) for line in self._lines), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(line.startswith(text[-length:]) for line in self._lines):
                return length
        return 0

    def shown_in(self, data: bytes) -> str | None:
        """The name of a secret that ``data`` holds; None: of none."""
        search = Search(self)
        search.feed(data)
        return search.found or None

    def forms(self) -> Iterable[tuple[str, bytes]]:
        """The name of each, with every way in which it may stand in what is reported."""
        return ((name, form) for name, value in self._values.items() for form in forms(value))


class Search:
    """Looks for secrets in bytes that come piece by piece; ``found`` is the name of the first that is there."""

    def __init__(self, secrets: Secrets) -> None:
        self._forms = [(name, re.compile(re.escape(form))) for name, form in secrets.forms()]
        self._kept = max((len(form) for _, form in secrets.forms()), default=1) - 1
        self._end = b""  # of what came so far: a secret may begin in it
        self.found = ""

    def feed(self, piece: Any) -> None:
        """Look at the next bytes, which are not copied but for their ends."""
        view = memoryview(piece).cast("B")
        seam = self._end + bytes(view[: self._kept])
        for name, form in self._forms:
            if not self.found and (form.search(view) or form.search(seam)):
                self.found = name
        self._end = (self._end + bytes(view[-self._kept :]))[-self._kept :] if self._kept else b""


def forms(value: str) -> Iterable[bytes]:
    """How a secret stands in reported data: as it is, and as JSON has it."""
    if len(value) < SHORTEST:
        return ()
    plain = value.encode(errors="surrogatepass")
    return {
        plain,
        json.dumps(value)[1:-1].encode(),
        json.dumps(value, ensure_ascii=False)[1:-1].encode(errors="replace"),
    }
