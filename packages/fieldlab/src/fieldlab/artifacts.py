"""Artifacts: the files that steps produced, listed and downloaded.

Nothing that a node says decides where a file lands: names are checked as portable relative names before a path is
made of them, and the bytes are believed only when their SHA-256 is the one that was announced. A download that was cut
continues where it stopped; a file that is there already, with the right bytes, is left alone.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fnmatch
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fieldlab_common import paths
from fieldlab_common import protocol as p
from fieldlab_common.context import check_artifact_name
from fieldlab_common.errors import ArtifactNameError, BlobMismatch, FieldlabError, InvalidNameError, NotFound
from fieldlab_common.step import check_name

from fieldlab.source import Source
from fieldlab.text import clean, html_table, one_line, size, table

__all__ = ["ArtifactFile", "ArtifactFiles", "Artifacts", "fetch", "place_of"]

_READ = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
# What Windows takes for a device, whatever stands behind a dot (its "Naming files, paths and namespaces").
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(?:\..*)?", re.IGNORECASE)


def fetch(source: Source, digest: str, length: int) -> bytearray:
    """The blob of that digest and length, in memory once, verified.

    Raises:
        BlobMismatch: the bytes are not those that were announced.
    """
    data = bytearray()
    _pump(source, digest, length, 0, hashlib.sha256(), data.extend)
    return data


def _pump(
    source: Source, digest: str, length: int, offset: int, sha: hashlib._Hash, sink: Callable[[bytes], object]
) -> None:
    for chunk in source.blob(digest, offset) if offset < length else ():
        offset += len(chunk)
        if offset > length:
            break
        sha.update(chunk)
        sink(chunk)
    if offset != length or sha.hexdigest() != digest:
        raise BlobMismatch(
            f"The bytes of blob {digest[:12]}… are not those that were announced ({offset} of {length} bytes came).",
            advice="Download it again; if it stays, the stored file is damaged.",
        )


@dataclass(frozen=True, kw_only=True)
class ArtifactFile:
    """One artifact. ``stored``: its bytes can be read; else ``lost`` may say why they never will be."""

    deployment: str
    step: str
    name: str
    size: int
    sha256: str
    attempt: int = 1
    iteration: int | None = None
    stored: bool = True
    lost: str = ""
    _source: Source = field(repr=False, compare=False)

    def read(self) -> bytes:
        """Its bytes, verified."""
        self._require()
        return bytes(fetch(self._source, self.sha256, self.size))

    def download(self, path: str | os.PathLike[str]) -> Path:
        """Write it to the file ``path``, whose folders are made; continues a download that was cut."""
        self._require()
        target = Path(path)
        if not _is_there(target, self.sha256, self.size):
            _save(self._source, self, target)
        return target

    def _require(self) -> None:
        if not _DIGEST.fullmatch(self.sha256):
            raise BlobMismatch(
                f"Artifact {clean(self.name)!r:.100} has no SHA-256 that its bytes could be held against."
            )
        if self.lost:
            raise NotFound(f"Artifact {clean(self.name)!r} of {clean(self.step)!r} was lost: {clean(self.lost)}.")

    def __str__(self) -> str:
        return f"{one_line(self.deployment)}/{one_line(self.step)}/{one_line(self.name)} ({size(self.size)})"


def of_info(info: p.ArtifactInfo, source: Source) -> ArtifactFile:
    """An artifact as the client shows it."""
    return ArtifactFile(
        deployment=info.deployment,
        step=info.step,
        name=info.name,
        size=info.size,
        sha256=info.sha256,
        attempt=info.attempt,
        iteration=info.iteration,
        stored=info.stored,
        lost=info.lost,
        _source=source,
    )


def place_of(file: ArtifactFile, platform: str = os.name) -> str:
    """Where it lands below the download folder: deployment/step/attempt or iteration/name.

    Raises:
        InvalidNameError: a name would leave the folder, or is none on this platform.
    """
    number = file.attempt if file.iteration is None else file.iteration
    if paths.parts_of(file.step) is None:
        raise InvalidNameError(f"{file.step!r:.100} cannot be the name of a step.")
    for name, _, _ in paths.parts_of(file.step) or ():
        check_name(name, "a step")
    parts = (check_name(file.deployment, "a deployment"), file.step, str(int(number)))
    place = "/".join((*parts, check_artifact_name(file.name)))
    if platform == "nt" and any(_DEVICE.fullmatch(part) or part.endswith(".") for part in place.split("/")):
        raise ArtifactNameError(
            f"{place!r} is no name for a file on Windows.", advice="Give it another: artifact.download(path)."
        )
    return place


def _is_there(path: Path, digest: str, length: int) -> bool:
    if not path.is_file() or path.stat().st_size != length:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def _save(source: Source, wanted: ArtifactFile, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _part_of(target, wanted.sha256) as (part, file):
        sha, offset = hashlib.sha256(), 0
        while block := file.read(_READ):
            sha.update(block)
            offset += len(block)
        if offset > wanted.size:
            file.truncate(0)
            sha, offset = hashlib.sha256(), 0
        try:
            _pump(source, wanted.sha256, wanted.size, offset, sha, file.write)
        except BlobMismatch:
            file.truncate(0)  # nothing of it can be trusted, so the next download begins anew
            raise
        file.flush()
        os.fsync(file.fileno())
        try:
            os.replace(part, target)
        except OSError:
            part.unlink(missing_ok=True)  # it can never be given its name
            raise


@contextlib.contextmanager
def _part_of(target: Path, digest: str) -> Iterator[tuple[Path, BinaryIO]]:
    """The file that a download goes into, from its beginning: what an earlier one left, which this one has alone.

    If another program, or thread, is downloading the same file just now, it is a fresh one, gone in the end.
    """
    stem = f".{os.fsencode(target.name)[:100].decode(errors='ignore')}.{digest[:16]}"
    part = target.with_name(f"{stem}.part")
    with part.open("ab+") as file:
        if _has_alone(file, part):
            file.seek(0)
            yield part, file
            return
    own = target.with_name(f"{stem}.{uuid.uuid4().hex[:8]}.part")
    try:
        with own.open("xb+") as file:
            yield own, file
    finally:
        own.unlink(missing_ok=True)


def _has_alone(file: BinaryIO, path: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows, where a file that another has open cannot be replaced anyway
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # else it was just finished, and renamed
    except OSError:
        return False


class ArtifactFiles(list[ArtifactFile]):
    """Artifacts in the order in which they were announced; shown as a table."""

    def _rows(self) -> Iterator[list[object]]:
        for one in self:
            number = one.attempt if one.iteration is None else one.iteration
            state = "lost: " + one.lost if one.lost else ("stored" if one.stored else "on its way")
            yield [one.deployment, one.step, number, one.name, size(one.size), state]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


_HEADER = ("deployment", "step", "attempt", "name", "size", "state")


class Artifacts:
    """The artifacts of a run."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def list(self, *, deployment: str | None = None, step: str | None = None, name: str | None = None) -> ArtifactFiles:
        """Those announced so far, or those of one deployment or step, or with a name like ``*.pcap``."""
        found = (of_info(info, self._source) for info in self._source.artifacts())
        return ArtifactFiles(
            one
            for one in found
            if deployment in (None, one.deployment)
            and (step is None or paths.below(one.step, step))
            and (name is None or fnmatch.fnmatchcase(one.name, name))
        )

    def download(
        self,
        folder: str | os.PathLike[str] = "out",
        *,
        deployment: str | None = None,
        step: str | None = None,
        name: str | None = None,
    ) -> builtins.list[Path]:
        """Write every artifact that is stored to ``folder/<deployment>/<step>/<attempt or iteration>/<name>``.

        Files that are there already, with the right bytes, are not fetched again; a download that was cut goes on
        where it stopped. One that cannot be had does not keep the others back: its error is raised in the end.

        Raises:
            InvalidNameError: a node gave a name that would leave the folder, or that this platform cannot have.
            BlobMismatch: the bytes are not those that were announced.
        """
        base = Path(folder)
        base.mkdir(parents=True, exist_ok=True)
        written: builtins.list[Path] = []
        failed: builtins.list[FieldlabError] = []
        for file in self.list(deployment=deployment, step=step, name=name):
            if file.lost or not file.stored:
                continue
            try:
                written.append(file.download(_inside(base, file)))
            except (InvalidNameError, BlobMismatch, NotFound) as error:
                failed.append(error)
            except OSError as error:
                if error.errno not in _UNNAMEABLE:
                    raise
                failed.append(_unwritten(file, error))
        if failed:
            raise failed[0]
        return written

    def __repr__(self) -> str:
        return repr(self.list())

    def _repr_html_(self) -> str:
        return self.list()._repr_html_()


# Errors of the file system that are the name's fault, and not the disk's: the other files can still be written.
_UNNAMEABLE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


def _unwritten(file: ArtifactFile, error: OSError) -> ArtifactNameError:
    blocked = error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
    why = "another stands in its place" if blocked else "this file system has no such names"
    made = ArtifactNameError(f"Artifact {clean(file.name)!r} cannot be written: {why} ({error}).")
    made.__cause__ = error
    return made


def _inside(base: Path, file: ArtifactFile) -> Path:
    path = base / place_of(file)
    if not path.parent.resolve().is_relative_to(base.resolve()):
        raise ArtifactNameError(f"Artifact {clean(file.name)!r} would be written outside of {base}, by a link in it.")
    return path
