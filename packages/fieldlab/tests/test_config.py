"""Where the director is: arguments, then the environment, then the profile file."""

from pathlib import Path

import pytest
from fieldlab.config import access, profile_path
from fieldlab_common.errors import ConfigurationError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}


def write(environ: dict[str, str], text: str) -> Path:
    path = profile_path(environ, "linux")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


LAB = '[lab]\nendpoint = "https://lab.test/"\ntoken = "flu_lab"\n'


def test_arguments_win_over_the_environment(environ: dict[str, str]) -> None:
    environ |= {"FIELDLAB_ENDPOINT": "http://env.test", "FIELDLAB_TOKEN": "env"}
    found = access("http://arg.test/", "arg", environ=environ)
    assert (found.endpoint, found.token) == ("http://arg.test", "arg")


def test_the_environment_wins_over_the_profile(environ: dict[str, str]) -> None:
    write(environ, LAB)
    environ |= {"FIELDLAB_ENDPOINT": "http://env.test", "FIELDLAB_TOKEN": "env"}
    assert access(environ=environ).endpoint == "http://env.test"


@pytest.mark.skipif("sys.platform != 'linux'", reason="the path is the platform's")
def test_the_only_profile_is_used_when_nothing_else_is_said(environ: dict[str, str]) -> None:
    write(environ, LAB)
    found = access(environ=environ)
    assert (found.endpoint, found.token) == ("https://lab.test", "flu_lab")


def test_a_profiles_token_is_not_shown_to_another_director(environ: dict[str, str]) -> None:
    write(environ, LAB)
    assert access("https://other.test", environ=environ).token is None
    assert access("https://lab.test", environ=environ).token == "flu_lab"


def test_nothing_said_anywhere_names_every_place(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        access(environ=environ)
    for word in ("endpoint=", "FIELDLAB_ENDPOINT", str(profile_path(environ))):
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["[lab", "lab = 3\ndefault = 'lab'", "[lab]\nendpoint = 3\n"])
def test_a_broken_profile_file_is_named(environ: dict[str, str], text: str) -> None:
    path = write(environ, text)
    with pytest.raises(ConfigurationError, match=path.name):
        access(environ=environ)


def test_an_unknown_profile_suggests_the_closest(environ: dict[str, str]) -> None:
    write(environ, LAB)
    with pytest.raises(ConfigurationError, match="'lab'"):
        access(profile="lap", environ=environ)


@pytest.mark.parametrize("endpoint", ["director.test", "ftp://x", "http://"])
def test_an_endpoint_that_is_no_address_is_refused(environ: dict[str, str], endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="no endpoint"):
        access(endpoint, environ=environ)


def test_a_token_is_not_printed() -> None:
    assert "secret" not in repr(access("http://x.test", "secret", environ={}))
