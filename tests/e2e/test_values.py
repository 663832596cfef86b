"""Values between steps and on their way to the user: as what they were, and by the way that suits their size."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import os
import pathlib
from typing import Any

import fieldlab as fl
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

NUMBERS = 12_500_000  # of 8 bytes: 100 MB
MB = 1_000_000


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Reading:
    at: dt.datetime
    loss: decimal.Decimal
    colour: Colour


VALUES: dict[str, Any] = {
    "nested": [{"a": (1, 2.5, None, True)}, {3, 4}, frozenset({"x"}), b"\0\xff", complex(1, 2), 2**80],
    "reading": Reading(
        dt.datetime(2026, 1, 2, 3, 4, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
        decimal.Decimal("0.10"),
        Colour.RED,
    ),
    "path": pathlib.Path("out") / "trace.pcap",
    "array": np.arange(12, dtype=">f4").reshape(3, 4),
    "frame": pd.DataFrame({"host": ["a", "b"], "at": pd.to_datetime(["2026-01-01", "2026-01-02"], utc=True)}),
    "table": pa.table({"n": [1, None], "text": ["x", "y"]}),
}


@fl.task
def give() -> dict[str, Any]:
    return VALUES


@fl.task
def unlike(values: dict[str, Any]) -> list[str]:
    """Those of the values of the step before that are not what it gave."""
    return _unlike(values)


def _unlike(values: dict[str, Any]) -> list[str]:
    return [key for key, value in VALUES.items() if not _equal(values[key], value)]


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one.equals(other) if isinstance(one, pd.DataFrame | pa.Table) else one == other)


@pytest.mark.parametrize("where", ["here", "director"])
def test_values_are_what_they_were_in_the_next_step_and_at_the_user(client: fl.Client, name: str, where: str) -> None:
    with fl.DAG("values") as dag:
        unlike(give())
    exp = fl.Experiment(name).map(dag, client.nodes()["a"])
    run = client.submit(exp) if where == "director" else fl.run(exp)
    run.wait(60, raise_on_failure=True)
    assert run.results["a"]["unlike"].value == []
    assert _unlike(run.results["a"]["give"].value) == []


@fl.task
def large() -> Any:
    return np.arange(NUMBERS, dtype=np.float64)


@fl.task
def total(array: Any) -> tuple[float, int]:
    """Its sum; and the most memory, in bytes, that the supervisor (the spawner's parent) ever had."""
    parent = pathlib.Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
    status = pathlib.Path(f"/proc/{parent}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return float(array.sum()), int(peak.split()[1]) * 1024


def test_a_hundred_megabytes_go_to_the_next_step_through_a_file_and_to_the_user_as_an_artifact(tmp_path: Any) -> None:
    with fl.DAG("large") as dag:
        total(large())
    run = fl.run(fl.Experiment("large").map(dag, fl.Node.dummy("a")), folder=tmp_path, timeout=100)
    result = run.results["a"]
    summed, supervisor = result["total"].value
    assert summed == NUMBERS * (NUMBERS - 1) / 2
    assert [path.stat().st_size > 100 * MB for path in tmp_path.glob("deployments/a/values/*")] == [True]
    assert result.cost is not None
    assert result.cost.control_bytes < 50_000
    assert supervisor < 100 * MB
    for step in result.values():
        assert step.usage is not None
        assert step.usage.peak_memory < 700 * MB  # a few times the array, whatever else was there
    assert run.artifacts.download(tmp_path / "out") == []  # a value is no artifact to its user
    assert np.array_equal(result["large"].value, np.arange(NUMBERS, dtype=np.float64))
    run.close()
