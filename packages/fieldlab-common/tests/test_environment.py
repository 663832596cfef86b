"""Environments and what tasks need of them."""

import pytest
from fieldlab_common.environment import (
    Host,
    Requirements,
    Resources,
    Venv,
    check_packages,
    conflicting_pins,
    parse_duration,
    parse_size,
)
from fieldlab_common.errors import DefinitionError


def test_requirements_merge_in_order_without_doubles():
    first = Requirements(packages=("a", "b"), env={"X": "1", "Y": "1"})
    second = Requirements(packages=("b", "c"), env={"X": "2"})
    assert first.merged(second) == Requirements(packages=("a", "b", "c"), env={"X": "2", "Y": "1"})


def test_needing_keeps_the_kind_and_its_settings():
    assert Venv(python="3.12").needing(Requirements(packages=("a",))) == Venv(
        python="3.12", requirements=Requirements(packages=("a",))
    )
    assert type(Host().needing(Requirements())) is Host


def test_contradicting_pins_are_found_whatever_their_spelling():
    assert conflicting_pins(["Foo_Bar==1", "x>=2", "foo-bar==2", "y==1", "y==1"]) == [("foo-bar", "1", "2")]


@pytest.mark.parametrize(
    "package",
    [
        "dnspython",
        "dnspython>=2.6",
        "numpy ~= 2.0, !=2.1.*",
        "requests[socks,security]>=2.8.1,==2.8.*;python_version<'2.7'",
        "zope.interface (>5.0,)",
        "x===2024a",
        "torch==2.5.1+cpu",
        "pip @ https://example.org/pip.whl",
        "git+https://example.org/x.git@v1#egg=x",
        "./wheels/x-1.0-py3-none-any.whl",
        "--no-binary=:all:",
    ],
)
def test_what_an_installer_takes_is_a_requirement(package):
    check_packages([package])


@pytest.mark.parametrize("package", ["", "numpy >> 3", "numpy=1.0", "numpy 2.0", "numpy>=", 3])
def test_what_no_installer_takes_is_refused(package):
    with pytest.raises(DefinitionError, match="no requirement"):
        check_packages([package])


@pytest.mark.parametrize(("text", "size"), [("1 GiB", 2**30), ("2GB", 2 * 10**9), (512, 512), ("1.5 KiB", 1536)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("6h", 21600), (2.5, 2.5), ("250ms", 0.25)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("wrong", ["", "much", "-1", "1 lightyear", "1h30m"])
def test_what_is_no_size_or_duration_is_refused(wrong):
    with pytest.raises(DefinitionError):
        parse_size(wrong)
    with pytest.raises(DefinitionError):
        parse_duration(wrong)


@pytest.mark.parametrize("wrong", [{"cpus": 0}, {"memory": "lots"}, {"walltime": -1}])
def test_resources_are_checked_where_they_are_written(wrong):
    with pytest.raises(DefinitionError):
        Resources(**wrong)
