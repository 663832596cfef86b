"""A user's code loads on the node, from wherever it was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import nbclient
import nbformat
import pytest
from fieldlab_director import Embedded

TASKS = """
from dataclasses import dataclass
import fieldlab as fl
import fieldlab.results
from fieldlab.artifacts import ArtifactFile
from fieldlab.runs import Run

FACTOR = 3

@dataclass
class Reading:
    value: int

def times(reading):
    return Reading(reading.value * FACTOR)

@fl.task
def read(start):
    return Reading(start)

@fl.task
def scale(reading):
    return times(reading)

class Shift(fl.Task):
    def __init__(self, by):
        self.by = by
    def run(self, reading):
        return reading.value + self.by

def show(run: fl.Run | None, client: fl.Client, rows: list[fl.Results]) -> None | fl.Plan:
    return None

class Watched(Run):
    files: list[ArtifactFile] | fieldlab.results.Results

def define():
    with fl.DAG("code") as dag:
        Shift(by=4)(scale(read(10))).when(read(1), lambda one: one.value == FACTOR - 2)
    return dag
"""
MODULE = TASKS.replace("def times", "import helper\n\ndef times").replace(
    "Reading(reading.value * FACTOR)", "Reading(helper.multiply(reading.value, FACTOR))"
)
HELPER = "def multiply(a, b):\n    return a * b\n"
USE = """
import json, os
with fl.Client() as client:
    run = client.submit(fl.Experiment(os.environ["NAME"]).map(define(), client.nodes()["a"]))
    run.wait(60, raise_on_failure=True)
    there = [run.results["a"]["Shift"].value, run.results["a"]["scale"].value.value]
here = fl.run(define(), timeout=60)
print(json.dumps([*there, here["Shift"].value, here["scale"].value.value]))
"""
WANTED = [34, 30, 34, 30]


@pytest.fixture
def environment(director: Embedded, name: str) -> dict[str, str]:
    return {**os.environ, "FIELDLAB_ENDPOINT": director.url, "FIELDLAB_TOKEN": director.token, "NAME": name}


def _run(script: Path, environment: dict[str, str], cwd: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, str(script)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_from_a_script(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "script.py").write_text(TASKS + USE)
    assert _run(tmp_path / "script.py", environment, tmp_path) == WANTED


def test_from_a_module_beside_the_script_that_imports_a_helper_module(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "helper.py").write_text(HELPER)
    (folder / "tasks.py").write_text(MODULE)
    (folder / "script.py").write_text("import fieldlab as fl\nfrom tasks import define\n" + USE)
    assert _run(folder / "script.py", environment, tmp_path) == WANTED


def test_from_a_notebook(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    for key in ("FIELDLAB_ENDPOINT", "FIELDLAB_TOKEN", "NAME"):
        monkeypatch.setenv(key, environment[key])
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(text)) for text in (MODULE, USE)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[1].outputs)
    assert json.loads(printed.splitlines()[-1]) == WANTED
