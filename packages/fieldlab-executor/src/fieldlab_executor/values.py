"""Values on the node: opens handles, and makes them.

Values stay on the node as files under ``values/`` or, small ones, inside the frames. A *handle* says where:
``{"j": document}``, ``{"x": file}`` with a document, ``{"a": file}`` with a document and parts, ``{"b": base64}`` or
``{"p": file}`` with a pickle, or null for None. The value of a step that is a DAG is put together of those inside:
``{"l": [handles]}``, ``{"d": {name: handle}}``.
"""

from __future__ import annotations

import binascii
import os

from fieldlab_common import payload

from fieldlab_executor.failures import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["HANDLE_BYTES", "Values", "read_file"]

HANDLE_BYTES = 1024  # a larger value goes to the next step through a file


class Values:
    """Opens handles, and makes them."""

    def __init__(self, root: str, inline: int) -> None:
        self._folder = f"{root}/values"
        self._inline = inline
        self.kept_out: dict[str, str] = {}  # the secrets that the step got

    def open(self, handle: Mapping[str, Any] | None) -> Any:
        """The value that a handle stands for."""
        if handle is None:
            return None
        if "j" in handle:
            return payload.decode_value("json", handle["j"])
        if "x" in handle:
            import json

            return payload.decode_value("json", json.loads(self._read(handle["x"])))
        if "a" in handle:
            return payload.decode_value("parts", data=self._read_once(handle["a"]))
        if "l" in handle:
            return [self.open(one) for one in handle["l"]]
        if "d" in handle:
            return {name: self.open(one) for name, one in handle["d"].items()}
        return payload.loads_local(binascii.a2b_base64(handle["b"]) if "b" in handle else self._read(handle["p"]))

    def open_input(self, given: Mapping[str, Any]) -> Any:
        """The value of a step; of an iterated one, the list of its iterations' values."""
        handles = given["handles"]
        if given.get("many"):
            return [self.open(handle) for handle in handles]
        return self.open(handles[0]) if handles else None

    def keep(self, value: Any, name: str) -> tuple[dict[str, Any], bytes]:
        """What the supervisor is told of ``value``, and, inline, its bytes.

        ``value`` are the fields of a ValueRef, ``handle`` is a handle; that of a small document is not repeated.
        """
        encoded = payload.encode_value(value)
        if self.kept_out:
            self._keep_out(encoded)
        reference: dict[str, Any] = {"format": encoded.format, "size": encoded.size, "summary": encoded.summary}
        if encoded.exact and encoded.format == "json" and encoded.size <= HANDLE_BYTES:
            return {"value": reference}, encoded.body
        inline = encoded.size <= (self._inline if encoded.format == "json" else self._inline * 3 // 4)
        if not inline:
            reference["file"] = f"{name}.value"
            reference["sha256"] = self._write_hashed(reference["file"], encoded)
        if not encoded.exact:
            handle: Any = self.keep_local(value, name)
        else:
            file = reference.get("file") or self._write(f"{name}.value", encoded.body)
            handle = {"x" if encoded.format == "json" else "a": file}
        return {"value": reference, "handle": handle}, encoded.body if inline else b""

    def _keep_out(self, encoded: payload.EncodedValue) -> None:
        from fieldlab_executor.secrets import Search, Secrets

        search = Search(Secrets(self.kept_out))
        encoded.write(search.feed)
        if search.found:
            raise Failure(
                "bad_result",
                f"It holds the secret {search.found!r}, which must not leave the node. Return something else.",
            )

    def keep_local(self, value: Any, name: str) -> dict[str, Any]:
        """A handle for ``value`` that never leaves the node."""
        data = payload.dumps_local(value)
        if len(data) <= HANDLE_BYTES:
            return {"b": binascii.b2a_base64(data, newline=False).decode()}
        return {"p": self._write(f"{name}.local", data)}

    def keep_exact(self, value: Any, name: str) -> dict[str, Any]:
        """A handle for ``value`` for the node alone, as data where that gives precisely the same."""
        encoded = payload.encode_value(value)
        if encoded.exact and encoded.format == "json" and encoded.size <= HANDLE_BYTES:
            return {"j": encoded.json}
        return self.keep_local(value, name)

    def _read(self, name: str) -> bytes:
        return read_file(f"{self._folder}/{name}")

    def _read_once(self, name: str) -> bytearray:
        """The content of a file that may be large, in memory that the value is to keep."""
        path = f"{self._folder}/{name}"
        data = bytearray(os.path.getsize(path))
        with open(path, "rb", buffering=0) as file:
            view = memoryview(data)
            while view and (count := file.readinto(view)):
                view = view[count:]
        return data

    def _write_hashed(self, name: str, encoded: payload.EncodedValue) -> str:
        """Write a file without gathering its content in memory; its SHA-256."""
        import hashlib  # it brings a library with it that most steps do not need

        digest = hashlib.sha256()
        with open(f"{self._folder}/{name}", "wb") as file:

            def write(piece: Any) -> None:
                digest.update(piece)
                file.write(piece)

            encoded.write(write)
        return digest.hexdigest()

    def _write(self, name: str, data: bytes) -> str:
        with open(f"{self._folder}/{name}", "wb") as file:
            file.write(data)
        return name


def read_file(path: str) -> bytes:
    """The content of a file; less machinery than ``open`` has, for what every step does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(fd, os.fstat(fd).st_size + 1)]
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)
