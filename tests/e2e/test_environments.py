"""Environments as a user meets them: here and at a director, made, failing, and on a node that is cut off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fieldlab as fl
import pytest
from fieldlab_executor.interpreters import interpreters

PROGRAM = """
import sys
import fieldlab as fl

@fl.task(packages=[sys.argv[1]])
def probe() -> str:
    import fieldlab_probe
    return fieldlab_probe.__name__

with fl.DAG("probe") as dag:
    probe()
result = fl.run(dag, timeout=60)
print(result["probe"].value if result.state == "succeeded" else result.message)
"""


@pytest.fixture
def wheel(tmp_path: Path) -> str:
    """A requirement for a distribution of one module and one program."""
    files = {
        "fieldlab_probe.py": "def main():\n    print('probed')\n",
        "fieldlab_probe-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: fieldlab-probe\nVersion: 1.0\n",
        "fieldlab_probe-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "fieldlab_probe-1.0.dist-info/entry_points.txt": "[console_scripts]\nfieldlab-probe = fieldlab_probe:main\n",
    }
    path = tmp_path / "fieldlab_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr("fieldlab_probe-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in files))
    return f"fieldlab-probe @ {path.as_uri()}"


def _broken() -> fl.DAG:
    @fl.task(setup=["seq 100", "echo the-reason >&2; exit 3"])
    def never() -> None: ...

    with fl.DAG("broken") as dag:
        never()
    return dag


@pytest.mark.parametrize("where", ["here", "director"])
def test_a_step_has_its_packages_and_their_programs(client: fl.Client, name: str, wheel: str, where: str) -> None:
    @fl.task(packages=[wheel])
    def probe() -> str:
        import fieldlab_probe

        return str(fieldlab_probe.__name__)

    with fl.DAG("probing") as dag:
        probe()
        fl.shell("fieldlab-probe")().named("program")
    exp = fl.Experiment(name).map(dag, client.nodes()["a"])
    run = client.submit(exp) if where == "director" else fl.run(exp)
    run.wait(60, raise_on_failure=True)
    assert run.results["a"]["probe"].value == "fieldlab_probe"
    assert run.results["a"]["program"].value.strip() == "probed"


@pytest.mark.parametrize("where", ["here", "director"])
def test_an_environment_that_cannot_be_made_fails_its_deployment_with_all_that_was_said(
    client: fl.Client, name: str, where: str
) -> None:
    exp = fl.Experiment(name).map(_broken(), client.nodes()["a"])
    run = client.submit(exp) if where == "director" else fl.run(exp)
    assert run.wait(timeout=60) is fl.ExperimentState.FAILED
    result = run.results["a"]
    assert result.reason is fl.Reason.PREPARE_FAILED
    assert "exit code 3" in result.message
    assert result.message.rstrip().endswith("the-reason")
    lines = [line.text for line in run.logs(deployment="a") if line.stream == "executor"]
    assert [str(number) for number in range(1, 101)] == [line for line in lines if line.isdigit()]
    assert "the-reason" in lines


def test_a_venv_of_another_minor_version_runs_what_needs_no_particular_one() -> None:
    others = interpreters()[1:]
    if not others:
        pytest.skip("this machine has one minor version of Python only")
    with fl.DAG("elsewhere") as dag:
        fl.shell("python --version")().named("version")
    run = fl.run(fl.Experiment("elsewhere").map(dag, fl.Node.dummy("a"), env=fl.Venv(python=others[0])))
    run.wait(60, raise_on_failure=True)
    assert run.results["a"]["version"].value.startswith(f"Python {others[0]}.")


def _cut_off(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on this machine without any network, not even its own address."""
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        pytest.skip("cutting the network takes unshare and root")
    return subprocess.run([unshare, "--net", *command], capture_output=True, text=True, timeout=100)


def test_a_machine_that_is_cut_off_works_with_what_it_made_before_and_says_what_it_lacks(
    wheel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    made = subprocess.run([sys.executable, str(script), wheel], capture_output=True, text=True, timeout=100)
    assert made.stdout == "fieldlab_probe\n", made.stderr
    assert _cut_off(sys.executable, str(script), wheel).stdout == "fieldlab_probe\n"
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    lacking = _cut_off(sys.executable, str(script), "six==1.17.0")
    assert "Installing six==1.17.0 failed: the node does not reach" in lacking.stdout
    assert "prepare while it is connected" in lacking.stdout
