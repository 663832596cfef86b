"""What a child is told of its job, as far as it follows from the step alone.

Sealed code that is short goes with the job: a child that reads a file for it makes five system calls more, and a DAG of
a thousand steps has a few tasks. A worker keeps what it has loaded, so it is told the digest, and reads the blob once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fieldlab_common.deployment import StepSpec, inlined

from fieldlab_executor import frames
from fieldlab_executor.frames import CALL, EVALUATE, SHARED
from fieldlab_executor.instructions import Evaluate, Key

__all__ = ["Jobs"]

MAX_CODE, MAX_KEPT = 32 * 1024, 64  # bytes of sealed code that go with a job, and of how many tasks they are kept


class Jobs:
    """``blobs``: the folder in which the deployment's blobs are."""

    def __init__(self, blobs: Path) -> None:
        self._blobs = blobs
        self._code: dict[str, bytes | str] = {}

    def call(self, spec: StepSpec, key: Key, number: int, folder: str, **more: Any) -> frames.Job:
        """The job for an attempt of the step; ``more`` is what follows from what came before it.

        Raises:
            OSError: the code's blob cannot be read.
        """
        args, shared = inlined(spec.args), spec.isolation == "shared"
        if spec.env:
            more["env"] = dict(spec.env)
        if spec.cwd is not None:
            more["cwd"] = spec.cwd
        if spec.secret_env:
            more["secret_env"] = dict(spec.secret_env)
        if spec.timeout is not None:
            more["traced"] = True
        code = spec.code if shared else self._sealed(spec.code)
        kind = CALL | SHARED if shared else CALL
        return (kind, number, *key, code, spec.args if args is None else args, folder, more or None)

    def question(self, ask: Evaluate, number: int, folder: str) -> frames.Job:
        """The job of answering the machine's question."""
        handles = ask.handle if ask.many else (ask.handle,)
        more = {
            "what": ask.kind,
            "code": ask.code,
            "text": ask.text,
            "input": {"handles": handles, "many": ask.many},
            "path": ask.path,
        }
        kind = EVALUATE | SHARED if ask.shared else EVALUATE
        return (kind, number, "", 1, None, "", "", folder, more)

    def _sealed(self, digest: str) -> bytes | str:
        """The sealed code; its digest, if it is long."""
        found = self._code.get(digest)
        if found is None:
            path = self._blobs / digest
            found = path.read_bytes() if os.path.getsize(path) <= MAX_CODE else digest
            if len(self._code) >= MAX_KEPT:
                del self._code[next(iter(self._code))]
            self._code[digest] = found
        return found
