"""What grows with an experiment: long DAGs on one node, plans for many nodes, simulations of a day."""

from __future__ import annotations

import itertools
import shutil

from measure import Row, Turns, Versions, alternate, program, work

__all__ = ["growth", "plan", "simulation"]


def growth(rounds: int, versions: Versions) -> list[Row]:
    """What a step costs, and the supervisor holds, at 10,000 steps beside 1,000."""
    folder = work("growth")
    places = (str(folder / str(number)) for number in itertools.count())
    shapes = ("chain", "fanout")
    found = {shape: [program("growth", shape, next(places)) for _ in range(rounds)] for shape in shapes}
    shutil.rmtree(folder)
    rows: list[Row] = []
    for shape, label in zip(shapes, ("chain", "fan-out"), strict=True):

        def of(name: str, factor: float, shape: str = shape) -> list[float]:
            return [factor * one[name] for one in found[shape]]

        few, many = of("few", 1000), of("many", 1000)
        name, peer = f"a step of a {label} of 10,000", f"of a {label} of 1,000"
        rows.append(Row(name=name, unit="ms", samples=many, peer=peer, peer_samples=few, aim=1.2, aimed="ratio"))
        name = f"supervisor, {label} of 10,000 over 1,000"
        rows.append(Row(name=name, unit="MB", samples=of("memory", 1e-6), aim=20))
    return rows


def plan(rounds: int, versions: Versions) -> list[Row]:
    """Defining, checking and planning 10,000 steps for 100 nodes; half of them may need other implementations."""
    samples = alternate(rounds, {kinds: lambda kinds=kinds: program("plan", kinds)["seconds"] for kinds in ("1", "2")})  # type: ignore[misc]
    return [
        Row(name="plan of 10,000 steps for 100 nodes", unit="s", samples=samples["1"], aim=2),
        Row(name="the same for two kinds of nodes", unit="s", samples=samples["2"]),
    ]


def simulation(rounds: int, versions: Versions) -> list[Row]:
    """Experiments on 200 nodes, on a virtual clock."""
    measures = {name: lambda name=name: program("simulate", name)["seconds"] for name in ("chain", "day")}  # type: ignore[misc]
    turns = Turns.take(dict.fromkeys(measures, rounds), measures)
    return [
        Row(name="fl.simulate of 200 nodes × 500 steps", unit="s", samples=turns.samples["chain"], aim=20),
        Row(name="the same, 24 h with a step a minute", unit="s", samples=turns.samples["day"]),
    ]
