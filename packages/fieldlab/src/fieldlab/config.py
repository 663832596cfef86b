"""Where the director is and as whom to ask: arguments first, then the environment, then the user's profile file.

The profile file is ``fieldlab/profiles.toml`` in the platform's folder for configuration. ``Client.login`` writes it;
it may be written by hand, too::

    default = "lab"                      # the current profile: the one that is used when none is named

    [lab]
    endpoint = "https://director.example.org"
    token = "flu_..."
    ca = "/etc/ssl/lab.pem"              # if its certificate is not signed by one that the system knows

It holds what opens a director, so it is written for its owner alone (mode 0600), and replaced in one piece: whoever
reads it meanwhile gets the old one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload
from urllib.parse import urlsplit

from fieldlab_common.errors import ConfigurationError

from fieldlab.text import closest, html_table, listed, table

__all__ = ["Access", "Profile", "Profiles", "access", "profile_path", "profiles"]

_KEYS = ("endpoint", "user", "token", "expires", "ca")


@dataclass(frozen=True, kw_only=True)
class Access:
    """An endpoint, and the token for it. ``user`` and ``profile`` are what the profile file says, if it was asked."""

    endpoint: str
    token: str | None = None
    ca: str | None = None
    user: str | None = None
    profile: str | None = None

    def __repr__(self) -> str:
        return f"<Access {self.endpoint}>"  # a token is never shown


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One director in the profile file, and as whom it is asked. ``expires`` is a text: when the token does."""

    name: str
    endpoint: str
    user: str | None = None
    token: str | None = None
    expires: str | None = None
    ca: str | None = None

    def __repr__(self) -> str:
        return f"<Profile {self.name}: {self.user or 'nobody'} at {self.endpoint}>"  # a token is never shown


class Profiles(Sequence[Profile]):
    """The profiles there are, shown as a table; ``current`` is the name of the one that is used when none is named."""

    def __init__(self, found: Iterable[Profile], current: str | None, path: Path) -> None:
        self._all = list(found)
        self.current, self._path = current, path

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, at: int) -> Profile: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Profile]: ...
    def __getitem__(self, at: int | slice) -> Profile | Sequence[Profile]:
        """The profile at a place."""
        return self._all[at]

    def use(self, name: str) -> None:
        """Make a profile the current one.

        Raises:
            ConfigurationError: there is none of that name.
        """
        self._find(name)
        self.current = name
        _write(self._path, self)

    def remove(self, name: str) -> None:
        """Forget a profile. Its token stays good: ``client.logout()`` ends it.

        Raises:
            ConfigurationError: there is none of that name.
        """
        self._all.remove(self._find(name))
        self.current = None if self.current == name else self.current
        _write(self._path, self)

    def keep(self, profile: Profile) -> None:
        """Add a profile, or change the one of that name, and make it the current one."""
        self._all = [one for one in self if one.name != profile.name] + [profile]
        self.current = profile.name
        _write(self._path, self)

    def forget_token(self, token: str) -> None:
        """Leave out a token that is not good any more, wherever it stands."""
        if any(one.token == token for one in self):
            self._all = [replace(one, token=None, expires=None) if one.token == token else one for one in self]
            _write(self._path, self)

    def _find(self, name: str) -> Profile:
        for one in self:
            if one.name == name:
                return one
        names = [one.name for one in self]
        raise ConfigurationError(
            f"{self._path} has no profile {name!r}.{closest(name, names)}", advice=f"There are: {listed(names)}."
        )

    def _rows(self) -> Iterator[list[object]]:
        for one in self:
            state = "logged out" if one.token is None else one.expires or "does not expire"
            yield ["*" if one.name == self.current else "", one.name, one.endpoint, one.user, state]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows()) if self else f"no profiles in {self._path}"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


_HEADER = ("", "name", "endpoint", "user", "login expires")


def profile_path(environ: Mapping[str, str], platform: str = sys.platform) -> Path:
    """The profile file of this user on this platform."""
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or Path.home())
    if platform == "win32":
        base = Path(environ.get("APPDATA") or home / "AppData" / "Roaming")
    elif platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    return base / "fieldlab" / "profiles.toml"


def profiles(environ: Mapping[str, str] = os.environ) -> Profiles:
    """The directors that were logged in to, or written into the profile file: list, ``use(name)``, ``remove(name)``.

    Raises:
        ConfigurationError: the profile file is not as it should be.
    """
    path = profile_path(environ)
    data = _read(path)
    names = _names(data)
    found = []
    for name in names:
        known = {key: value for key, value in _profile_in(path, data, name).items() if key in _KEYS}
        found.append(Profile(**{"name": name, "endpoint": "", **known}))
    return Profiles(found, _current(data, names), path)


def access(
    endpoint: str | None = None,
    token: str | None = None,
    *,
    profile: str | None = None,
    ca: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Access:
    """Put together where to ask and as whom.

    A token of the environment or of a profile is only used for the endpoint that it stands beside, or that the same
    source leaves open: a token for one director is not shown to another.

    Raises:
        ConfigurationError: no endpoint is said anywhere, or the profile file is not as it should be.
    """
    if endpoint is None and profile is None and environ.get("FIELDLAB_ENDPOINT"):
        endpoint = environ["FIELDLAB_ENDPOINT"]
    if token is None and profile is None:
        token = environ.get("FIELDLAB_TOKEN") or None
    path = profile_path(environ)
    user = name = None
    if endpoint is None or token is None or profile is not None:
        name, found = _profile(path, profile, endpoint)
        told = found.get("endpoint")
        if endpoint is None or same_endpoint(told, endpoint):
            endpoint, ca = endpoint or told, ca or found.get("ca")
            token, user = token or found.get("token"), found.get("user")
    if endpoint is None:
        raise ConfigurationError(
            "It is not said where the director is.",
            advice=(
                "Log in once with fl.Client.login(endpoint, user), give Client(endpoint=..., token=...), set "
                f"FIELDLAB_ENDPOINT and FIELDLAB_TOKEN, or write {path}."
            ),
        )
    return Access(endpoint=checked(endpoint), token=token, ca=ca, user=user, profile=name)


def checked(endpoint: str) -> str:
    """An endpoint, without a slash at its end.

    Raises:
        ConfigurationError: it is none.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"{endpoint!r} is no endpoint.", advice="Give an address such as https://director.example.org:8443."
        )
    return endpoint.rstrip("/")


def same_endpoint(one: str | None, other: str) -> bool:
    """Whether a profile's endpoint is the one that is asked."""
    return one is not None and one.rstrip("/") == other.rstrip("/")


# --- the file --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"The profile file {path} cannot be read: {error}.") from error
    if os.name == "posix" and "token" in text and path.stat().st_mode & 0o077:
        warnings.warn(f"{path} has tokens, and can be read by others. Run: chmod 600 {path}", stacklevel=4)
    return data


def _names(data: Mapping[str, Any]) -> list[str]:
    return [key for key, value in data.items() if isinstance(value, dict)]


def _current(data: Mapping[str, Any], names: list[str]) -> str | None:
    return data.get("default") or (names[0] if len(names) == 1 else None)


def _profile(path: Path, name: str | None, endpoint: str | None) -> tuple[str | None, dict[str, Any]]:
    """The profile of a name; without one, that of an endpoint; without either, the current one."""
    data = _read(path)
    names = _names(data)
    if not names and name is not None and not path.exists():
        raise ConfigurationError(f"There is no profile {name!r}: {path} does not exist.")
    wanted = name or _current(data, names)
    if name is None and endpoint is not None:
        fits = [one for one in names if same_endpoint(_profile_in(path, data, one).get("endpoint"), endpoint)]
        wanted = wanted if wanted in fits or not fits else fits[0]
    return (None, {}) if wanted is None else (wanted, _profile_in(path, data, wanted))


def _profile_in(path: Path, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = data.get(name)
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        names = _names(data)
        raise ConfigurationError(
            f"{path} has no profile {name!r} made of texts.{closest(str(name), names)}",
            advice=f"There are: {listed(names)}. A profile has endpoint, token and perhaps ca.",
        )
    return found


def _write(path: Path, found: Profiles) -> None:
    lines = ["# Written by fieldlab. It has tokens: it is for you alone."]
    if found.current is not None:
        lines.append(f"default = {_quoted(found.current)}")
    for one in found:
        lines += ["", f"[{_quoted(one.name)}]"]
        lines += [f"{key} = {_quoted(value)}" for key in _KEYS if (value := getattr(one, key)) is not None]
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise ConfigurationError(f"The profile file {path} cannot be written: {error}.") from error


def _quoted(text: str) -> str:
    """A basic string of TOML, whose escapes are those of JSON, but for DEL."""
    import json

    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
