"""The codec of everything that is sent: frozen dataclasses to JSON and back, in pure Python.

A node needs no compiled package for it. The director decodes the same classes with msgspec, which gives the same
answers (``tests/contract`` compares the two): fields by name; a field that is absent takes its default; a field that
is unknown is ignored, so that a newer party can talk to an older one; a value of the wrong type is an error with its
path. A field typed as a class with a ``kind`` travels as ``{"kind": …, "body": …}`` and is decoded through
the table of that class's subclasses.

Records of a journal are framed (``frame``, ``unframe``): length, CRC-32 and number, then the record's JSON bytes.
"""

from __future__ import annotations

import functools
import json
import struct
import sys
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from fieldlab_common.errors import InvalidMessage

__all__ = ["FRAME", "MAX_FRAME", "decode", "dumps", "encode", "frame", "loads", "unframe"]

T = TypeVar("T")
Decoder = Callable[[Any, str], Any]

FRAME = struct.Struct(">IIQ")  # length of the body, CRC-32 of number and body, number
MAX_FRAME = 4 * 1024 * 1024


def encode(value: Any) -> Any:
    """Turn a dataclass (or a container of them) into what ``json.dumps`` takes. Fields at their default stay out."""
    cls = type(value)
    if cls not in _WAYS:
        _WAYS[cls] = _way(cls)
    way = _WAYS[cls]
    return value if way is None else way(value)


_WAYS: dict[type, Callable[[Any], Any] | None] = {}


def _way(cls: type) -> Callable[[Any], Any] | None:
    """How values of a type are encoded; None: they stay as they are."""
    if is_dataclass(cls):
        return _encoder(cls)
    if issubclass(cls, Enum):
        return lambda value: value._value_
    if issubclass(cls, Mapping):
        return lambda value: {k: encode(v) for k, v in value.items()}
    if issubclass(cls, list | tuple):
        return lambda value: [encode(v) for v in value]
    return None


def _encoder(cls: Any) -> Callable[[Any], dict[str, Any]]:
    plan = [(f.name, f.default, _is_tagged(t)) for f, t in _typed_fields(cls)]

    def run(value: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, default, tagged in plan:
            item = getattr(value, name)
            if item is default or (default is not MISSING and type(item) is type(default) and item == default):
                continue
            out[name] = {"kind": item.kind, "body": encode(item)} if tagged else encode(item)
        return out

    return run


def decode(cls: type[T], data: Any) -> T:
    """Make a ``cls`` of JSON data.

    Raises:
        InvalidMessage: with the path of what is wrong, e.g. ``$.steps[3].name``.
    """
    return typing.cast(T, _decoder(typing.cast(Any, cls))(data, "$"))


def dumps(value: Any) -> bytes:
    """Compact JSON bytes of a dataclass, keys in field order: equal values give equal bytes.

    Half a character (a lone surrogate), which any text of a user's may hold and JSON may not, becomes a ``?``.
    """
    return json.dumps(encode(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        errors="replace"
    )


def loads(cls: type[T], data: bytes) -> T:
    """Make a ``cls`` of JSON bytes; InvalidMessage if they are not JSON or not of that form."""
    try:
        parsed = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"What should be a {cls.__name__} is not JSON: {error}.", details={"path": "$"}) from error
    return decode(cls, parsed)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def frame(number: int, body: bytes) -> bytes:
    """One record as it stands in a journal segment and in the body of an upload."""
    return FRAME.pack(len(body), zlib.crc32(body, number & 0xFFFFFFFF), number) + body


def unframe(data: bytes | memoryview, offset: int = 0) -> Iterator[tuple[int, bytes, int]]:
    """Yield (number, body, offset after it) for each whole record; stop silently at a cut one.

    Raises:
        InvalidMessage: a frame is longer than ``MAX_FRAME`` or its checksum is wrong.
    """
    view = memoryview(data)
    while offset + FRAME.size <= len(view):
        length, crc, number = FRAME.unpack_from(view, offset)
        if length > MAX_FRAME:
            raise InvalidMessage(f"A record of {length} bytes at offset {offset} is over the limit of {MAX_FRAME}.")
        end = offset + FRAME.size + length
        if end > len(view):
            return
        body = bytes(view[offset + FRAME.size : end])
        if zlib.crc32(body, number & 0xFFFFFFFF) != crc:
            raise InvalidMessage(f"The record at offset {offset} does not match its checksum.")
        yield number, body, end
        offset = end


# --- how types become decoders ---------------------------------------------------------------------------------------


def _typed_fields(cls: type) -> list[tuple[Any, Any]]:
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in fields(cls) if f.init]


def _is_tagged(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint) and getattr(hint, "kind", None) == ""


def _fail(path: str, wanted: str, data: Any) -> InvalidMessage:
    shown = repr(data)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return InvalidMessage(f"At {path}: expected {wanted}, got {shown}.", details={"path": path})


@functools.cache
def _decoder(hint: Any) -> Decoder:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return lambda data, path: data
    if origin in (types.UnionType, typing.Union):
        return _optional(args)
    if origin is typing.Literal:
        return _literal(args)
    if origin is not None:
        return _container(origin, args)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum(hint)
    if _is_tagged(hint):
        return _tagged(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return _dataclass(hint)
    if hint in (dict, list):
        return _plain(hint)
    return _plain(hint)


def _plain(cls: type) -> Decoder:
    if cls is str:
        return _text

    def run(data: Any, path: str) -> Any:
        if cls is float and type(data) is int:
            return float(data)
        if type(data) is not cls:
            raise _fail(path, "a whole number" if cls is int else f"a {cls.__name__}", data)
        return data

    return run


def _text(data: Any, path: str) -> Any:
    """Text; of a short one, such as a name or a digest, one copy is kept however often it stands in a document."""
    if type(data) is not str:
        raise _fail(path, "text", data)
    return sys.intern(data) if len(data) <= _SHORT else data


_SHORT = 200


def _optional(args: tuple[Any, ...]) -> Decoder:
    inner = [_decoder(a) for a in args if a is not type(None)]
    nullable = type(None) in args

    def run(data: Any, path: str) -> Any:
        if data is None and nullable:
            return None
        for index, one in enumerate(inner):
            try:
                return one(data, path)
            except InvalidMessage:
                if index == len(inner) - 1:
                    raise
        raise _fail(path, "a value", data)

    return run


def _literal(args: tuple[Any, ...]) -> Decoder:
    def run(data: Any, path: str) -> Any:
        if data not in args:
            raise _fail(path, "one of " + ", ".join(map(repr, args)), data)
        return data

    return run


def _enum(cls: type[Enum]) -> Decoder:
    def run(data: Any, path: str) -> Any:
        try:
            return cls(data)
        except ValueError:
            raise _fail(path, "one of " + ", ".join(str(m.value) for m in cls), data) from None

    return run


def _container(origin: Any, args: tuple[Any, ...]) -> Decoder:
    if isinstance(origin, type) and issubclass(origin, Mapping):
        value = _decoder(args[1])

        def mapping(data: Any, path: str) -> Any:
            if type(data) is not dict:
                raise _fail(path, "an object", data)
            return {k: value(v, f"{path}.{k}") for k, v in data.items()}

        return mapping
    item = _decoder(args[0])
    make = tuple if origin is tuple else list

    def sequence(data: Any, path: str) -> Any:
        if type(data) is not list:
            raise _fail(path, "a list", data)
        return make(item(v, f"{path}[{i}]") for i, v in enumerate(data))

    return sequence


def _tagged(base: Any) -> Decoder:
    def run(data: Any, path: str) -> Any:
        if type(data) is not dict or type(data.get("kind")) is not str:
            raise _fail(path, "an object with a kind", data)
        table: dict[str, Any] = {sub.kind: sub for sub in base.__subclasses__()}
        cls = table.get(data["kind"])
        if cls is None:
            raise _fail(f"{path}.kind", "one of " + ", ".join(sorted(table)), data["kind"])
        return _dataclass(cls)(data.get("body", {}), f"{path}.body")

    return run


@functools.cache
def _dataclass(cls: type) -> Decoder:
    plan: list[tuple[str, Decoder, bool]] | None = None

    def run(data: Any, path: str) -> Any:
        nonlocal plan
        if plan is None:  # on first use, so that a class may refer to itself
            plan = [
                (f.name, _decoder(hint), f.default is MISSING and f.default_factory is MISSING)
                for f, hint in _typed_fields(cls)
            ]
        if type(data) is not dict:
            raise _fail(path, f"an object ({cls.__name__})", data)
        values: dict[str, Any] = {}
        for name, one, required in plan:
            if name in data:
                values[name] = one(data[name], f"{path}.{name}")
            elif required:
                raise InvalidMessage(f"At {path}: {cls.__name__} lacks {name!r}.", details={"path": f"{path}.{name}"})
        return cls(**values)

    return run
