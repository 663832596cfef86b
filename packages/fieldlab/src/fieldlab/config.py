"""Where the director is and as whom to ask: arguments first, then the environment, then the user's profile file.

The profile file is ``fieldlab/profiles.toml`` in the platform's folder for configuration::

    default = "lab"                      # the profile that is used when none is named

    [lab]
    endpoint = "https://director.example.org"
    token = "flu_..."
    ca = "/etc/ssl/lab.pem"              # if its certificate is not signed by one that the system knows
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fieldlab_common.errors import ConfigurationError

from fieldlab.text import closest, listed

__all__ = ["Access", "access", "profile_path"]


@dataclass(frozen=True, kw_only=True)
class Access:
    """An endpoint, and the token for it."""

    endpoint: str
    token: str | None = None
    ca: str | None = None

    def __repr__(self) -> str:
        return f"<Access {self.endpoint}>"  # a token is never shown


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
    if endpoint is None or token is None or profile is not None:
        found = _profile(path, profile)
        told = found.get("endpoint")
        if endpoint is None or (told is not None and told.rstrip("/") == endpoint.rstrip("/")):
            endpoint, ca = endpoint or told, ca or found.get("ca")
            token = token or found.get("token")
    if endpoint is None:
        raise ConfigurationError(
            "It is not said where the director is.",
            advice=f"Give Client(endpoint=..., token=...), set FIELDLAB_ENDPOINT and FIELDLAB_TOKEN, or write {path}.",
        )
    return Access(endpoint=_checked(endpoint), token=token, ca=ca)


def _checked(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"{endpoint!r} is no endpoint.", advice="Give an address such as https://director.example.org:8443."
        )
    return endpoint.rstrip("/")


def _profile(path: Path, name: str | None) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if name is None:
            return {}
        raise ConfigurationError(f"There is no profile {name!r}: {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"The profile file {path} cannot be read: {error}.") from error
    names = [key for key, value in data.items() if isinstance(value, dict)]
    wanted = name or data.get("default") or (names[0] if len(names) == 1 else None)
    if wanted is None:
        return {}
    found = data.get(wanted)
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ConfigurationError(
            f"{path} has no profile {wanted!r} made of texts.{closest(str(wanted), names)}",
            advice=f"There are: {listed(names)}. A profile has endpoint, token and perhaps ca.",
        )
    return found
