"""One file for a node: executor, common, cloudpickle and the facade as ``fieldlab.pyz``, and its way into the cache.

``build`` packs the installed packages; equal packages give equal bytes. Started, the file unpacks itself into a folder
named by the digest of its contents (0700, compiled, complete before it gets its name), and runs from there: what runs
is never pulled from under it by an upgrade, and bytecode is kept. ``unpacked`` does the same for an executor that
runs from installed packages, whose steps need that folder too.

Invariant: this module works from inside the zip too, and needs nothing but the standard library.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ROOTS", "build", "contents", "unpacked"]

ROOTS = {"cloudpickle": "cloudpickle", "fieldlab_common": "fieldlab_common", "fieldlab_executor": "fieldlab_executor"}
_FACADE = "fieldlab_executor/facade/"
_DIGEST = "DIGEST"
_EPOCH = (1980, 1, 1, 0, 0, 0)

# The first thing that runs on a node. It must be quick, and must not import anything of the zip: that would be
# compiled on every start.
_MAIN = """\
import os
import sys


def cache():
    chosen = os.environ.get("FIELDLAB_CACHE")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(os.path.abspath(os.path.expanduser(base)), "fieldlab")


def unpack(place):
    import compileall
    import shutil
    import tempfile
    import zipfile

    parent = os.path.dirname(place)
    os.makedirs(parent, mode=0o700, exist_ok=True)
    fresh = tempfile.mkdtemp(prefix=".new-", dir=parent)
    try:
        with zipfile.ZipFile(sys.path[0]) as archive:
            archive.extractall(fresh)
        compileall.compile_dir(fresh, quiet=2, stripdir=fresh, prependdir=place)
        try:
            os.rename(fresh, place)
        except OSError:
            if not os.path.isdir(place):
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


if sys.version_info < (3, 11):
    sys.exit("fieldlab needs Python 3.11 or newer; this is %s, %s" % (sys.version.split()[0], sys.executable))
place = os.path.join(cache(), "executables", "@DIGEST@")
if not os.path.isdir(place):
    unpack(place)
sys.path[0] = place
from fieldlab_executor.__main__ import main

sys.exit(main())
"""


def _sources() -> Iterator[tuple[str, Path]]:
    """Every file to pack, with its name in the zip."""
    for package in ROOTS:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.origin:
            raise ModuleNotFoundError(f"{package} is not installed", name=package)
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".typed") and path.is_file():
                yield f"{package}/{path.relative_to(folder).as_posix()}", path


def contents() -> dict[str, bytes]:
    """What the zip holds, by name, without ``__main__.py``; the facade stands as ``fieldlab``."""
    found: dict[str, bytes] = {}
    for name, path in _sources():
        data = path.read_bytes()
        found[name] = data
        if name.startswith(_FACADE):
            found[f"fieldlab/{name.removeprefix(_FACADE)}"] = data
    return dict(sorted(found.items()))


def _digest(files: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, data in files.items():
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()[:32]


def build(path: str | os.PathLike[str]) -> Path:
    """Write ``fieldlab.pyz`` to ``path``, atomically; equal packages give equal bytes."""
    files = contents()
    digest = _digest(files)
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    everything = {"__main__.py": _MAIN.replace("@DIGEST@", digest).encode(), _DIGEST: digest.encode(), **files}
    fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for name, data in everything.items():
                    entry = zipfile.ZipInfo(name, _EPOCH)
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, data)
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return target


def unpacked(cache: Path) -> Path:
    """The folder with what the zip holds, made if it is not there; the one that this runs from, if so."""
    own = Path(__file__).absolute().parent.parent
    if (own / _DIGEST).is_file():
        return own
    parent = cache / "executables"
    stamp = parent / f"from-{_stamp()}"
    with contextlib.suppress(OSError):
        place = parent / stamp.read_text()
        if place.is_dir():
            return place
    files = contents()
    place = parent / _digest(files)
    _place({**files, _DIGEST: place.name.encode()}, place)
    _write(stamp, place.name)
    return place


def _stamp() -> str:
    """What changes when an installed package does: names, sizes and times of its files."""
    total = hashlib.sha256(sys.version.encode())
    for name, path in _sources():
        status = path.stat()
        total.update(f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:32]


def _place(files: dict[str, bytes], place: Path) -> None:
    if place.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
    try:
        for name, data in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        compileall.compile_dir(fresh, quiet=2, stripdir=str(fresh), prependdir=str(place))
        with contextlib.suppress(OSError):  # another was quicker, and made the same
            fresh.rename(place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    with os.fdopen(fd, "w") as file:
        file.write(text)
    os.replace(temporary, path)
