"""examples/netunicorn: netunicorn's notebooks redone in ours run from top to bottom, and say what they should."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "netunicorn"

# By notebook, then by cell: what it prints.
PRINTED = {
    "basic": {
        "nodes": "raspi-1 raspi-2 raspi-3\n",
        "too-few": r"30 nodes .*\n",
        "state": "succeeded\n",
        "results": "".join(f"raspi-{n} {{'long': 0.5, 'short': 0.3, 'last': 0.1}}\n" for n in (1, 2, 3)),
    },
    "execution_graph": {
        "graph": "succeeded one two three four\n",
        "circle": r"DAG 'circle' has a circle: one -> two -> one\..*\n",
        "cycle": "4 ['three', 'three', 'three', 'three']\n",
        "ends": "succeeded {'four': 'failed', 'five': 'succeeded', 'six': 'skipped', 'seven': 'succeeded'}\n",
        "unchanged": "{'one': 4, 'two': 4}\n",
    },
    "flags": {
        "stages": "succeeded ['raspi-1', 'raspi-2', 'raspi-3'] two\n",
        "log": "3 two\n",
        "barriers": "succeeded {'server': 2, 'raspi-1': 2, 'raspi-2': 2, 'raspi-3': 2}\n",
        "by-hand": "7\n",
    },
    "graph": {
        "rounds": "0 False skipped\n1 True succeeded\n2 False skipped\n",
        "simulated": "succeeded\n",
    },
    "local_executor": {
        "local": "I've heard of 0!\n",
        "log": "listening\n",
        "nodes": "{'pi-0': 'at the roof', 'pi-1': 'at the cellar'}\n",
        "unchanged": "<Success: {'dummy1': [<Success: 0>], 'repeater': [<Success: I've heard of [<Success: 0>]!>]}>\n",
    },
    "tasks_and_dispatchers": {
        "task": r"dividing 10 by 4\n2\.5\ndivide\(.*missing a required argument: 'divisor'.*\n",
        "outcomes": "2.5 failed ZeroDivisionError: division by zero 3\n",
        "class": "slept 0.1 s for a test\n",
        "requirements": r"\('mkdir -p /tmp/mydata',\)\n.*numpy is pinned to 2\.1\.0 and to 2\.2\.0.*\n",
        "implementations": "{'a': 'rm somefile', 'b': 'Remove-Item somefile'}\n",
        "arguments": "{'a': '1: my address is 192.0.2.1', 'b': '1: my address is 192.0.2.2'}\n",
        "dispatchers": (
            r"\{'pi-1': 'my address is 192\.0\.2\.1', 'pi-2': 'my address is 192\.0\.2\.2'\}\n"
            r".*not implemented for architecture: Architecture\.WINDOWS_AMD64.*\n"
        ),
    },
}
PATTERNS = {"too-few", "circle", "task", "requirements", "dispatchers"}


def test_every_notebook_is_run():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_a_notebook_keeps_no_output(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("name", PRINTED)
def test_a_notebook_runs_and_says_what_it_should(name, tmp_path, monkeypatch):
    for variable in ("FIELDLAB_ENDPOINT", "FIELDLAB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3", resources=resources).execute()
    said = {cell["id"]: "".join(out.get("text", "") for out in cell.get("outputs", ())) for cell in notebook.cells}
    for cell, wanted in PRINTED[name].items():
        pattern = wanted if cell in PATTERNS else re.escape(wanted)
        assert re.fullmatch(pattern, said[cell], re.S), (cell, said[cell], wanted)
