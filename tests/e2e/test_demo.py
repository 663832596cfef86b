"""The demo as a newcomer runs it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples" / "quickstart.py"
Marked = tuple[dict[str, str], Callable[[], list[str]]]


def test_the_demo_measures_writes_what_it_promises_and_leaves_no_process(tmp_path: Path, marked: Marked) -> None:
    environment, there = marked
    done = subprocess.run(
        [sys.executable, str(DEMO)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert there() == []
    said = done.stdout
    assert "throughput_sendfile: has no `sender`" in said  # the plan says why an implementation was not taken
    assert "round trips, the median took" in said.partition("The log of plain/round_trips:")[2]

    output = tmp_path / "demo-output"
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["server", "plain", "zero-copy"]
    for deployment, steps in results.items():
        for step, one in steps.items():
            assert one.keys() == {"status", "value", "started", "ended", "attempts"}, (deployment, step)
            assert one["status"] == "succeeded"
            assert one["started"] <= one["ended"]
            assert one["attempts"] == 1
    for deployment in ("plain", "zero-copy"):
        trips, rate = results[deployment]["round_trips"]["value"], results[deployment]["throughput"]["value"]
        assert trips["exchanges"] >= 1000
        assert 0 < trips["p50"] <= trips["p90"] <= trips["p99"]
        assert rate["seconds"] >= 2
        assert rate["bytes"] > 0
        rows = list(csv.DictReader((output / deployment / "round_trips" / "1" / "round-trips.csv").open()))
        assert len(rows) == trips["exchanges"]
    for deployment in results:
        rows = list(csv.DictReader((output / deployment / "counters" / "1" / "counters.csv").open()))
        assert {row["interface"] for row in rows} >= {"lo"}
    drawing = ElementTree.parse(output / "server" / "plot" / "1" / "round-trips.svg").getroot()
    assert len(drawing.findall("{http://www.w3.org/2000/svg}polyline")) == 2
