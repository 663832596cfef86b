"""How much one user, one experiment and one deployment may have: what is over it is refused, and who sent it is told.

A quota of things that a request makes is held after they were made, in the same transaction: what raises is undone, and
a request that is repeated, and so makes nothing, is answered as before. What an executor reports must never be held
up: records over a quota become refusals, one by one, which their steps see; logs that come too fast wait on the node,
whose spool says what it dropped when it was full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice

from fieldlab_common.errors import RateLimited, TooLarge
from fieldlab_common.protocol import ArtifactRecord, EventRecord, Refusal

from fieldlab_director.services.intake import Entry
from fieldlab_director.settings import Limits
from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx

__all__ = ["Brake", "hold_bytes", "hold_events", "hold_experiments", "hold_infrastructures", "hold_pace", "within"]


def hold_experiments(tx: Tx, owner_id: str, most: int) -> None:
    """Hold that a user has no more experiments than ``most``.

    Raises:
        TooLarge.
    """
    if tx.value(queries.COUNT_EXPERIMENTS, owner_id=owner_id) > most:
        raise TooLarge(f"You have {most} experiments already.", advice="Delete those that nobody needs.")


def hold_infrastructures(tx: Tx, owner_id: str, most: int) -> None:
    """Hold that a user has no more infrastructures than ``most``.

    Raises:
        TooLarge.
    """
    if tx.value(queries.COUNT_INFRASTRUCTURES, owner_id=owner_id) > most:
        raise TooLarge(f"You have {most} infrastructures already.", advice="Detach those that nobody needs.")


def hold_events(tx: Tx, experiment_id: str, most: int) -> None:
    """Hold that an experiment has no more events than ``most``.

    Raises:
        TooLarge.
    """
    if tx.value(queries.COUNT_EVENTS, id=experiment_id) > most:
        raise TooLarge(f"The experiment has {most} events already.", advice="Put what is measured into results.")


def hold_bytes(tx: Tx, owner_id: str, size: int, most: int) -> None:
    """Hold that a user's blobs and one of ``size`` bytes more are together no more than ``most`` bytes.

    Raises:
        TooLarge.
    """
    stored = int(tx.value(queries.BYTES_OF_OWNER, owner_id=owner_id) or 0)
    if stored + size > most:
        raise TooLarge(
            f"With these {size} bytes, code, inputs and artifacts would have {stored + size} of at most {most}.",
            advice="Delete experiments that nobody needs.",
        )


def within(tx: Tx, experiment_id: str, taken: Sequence[Entry | Refusal], limits: Limits) -> list[Entry | Refusal]:
    """What an executor sent, with refusals for the events and artifacts that an experiment has no room for."""
    result = list(taken)
    for kind, count, most, what in (
        (EventRecord, queries.COUNT_EVENTS, limits.events, "events"),
        (ArtifactRecord, queries.COUNT_ARTIFACTS, limits.artifacts, "artifacts"),
    ):
        places = [at for at, entry in enumerate(result) if isinstance(entry, Entry) and isinstance(entry.body, kind)]
        if places:
            room = max(0, most - int(tx.value(count, id=experiment_id) or 0))
            for at in islice(places, room, None):
                message = f"the experiment has {most} {what}, the most that it may have"
                result[at] = Refusal(number=result[at].number, message=f"A record was refused: {message}.")
    return result


def hold_pace(brake: Brake, deployment_id: str, size: int, pace: float) -> None:
    """Hold that a deployment's logs come no faster than ``pace`` bytes a second, but for bursts.

    Raises:
        RateLimited: they wait on the node meanwhile.
    """
    wait = brake.take(deployment_id, size)
    if wait:
        raise RateLimited(
            f"The deployment's logs come faster than {pace:.0f} bytes a second.",
            advice="They wait on the node; what it has no room for is dropped, oldest first, and said.",
            details={"retry_after": wait},
        )


class Brake:
    """Lets a burst of one key through at once, and then one each ``every`` seconds (GCRA, ITU-T I.371).

    It is of this process: several directors on one database brake each on their own.
    """

    def __init__(
        self, burst: float, every: float, *, most: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every, self._burst, self._most, self._clock = every, burst * every, most, clock
        self._free_at: dict[str, float] = {}  # when the key has its whole burst again

    def take(self, key: str, weight: float = 1.0) -> float:
        """Count something of a key; or the seconds until there is room for it, when there is none now.

        Something heavier than a burst fits where a whole burst does.
        """
        now = self._clock()
        free_at = max(self._free_at.get(key, now), now)
        cost = self._every * weight
        wait = free_at - now + min(cost, self._burst) - self._burst
        if wait > 1e-9:  # a sum of rounded numbers
            return wait
        if key not in self._free_at and len(self._free_at) >= self._most:
            self._make_room(now)
        self._free_at[key] = free_at + cost
        return 0.0

    def forgive(self, key: str) -> None:
        """Count one less: it was a good one."""
        if key in self._free_at:
            self._free_at[key] -= self._every

    def _make_room(self, now: float) -> None:
        self._free_at = {key: at for key, at in self._free_at.items() if at > now}
        if len(self._free_at) >= self._most:
            del self._free_at[min(self._free_at, key=self._free_at.__getitem__)]
