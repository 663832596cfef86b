"""Which of the user's own modules a task needs on a node, and the bundle in which they travel.

A module is *the user's own* when it is neither of the standard library nor from an installed distribution: what lies
in a ``site-packages`` folder is installed (and is asked for with ``packages=``), what an editable install points to is
not. Needed are the modules that sealed code names, and what those import, in turn, anywhere in their code.

A bundle is a zip of sources under the names by which they are imported. Equal sources give equal bytes, whoever makes
it and whenever, so that it is uploaded once.
"""

from __future__ import annotations

import dis
import functools
import importlib.util
import io
import os
import site
import sys
import sysconfig
import types
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fieldlab_common.errors import DefinitionError, UnsupportedError

__all__ = ["MAX_BUNDLE", "bundle", "imports_of", "is_own", "named_in", "needed"]

MAX_BUNDLE = 64 * 1024 * 1024
_OURS = frozenset({"fieldlab", "fieldlab_common", "fieldlab_executor", "fieldlab_director", "cloudpickle"})
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    found = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    found |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(os.path.realpath(path) + os.sep for path in found if path)


@functools.lru_cache(maxsize=8192)
def _own_file(path: str) -> bool:
    real = os.path.realpath(path)
    if f"{os.sep}site-packages{os.sep}" in real or f"{os.sep}dist-packages{os.sep}" in real:
        return False
    return not real.startswith(_installed_folders())


def _places(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The file of a module, if it has one, and its folders, if it is a package; it is not imported for that."""
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
        folders = getattr(module, "__path__", ())
        return (file if isinstance(file, str) else None), tuple(str(f) for f in folders)
    try:
        spec = importlib.util.find_spec(name) if "." not in name else None
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        return _beside_parent(name)
    file = spec.origin if spec.has_location else None
    return file, tuple(spec.submodule_search_locations or ())


def _beside_parent(name: str) -> tuple[str | None, tuple[str, ...]]:
    """A module inside a package that is not imported: looked for in the parent's folders, running nothing."""
    parent, _, leaf = name.rpartition(".")
    if not parent:
        return None, ()
    for folder in _places(parent)[1]:
        package = os.path.join(folder, leaf, "__init__.py")
        if os.path.isfile(package):
            return package, (os.path.join(folder, leaf),)
        plain = os.path.join(folder, leaf + ".py")
        if os.path.isfile(plain):
            return plain, ()
    spread = [os.path.join(folder, leaf) for folder in _places(parent)[1]]
    return None, tuple(folder for folder in spread if os.path.isdir(folder))


def is_own(name: str) -> bool:
    """Whether the module is the user's own: it has to travel."""
    top = name.partition(".")[0]
    if top in _OURS or top in sys.stdlib_module_names or top in ("__main__", "__mp_main__"):
        return False
    file, folders = _places(name)
    places = [file] if file else list(folders)
    return bool(places) and all(_own_file(place) for place in places)


def named_in(data: bytes) -> Iterator[str]:
    """The user's own modules, among those imported here, whose names are texts in sealed code.

    A text that is a module's name by chance brings a module too many, which does no harm.
    """
    for name, pickled in _own_loaded(tuple(sys.modules)):
        if pickled in data:
            yield name


@functools.lru_cache(maxsize=1)
def _own_loaded(loaded: tuple[str, ...]) -> tuple[tuple[str, bytes], ...]:
    """The user's own among these modules, with their names as a pickle holds them (SHORT_BINUNICODE, PEP 3154)."""
    own = (name for name in loaded if name.isascii() and len(name) < 256 and is_own(name))
    return tuple((name, b"\x8c" + bytes([len(name)]) + name.encode()) for name in own)


# --- what code imports ------------------------------------------------------------------------------------------------


def imports_of(code: types.CodeType, package: str = "") -> set[str]:
    """The modules that import statements anywhere in ``code`` name; ``package`` resolves relative ones.

    ``from a import b`` gives ``a`` and ``a.b``: only the importing interpreter knows whether ``b`` is a module.
    """
    found: set[str] = set()
    pending = [code]
    while pending:
        one = pending.pop()
        pending.extend(const for const in one.co_consts if isinstance(const, types.CodeType))
        found.update(_imports_of_one(one, package))
    return found


def _imports_of_one(code: types.CodeType, package: str) -> Iterator[str]:
    recent: list[object] = []
    base = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            recent.append(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            level = recent[-2] if len(recent) > 1 and isinstance(recent[-2], int) else 0
            base = _absolute(str(instruction.argval), level, package)
            if base:
                yield base
        elif instruction.opname == "IMPORT_FROM" and base:
            yield f"{base}.{instruction.argval}"


def _absolute(name: str, level: int, package: str) -> str:
    if not level:
        return name
    parts = package.split(".") if package else []
    kept = parts[: len(parts) - level + 1]
    return ".".join([*kept, name] if name else kept)


def needed(roots: Iterable[str]) -> tuple[str, ...]:
    """``roots`` and every module of the user's own that they import, directly or not; sorted."""
    found: set[str] = set()
    pending = [name for name in roots if is_own(name)]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        parent = name.rpartition(".")[0]
        more = {*_imports_of_module(name), *([parent] if parent else [])}
        pending.extend(other for other in more - found if is_own(other))
    return tuple(sorted(found))


def _imports_of_module(name: str) -> set[str]:
    file, folders = _places(name)
    if file is None or not file.endswith(".py"):
        return set()
    stat = os.stat(file)
    package = name if folders else name.rpartition(".")[0]
    return _scan(file, stat.st_mtime_ns, stat.st_size, package)


@functools.lru_cache(maxsize=1024)
def _scan(file: str, _mtime: int, _size: int, package: str) -> set[str]:
    try:
        code = compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise DefinitionError(f"{file} cannot be compiled: {error}.") from error
    return imports_of(code, package)


# --- the bundle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    name: str
    path: str


def _entries(modules: Iterable[str]) -> dict[str, _Entry]:
    """What goes into the bundle, by its name there. A package brings all its sources: it may import them by name."""
    found: dict[str, _Entry] = {}
    for name in modules:
        file, folders = _places(name)
        if file is None:
            continue  # a namespace package: its folders hold nothing but the modules that were named
        if not file.endswith(".py"):
            raise UnsupportedError(
                f"The module {name!r} ({file}) is not Python source and cannot travel to a node.",
                advice="Make it a package, install it, and name it in packages=.",
            )
        base = name.replace(".", "/")
        if not folders:
            found[base + ".py"] = _Entry(base + ".py", file)
            continue
        for path in sorted(Path(os.path.dirname(file)).rglob("*.py")):
            inside = path.relative_to(os.path.dirname(file)).as_posix()
            if not any(part.startswith(".") or part == "__pycache__" for part in inside.split("/")):
                found[f"{base}/{inside}"] = _Entry(f"{base}/{inside}", str(path))
    return found


def bundle(modules: Iterable[str]) -> bytes:
    """The zip of ``modules``; empty bytes if there is nothing to bring.

    Raises:
        UnsupportedError: a module is not Python source, or all of them are too large together.
    """
    entries = _entries(modules)
    if not entries:
        return b""
    buffer, total = io.BytesIO(), 0
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in _folders(entries):  # without them, zipimport finds no namespace package before Python 3.13
            archive.writestr(_info(name, 0o755), b"")
        for name in sorted(entries):
            data = Path(entries[name].path).read_bytes()
            total += len(data)
            if total > MAX_BUNDLE:
                raise UnsupportedError(
                    f"The sources that tasks import are more than {MAX_BUNDLE // 2**20} MiB.",
                    advice="Make a distribution of them, install it, and name it in packages=.",
                )
            archive.writestr(_info(name, 0o644), data, compresslevel=6)
    return buffer.getvalue()


def _folders(names: Iterable[str]) -> list[str]:
    found: set[str] = set()
    for name in names:
        parts = name.split("/")[:-1]
        found.update("/".join(parts[: index + 1]) + "/" for index in range(len(parts)))
    return sorted(found)


def _info(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date_time=_EPOCH)
    info.compress_type, info.external_attr, info.create_system = zipfile.ZIP_DEFLATED, mode << 16, 3
    return info
