"""Measure: ``make bench``, or ``make bench ARGS="chains --rounds 3"``. A table, and JSON in benchmarks/results/."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
from collections.abc import Callable
from importlib.metadata import version

import chains
import executors
import installs
from figures import CACHE, ROOT, Figure, as_json, machine, met, ratio

BENCHMARKS: dict[str, Callable[[int], list[Figure]]] = {
    "installs": installs.measure,
    "chains": chains.measure,
    "executors": executors.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which to run; all if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (5)")
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    figures: list[Figure] = []
    for name in arguments.names or BENCHMARKS:
        found = BENCHMARKS[name](arguments.rounds)
        print(f"\n{name}\n{table(found)}", flush=True)
        figures += found
    at = dt.datetime.now(dt.UTC)
    result = {
        "at": at.isoformat(timespec="seconds"),
        "machine": {**machine(), "load_before": load},
        "versions": {
            name: version(name) for name in ("fieldlab", "fieldlab-common", "fieldlab-executor", "cloudpickle")
        },
        "rounds": arguments.rounds,
        "figures": [as_json(figure, figures) for figure in figures],
    }
    path = ROOT / "benchmarks" / "results" / f"{at:%Y%m%dT%H%M%SZ}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nWritten: {path.relative_to(ROOT)}")


def table(figures: list[Figure]) -> str:
    """The figures as text: medians, and ratios to what they are compared with."""
    words = {True: "yes", False: "NO", None: ""}
    rows = [("", "median", "unit", "ratio", "aim", "met")]
    for figure in figures:
        times = ratio(figure, figures)
        aim = "" if figure.aim is None else f"≤ {figure.aim:g}" + (" ×" if figure.against else "")
        shown = f"{times:.2f} ×" if times is not None else ""
        rows.append((figure.name, f"{figure.median:.2f}", figure.unit, shown, aim, words[met(figure, figures)]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    main()
