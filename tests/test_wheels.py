"""What is published works: the wheels are built, installed into an empty environment, and used there.

Needs uv and a package index, as `make setup` does.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    "fieldlab": "fieldlab",
    "fieldlab-common": "fieldlab_common",
    "fieldlab-director": "fieldlab_director",
    "fieldlab-executor": "fieldlab_executor",
}

JOB = """
import sys
from pathlib import Path

import fieldlab as fl

assert Path(fl.__file__).is_relative_to(sys.prefix), f"{fl.__file__} is not the installed one"


@fl.task
def double(x: int) -> int:
    return 2 * x


if __name__ == "__main__":
    with fl.DAG("d") as dag:
        double(double(3)).named("last")
    r = fl.run(dag)
    assert r["last"].value == 12
    print("value:", r["last"].value)
"""


def run(command: Sequence[str | Path], *, cwd: Path) -> str:
    """Run a command in `cwd`; its standard output. A failure shows all that it said."""
    leaking = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in leaking}
    environment |= {"UV_PYTHON_DOWNLOADS": "never", "UV_SYSTEM_CERTS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def uv() -> str:
    own = ROOT / ".uv" / "bin" / "uv"
    found = str(own) if own.exists() else shutil.which("uv")
    assert found, "uv is missing: run `make setup`"
    return found


@pytest.fixture(scope="module")
def wheels(uv: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built wheels, by the name of their distribution."""
    folder = tmp_path_factory.mktemp("wheels")
    run([uv, "build", "--quiet", "--all-packages", "--wheel", "--out-dir", folder], cwd=ROOT)
    return {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


def test_every_package_builds_a_wheel(wheels: dict[str, Path]) -> None:
    assert set(wheels) == set(MODULES)


@pytest.mark.parametrize("distribution", MODULES)
def test_a_wheel_is_typed_and_carries_the_licence_but_no_tests(wheels: dict[str, Path], distribution: str) -> None:
    names = zipfile.ZipFile(wheels[distribution]).namelist()
    assert f"{MODULES[distribution]}/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {MODULES[distribution]}


def test_all_wheels_have_one_version(wheels: dict[str, Path]) -> None:
    assert len({path.name.split("-")[1] for path in wheels.values()}) == 1


def test_the_client_installed_from_wheels_runs_a_dag(uv: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    python = tmp_path / "empty" / "bin" / "python"
    run([uv, "venv", "--quiet", "--python", sys.executable, "empty"], cwd=tmp_path)
    client = [wheels[name] for name in ("fieldlab", "fieldlab-common", "fieldlab-executor")]
    run([uv, "pip", "install", "--quiet", "--python", python, *client], cwd=tmp_path)
    job = tmp_path / "job.py"
    job.write_text(JOB)
    assert run([python, job], cwd=tmp_path) == "value: 12\n"
