"""Environments on a node: what is there is used, what is missing is named, what is made is made once.

Virtual environments here are real, made by uv and by venv with pip; what is installed into them is a wheel of our own,
so that no index is asked, but where an index that refuses is the point.
"""

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
from fieldlab_common import wire
from fieldlab_common.environment import Container, Environment, Host, Requirements, Venv
from fieldlab_common.errors import FieldlabError, UnsupportedError
from fieldlab_common.lifecycle import DeploymentState, Reason
from fieldlab_common.protocol import Lane, Tagged
from fieldlab_executor import environments, system, zipapp
from fieldlab_executor.environments import PrepareFailed, ensure, find
from fieldlab_executor.interpreters import find_python, interpreters

from .hub import Bench, Executor, gone

cloudpickle.register_pickle_by_value(sys.modules[__name__])

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
UV = Path(__file__).parents[3] / ".uv" / "bin"
KILL_BOUND = 2.0  # seconds that anything may outlive who asked for the environment
REFUSED = "http://127.0.0.1:9/simple"
HIDE = """
import os, signal, subprocess, sys
def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setsid()
    pipe.write(f"{os.getpid()}\\n")
    pipe.flush()
    while True:
        signal.pause()
pipe = open(sys.argv[1], "w")
if not os.fork():
    if not os.fork():
        stay()
    os._exit(0)
os.wait()
if not os.fork():
    stay()
pipe.close()
signal.pause()
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
    record = "fieldlab_probe-1.0.dist-info/RECORD"
    path = tmp_path / "fieldlab_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(record, "".join(f"{name},,\n" for name in (*files, record)))
    return f"fieldlab-probe @ {path.as_uri()}"


@pytest.fixture
def uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node has uv."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(UV), *os.get_exec_path()]))


@pytest.fixture(params=["uv", "venv with pip", "pip of the base"])
def builder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the node has to install with; Debian's Python may lack what puts a pip into a new environment."""
    monkeypatch.setattr(environments, "_uv", lambda: str(UV / "uv") if request.param == "uv" else None)
    if request.param == "pip of the base":
        monkeypatch.setattr(environments, "_has", lambda python, module: module == "pip")
        monkeypatch.setattr(environments, "find_python", lambda version: sys._base_executable)
    return str(request.param)


one_of_each = pytest.mark.parametrize("builder", ["uv", "pip of the base"], indirect=True)


def needing(**requirements: object) -> Venv:
    return Venv(requirements=Requirements(**requirements))


def version_of(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def quiet(line: str) -> None:
    """Listens to no builder."""


def preparing(environment: Environment, cache: Path, *options: str, **streams: int) -> subprocess.Popen[bytes]:
    tagged = wire.dumps(Tagged(kind=environment.kind, body=wire.encode(environment))).decode()
    words = ["prepare", "--environment", tagged, "--python", HERE, "--cache", str(cache), *options]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fieldlab_executor", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **streams,
    )


# --- the node as it is ------------------------------------------------------------------------------------------------


def test_host_is_an_interpreter_of_the_node_in_the_version_asked_for() -> None:
    assert version_of(ensure(Host(), python=HERE).python) == HERE


def test_host_expects_the_packages_to_be_there() -> None:
    ensure(Host(requirements=Requirements(packages=("pytest>=1",))), python=HERE)


def test_host_names_the_packages_that_it_lacks() -> None:
    with pytest.raises(PrepareFailed, match="lacks no-such-thing, and Host installs nothing"):
        ensure(Host(requirements=Requirements(packages=("pytest", "no-such-thing==1"))), python=HERE)


def test_host_names_the_system_packages_that_it_lacks() -> None:
    with pytest.raises(PrepareFailed, match=r"system packages no-such-package, .* apt-get install no-such-package"):
        ensure(Host(requirements=Requirements(system_packages=("sh", "no-such-package"))))


def test_host_runs_no_setup_commands() -> None:
    with pytest.raises(PrepareFailed, match="setup commands"):
        ensure(Host(requirements=Requirements(setup=("true",))))


def test_a_container_is_no_environment_of_this_executor() -> None:
    with pytest.raises(UnsupportedError, match="container"):
        ensure(Container(image="x"))


def test_in_a_container_that_was_made_for_it_a_container_is_the_host_or_a_venv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(environments.CONTAINER, "x")
    plain = ensure(Container(image="x", requirements=Requirements(env={"SITE": "roof"})), cache=tmp_path)
    assert (plain.python, plain.variables) == (find_python(""), {"SITE": "roof"})
    wanted = Container(image="x", requirements=Requirements(setup=('touch "$VIRTUAL_ENV/made"',)))
    assert find(wanted, cache=tmp_path) is None
    made = ensure(wanted, cache=tmp_path)
    assert Path(made.variables["VIRTUAL_ENV"], "made").exists()
    made.close()


# --- virtual environments ---------------------------------------------------------------------------------------------


def test_a_venv_has_what_was_asked_for_and_is_made_once(builder: str, wheel: str, tmp_path: Path) -> None:
    marker = tmp_path / "built"
    venv = needing(packages=(wheel,), setup=(f"fieldlab-probe >> '{marker}'",), env={"SITE": "roof"})
    assert find(venv, python=HERE, cache=tmp_path / "cache") is None
    said: list[str] = []
    first = ensure(venv, python=HERE, cache=tmp_path / "cache", log=said.append)
    second = find(venv, python=HERE, cache=tmp_path / "cache")
    assert second is not None
    assert first.python == second.python
    assert marker.read_text() == "probed\n"
    assert any("fieldlab-probe" in line for line in said)
    shown = subprocess.run(["/bin/sh", "-c", "fieldlab-probe; echo $SITE"], env=first.variables, capture_output=True)
    assert shown.stdout == b"probed\nroof\n"


def test_a_node_that_has_nothing_to_install_with_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_uv", lambda: None)
    monkeypatch.setattr(environments, "_has", lambda python, module: False)
    with pytest.raises(PrepareFailed, match=r"neither uv nor a pip .* Install uv"):
        ensure(needing(packages=("anything",)), cache=tmp_path, log=quiet)


def test_a_venv_that_cannot_be_made_says_what_its_builder_said_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    venv = needing(setup=("echo the-reason >&2; exit 3",))
    for _ in range(2):
        with pytest.raises(PrepareFailed, match=r"(?s)exit code 3.*\nthe-reason") as caught:
            ensure(venv, python=HERE, cache=tmp_path, log=said.append)
        assert not caught.value.transient
    assert said.count("the-reason") == 2
    assert [path for path in (tmp_path / "venvs").iterdir() if path.suffix != ".lock"] == []


def test_a_builder_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(PrepareFailed, match="not done within 3 s"):
        ensure(needing(setup=(f"sleep 1000 & echo $! > '{note}'; wait",)), cache=tmp_path, log=quiet, seconds=3.0)
    assert gone([int(note.read_text())], KILL_BOUND) == []


def test_several_that_want_the_same_venv_at_once_build_it_once(tmp_path: Path) -> None:
    marker = tmp_path / "built"
    venv = needing(setup=(f"echo once >> '{marker}'",))
    wanting = [preparing(venv, tmp_path / "cache") for _ in range(4)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in wanting]
    assert len({answer["python"] for answer in answers}) == 1
    assert marker.read_text() == "once\n"


@one_of_each
def test_a_node_without_network_has_what_was_made_before_and_says_what_it_lacks(
    builder: str, wheel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure(needing(packages=(wheel,)), python=HERE, cache=tmp_path, log=quiet)
    variables = {"PIP_INDEX_URL": REFUSED, "PIP_RETRIES": "1", "UV_HTTP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    assert ensure(needing(packages=(wheel,)), python=HERE, cache=tmp_path, log=quiet)
    with pytest.raises(PrepareFailed, match=r"Installing fieldlab-nowhere failed: the node does not reach") as caught:
        ensure(needing(packages=("fieldlab-nowhere",)), python=HERE, cache=tmp_path, log=quiet)
    assert caught.value.transient
    assert "an environment that was made once works offline" in caught.value.advice


def test_the_index_that_is_set_for_one_installer_is_the_others_too() -> None:
    index = environments._index_variables
    assert index({"PIP_INDEX_URL": "a"}) == {"UV_DEFAULT_INDEX": "a"}
    assert index({"UV_INDEX_URL": "b"}) == {"PIP_INDEX_URL": "b"}
    assert index({"PIP_INDEX_URL": "a", "UV_DEFAULT_INDEX": "b"}) == index({}) == {}


# --- interpreters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def other() -> str:
    """Another minor version that this machine has."""
    others = interpreters()[1:]
    if not others:
        pytest.skip("this machine has one minor version of Python only")
    return others[-1]


def test_a_version_that_the_node_lacks_is_an_error_that_says_so() -> None:
    with pytest.raises(FieldlabError, match=rf"no Python 3\.99.*{HERE}"):
        ensure(Host(), python="3.99")


def test_what_only_looks_like_an_interpreter_is_passed_over(
    tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = find_python(other)
    shims, uv = tmp_path / "shims", tmp_path / "uv" / f"cpython-{other}.10-linux" / "bin"
    for folder in (shims, uv, tmp_path / "uv" / f"cpython-{other}.9-linux" / "bin"):
        folder.mkdir(parents=True)
        (folder / f"python{other}").write_text("#!/bin/sh\nexit 127\n")
        (folder / f"python{other}").chmod(0o755)
    (uv / f"python{other}").unlink()
    (uv / f"python{other}").symlink_to(real)
    monkeypatch.setenv("PATH", str(shims))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    monkeypatch.setattr("fieldlab_executor.interpreters._USUAL", ())
    assert find_python(other) == str(uv / f"python{other}")


def test_steps_run_on_the_version_in_which_their_code_was_written(
    launch: Callable[..., Executor], other: str, wheel: str, tmp_path: Path, uv: None
) -> None:
    def where() -> tuple[str, str]:
        import fieldlab_probe

        return f"{sys.version_info.major}.{sys.version_info.minor}", fieldlab_probe.__name__

    bench = Bench()
    bench.step("where", where)
    venv = needing(packages=(wheel,))
    packed = zipapp.build(tmp_path / "fieldlab.pyz")
    executor = launch(bench, environment=venv, python=HERE, command=(find_python(other), str(packed)))
    assert executor.wait() == 0
    assert executor.hub.bodies("started")[0].python == HERE
    assert executor.hub.value("where") == (HERE, "fieldlab_probe")
    assert version_of(find_python(other)) == other != HERE


# --- in an executor ---------------------------------------------------------------------------------------------------


def test_what_a_builder_says_stands_in_the_deployments_log_and_its_end_in_the_reason(
    launch: Callable[..., Executor],
) -> None:
    bench = Bench()
    bench.step("never", lambda: 1)
    executor = launch(bench, environment=needing(setup=("seq 100; echo the-reason; exit 3",)))
    assert executor.wait() == 0
    hub = executor.hub
    assert (hub.ended.state, hub.ended.reason) == (DeploymentState.FAILED, Reason.PREPARE_FAILED)
    assert "100\nthe-reason" in hub.ended.message
    assert {"1", "100", "the-reason"} <= set(hub.logs("", "executor").split("\n"))
    assert hub.bodies("step", Lane.CONTROL) == []


@pytest.fixture
def hiding(tmp_path: Path) -> tuple[Environment, Callable[[], list[int]]]:
    """An environment whose setup hides processes and stays; and their pids, once they are there."""
    script, pipe = tmp_path / "hide.py", tmp_path / "pids"
    script.write_text(HIDE)
    os.mkfifo(pipe)

    def pids() -> list[int]:
        with open(pipe) as reader:
            return [int(reader.readline()) for _ in range(2)]

    return needing(setup=(f"exec '{sys.executable}' '{script}' '{pipe}'",)), pids


Hiding = tuple[Environment, Callable[[], list[int]]]


def test_a_killed_executor_takes_its_builders_with_it(launch: Callable[..., Executor], hiding: Hiding) -> None:
    environment, pids = hiding
    executor = launch(Bench(), environment=environment)
    hidden = pids()
    executor.signal(signal.SIGKILL)
    assert gone(hidden, KILL_BOUND) == []


def test_a_cancel_while_the_environment_is_made_ends_the_builders(
    launch: Callable[..., Executor], hiding: Hiding
) -> None:
    environment, pids = hiding
    executor = launch(Bench(), environment=environment)
    hidden = pids()
    executor.hub.cancel("enough")
    assert executor.wait() == 0
    assert gone(hidden, 0.0) == []
    assert executor.hub.ended.state is DeploymentState.CANCELLED


@pytest.mark.parametrize("end", ["leash", "SIGTERM"])
def test_making_an_environment_ends_with_who_asked_for_it(hiding: Hiding, tmp_path: Path, end: str) -> None:
    environment, pids = hiding
    with preparing(environment, tmp_path / "cache", "--leash", "0", stdin=subprocess.PIPE) as process:
        hidden = pids()
        assert process.stdin is not None
        if end == "leash":
            process.stdin.close()
        else:
            process.terminate()
        assert gone([*hidden, process.pid], KILL_BOUND) == []


def test_what_a_setup_command_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with preparing(needing(setup=(f"setsid sleep 1000 & echo $! > '{note}'",)), tmp_path / "cache") as process:
        assert "python" in json.loads(process.communicate(timeout=60)[0])
    assert gone([int(note.read_text())], 0.0) == []


# --- system packages --------------------------------------------------------------------------------------------------


def test_system_packages_are_refused_where_they_cannot_be_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrepareFailed, match=r"lacks the system packages no-such-package.*apt-get install"):
        ensure(needing(system_packages=("no-such-package",)), cache=tmp_path, log=quiet)


def test_a_program_or_a_package_of_that_name_is_there() -> None:
    assert system.missing(("sh", "libc6", "no-such-package")) == ("no-such-package",)


def test_a_tiny_system_package_is_installed_with_apt_get(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("apt-get needs root")
    subprocess.run(["dpkg", "--purge", "hello"], check=True, capture_output=True)
    try:
        said: list[str] = []
        ensure(needing(system_packages=("hello",)), cache=tmp_path, log=said.append)
        assert subprocess.run(["hello"], capture_output=True, check=True).stdout.startswith(b"Hello")
        assert any("Setting up hello" in line for line in said)
    finally:
        subprocess.run(["dpkg", "--purge", "hello"], check=True, capture_output=True)
