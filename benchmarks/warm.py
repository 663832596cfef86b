"""How soon a step runs once it is submitted: from the client's call, through the director, until its process is there.

The node is a local one that ran something before: ``fieldlab.pyz`` is unpacked, and what it needs is in the page cache.
"""

from __future__ import annotations

import shutil
import time

import director as d
import fieldlab as fl
from measure import Row, Versions, work

__all__ = ["submit"]

WARM = 3  # runs before what is measured


def submit(rounds: int, versions: Versions) -> list[Row]:
    """Milliseconds from ``client.submit`` until the step's process has begun, and until its value is here."""
    folder = work("submit")
    with d.serving(folder / "director", nodes=1) as director, fl.Client(director.url, director.token) as client:
        found = [_submit(client, number) for number in range(WARM + rounds)][WARM:]
    shutil.rmtree(folder)
    begun, here = ([1000 * one[index] for one in found] for index in (0, 1))
    return [
        Row(name="submit to first step, warm local node", unit="ms", samples=begun, aim=150),
        Row(name="submit to its result", unit="ms", samples=here),
    ]


def _submit(client: fl.Client, number: int) -> tuple[float, float]:
    @fl.task
    def when() -> float:
        return time.monotonic()  # of one clock for all processes of the machine

    with fl.DAG("one") as dag:
        when()
    described = fl.Experiment(f"submit-{number}").map(dag, client.nodes())
    begin = time.monotonic()
    run = client.submit(described)
    run.wait(timeout=d.WAIT, raise_on_failure=True)
    here = time.monotonic() - begin
    (result,) = run.results.values()
    return result["when"].value - begin, here
