"""The only place where user code and user values are turned into bytes and back.

Two ways, kept apart. **Code and arguments** go from a user to the user's own nodes as cloudpickle (``seal``,
``unseal``); whatever stands for a value that exists only there (a step's result, a node's property, a file) is a
*reference*: an object whose type has ``__fieldlab_reference__``, which leaves as a persistent id and is resolved by
the child that opens it. **Values** come back as data (``encode_value``, ``decode_value``): a tagged JSON document
that cannot run anything when it is opened. Its large arrays, frames and bytes stand beside it, in *parts* of their own
form (``tables``). What has no such form travels as an opaque pickle, opened only on trust.

With parts, a value is: ``MAGIC``, the length of its head (8 bytes, little-endian), the head (a JSON object: ``v`` is
the document, ``parts`` has the length of each part), then the parts. Head and parts begin at multiples of ``ALIGN``.

Invariants: ``decode_value`` without ``trust`` never unpickles, imports a module or calls a user's constructor.
The director never imports this module (a contract in CI holds that).
"""

from __future__ import annotations

import binascii
import builtins
import marshal
import sys
import types
from _pickle import Unpickler
from _pickle import dumps as _pickled
from _pickle import loads as _unpickled
from io import BytesIO

from fieldlab_common.compact import to_text
from fieldlab_common.errors import InvalidMessage, UntrustedValue

TYPE_CHECKING = False  # no module is loaded here that a step which returns plain data does not need (``compact``)
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from fieldlab_common.tables import Part

    Reference = tuple[Any, ...]

__all__ = [
    "NO_ARGUMENTS",
    "EncodedValue",
    "Unresolved",
    "decode_value",
    "dumps_local",
    "encode_value",
    "loads_local",
    "make_code",
    "make_function",
    "make_module",
    "sample",
    "seal",
    "send_by_value",
    "set_function",
    "type_name",
    "unseal",
]

MAGIC = b"fieldlab"
ALIGN = 64
PART_BYTES = 32 * 1024  # what is smaller stands in the document, in base64

# --- code and arguments -----------------------------------------------------------------------------------------------

NO_ARGUMENTS = _pickled(((), {}), 5)  # the sealed arguments of most steps


_Function = types.FunctionType


class _Unsealer(Unpickler):
    __slots__ = ("resolve",)
    resolve: Callable[[Reference], Any]

    def persistent_load(self, pid: Any) -> Any:
        return self.resolve(pid)


def seal(obj: Any, *, what: str) -> bytes:
    """Pickle code or arguments for a node.

    ``what`` says in an error what it was: "task 'resolve'", "the arguments of step 'probe-2'".

    Raises:
        UnpicklableError: naming the variable to blame.
    """
    from fieldlab_common import sealing

    return sealing.seal(obj, what)


def unseal(data: bytes, resolve: Callable[[Reference], Any]) -> Any:
    """Open what ``seal`` made, on the node; ``resolve`` gives the value of each reference. Runs user code."""
    unsealer = _Unsealer(BytesIO(data))
    unsealer.resolve = resolve
    return unsealer.load()


def send_by_value(module: types.ModuleType) -> None:
    """Let what ``module`` defines travel as code, and not by its name: for an installed module that no node has."""
    from fieldlab_common import sealing

    sealing.send_by_value(module)


def dumps_local(value: Any) -> bytes:
    """A value for another step on the same node: a pickle, complete and private to the deployment."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return _pickled(value, 5)
    from fieldlab_common import sealing

    return sealing.dumps(value)


def loads_local(data: bytes) -> Any:
    """Open what ``dumps_local`` made. Runs user code; only a child process calls it."""
    return _unpickled(data)


# What sealed functions are made of again, by these names; ``sealing`` takes them apart.


def make_code(python: tuple[int, int], data: bytes) -> types.CodeType:
    """A function's code, which only the Python that compiled it can run."""
    if python != sys.version_info[:2]:
        made, runs = ".".join(map(str, python)), ".".join(map(str, sys.version_info[:2]))
        raise ValueError(f"its code was compiled by Python {made}, and this is Python {runs}")
    code: types.CodeType = marshal.loads(data)
    return code


def make_function(code: types.CodeType, names: dict[str, Any]) -> types.FunctionType:
    """A function before ``set_function``; ``names`` are its globals, the same of several that share them."""
    names["__builtins__"] = builtins.__dict__
    if not code.co_freevars:
        return _Function(code, names)
    return _Function(code, names, None, None, tuple([types.CellType() for _ in code.co_freevars]))


def set_function(function: Any, state: tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[Any], Any]) -> None:
    """Give a function its attributes, its globals, what else it has, and the values of its cells.

    This comes after ``make_function`` because any of it may refer to the function. The last part of ``state`` are
    modules, which were imported by being there.
    """
    attributes, names, others, values, _ = state
    if attributes:
        function.__dict__.update(attributes)
    if names:
        function.__globals__.update(names)
    if others:
        for name, value in others.items():
            setattr(function, name, value)
    if values:
        for cell, value in zip(function.__closure__, values, strict=True):
            if value:
                cell.cell_contents = value[0]


class _Made:
    """Leaves as a call of ``make`` with ``arguments``, and what follows on it."""

    def __init__(self, make: Callable[..., Any], *arguments: Any, then: tuple[Any, ...] = ()) -> None:
        self._reduced = (make, arguments, *then)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def sample() -> bytes:
    """A function that does nothing, as ``seal`` would make it, without what ``seal`` has to load."""
    code = _Made(make_code, sys.version_info[:2], marshal.dumps((lambda: None).__code__, 2))
    state: Any = ({}, {}, {}, [], ())
    then = (state, None, None, set_function)
    return _pickled(_Made(make_function, code, {"__name__": __name__}, then=then), 5)


def make_module(name: str) -> types.ModuleType:
    """The module of that name, imported if it was not."""
    __import__(name)
    return sys.modules[name]


def type_name(cls: type) -> str:
    """The name of a class, as people know it."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


# --- values as data ---------------------------------------------------------------------------------------------------


class EncodedValue:
    """A value ready to travel.

    ``format`` is ``json`` (``json`` is the document), ``parts`` (the document, and parts beside it) or ``pickle``.
    ``exact``: opening it gives back precisely the value, also in a process that knows no user classes. ``summary`` is
    one short line for people. ``size`` is the length in bytes of what ``write`` gives, and of ``body``.
    """

    __slots__ = ("_head", "_parts", "exact", "format", "json", "size", "summary")

    def __init__(
        self, format: str, head: bytes, summary: str, exact: bool, json: Any = None, parts: Sequence[Part] = ()
    ) -> None:
        self.format, self.summary, self.exact, self.json = format, summary, exact, json
        self._head, self._parts = head, parts
        self.size = len(head) + sum(part.size for part in parts)

    def write(self, write: Callable[[Any], object]) -> None:
        """Give its bytes to ``write``, piece by piece, as a file or an artifact holds them."""
        write(self._head)
        for part in self._parts:
            part.write(write)

    @property
    def body(self) -> bytes:
        """Its bytes in one, for what is small."""
        if not self._parts:
            return self._head
        made = bytearray()
        self.write(made.extend)
        return bytes(made)


class Unresolved:
    """A dataclass or enum member whose class the reading process has not imported: its type's name and its data."""

    __slots__ = ("fields", "type_name")

    def __init__(self, type_name: str, fields: dict[str, Any]) -> None:
        self.type_name, self.fields = type_name, fields

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Unresolved):
            return NotImplemented
        return (self.type_name, self.fields) == (other.type_name, other.fields)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Unresolved(type_name={self.type_name!r}, fields={self.fields!r})"


class _NotData(Exception):
    """The value has no safe form."""


class _Encoder:
    def __init__(self) -> None:
        self.exact = True
        self.parts: list[Part] = []

    def encode(self, value: Any) -> Any:
        cls = type(value)
        if value is None or cls is bool:
            return value
        simple = _ENCODE.get(cls) or _loaded(cls)
        if simple is not None:
            return simple(value)
        if cls is list:
            return [self.encode(v) for v in value]
        if cls is dict:
            return self._dict(value)
        if cls is bytes or cls is bytearray:
            return {"$": cls.__name__, **self._bytes(value)}
        if cls in (tuple, set, frozenset):
            return {"$": cls.__name__, "v": [self.encode(v) for v in value]}
        return self._other(value, cls)

    def _dict(self, value: dict[Any, Any]) -> Any:
        if all(type(k) is str for k in value) and "$" not in value and all(map(_is_text, value)):
            return {k: self.encode(v) for k, v in value.items()}
        return {"$": "dict", "v": [[self.encode(k), self.encode(v)] for k, v in value.items()]}

    def _other(self, value: Any, cls: type) -> Any:
        if _is_a(value, "enum", "Enum"):
            self.exact = False
            return {"$": "enum", "type": _type_path(cls), "name": value.name, "v": self.encode(value.value)}
        if hasattr(cls, "__dataclass_fields__"):
            import dataclasses

            self.exact = False
            fields = {f.name: self.encode(getattr(value, f.name)) for f in dataclasses.fields(cls)}
            return {"$": "dataclass", "type": _type_path(cls), "v": fields}
        if _is_a(value, "pathlib", "PurePath"):
            self.exact = self.exact and cls is type(sys.modules["pathlib"].Path())
            return {"$": "path", "v": str(value)}
        if cls.__module__.partition(".")[0] in ("numpy", "pandas", "pyarrow"):
            return self._table(value)
        raise _NotData(type_name(cls))

    def _table(self, value: Any) -> Any:
        from fieldlab_common import tables

        try:
            return tables.encode(value, self.emit, self.encode)
        except tables.NotData as error:
            raise _NotData(str(error)) from error

    def _bytes(self, value: bytes | bytearray) -> dict[str, Any]:
        if len(value) < PART_BYTES:
            return {"v": _b64(value)}
        from fieldlab_common.tables import Raw

        return self.emit(Raw(value))

    def emit(self, part: Part) -> dict[str, Any]:
        """Put a part beside the document, or into it if it is small; what the document says of it."""
        if part.size >= PART_BYTES:
            self.parts.append(part)
            return {"part": len(self.parts) - 1}
        data = bytearray()
        part.write(data.extend)
        return {"v": _b64(data)}


def _is_a(value: object, module: str, name: str) -> bool:
    """Whether it is an instance of the module's class: without that module, it cannot be."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _b64(data: bytes | bytearray) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type_path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _int(value: int) -> Any:
    return value if -(2**53) < value < 2**53 else {"$": "int", "v": hex(value)}


def _float(value: float) -> Any:
    return value if value - value == 0 else {"$": "float", "v": repr(value)}


def _str(value: str) -> Any:
    return value if _is_text(value) else {"$": "str", "v": _b64(value.encode("utf-8", "surrogatepass"))}


def _moment(kind: str) -> Callable[[Any], Any]:
    def run(value: Any) -> Any:
        zone = getattr(value, "tzinfo", None)
        key = getattr(zone, "key", None)
        import datetime as dt

        if zone is not None and key is None and type(zone) is not dt.timezone:
            raise _NotData(type_name(type(zone)))
        document = {"$": kind, "v": value.isoformat()}
        if key is not None:
            document["zone"] = key
        elif zone is not None and (offset := zone.utcoffset(None)) and offset.microseconds:
            document["offset"] = str(offset // dt.timedelta(microseconds=1))  # fromisoformat may lose it
        if getattr(value, "fold", 0):
            document["fold"] = "1"
        return document

    return run


_ENCODE: dict[type, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    str: _str,
    complex: lambda v: {"$": "complex", "v": [repr(v.real), repr(v.imag)]},
    range: lambda v: {"$": "range", "v": [hex(v.start), hex(v.stop), hex(v.step)]},
}
# Of modules that a process may not have loaded; it has none of their values then.
_LOADED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "datetime": {
        "datetime": _moment("datetime"),
        "date": _moment("date"),
        "time": _moment("time"),
        "timedelta": lambda v: {"$": "timedelta", "v": [v.days, v.seconds, v.microseconds]},
    },
    "decimal": {"Decimal": lambda v: {"$": "decimal", "v": str(v)}},
    "uuid": {"UUID": lambda v: {"$": "uuid", "v": str(v)}},
}


def _loaded(cls: type) -> Callable[[Any], Any] | None:
    """How values of a class of such a module are encoded, if it is one."""
    found = _LOADED.get(cls.__module__, {}).get(cls.__name__)
    return found if found is not None and getattr(sys.modules[cls.__module__], cls.__name__, None) is cls else None


def encode_value(value: Any) -> EncodedValue:
    """Turn a task's result into what travels to the client.

    Raises:
        UnpicklableError: it is neither data nor can it be pickled; says which part.
    """
    encoder = _Encoder()
    try:
        document = encoder.encode(value)
        if encoder.parts:
            return _beside(document, encoder.parts, _summary(value), encoder.exact)
        return EncodedValue("json", _dumps(document), _summary(value), encoder.exact, document)
    except (_NotData, RecursionError):
        pass
    data = seal(value, what=f"the result, a {type_name(type(value))},")
    return EncodedValue("pickle", data, f"{type_name(type(value))} (pickle)", exact=False)


def _dumps(document: Any) -> bytes:
    return to_text(document).encode()


def _beside(document: Any, parts: Sequence[Part], summary: str, exact: bool) -> EncodedValue:
    """A document with its parts."""
    from fieldlab_common.tables import Raw

    head = _dumps({"v": document, "parts": [part.size for part in parts]})
    start = (MAGIC + len(head).to_bytes(8, "little")).ljust(ALIGN, b"\0") + head.ljust(_aligned(len(head)), b" ")
    padded = [one for part in parts for one in (part, Raw(bytes(_aligned(part.size) - part.size)))]
    return EncodedValue("parts", start, summary, exact, document, padded)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _summary(value: Any) -> str:
    if isinstance(value, list | tuple | set | frozenset | dict):
        return f"{type(value).__name__} of {len(value)}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        what = "array" if type(value).__module__ == "numpy" else type(value).__name__.lower()
        return f"{value.dtype} {what} {tuple(value.shape)}"
    if hasattr(value, "columns") and hasattr(value, "shape"):
        return f"{type_name(type(value))} {tuple(value.shape)}"
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    cls = type(value)
    if value is None or cls is bool or cls in _ENCODE or _loaded(cls) or _is_a(value, "pathlib", "PurePath"):
        text = repr(value[:80] if isinstance(value, str) else value)
        return text if len(text) <= 60 else text[:57] + "..."
    return type_name(cls)


def decode_value(format: str, document: Any = None, data: Any = b"", *, trust: bool = False) -> Any:
    """Open a value. ``document`` for the format ``json``; ``data``, bytes, for ``parts`` and ``pickle``.

    An array among the parts keeps ``data`` and, if that can be written to, is not copied.

    Raises:
        UntrustedValue: it is a pickle and ``trust`` is false.
        InvalidMessage: the document is not one that ``encode_value`` makes.
    """
    if format == "pickle":
        if not trust:
            raise UntrustedValue(
                "The value is a pickle, and opening a pickle can run any code.",
                advice="If you trust the node and the task, open it with .trust(); better, return plain data.",
            )
        return _unpickled(data)
    if format not in ("json", "parts"):
        raise InvalidMessage(f"{format!r} is no format of values; there are json, parts and pickle.")
    try:
        return _decode(document if format == "json" else _with_parts(memoryview(data)))
    except InvalidMessage:
        raise
    except (ValueError, TypeError, KeyError, LookupError, ArithmeticError, AttributeError, ImportError) as error:
        raise InvalidMessage(f"A value is malformed: {type(error).__name__}: {error}.") from error


def _with_parts(data: memoryview) -> Any:
    """The document, in which each part's bytes stand under ``raw``."""
    if data[: len(MAGIC)] != MAGIC:
        raise InvalidMessage("A value is malformed: it does not begin as one with parts does.")
    length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 8], "little")
    position = ALIGN + _aligned(length)
    import json

    head = json.loads(bytes(data[ALIGN : ALIGN + length]))
    parts = []
    for size in head["parts"]:
        parts.append(data[position : position + size])
        if parts[-1].nbytes != size:
            raise InvalidMessage("A value is malformed: it ends before its last part does.")
        position += _aligned(size)
    return _insert(head["v"], parts)


def _insert(document: Any, parts: Sequence[memoryview]) -> Any:
    if isinstance(document, list):
        return [_insert(one, parts) for one in document]
    if not isinstance(document, dict):
        return document
    if "$" in document and "part" in document:
        return {**document, "raw": parts[document["part"]]}
    return {key: _insert(one, parts) for key, one in document.items()}


def _decode(doc: Any) -> Any:
    if isinstance(doc, list):
        return [_decode(v) for v in doc]
    if not isinstance(doc, dict):
        return doc
    if "$" not in doc:
        return {k: _decode(v) for k, v in doc.items()}
    decoder = _DECODE.get(doc["$"])
    if decoder is None:
        raise InvalidMessage(f"A value has the unknown tag {doc['$']!r}; the node may run a newer fieldlab.")
    return decoder(doc)


def _parse_moment(doc: dict[str, Any]) -> Any:
    import datetime as dt

    value = getattr(dt, doc["$"]).fromisoformat(doc["v"])
    if "zone" in doc:
        import zoneinfo

        value = value.replace(tzinfo=zoneinfo.ZoneInfo(doc["zone"]))
    if "offset" in doc:
        value = value.replace(tzinfo=dt.timezone(dt.timedelta(microseconds=int(doc["offset"]))))
    return value.replace(fold=1) if "fold" in doc else value


def _known(path: str) -> Any:
    """The class that ``module:qualname`` names, if this process has imported it already; never imports."""
    module, _, qualname = path.partition(":")
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = vars(found).get(name) if isinstance(found, types.ModuleType | type) else None
    return found if isinstance(found, type) else None


def _decode_dataclass(doc: dict[str, Any]) -> Any:
    import dataclasses

    fields = {k: _decode(v) for k, v in doc["v"].items()}
    cls = _known(doc["type"])
    if (
        cls is None
        or not hasattr(cls, "__dataclass_fields__")
        or {f.name for f in dataclasses.fields(cls)} != set(fields)
    ):
        return Unresolved(doc["type"], fields)
    value: Any = object.__new__(cls)
    for name, item in fields.items():
        object.__setattr__(value, name, item)
    return value


def _decode_enum(doc: dict[str, Any]) -> Any:
    import enum

    cls, value = _known(doc["type"]), _decode(doc["v"])
    if cls is not None and issubclass(cls, enum.Enum) and doc["name"] in cls.__members__:
        return cls.__members__[doc["name"]]
    if cls is not None and issubclass(cls, enum.Flag):  # several at once, or none, have no member of their own
        try:
            return cls(value)
        except ValueError:
            pass
    return Unresolved(doc["type"], {"name": doc["name"], "value": value})


def _raw(doc: Mapping[str, Any]) -> Any:
    return doc["raw"] if "raw" in doc else binascii.a2b_base64(doc["v"])


def _tabular(doc: dict[str, Any]) -> Any:
    from fieldlab_common import tables

    return tables.decode(doc, _raw, _decode)


_DECODE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int": lambda d: int(d["v"], 16),
    "float": lambda d: float(d["v"]),
    "str": lambda d: binascii.a2b_base64(d["v"]).decode("utf-8", "surrogatepass"),
    "bytes": lambda d: bytes(_raw(d)),
    "bytearray": lambda d: bytearray(_raw(d)),
    "complex": lambda d: complex(float(d["v"][0]), float(d["v"][1])),
    "datetime": _parse_moment,
    "date": _parse_moment,
    "time": _parse_moment,
    "timedelta": lambda d: make_module("datetime").timedelta(*d["v"]),
    "decimal": lambda d: make_module("decimal").Decimal(d["v"]),
    "uuid": lambda d: make_module("uuid").UUID(d["v"]),
    "range": lambda d: range(*(int(v, 16) for v in d["v"])),
    "path": lambda d: make_module("pathlib").Path(d["v"]),
    "tuple": lambda d: tuple(_decode(v) for v in d["v"]),
    "set": lambda d: {_decode(v) for v in d["v"]},
    "frozenset": lambda d: frozenset(_decode(v) for v in d["v"]),
    "dict": lambda d: {_decode(k): _decode(v) for k, v in d["v"]},
    "dataclass": _decode_dataclass,
    "enum": _decode_enum,
    **dict.fromkeys(
        ("ndarray", "scalar", "table", "dataframe", "series", "index", "array", "element", "pandas"), _tabular
    ),
}
