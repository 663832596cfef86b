"""What the documentation says is so: its programs run, its tables are those of the code, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fieldlab_common import errors
from fieldlab_common.lifecycle import TRANSITIONS, Reason

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def programs():
    for page in PAGES:
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M), 1):
            yield pytest.param(code, id=f"{page.name}-{number}")


def table(page: str, heading: str | None = None) -> list[list[str]]:
    """The cells of the first table under a heading (or of the page), without its head."""
    text = (ROOT / "docs" / page).read_text()
    if heading:
        text = text[text.index(f"\n## {heading}\n") :]
    rows: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


@pytest.mark.parametrize("code", list(programs()))
def test_a_program_of_the_documentation_runs(code, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_in_the_readme_is_short():
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[1]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 25


@pytest.mark.parametrize("kind", list(TRANSITIONS), ids=lambda kind: kind.__name__)
def test_the_page_on_states_has_the_tables_of_the_code(kind):
    shown = {
        row[0]: set(re.findall(r"`(\w+)`", row[2])) for row in table("lifecycle.md", kind.__name__[: -len("State")])
    }
    assert shown == {f"`{old.value}`": {new.value for new in row} for old, row in TRANSITIONS[kind].items()}


@pytest.mark.parametrize("kind", list(TRANSITIONS), ids=lambda kind: kind.__name__)
def test_the_pictures_of_states_have_every_way_and_no_other(kind):
    text = (ROOT / "docs" / "lifecycle.md").read_text()
    section = text[text.index(f"\n## {kind.__name__[: -len('State')]}\n") :]
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", section[: section.index("\n```\n")], re.M))
    assert drawn == {(old.value, new.value) for old, row in TRANSITIONS[kind].items() for new in row}


def test_the_page_on_states_has_every_reason():
    assert [row[0] for row in table("lifecycle.md", "Reasons")] == [f"`{reason.value}`" for reason in Reason]


def test_the_page_on_errors_has_every_error_with_its_status():
    answered = {
        cls for cls in errors.BY_CODE.values() if issubclass(cls, errors.DirectorError) and "status" in vars(cls)
    }
    expected = {
        (f"`{code}`", f"`{cls.__name__}`", str(cls.status) if cls in answered else "")
        for code, cls in errors.BY_CODE.items()
        if cls.__module__ == errors.__name__
    }
    assert {tuple(row[:3]) for row in table("errors.md")} == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_test_that_the_page_on_reliability_names_is_there():
    text = (ROOT / "docs" / "reliability.md").read_text()
    folders = {"D/": "packages/fieldlab-director/tests/", "E/": "packages/fieldlab-executor/tests/"}
    named = re.findall(r"`(D/|E/)?([\w/]+\.py)::(\w+)`", text)
    missing = [
        f"{folder}{path}::{name}"
        for folder, path, name in named
        if f"\ndef {name}(" not in (ROOT / folders.get(folder, "") / path).read_text()
    ]
    assert len(named) > 50
    assert missing == []
