"""Values as they travelled: opened from a reference, only when asked for, and a pickle only on trust."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from fieldlab_common import protocol as p
from fieldlab_common.errors import BadAnswer

__all__ = ["open_value"]


def open_value(ref: p.ValueRef, blob: Callable[[str, int], bytes | bytearray], *, trust: bool = False) -> Any:
    """The value that ``ref`` refers to. ``blob`` gives the bytes of a digest and size, verified.

    Raises:
        UntrustedValue: it is a pickle and ``trust`` is false; nothing is fetched then.
        BadAnswer: the bytes are not what a value looks like.
    """
    from fieldlab_common import payload

    if ref.format == "pickle":
        if not trust:
            return payload.decode_value("pickle")
        data = blob(ref.sha256, ref.size) if ref.sha256 else base64.b64decode(ref.data)
        return payload.decode_value("pickle", data=data, trust=True)
    if ref.format == "parts":
        return payload.decode_value(
            "parts", data=blob(ref.sha256, ref.size) if ref.sha256 else base64.b64decode(ref.data)
        )
    document = ref.json
    if ref.sha256:
        try:
            document = json.loads(blob(ref.sha256, ref.size))
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"The value with SHA-256 {ref.sha256[:12]}… is not the JSON it should be.") from error
    return payload.decode_value(ref.format, document)
