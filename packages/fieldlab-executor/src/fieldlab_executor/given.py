"""A job as its child sees it: what the supervisor told, and what references in sealed code and arguments stand for."""

from __future__ import annotations

import os

from fieldlab_executor import frames
from fieldlab_executor.values import Values, read_file

TYPE_CHECKING = False  # the parent of all steps has this module, and is kept small (``spawner``)
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from fieldlab_executor.context import Connection, Context

__all__ = ["Given", "follow"]


class Given:
    """What one child has to do, and where. ``root`` is the deployment's folder.

    It is made before the child is forked: what is made afterwards costs pages of memory.
    """

    __slots__ = (
        "_connection",
        "_context",
        "_opened",
        "args",
        "attempt",
        "code",
        "fd",
        "folder",
        "iteration",
        "kind",
        "more",
        "number",
        "resolve",
        "root",
        "step",
        "values",
    )

    def __init__(self, root: str, inline: int) -> None:
        self.root = root
        self.values = Values(root, inline)
        self.fd = -1
        self.resolve = self._resolve  # bound once
        self._connection: Connection | None = None
        self._context: Context | None = None
        self._opened: dict[str, Any] | None = None

    def take(self, job: frames.Job) -> None:
        """Begin with a job."""
        self.kind, self.number, self.step, self.attempt, self.iteration = job[:5]
        self.code, self.args, self.folder, self.more = job[5:]
        self._context = self._opened = None

    @property
    def connection(self) -> Connection:
        """For questions to the supervisor, made when there is the first."""
        if self._connection is None:
            from fieldlab_executor.context import Connection

            self._connection = Connection(self.fd)
        return self._connection

    def finish(self, answer: dict[str, Any], data: bytes) -> None:
        """Send the result frame, if there is still somebody to send it to."""
        answer["op"] = "result"
        try:
            if self._connection is not None:
                self._connection.write(answer, data)
                return
            frame = frames.pack(answer, data)
            while frame:
                frame = frame[os.write(self.fd, frame) :]
        except OSError:  # the supervisor is gone: the spawner's sweep follows
            pass

    def blob(self, digest: str) -> bytes:
        """The bytes of a blob of the deployment."""
        return read_file(f"{self.root}/blobs/{digest}")

    @property
    def _more(self) -> dict[str, Any]:
        if self.more is None:
            self.more = {}
        return self.more

    @property
    def artifacts(self) -> str:
        """The folder for the attempt's artifacts."""
        return f"{self.root}/artifacts/{self.step}.{self.iteration or 0}-{self.attempt}"

    def _resolve(self, reference: tuple[Any, ...]) -> Any:
        """What a reference in sealed code or arguments stands for."""
        kind = reference[0]
        if kind == "step":
            return self._of_step(*reference[1:])
        if kind == "item":
            return self.values.open(self._more["item"])
        if kind == "context":
            return self.ctx()
        if kind == "node":
            return self.ctx().node[reference[1]]
        if kind == "file":
            return self._file(reference[1], reference[2])
        if kind == "secret":
            return self.secret(reference[1])
        raise LookupError(f"the reference {reference!r} is of a kind that this executor does not know")

    def secret(self, name: str) -> str:
        """The text of a secret, from the supervisor."""
        value = str(self.connection.ask("secret", name=name)["value"])
        self.values.kept_out[name] = value
        return value

    def ctx(self) -> Context:
        """The task's context, made when it is first needed."""
        if self._context is None:
            from fieldlab_executor.context import Context

            self._context = Context(self, self.connection, self.values)
        return self._context

    def _of_step(self, name: str, attribute: str, path: Iterable[Any]) -> Any:
        inputs = self._more.setdefault("inputs", {})
        given = inputs.get(name)
        if given is None:
            given = inputs[name] = self.connection.ask("input", name=name)["input"]
        if attribute == "status":
            return given["status"]
        if attribute == "error":
            return given["error"] or None
        if self._opened is None:
            self._opened = {}
        if name not in self._opened:
            self._opened[name] = self.values.open_input(given)
        return follow(self._opened[name], path)

    def _file(self, digest: str, name: str) -> str:
        folder = os.path.join(self.root, "files", digest)
        path = os.path.join(folder, name)
        os.makedirs(folder, exist_ok=True)
        try:
            os.link(os.path.join(self.root, "blobs", digest), path)
        except FileExistsError:
            pass
        return path


def follow(value: Any, path: Iterable[Any]) -> Any:
    """The part of ``value`` that a path of keys and indexes leads to."""
    for key in path:
        value = value[key]
    return value
