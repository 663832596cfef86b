"""The public API as type checkers see it: mypy and pyright (basedpyright), each as its users run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def mypy(file: Path, folder: Path) -> dict[int, list[str]]:
    """What mypy says against each line of a file."""
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\nwarn_unreachable = true\n")
    cache = ROOT / ".cache" / "mypy-typing" if file.is_relative_to(ROOT) else folder
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(folder / "mypy.ini"),
        "--cache-dir",
        str(cache),
    ]
    found = _output([*command, "--no-error-summary", "--show-absolute-path", str(file)], (0, 1))
    lines: dict[int, list[str]] = {}
    for said in found.splitlines():
        match = re.match(rf"{re.escape(str(file))}:(\d+): error: (.*)", said)
        if match:
            lines.setdefault(int(match[1]), []).append(match[2])
        else:
            assert ": note: " in said, said
    return lines


def pyright(file: Path, folder: Path) -> dict[int, list[str]]:
    """What basedpyright says against each line of a file, in pyright's standard mode."""
    settings = {
        "include": [str(file)],
        "typeCheckingMode": "standard",
        "pythonVersion": "3.11",
        "reportUnusedExpression": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "--project"]
    found = json.loads(_output([*command, str(folder / "pyrightconfig.json")], (0, 1)))
    assert found["summary"]["filesAnalyzed"] == 1
    lines: dict[int, list[str]] = {}
    for one in found["generalDiagnostics"]:
        if one["severity"] in ("error", "warning"):
            lines.setdefault(one["range"]["start"]["line"] + 1, []).append(one["message"])
    return lines


def _output(command: list[str], codes: tuple[int, ...]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout


Checker = Callable[[Path, Path], dict[int, list[str]]]
both = pytest.mark.parametrize("checker", [mypy, pyright])


@both
def test_a_checker_accepts_the_program_of_the_design_and_agrees_on_every_type(checker: Checker, tmp_path: Path) -> None:
    assert checker(HERE / "program.py", tmp_path) == {}


@both
def test_a_checker_refuses_every_marked_line_and_no_other(checker: Checker, tmp_path: Path) -> None:
    file = HERE / "misuse.py"
    lines = file.read_text("utf-8").splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("  # refused")}
    said = checker(file, tmp_path)
    assert len(marked) > 60
    assert {number: lines[number - 1] for number in marked - said.keys()} == {}
    assert {number: said[number] for number in said.keys() - marked} == {}


@both
def test_a_checker_can_tell_a_wrong_type_from_a_right_one(checker: Checker, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(
        "from typing import assert_type\nimport fieldlab as fl\n@fl.task\ndef one() -> int:\n    return 1\n"
        "assert_type(one(), fl.Step[int])\nassert_type(one(), fl.Step[str])\n"
    )
    assert checker(file, tmp_path).keys() == {7}
