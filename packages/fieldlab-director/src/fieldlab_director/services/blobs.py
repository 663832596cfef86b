"""Who may read and send which blob. What is not the caller's does not exist for the caller, whoever else has it.

A user reads and sends blobs of its own. An executor reads what its deployment was submitted with, and sends what it has
announced as an artifact; what it sends belongs to the owner of the experiment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fieldlab_common.errors import BlobMismatch, InvalidRequest, NotFound, Unavailable

from fieldlab_director.services.identity import ExecutorCaller, UserCaller
from fieldlab_director.services.journals import deployment_of, finish
from fieldlab_director.services.quotas import hold_bytes
from fieldlab_director.services.uses import use
from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx, experiment_topic

__all__ = ["Admission", "admit", "arrived", "locate", "missing"]

Someone = UserCaller | ExecutorCaller
TOUCH_SECONDS = 3600.0  # what was asked for that recently is not noted again
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a caller may send: ``scope`` keeps its upload apart; ``size`` if the owner has the whole blob already."""

    scope: str
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Stored:
    size: int
    doomed: float | None


def missing(tx: Tx, caller: UserCaller, digests: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``digests`` that the caller has not sent, in order. The others are kept for another while.

    Raises:
        InvalidRequest: one of them is no digest.
    """
    for digest in digests:
        _hold_digest(digest)
    found: set[str] = set()
    for begin in range(0, len(digests), 500):
        part = list(digests[begin : begin + 500])
        found.update(tx.all(queries.OWNED_BLOBS, _digest, owner_id=caller.id, digests=part))
        before = tx.now - TOUCH_SECONDS
        tx.execute(queries.TOUCH_BLOBS, guard_owner_id=caller.id, digests=part, before=before, created=tx.now)
    return tuple(digest for digest in dict.fromkeys(digests) if digest not in found)


def locate(tx: Tx, caller: Someone, digest: str) -> int:
    """The size of a blob that the caller may read.

    Raises:
        NotFound.
    """
    if isinstance(caller, ExecutorCaller):
        spec = deployment_of(tx, caller).spec
        if digest != spec.graph and digest not in spec.blobs:
            raise _not_found()
    size: int | None = tx.value(queries.BLOB_OF_OWNER, owner_id=_owner(tx, caller), digest=digest)
    if size is None:
        raise _not_found()
    return size


def admit(tx: Tx, caller: Someone, digest: str, size: int | None = None, *, most: int | None = None) -> Admission:
    """Whether the caller may send a blob (of ``size`` bytes, when it says so).

    Raises:
        NotFound: an executor that has not announced it. BlobMismatch: it announced another size. TooLarge: the owner
            would have more than ``most`` bytes.
    """
    _hold_digest(digest)
    owner = _owner(tx, caller)
    there: int | None = tx.value(queries.BLOB_OF_OWNER, owner_id=owner, digest=digest)
    scope = f"user-{caller.id}" if isinstance(caller, UserCaller) else _announced(tx, caller, digest, size)
    if there is None and most is not None:
        hold_bytes(tx, owner, size or 0, most)
    return Admission(scope=scope, size=there)


def _announced(tx: Tx, caller: ExecutorCaller, digest: str, size: int | None) -> str:
    sizes = tx.all(queries.ANNOUNCED, _size, deployment_id=caller.deployment_id, sha256=digest)
    if not sizes:
        raise _not_found()
    if size is not None and size not in sizes:
        raise BlobMismatch(f"Blob {digest} was announced with {sizes[0]} bytes, not {size}.")
    return f"deployment-{caller.deployment_id}"


def arrived(tx: Tx, caller: Someone, digest: str, size: int) -> None:
    """Note that all bytes of a blob are stored; a deployment that waited only for them ends by that.

    Raises:
        Unavailable: just now, the same bytes are being removed because nobody had them.
    """
    owner = _owner(tx, caller)
    stored = tx.one(queries.BLOB, _Stored, digest=digest)
    if stored is None:
        tx.execute(queries.ADD_BLOB, digest=digest, size=size, created=tx.now, doomed=None)
    elif stored.doomed is not None:
        raise Unavailable(f"Blob {digest} is just being removed.", advice="Send it again in a moment.")
    if tx.value(queries.BLOB_OF_OWNER, owner_id=owner, digest=digest) is None:
        tx.execute(queries.ADD_BLOB_REF, owner_id=owner, digest=digest, created=tx.now)
    if isinstance(caller, ExecutorCaller):
        row = deployment_of(tx, caller)
        use(tx, row.experiment_id, digest)
        tx.execute(queries.ARTIFACTS_STORED, guard_deployment_id=row.id, guard_sha256=digest)
        finish(tx, row)
        tx.notify(experiment_topic(row.experiment_id))


# --- inside ----------------------------------------------------------------------------------------------------------


def _owner(tx: Tx, caller: Someone) -> str:
    if isinstance(caller, UserCaller):
        return caller.id
    owner: str = tx.value(queries.OWNER, id=deployment_of(tx, caller).experiment_id)
    return owner


def _not_found() -> NotFound:
    return NotFound("There is no such blob.")


def _hold_digest(digest: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest(f"{digest[:80]!r} is not a SHA-256 in lower-case hexadecimal.", details={"path": "digest"})


def _digest(digest: str) -> str:
    return digest


def _size(size: int) -> int:
    return size
