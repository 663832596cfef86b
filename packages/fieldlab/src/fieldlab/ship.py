"""What a submit does before the request: resolve, seal, bundle, and bring to the director what it does not have.

``Shipment`` is what resolving makes: the deployments and every blob they name, in memory but for files, which are
read when they are sent. Blobs are named by their SHA-256, so what the director has is never sent again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.deployment import MAX_INLINE, inline
from fieldlab_common.errors import BlobMismatch, DefinitionError, PlanError
from fieldlab_common.experiment import Experiment
from fieldlab_common.node import Node
from fieldlab_common.resolve import Resolution, resolve

from fieldlab import modules
from fieldlab.transport import Session

__all__ = ["CHUNK", "Blobs", "Order", "Shipment", "pack", "require_sound", "settings_of", "step_names", "upload"]

CHUNK = 4 * 1024 * 1024  # bytes in one request of an upload
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_ASK = 1000  # digests in one question


class Blobs:
    """The blobs of one experiment, by digest: bytes, or the path of a file. It is the ``Sealer`` of ``resolve``."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.files: dict[str, str] = {}
        self._sealed: dict[int, tuple[object, str]] = {}
        self._roots: set[str] = set()
        self._bundled: tuple[frozenset[str], tuple[str, ...]] = (frozenset(), ())
        self._empty = ""

    def seal(self, obj: Any, what: str) -> str:
        """Seal an object and return its digest; note which of the user's modules it needs."""
        known = self._sealed.get(id(obj))
        if known is None:  # obj is kept, so that its id stays its own
            known = self._sealed[id(obj)] = (obj, self.add(self._seal(obj, what)))
        return known[1]

    def seal_arguments(self, obj: Any, what: str) -> str:
        """Seal a step's arguments and return their digest, or themselves if they are short."""
        if _is_empty(obj):  # the arguments of most steps of a wide graph
            self._empty = self._empty or inline(self._seal(obj, what))
            return self._empty
        data = self._seal(obj, what)
        return inline(data) if len(data) <= MAX_INLINE else self.add(data)

    def _seal(self, obj: Any, what: str) -> bytes:
        from fieldlab_common import payload

        data = payload.seal(obj, what=what)
        self._roots.update(modules.named_in(data))
        for code in _codes(obj):
            self._roots.update(name for name in modules.imports_of(code) if modules.is_own(name))
        return data

    def seal_file(self, path: str) -> str:
        """Take a file in and return its digest; it is read again when it is sent.

        Raises:
            DefinitionError: it cannot be read.
        """
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DefinitionError(
                f"The file {path!r} cannot be read: {error.strerror or error}.", advice="Give fl.File a readable file."
            ) from error
        self.files[digest] = os.path.abspath(path)
        return digest

    def bundles(self) -> tuple[str, ...]:
        """Digests of the source bundles of the modules that what was sealed so far needs."""
        roots = frozenset(self._roots)
        if roots != self._bundled[0]:
            data = modules.bundle(modules.needed(roots))
            self._bundled = roots, ((self.add(data),) if data else ())
        return self._bundled[1]

    def add(self, data: bytes) -> str:
        """Take bytes in and return their digest."""
        digest = hashlib.sha256(data).hexdigest()
        self.data[digest] = data
        return digest

    def size(self, digest: str) -> int:
        """Length of a blob in bytes."""
        return len(self.data[digest]) if digest in self.data else os.path.getsize(self.files[digest])

    def chunks(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a blob from ``offset`` on."""
        if digest in self.data:
            data = self.data[digest]
            yield from (data[at : at + CHUNK] for at in range(offset, len(data), CHUNK))
            return
        with open(self.files[digest], "rb") as file:
            file.seek(offset)
            yield from iter(functools.partial(file.read, CHUNK), b"")


def _is_empty(obj: Any) -> bool:
    """Whether these are arguments, and there are none. Nothing is compared: steps and fields refuse it."""
    shape = (tuple, dict)
    return type(obj) is tuple and len(obj) == 2 and tuple(map(type, obj)) == shape and not (len(obj[0]) or len(obj[1]))


def _codes(obj: Any, depth: int = 0) -> Iterator[types.CodeType]:
    """The code of functions that travel by value: of ``obj`` itself, and of those of ``__main__`` that it uses."""
    function = getattr(obj, "__func__", obj)
    if not isinstance(function, types.FunctionType):
        cls = obj if isinstance(obj, type) else type(obj)
        if cls.__module__ == "__main__" and depth < _DEPTH:
            for member in vars(cls).values():
                yield from _codes(member, depth + 1)
        return
    yield function.__code__
    if depth >= _DEPTH or modules.is_own(function.__module__ or ""):
        return
    used = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    used += [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    for one in used:
        if isinstance(one, types.FunctionType | type) and getattr(one, "__module__", "") == "__main__":
            yield from _codes(one, depth + 1)


_DEPTH = 8


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be run, as whoever runs it gets it: specifications, each with its node, and the blobs they name."""

    name: str
    deployments: tuple[tuple[p.DeploymentSpec, Node], ...]
    blobs: Blobs
    settings: p.ExperimentSettings = field(default_factory=p.ExperimentSettings)


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """An experiment, resolved and sealed. ``graphs``: for each deployment the digest of its graph."""

    name: str
    resolution: Resolution
    blobs: Blobs
    graphs: Mapping[str, str]
    settings: p.ExperimentSettings = field(default_factory=p.ExperimentSettings)

    def request(self, *, if_exists: str, start: bool) -> p.SubmitExperiment:
        """The request that submits it."""
        specs = tuple(spec for spec, _ in self.order().deployments)
        return p.SubmitExperiment(
            name=self.name, deployments=specs, settings=self.settings, if_exists=if_exists, start=start
        )

    def order(self) -> Order:
        """It, for a run in this process."""
        placed = tuple((p.spec_of(d, self.graphs[d.name]), d.node) for d in self.resolution.deployments)
        return Order(name=self.name, deployments=placed, blobs=self.blobs, settings=self.settings)


def settings_of(experiment: Experiment) -> p.ExperimentSettings:
    """The settings of an experiment as they travel."""
    return p.ExperimentSettings(
        reporting=experiment.reporting,
        lost_after=experiment.lost_after,
        min_nodes=experiment.needed,
        start_at=experiment.start_at.timestamp() if experiment.start_at is not None else None,
    )


def pack(experiment: Experiment) -> Shipment:
    """Resolve ``experiment`` and seal everything that its deployments name. Sends nothing, raises for no problem."""
    blobs = Blobs()
    resolution = resolve(experiment, blobs, python=PYTHON)
    digests: dict[int, str] = {}
    for deployment in resolution.deployments:
        if id(deployment.graph) not in digests:
            digests[id(deployment.graph)] = blobs.add(wire.dumps(deployment.graph))
    return Shipment(
        name=experiment.name,
        resolution=resolution,
        blobs=blobs,
        graphs={d.name: digests[id(d.graph)] for d in resolution.deployments},
        settings=settings_of(experiment),
    )


def step_names(shipment: Shipment) -> dict[str, tuple[str, ...]]:
    """The plain paths of the steps of each graph, by the graph's digest."""
    deployments = shipment.resolution.deployments
    return {shipment.graphs[d.name]: tuple(path for path, _ in d.graph.walk()) for d in deployments}


def require_sound(shipment: Shipment) -> Shipment:
    """Return ``shipment`` if it can run.

    Raises:
        PlanError: with every problem that was found.
    """
    problems = [str(problem) for problem in shipment.resolution.problems]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise PlanError(
            f"Experiment {shipment.name!r} cannot run as it is: {problems[0]}{more}",
            problems=problems,
            advice="Look at fl.plan(experiment) for all of it.",
        )
    return shipment


# --- upload -----------------------------------------------------------------------------------------------------------


def upload(session: Session, shipment: Shipment) -> None:
    """Bring every blob to the director that it does not have; what was cut is continued where it stopped."""
    wanted = tuple(dict.fromkeys([*shipment.blobs.data, *shipment.blobs.files]))
    for at in range(0, len(wanted), _ASK):
        part = p.BlobList(digests=wanted[at : at + _ASK])
        for digest in session.call("missing_blobs", p.BlobList, body=part).digests:
            _upload_one(session, shipment.blobs, digest)


def _upload_one(session: Session, blobs: Blobs, digest: str) -> None:
    size, offset, restarts = blobs.size(digest), 0, 0
    if size == 0:
        _put(session, digest, b"", 0, 0)
        return
    while offset < size:
        chunk = next(blobs.chunks(digest, offset), b"")
        try:
            if not chunk:
                raise BlobMismatch(f"The file {blobs.files.get(digest)!r} changed while it was sent.")
            status = _put(session, digest, chunk, offset, size)
        except BlobMismatch:
            status = session.call("blob_status", p.BlobStatus, path={"digest": digest})
            restarts += 1
            if restarts > _RESTARTS or (status.offset == offset and not status.complete):
                raise
        if status.complete:
            return
        offset = status.offset


_RESTARTS = 3


def _put(session: Session, digest: str, chunk: bytes, offset: int, size: int) -> p.BlobStatus:
    query = {"offset": offset, "size": size}
    return session.call("put_blob", p.BlobStatus, path={"digest": digest}, query=query, body=chunk)
