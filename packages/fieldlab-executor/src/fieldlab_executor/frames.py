"""What supervisor, spawner and children say to each other, as bytes.

Between supervisor and child a frame is a JSON header and opaque bytes behind it, both counted in front: the supervisor
never has to look into a value. Between supervisor and spawner each message is one packet of a few numbers, because
there the kernel keeps the borders and a child's descriptors travel with its packet.

Invariant: a length over ``MAX_FRAME`` is refused before anything is kept, so that no child can fill the supervisor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from fieldlab_common.errors import InvalidMessage

__all__ = ["CHILD", "EXIT", "FAILED", "FORK", "MAX_FRAME", "ORPHAN", "Frame", "Unpacker", "pack", "receive"]

Frame = tuple[dict[str, Any], bytes]

MAX_FRAME = 64 * 1024 * 1024
_HEAD = struct.Struct(">II")  # lengths of header and bytes

# Packets between supervisor and spawner. To the spawner: FORK (how many). From it: CHILD (pid; its descriptors beside
# it), FAILED (errno of a fork that failed), EXIT (pid, wait status, CPU seconds, peak memory in KiB), then orphans.
FORK = struct.Struct("<cI")
CHILD = struct.Struct("<cI")
FAILED = struct.Struct("<cI")
EXIT = struct.Struct("<cIidQ")
ORPHAN = struct.Struct("<I")


def pack(header: Mapping[str, Any], data: bytes = b"") -> bytes:
    """One frame."""
    head = _encode(header).encode()
    if len(head) > MAX_FRAME or len(data) > MAX_FRAME:
        raise InvalidMessage(f"A message of {len(head) + len(data)} bytes is over the limit of {MAX_FRAME}.")
    return _HEAD.pack(len(head), len(data)) + head + data


# Without what json.loads and json.dumps do around it: in a fresh child each function that runs is memory to be copied.
_decode = json.JSONDecoder().raw_decode
_encode = json.JSONEncoder(separators=(",", ":")).encode


def _parse(head: bytes) -> dict[str, Any]:
    try:
        header, _ = _decode(head.decode())
    except ValueError as error:
        raise InvalidMessage(f"A frame's header is not JSON: {error}.") from error
    if type(header) is not dict:
        raise InvalidMessage("A frame's header is not an object.")
    return header


class Unpacker:
    """Takes bytes as they come, gives whole frames."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of a frame that has begun and is not whole."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Every frame that ``data`` completes.

        Raises:
            InvalidMessage: this is not made of frames, or one is too long.
        """
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _HEAD.size:
            head, body = _HEAD.unpack_from(buffer)
            if head > MAX_FRAME or body > MAX_FRAME:
                raise InvalidMessage(f"A frame of {head + body} bytes is over the limit of {MAX_FRAME}.")
            start, end = _HEAD.size + head, _HEAD.size + head + body
            if len(buffer) < end:
                return
            frame = _parse(bytes(buffer[_HEAD.size : start])), bytes(buffer[start:end])
            del buffer[:end]
            yield frame


def receive(fd: int) -> Frame | None:
    """Wait for one frame; None at the end of the stream. For a descriptor that only one thread reads."""
    data = b""
    while len(data) < _HEAD.size:
        more = os.read(fd, _HEAD.size - len(data))
        if not more:
            return None
        data += more
    head, body = _HEAD.unpack(data)
    rest = os.read(fd, head + body)
    while len(rest) < head + body:
        more = os.read(fd, head + body - len(rest))
        if not more:
            return None
        rest += more
    return _parse(rest[:head]), rest[head:]
