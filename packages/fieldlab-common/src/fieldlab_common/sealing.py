"""How code and arguments are taken apart into pickles: what ``payload.seal`` does, apart for what it has to load.

Functions, modules and code leave as ``payload`` puts them together again (``make_function`` …), so that a node which
opens them need not load cloudpickle: that is most of what a step's process would hold. What cloudpickle knows besides
(classes of ``__main__``, say) leaves as cloudpickle has it, and the node loads it for them.
"""

from __future__ import annotations

import collections
import io
import marshal
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

import cloudpickle

from fieldlab_common import payload
from fieldlab_common.errors import UnpicklableError

__all__ = ["dumps", "seal", "send_by_value"]

_MARSHAL = 2  # of its formats, the last that gives the same bytes for the same code: later ones count references


class _Sealer(cloudpickle.Pickler):  # type: ignore[misc]
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        refer = getattr(type(obj), "__fieldlab_reference__", None)
        return None if refer is None else refer(obj)

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if type(obj) is types.FunctionType and isinstance(reduced, tuple) and len(reduced) == 6:
            return _function(obj, reduced)
        return reduced


def _code(code: types.CodeType) -> Any:
    return payload.make_code, (tuple(sys.version_info[:2]), marshal.dumps(code, _MARSHAL))


def _module(module: types.ModuleType) -> Any:
    reduced = cloudpickle.Pickler.dispatch_table[types.ModuleType](module)
    return (payload.make_module, reduced[1]) if len(reduced[1]) == 1 else reduced


_OURS: dict[type, Any] = {types.CodeType: _code, types.ModuleType: _module}
_Sealer.dispatch_table = collections.ChainMap(_OURS, cast(Any, cloudpickle.Pickler.dispatch_table))


def _function(function: types.FunctionType, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """A function that travels by value, from what cloudpickle found it to be made of."""
    (code, names, *_), (attributes, members) = reduced[1], reduced[2]
    used = members.pop("__globals__")
    submodules = members.pop("_cloudpickle_submodules")  # to be imported with it, for what it does with packages
    del members["__closure__"]
    plain = payload.make_function(code, dict(names))  # what it is then need not be said
    others = {name: value for name, value in members.items() if value and value != getattr(plain, name)}
    if members["__doc__"] is None and plain.__doc__ is not None:
        others["__doc__"] = None
    values = [_content(cell) for cell in function.__closure__ or ()]
    state = (attributes, used, others, values, submodules)
    return payload.make_function, (code, names), state, None, None, payload.set_function


def _content(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # nothing was assigned to the variable yet
        return ()


def seal(obj: Any, what: str) -> bytes:
    """As ``payload.seal``."""
    buffer = io.BytesIO()
    try:
        _Sealer(buffer, protocol=5).dump(obj)
    except Exception as error:  # cloudpickle and user reducers raise anything; every one means the same here
        culprit = _blame(obj)
        raise UnpicklableError(
            f"{what[:1].upper()}{what[1:]} cannot be sent to a node: {culprit or error}.",
            advice="Create such objects inside the task, or pass plain data.",
            details={"culprit": culprit or ""},
        ) from error
    return buffer.getvalue()


def send_by_value(module: types.ModuleType) -> None:
    """As ``payload.send_by_value``."""
    cloudpickle.register_pickle_by_value(module)


def dumps(value: Any) -> bytes:
    """As ``payload.dumps_local``."""
    return bytes(cloudpickle.dumps(value, protocol=5))


def _seals(obj: Any) -> bool:
    try:
        _Sealer(io.BytesIO(), protocol=5).dump(obj)
    except Exception:  # noqa: BLE001 - the same as in seal
        return False
    return True


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """What an object is made of, with words for people."""
    function = getattr(obj, "__func__", obj)
    if isinstance(function, types.FunctionType):
        code = function.__code__
        for name in code.co_names:
            if name in function.__globals__:
                yield f"the global variable {name!r}", function.__globals__[name]
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            yield f"the variable {name!r} of the enclosing function", cell.cell_contents
        for index, default in enumerate(function.__defaults__ or ()):
            yield f"default value {index + 1}", default
        if function is not obj:
            yield "the task's own settings", obj.__self__
    elif isinstance(obj, dict):
        yield from ((f"the item {key!r}", value) for key, value in obj.items())
    elif isinstance(obj, list | tuple | set | frozenset):
        yield from ((f"item {index + 1}", value) for index, value in enumerate(obj))
    elif hasattr(obj, "__dict__") and not isinstance(obj, type | types.ModuleType):
        yield from ((f"the attribute {key!r}", value) for key, value in vars(obj).items())


def _blame(obj: Any, depth: int = 0) -> str:
    if depth > 6:
        return ""
    for words, part in _parts(obj):
        if not _seals(part):
            inner = _blame(part, depth + 1)
            return (
                f"{words} ({inner})"
                if inner
                else f"{words} is a {payload.type_name(type(part))}, which cannot be pickled"
            )
    return ""
