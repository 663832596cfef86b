"""What a step costs, in a chain and in a fan-out, beside bare processes and beside the peers, all in the same rounds.

Each step of fieldlab's runs in a process of its own, and once more in warm workers (``isolation="shared"``), which is
what the peers do. Figures are (t(1100) - t(100)) / 1000, journal on the checkout's file system.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Row, Turns, Unavailable, Versions, peer, peer_environment, per_step, processor, program, work

__all__ = ["chain", "fanout"]

BARE, POOL, NETUNICORN = "fork", "pool", "netunicorn"
# What each peer is, and the distribution that has it; none: this interpreter.
NAMES = {
    BARE: ("fork + pipe + wait", ""),
    POOL: ("ProcessPoolExecutor (reuse)", ""),
    "loky": ("loky (reuse)", "loky"),
    "dask": ("Dask processes (reuse)", "distributed"),
    "parsl": ("Parsl HTEX (reuse)", "parsl"),
    "ray": ("Ray (reuse)", "ray"),
    NETUNICORN: ("netunicorn's executor", "netunicorn-executor"),
}
PEER_ROUNDS = 3  # of those that take seconds to start


def chain(rounds: int, versions: Versions) -> list[Row]:
    """A chain of steps that do nothing."""
    return _rows("chain", "a step of a chain", rounds, versions, bare=1.3, shared=1.5)


def fanout(rounds: int, versions: Versions) -> list[Row]:
    """A fan-out of steps that do nothing; 0.8 and 0.7 times a peer's throughput are 1.25 and 1.43 times its time."""
    return _rows("fanout", "a step of a fan-out", rounds, versions, bare=1.25, shared=1.43)


def _rows(shape: str, name: str, rounds: int, versions: Versions, *, bare: float, shared: float) -> list[Row]:
    folder = work(shape)
    places = (str(folder / str(number)) for number in itertools.count())
    costs: dict[str, list[float]] = {one: [] for one in ("process", "shared", BARE)}

    def ours(isolation: str) -> float:
        found = program("steps", shape, isolation, next(places))
        costs[isolation].append(processor(found))
        return per_step(found)

    measures: dict[str, Callable[[], float]] = {one: functools.partial(ours, one) for one in ("process", "shared")}
    measures |= {one: functools.partial(_peer, one, shape, folder, versions, costs.get(one)) for one in NAMES}
    few = min(rounds, PEER_ROUNDS)
    turns = Turns.take({one: few if NAMES.get(one, ("", ""))[1] else rounds for one in measures}, measures)
    shutil.rmtree(folder)

    def row(isolation: str, other: str, aim: float | None) -> Row:
        settings: dict[str, Any] = {"aim": aim, "aimed": "ratio", "note": turns.note(isolation, other)}
        label = name if isolation == "process" else name.replace("a step", "a shared step")
        peer_samples, called = turns.samples[other], NAMES[other][0]
        called = f"two lanes of {called}" if (shape, other) == ("fanout", BARE) else called
        return Row(
            name=label,
            unit="ms",
            samples=turns.samples[isolation],
            peer=called,
            peer_samples=peer_samples,
            **settings,
        )

    beside = [row("process", other, bare if other == BARE else None) for other in NAMES]
    ahead = [
        row("shared", other, shared if other == POOL else 1.0) for other in NAMES if other not in (BARE, NETUNICORN)
    ]
    return beside + ahead + [_cost(name, isolation, costs) for isolation in ("process", "shared")]


def _cost(name: str, isolation: str, costs: dict[str, list[float]]) -> Row:
    """Of all processes together, the client's too: on a busy machine it says more than the time that passed."""
    label = name if isolation == "process" else name.replace("a step", "a shared step")
    peer = NAMES[BARE][0]
    return Row(name=f"processor, {label}", unit="ms", samples=costs[isolation], peer=peer, peer_samples=costs[BARE])


def _peer(name: str, shape: str, folder: Path, versions: Versions, costs: list[float] | None) -> float:
    """A sample; ``costs`` takes that of the processor, where all of the peer's processes end with it."""
    distribution = NAMES[name][1]
    python = peer_environment(distribution, versions) if distribution else Path(sys.executable)
    try:
        found = peer(name, shape, folder, python)
        if costs is not None:
            costs.append(processor(found))
        return per_step(found)
    except (ValueError, KeyError, IndexError) as error:
        raise Unavailable(f"{name} printed no figures: {error!r}") from error
