"""Bodies that come compressed (RFC 9110, section 8.4), opened no further than their limit.

A body is opened part by part as it arrives, and each time by no more bytes than the limit leaves: what would grow a
thousandfold costs the limit in memory, and no more time than a body of the limit's length.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

from fieldlab_common.errors import InvalidRequest, TooLarge, UnsupportedEncoding

__all__ = ["ENCODINGS", "opener"]

# How zlib is told the format: gzip (RFC 1952); deflate is that of RFC 1950, in spite of its name.
ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


def opener(encoding: str, most: int, known: Mapping[str, int] = ENCODINGS) -> Callable[[bytes], bytes]:
    """What makes of each part of a body, b"" being its end, its bytes as they were before they were encoded.

    ``encoding`` is the header Content-Encoding, ``most`` the limit in bytes, ``known`` what else than the bytes as they
    are is taken here.

    Raises:
        UnsupportedEncoding: the director does not take it. What is returned raises TooLarge over the limit, and
        InvalidRequest for bytes that are not of that encoding, or end too early.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return _Plain(most)
    if name not in known:
        raise UnsupportedEncoding(
            f"The director does not take this body with the Content-Encoding {name[:40]!r}.",
            advice=f"Send it as it is{', or with gzip or deflate' if known else ''}.",
        )
    return _Inflater(known[name], most)


class _Plain:
    def __init__(self, most: int) -> None:
        self._most = self._left = most

    def __call__(self, part: bytes) -> bytes:
        self._left -= len(part)
        if self._left < 0:
            raise TooLarge(f"The body is over the limit of {self._most} bytes.")
        return part


class _Inflater:
    def __init__(self, window: int, most: int) -> None:
        self._inflate = zlib.decompressobj(window)
        self._most = self._left = most

    def __call__(self, part: bytes) -> bytes:
        try:
            opened = self._inflate.decompress(part, self._left + 1) if part else self._inflate.flush()
        except zlib.error as error:
            raise InvalidRequest(f"The body is not what its Content-Encoding says: {error}.") from error
        self._left -= len(opened)
        if self._left < 0:
            raise TooLarge(f"The body is over the limit of {self._most} bytes when it is opened.")
        if self._inflate.unused_data or (not part and not self._inflate.eof):
            raise InvalidRequest("The compressed body does not end where it should.")
        return opened
