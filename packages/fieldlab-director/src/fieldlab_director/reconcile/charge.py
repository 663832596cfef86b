"""Which infrastructures a director is in charge of: each of one director at a time.

A connector keeps things in memory, and what the loop knows of executors (who is silent, who was seen dead) is known to
one process. So it is not single deployments that directors share out among them, but infrastructures: all deployments
of one, its executors and its nodes are one director's business for as long as it renews its charge. What runs on a
director's own machine can be reached from there alone: such an infrastructure has a ``home``, and nobody else takes it.

A director that has the database for itself is in charge of everything, for good.
"""

from __future__ import annotations

import secrets

from fieldlab_director.decide import NEVER
from fieldlab_director.store import reconcile_queries as rq
from fieldlab_director.store.base import Tx

__all__ = ["CHARGE_SECONDS", "Charge"]

CHARGE_SECONDS = 30.0  # a director that died is missed for so long at most


class Charge:
    """One life of the director of a data folder. ``home`` names the folder; ``name`` is what it signs leases with."""

    def __init__(self, home: str, *, shared: bool) -> None:
        self.home, self.shared = home, shared
        self.name = f"{home}.{secrets.token_hex(8)}"

    def begin(self, tx: Tx) -> None:
        """Void what a former life has left: the folder is locked, so it is over."""
        former = f"{self.home}.%" if self.shared else "%"
        tx.execute(rq.LET_GO, guard_holder=former)
        tx.execute(rq.FREE, guard_lease=former, look_at=tx.now)
        if not self.shared:  # the data may have been moved or restored: it is at home where it is
            tx.execute(rq.BRING_HOME, home=self.home)

    def take(self, tx: Tx, known: frozenset[str]) -> frozenset[str]:
        """Take what nobody has and what another has not renewed, keep the rest; the ids of all that it is in charge of.

        What is not ``known`` already is looked at now, whatever the last director had planned.
        """
        until = tx.now + CHARGE_SECONDS if self.shared else NEVER
        guards = {"guard_home": self.home, "guard_holder": self.name, "guard_now": tx.now}
        tx.execute(rq.TAKE_CHARGE, holder=self.name, until=until, **guards)
        held = self.held(tx)
        if held - known:
            tx.execute(rq.LOOK_AT_OPEN, now=tx.now, held=sorted(held - known))
        return held

    def held(self, tx: Tx) -> frozenset[str]:
        """The ids of all that it is in charge of, and that are not detached."""
        return frozenset(tx.all(rq.IN_CHARGE, _id, holder=self.name))

    def finds_more(self, tx: Tx) -> bool:
        """Whether ``take`` would find something that nobody is in charge of."""
        return bool(tx.value(rq.WITHOUT_CHARGE, guard_home=self.home, guard_now=tx.now))

    def end(self, tx: Tx) -> None:
        """Leave all of it, and the jobs that were under way, to whoever takes them next."""
        tx.execute(rq.LET_GO, guard_holder=self.name)
        tx.execute(rq.FREE, guard_lease=self.name, look_at=tx.now)


def _id(id: str) -> str:
    return id
