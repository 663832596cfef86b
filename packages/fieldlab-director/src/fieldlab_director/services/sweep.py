"""Blobs that nothing refers to go, and uploads that nobody goes on with.

An owner's blob is over when no experiment of the owner uses it, and it was neither sent nor asked for since the grace:
whoever is about to submit has that long. A blob that no owner has any more is first *doomed*, in a transaction that
also holds that no owner has it; then its bytes are removed; then its row. Whoever sends the same bytes meanwhile is
told to send them again (``blobs.arrived``), so that no row can ever be without its bytes. Bytes without a row (a crash
came between) are doomed likewise once they are old.

Each round looks at a bounded number of rows and goes on from there in the next one; a crash at any point leaves only
what the next round does anyway. Several directors may sweep at once: nothing is hurt, and little is done twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
from fieldlab_common.errors import FieldlabError

from fieldlab_director.settings import Limits
from fieldlab_director.store import queries
from fieldlab_director.store import sweep_queries as q
from fieldlab_director.store.base import Store, Tx
from fieldlab_director.store.blobs import Blobs

__all__ = ["Sweeper", "Swept"]

log = structlog.get_logger("fieldlab.sweep")

ROWS = 500  # looked at in one transaction
REMOVED = 200  # blobs of which the bytes are removed in one round


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep has done: blobs that lost an owner, blobs whose bytes are gone, uploads that were thrown away."""

    let_go: int = 0
    removed: int = 0
    expired: int = 0

    def __add__(self, other: Swept) -> Swept:
        return Swept(
            let_go=self.let_go + other.let_go,
            removed=self.removed + other.removed,
            expired=self.expired + other.expired,
        )


@dataclass(frozen=True, kw_only=True)
class _Ref:
    owner_id: str
    digest: str
    over: bool


@dataclass(frozen=True, kw_only=True)
class _Blob:
    digest: str
    over: bool


class Sweeper:
    """Sweeps the blobs of a director, round by round."""

    def __init__(self, store: Store, blobs: Blobs, limits: Limits) -> None:
        self._store, self._blobs, self._limits = store, blobs, limits
        self._ref = ("", "")
        self._blob = ""

    async def run(self) -> None:
        """Sweep for ever: a round every ``Limits.sweep_every`` seconds, and all that lacks a row once a day."""
        rounds, daily = 0, max(1, round(86_400 / self._limits.sweep_every))
        while True:
            await asyncio.sleep(self._limits.sweep_every)
            rounds += 1
            try:
                done = await self.round()
                if rounds % daily == 0:
                    await self.doom_strays()
            except FieldlabError as error:
                log.warning("blobs were not swept", error=str(error))
                continue
            if done != Swept():
                log.info("swept", let_go=done.let_go, removed=done.removed, expired=done.expired)

    async def all(self) -> Swept:
        """Sweep everything once, from the beginning."""
        self._ref, self._blob = ("", ""), ""
        await self.doom_strays()
        done = await self.round()
        while self._ref != ("", ""):
            done += Swept(let_go=await self._store.write(self._let_go))
        self._blob = ""
        await self._store.write(self._doom)
        while self._blob:
            await self._store.write(self._doom)
        while removed := await self._remove():
            done += Swept(removed=removed)
        return done

    async def round(self) -> Swept:
        """Look at the next rows, and remove what is over."""
        let_go = await self._store.write(self._let_go)
        await self._store.write(self._doom)
        removed = await self._remove()
        now = await self._store.read(lambda tx: tx.now)
        expired = await self._blobs.expire(now - self._limits.upload_age)
        return Swept(let_go=let_go, removed=removed, expired=expired)

    async def doom_strays(self) -> None:
        """Doom the bytes on the shelf that have no row and are older than the grace."""
        now = await self._store.read(lambda tx: tx.now)
        async for page in self._blobs.shelf.older(now - self._limits.blob_grace):
            for begin in range(0, len(page), ROWS):
                part = page[begin : begin + ROWS]
                if await self._store.read(lambda tx, part=part: _unknown(tx, part)):  # type: ignore[misc]
                    await self._store.write(lambda tx, part=part: _doom_unknown(tx, part))  # type: ignore[misc]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _let_go(self, tx: Tx) -> int:
        owner_id, after = self._ref
        before = tx.now - self._limits.blob_grace
        page = tx.all(q.REFS, _Ref, owner_id=owner_id, after=after, before=before, limit=ROWS)
        over = [ref for ref in page if ref.over]
        for ref in over:
            tx.execute(q.DELETE_REF, guard_owner_id=ref.owner_id, guard_digest=ref.digest)
        self._ref = (page[-1].owner_id, page[-1].digest) if len(page) == ROWS else ("", "")
        return len(over)

    def _doom(self, tx: Tx) -> None:
        page = tx.all(q.BLOBS, _Blob, after=self._blob, before=tx.now - self._limits.blob_grace, limit=ROWS)
        over = [blob.digest for blob in page if blob.over]
        if over:
            tx.execute(q.DOOM, digests=over, doomed=tx.now)
        self._blob = page[-1].digest if len(page) == ROWS else ""

    async def _remove(self) -> int:
        doomed = await self._store.read(_doomed)
        for digest in doomed:
            await self._blobs.shelf.remove(digest)
        if doomed:
            await self._store.write(lambda tx: tx.execute(q.DELETE_BLOBS, digests=doomed))
        return len(doomed)


def _doomed(tx: Tx) -> list[str]:
    return tx.all(q.DOOMED, _digest, limit=REMOVED)


def _unknown(tx: Tx, digests: Iterable[str]) -> list[str]:
    wanted = list(digests)
    known = set(tx.all(q.KNOWN, _digest, digests=wanted))
    return [digest for digest in wanted if digest not in known]


def _doom_unknown(tx: Tx, digests: Iterable[str]) -> None:
    unknown = _unknown(tx, digests)
    rows = [{"digest": digest, "size": 0, "created": tx.now, "doomed": tx.now} for digest in unknown]
    tx.execute_many(queries.ADD_BLOB, rows)


def _digest(digest: str) -> str:
    return digest
