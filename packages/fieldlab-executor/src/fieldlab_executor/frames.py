"""What supervisor, spawner and children say to each other, as bytes.

Between supervisor and child a frame is a header and opaque bytes behind it, both counted in front: the supervisor
never has to look into a value. What a child says has a header in JSON, because the supervisor believes nobody; what it
is told is in the format of ``marshal``, which a process that has not loaded ``json`` can read, and only a child ever
does. Between supervisor and spawner each message is one packet of a few numbers, because
there the kernel keeps the borders and a child's descriptors travel with its packet.

Invariant: a length over ``MAX_FRAME`` is refused before anything is kept, so that no child can fill the supervisor.
"""

from __future__ import annotations

import functools
import marshal
import struct
from marshal import loads as _loads
from os import read

from fieldlab_common.compact import to_ascii
from fieldlab_common.errors import InvalidMessage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    Frame = tuple[dict[str, Any], bytes]
    # What it is (CALL …), number, step, attempt, iteration, sealed code, sealed arguments, folder, and what few have.
    Job = tuple[int, int, str, int, int | None, bytes | str, bytes | str, str, dict[str, Any] | None]

__all__ = [
    "CALL",
    "CHILD",
    "EVALUATE",
    "EXIT",
    "FAILED",
    "FDS",
    "FORK",
    "LOAD",
    "MAX_FRAME",
    "NONE",
    "ORPHAN",
    "SHARED",
    "Frame",
    "Job",
    "Unpacker",
    "pack",
    "receive",
    "tell",
    "told",
]

MAX_FRAME = 64 * 1024 * 1024
_HEAD = struct.Struct(">II")  # lengths of header and bytes
_SIZE = _HEAD.size
_lengths = _HEAD.unpack
_MARSHAL = 2  # of its formats, one that every Python writes and reads alike: an environment may have another

# Packets between supervisor and spawner. To the spawner: FORK (how many); LOAD (what ``tell`` makes of names of modules
# follows). From it: CHILD (pid; its descriptors beside
# it), FAILED (errno of a fork that failed), EXIT (pid, wait status, CPU seconds, peak memory in KiB), then orphans.
FORK = struct.Struct("<cI")
LOAD = b"L"
CHILD = struct.Struct("<cI")
FAILED = struct.Struct("<cI")
EXIT = struct.Struct("<cIidQ")
FDS = struct.Struct("@3i")  # a child's descriptors: its socket, and what is to be read of its output
ORPHAN = struct.Struct("<I")


# What a child is to do: call a step's code, or answer a question of the machine's; and then wait for the next job.
CALL, EVALUATE, SHARED = 1, 2, 4
# That a job returned None, and used so many microseconds of CPU time and KiB of memory.
_NONE = b'{"op":"result","usage":[%14d,%14d]}'
NONE = _HEAD.pack(len(_NONE % (0, 0)), 4) + _NONE + b"null"


def pack(header: Mapping[str, Any], data: bytes = b"") -> bytes:
    """One frame of a child's, or of anybody's but to a child."""
    head = to_ascii(header).encode()
    if len(head) > MAX_FRAME or len(data) > MAX_FRAME:
        raise InvalidMessage(f"A message of {len(head) + len(data)} bytes is over the limit of {MAX_FRAME}.")
    return _HEAD.pack(len(head), len(data)) + head + data


def tell(header: dict[str, Any] | list[str] | Job) -> bytes:
    """One frame to a child; the header is made of dictionaries, lists, tuples, text, bytes, numbers, bools and None.

    A job is a tuple, everything else that a child is told is a dictionary.
    """
    head = marshal.dumps(header, _MARSHAL)
    if len(head) > MAX_FRAME:
        raise InvalidMessage(f"A message of {len(head)} bytes is over the limit of {MAX_FRAME}.")
    return _HEAD.pack(len(head), 0) + head


@functools.cache
def _reader() -> Callable[[str], tuple[Any, int]]:
    import json  # whom a child tells something has it

    return json.JSONDecoder().raw_decode


def _parse(head: bytes) -> dict[str, Any]:
    try:
        header = _reader()(head.decode())[0]
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


def receive(fd: int) -> Any:
    """Wait for what the supervisor has to say; None when it is gone. For a descriptor that only one thread reads."""
    head = _read(fd, _SIZE)
    body = head and _read(fd, _lengths(head)[0])
    return _loads(body) if body else None


def told(packet: bytes) -> Any:
    """What ``tell`` made into one packet."""
    return _loads(packet[_SIZE:])


def _read(fd: int, size: int) -> bytes:
    data = read(fd, size)
    while len(data) < size:
        more = read(fd, size - len(data))
        if not more:
            return b""
        data += more
    return data
