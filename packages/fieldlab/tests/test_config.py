"""Where the director is: arguments, then the environment, then the profile file."""

import stat
import warnings
from pathlib import Path

import pytest
from fieldlab.config import Profile, Profiles, access, profile_path, profiles
from fieldlab_common.errors import ConfigurationError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}


def write(environ: dict[str, str], text: str) -> Path:
    path = profile_path(environ, "linux")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
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


# --- the profile file -------------------------------------------------------------------------------------------------

A = Profile(
    name="a.test:8420", endpoint="https://a.test:8420", user="ada", token="flu_a", expires="2030-01-01 00:00 UTC"
)
B = Profile(name="b", endpoint="https://b.test", ca='/etc/a "quoted"\\path\x7f.pem')


def test_what_is_kept_is_read_again_and_is_for_its_owner_alone(environ: dict[str, str]) -> None:
    for one in (A, B):
        profiles(environ).keep(one)
    found = profiles(environ)
    assert (list(found), found.current) == ([A, B], "b")
    path = profile_path(environ)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_current_profile_is_the_one_that_is_used(environ: dict[str, str]) -> None:
    for one in (A, B):
        profiles(environ).keep(one)
    assert access(environ=environ).endpoint == B.endpoint
    profiles(environ).use("a.test:8420")
    assert (access(environ=environ).token, access(environ=environ).user) == ("flu_a", "ada")
    profiles(environ).remove("a.test:8420")
    assert [one.name for one in profiles(environ)] == ["b"]
    assert profiles(environ).current == "b"  # the only one
    with pytest.raises(ConfigurationError, match="no profile 'c'"):
        profiles(environ).use("c")


def test_a_director_that_was_logged_in_to_needs_no_name_when_its_endpoint_is_given(environ: dict[str, str]) -> None:
    for one in (A, B):
        profiles(environ).keep(one)
    assert access(A.endpoint, environ=environ).token == "flu_a"


def test_a_token_that_ended_is_forgotten_and_its_endpoint_is_not(environ: dict[str, str]) -> None:
    profiles(environ).keep(A)
    profiles(environ).forget_token("flu_a")
    assert (profiles(environ)[0].token, profiles(environ)[0].endpoint) == (None, A.endpoint)
    assert "logged out" in repr(profiles(environ))


def test_no_token_is_shown(environ: dict[str, str]) -> None:
    profiles(environ).keep(A)
    shown = repr(profiles(environ)) + profiles(environ)._repr_html_() + repr(profiles(environ)[0])
    assert "flu_a" not in shown
    assert "ada" in shown


@pytest.mark.skipif("os.name != 'posix'", reason="modes are of POSIX")
def test_a_file_of_tokens_that_others_can_read_is_said(environ: dict[str, str]) -> None:
    path = write(environ, LAB)
    path.chmod(0o644)
    with pytest.warns(UserWarning, match=f"chmod 600 {path}"):
        access(environ=environ)
    path.chmod(0o600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        access(environ=environ)


def test_a_file_that_cannot_be_written_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fieldlab").write_text("a file where a folder should be")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        Profiles([], None, profile_path(environ)).keep(A)
