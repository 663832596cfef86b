"""Environments on a node: what is there is used, what is missing is named, what is made is made once."""

import subprocess
import sys

import pytest
from fieldlab_common.environment import Container, Host, Requirements, Venv
from fieldlab_common.errors import FieldlabError, UnsupportedError
from fieldlab_executor.environments import PrepareFailed, ensure

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_host_is_an_interpreter_of_the_node_in_the_version_asked_for():
    python = ensure(Host(), python=HERE)
    shown = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == HERE


def test_host_expects_the_packages_to_be_there():
    ensure(Host(requirements=Requirements(packages=("pytest>=1",))), python=HERE)


def test_host_names_the_packages_that_it_lacks():
    with pytest.raises(PrepareFailed, match="lacks no-such-thing, and Host installs nothing"):
        ensure(Host(requirements=Requirements(packages=("pytest", "no-such-thing==1"))), python=HERE)


def test_host_runs_no_setup_commands():
    with pytest.raises(PrepareFailed, match="setup commands"):
        ensure(Host(requirements=Requirements(setup=("true",))))


def test_a_version_that_the_node_lacks_is_an_error_that_says_so():
    with pytest.raises(FieldlabError, match=r"3\.99"):
        ensure(Host(), python="3.99")


def test_a_container_is_no_environment_of_this_executor():
    with pytest.raises(UnsupportedError, match="container"):
        ensure(Container(image="x"))


def test_a_venv_is_made_once_for_equal_requirements(tmp_path):
    marker = tmp_path / "built"
    venv = Venv(requirements=Requirements(setup=(f"echo once >> '{marker}'",)))
    first = ensure(venv, python=HERE, cache=tmp_path / "cache", log=lambda line: None)
    second = ensure(venv, python=HERE, cache=tmp_path / "cache", log=lambda line: None)
    assert first == second
    assert marker.read_text() == "once\n"


def test_a_venv_that_cannot_be_made_says_what_its_builder_said_and_leaves_nothing(tmp_path):
    said: list[str] = []
    venv = Venv(requirements=Requirements(setup=("echo the-reason >&2; exit 3",)))
    with pytest.raises(PrepareFailed, match="the-reason"):
        ensure(venv, python=HERE, cache=tmp_path, log=said.append)
    assert any("the-reason" in line for line in said)
    with pytest.raises(PrepareFailed):
        ensure(venv, python=HERE, cache=tmp_path, log=said.append)
