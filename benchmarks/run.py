"""``make bench``: measure, print a table, and keep all samples in ``benchmarks/results/``.

make bench ARGS="--only chain --quick" measures one group, in few rounds. The figures and how to read them stand in
docs/performance.md. Peers are installed from the package index into ``.cache/bench/`` on first use.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from figures import FIGURES
from measure import CACHE, ROOT, Row, Unavailable, run

# Of each group, as a measurement and as a quick look. Those of idle are quarters of a minute.
ROUNDS = {
    "client": (15, 3),
    "chain": (7, 1),
    "fanout": (7, 1),
    "growth": (1, 0),
    "plan": (5, 1),
    "simulation": (3, 1),
    "executor": (9, 3),
    "idle": (4, 1),
    "ingest": (5, 1),
    "events": (5, 1),
    "artifacts": (5, 1),
    "fleet": (1, 0),
    "submit": (20, 5),
    "restart": (1, 0),
}
RESULTS = ROOT / "benchmarks" / "results"
_HEAD = ("figure", "fieldlab", "beside it", "is", "ratio", "aim", "met")


def main() -> int:
    """Measure what was asked for; 1 if something could not be measured, or an aim was missed with ``--strict``."""
    asked = _arguments()
    CACHE.mkdir(parents=True, exist_ok=True)
    before = os.getloadavg()
    versions: dict[str, Any] = {}
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in asked.only or [name for name in FIGURES if ROUNDS[name][asked.quick]]:
        print(f"measuring: {name}", file=sys.stderr)
        try:
            rows += FIGURES[name](asked.rounds or ROUNDS[name][asked.quick], versions)
        except (Unavailable, OSError, RuntimeError) as error:
            failed[name] = str(error)
    about = machine() | {"load_before": before, "load_after": os.getloadavg()}
    print_table(rows, about)
    for name, why in failed.items():
        print(f"{name} could not be measured: {why}")
    print(f"\nAll samples: {save(rows, failed, about, versions)}")
    missed = asked.strict and any(row.met is False for row in rows)
    return 1 if failed or missed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure fieldlab beside its peers.")
    parser.add_argument("--only", action="append", choices=list(FIGURES), help="one group; may be given again")
    parser.add_argument("--quick", action="store_true", help="few rounds of each, and nothing of 10,000 steps: a look")
    parser.add_argument("--rounds", type=int, help="so many rounds of each")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if an aim is missed")
    return parser.parse_args()


# --- what is printed and kept -----------------------------------------------------------------------------------------


def print_table(rows: list[Row], about: dict[str, Any]) -> None:
    """The rows as a table, with the machine above and the notes below."""
    load = " → ".join(f"{one[0]:.2f}" for one in (about["load_before"], about["load_after"]))
    print(
        f"{about['date']}  {about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB, {about['kernel']}, ", end=""
    )
    print(f"{about['file_system']}, Python {about['python']}, commit {about['commit']}, load {load}\n")
    lines = [_HEAD, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for note in _unique(row.note for row in rows if row.note):
        names = ", ".join(_unique(row.name for row in rows if row.note == note))
        print(f"\n{names}: {note}", end="")
    print()


def _cells(row: Row) -> tuple[str, ...]:
    def amount(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.0f}" if not row.unit else f"{value:.{2 if value < 10 else 1}f} {row.unit}"

    ratio = "" if row.ratio is None else f"{row.ratio:.3f}" if row.ratio < 0.1 else f"{row.ratio:.2f}"
    aim = (
        "" if row.aim is None else f"≤ {row.aim:g} ×" if row.aimed == "ratio" else f"≤ {row.aim:g} {row.unit}".rstrip()
    )
    met = {True: "yes", False: "NO", None: ""}[row.met]
    return row.name, amount(row.figure), row.peer, amount(row.peer_figure), ratio, aim, met


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def save(rows: list[Row], failed: dict[str, str], about: dict[str, Any], versions: dict[str, Any]) -> Path:
    """Write the JSON file; its path from the root of the checkout."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{about['date'].replace(':', '').replace('+0000', 'Z')}.json"
    kept = {"machine": about, "versions": versions, "figures": [row.data() for row in rows], "failed": failed}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return path.relative_to(ROOT)


def machine() -> dict[str, Any]:
    """What these figures are of."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(CACHE),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str:
    """What was measured; with a ``+`` when packages/ differs from it."""
    try:
        changed = run(["git", "status", "--porcelain", "--", "packages"]).strip()
        return run(["git", "rev-parse", "--short", "HEAD"]).strip() + ("+" if changed else "")
    except Unavailable:  # no git, or no repository
        return "unknown"


def _first(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _file_system(path: Path) -> str:
    """The type of the file system that ``path`` is on: of the longest mount point above it."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "unknown"
    above = [(len(mount[1]), mount[2]) for mount in mounts if path.resolve().is_relative_to(mount[1])]
    return max(above)[1] if above else "unknown"


if __name__ == "__main__":
    sys.exit(main())
