"""Which files of a deployment are still to be sent, on disk: the announcement's record may be gone before its file is.

One line of JSON for each file announced, and one when it is stored or lost. A torn last line is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Upload", "Uploads"]


class Upload(NamedTuple):
    """A file to send; ``number`` is that of the control record that announces it."""

    sha256: str
    path: str
    size: int
    number: int
    step: str
    name: str


class Uploads:
    """The list in ``path``, made when the first file is added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = {upload.sha256: upload for upload in self._read()}

    def __iter__(self) -> Iterator[Upload]:
        return iter(list(self._open.values()))

    def add(self, upload: Upload) -> None:
        """A file was announced."""
        self._open[upload.sha256] = upload
        self._write(list(upload))

    def settle(self, sha256: str) -> Upload | None:
        """It is stored, or lost; what it was, or None if that was known."""
        upload = self._open.pop(sha256, None)
        if upload is not None:
            self._write(sha256)
        return upload

    def _write(self, entry: object) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(fd)

    def _read(self) -> Iterator[Upload]:
        found: dict[str, Upload] = {}
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return iter(())
        for line in lines[:-1]:
            entry = json.loads(line)
            if isinstance(entry, list):
                found[entry[0]] = Upload(*entry)
            else:
                found.pop(entry, None)
        return iter(list(found.values()))
