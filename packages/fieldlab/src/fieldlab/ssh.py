"""Hosts that are reached with SSH: what the director is told of them.

Files are read here, when the specification is made: the private key, and of known_hosts only the lines that are about
the hosts named. The director keeps what it is sent encrypted, and never gives it back.
"""

from __future__ import annotations

import base64
import fnmatch
import getpass
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from fieldlab_common.errors import ConfigurationError, DefinitionError
from fieldlab_common.step import check_name

from fieldlab.infrastructure import InfrastructureSpec

__all__ = ["SSH"]

KNOWN_HOSTS = "~/.ssh/known_hosts"
_FIELDS = ("host", "user", "port", "name")


@dataclass(frozen=True, kw_only=True)
class SSH(InfrastructureSpec):
    """Hosts behind SSH, each a node.

    ``hosts`` are texts like ``pi@10.0.0.7:22``, or mappings with ``host`` and, if wanted, ``user``, ``port``,
    ``name``; what else a mapping has are properties of its node. ``key`` is the path of a private key, with
    ``passphrase`` if it has one; or give ``password``. With neither, the director makes a key pair, and says in its
    answer which public key the hosts must let in. ``host_keys`` are lines as known_hosts has them; without, those
    lines of ``~/.ssh/known_hosts`` that are about the hosts: a host whose key is in neither is refused. All are
    reached through ``jump``, if that is given. ``python`` names interpreters to try first. ``link="tunnel"``:
    executors reach the director through the SSH connection, for a director that the hosts cannot dial.

    Raises:
        DefinitionError: a host cannot be understood. ConfigurationError: the key cannot be read.
    """

    kind: ClassVar[str] = "ssh"
    hosts: Sequence[str | Mapping[str, Any]]
    key: str | None = field(default=None, repr=False)
    passphrase: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    host_keys: Sequence[str] | None = None
    jump: str | Mapping[str, Any] | None = None
    python: str | Sequence[str] = ()
    link: Literal["direct", "tunnel"] = "direct"

    def __post_init__(self) -> None:
        if isinstance(self.hosts, str) or not self.hosts:
            raise DefinitionError("SSH(hosts=...) takes a list, like ['pi@10.0.0.7'].")
        if self.link not in ("direct", "tunnel"):
            raise DefinitionError(f"SSH(link={self.link!r}): it is 'direct' or 'tunnel'.")
        for host in self.hosts:
            _named(host)

    def options(self) -> dict[str, Any]:
        """It, as the connector's options."""
        hosts = [_named(host) for host in self.hosts]
        jump = _parsed(self.jump) if self.jump else None
        given: dict[str, Any] = {
            "hosts": hosts,
            "key": _read_key(self.key) if self.key else None,
            "passphrase": self.passphrase,
            "password": self.password,
            "host_keys": list(self._known([*hosts, *([jump] if jump else [])])),
            "jump": jump,
            "python": [self.python] if isinstance(self.python, str) else list(self.python),
            "link": self.link,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _known(self, hosts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        if self.host_keys is not None:
            yield from self.host_keys
            return
        path = Path(KNOWN_HOSTS).expanduser()
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        wanted = [host["host"] if host["port"] == 22 else f"[{host['host']}]:{host['port']}" for host in hosts]
        yield from (line for line in lines if any(_is_about(line, name) for name in wanted))


def _read_key(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The private key {path} cannot be read: {error}.") from error


def _named(host: str | Mapping[str, Any]) -> dict[str, Any]:
    found = _parsed(host)
    properties = (
        {name: value for name, value in host.items() if name not in _FIELDS} if isinstance(host, Mapping) else {}
    )
    named = host.get("name") if isinstance(host, Mapping) else None
    name = check_name(named or found["host"].replace(":", "-"), "a node")
    return {**found, "name": name, "properties": properties}


def _parsed(host: str | Mapping[str, Any]) -> dict[str, Any]:
    """Host, user and port of ``user@host:port`` or of a mapping."""
    if isinstance(host, Mapping):
        found = {"host": host.get("host"), "user": host.get("user"), "port": host.get("port", 22)}
    else:
        found = _of_text(host)
    port = found["port"]
    if not isinstance(found["host"], str) or not found["host"] or not isinstance(port, int) or not 0 < port < 65536:
        raise DefinitionError(f"{host!r} is no host.", advice="Give user@host, user@host:port, or a mapping with host.")
    return {**found, "user": found["user"] or getpass.getuser()}


def _of_text(text: str) -> dict[str, Any]:
    user, _, address = text.rpartition("@")
    if address.count(":") > 1 and not address.startswith("["):  # an IPv6 address as it is
        address = f"[{address}]"
    try:
        parts = urlsplit(f"//{address}")
        return {"host": parts.hostname, "user": user, "port": parts.port or 22}
    except ValueError:
        return {"host": None, "user": user, "port": 0}


def _is_about(line: str, name: str) -> bool:
    """Whether a line of known_hosts (sshd(8)) is about a host."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return False
    patterns = words[1] if words[0].startswith("@") and len(words) > 1 else words[0]
    if patterns.startswith("|1|"):  # HMAC-SHA-1 of the name, under a salt
        _, _, salt, hashed = [*patterns.split("|"), "", "", ""][:4]
        try:
            return hmac.digest(base64.b64decode(salt), name.encode(), "sha1") == base64.b64decode(hashed)
        except ValueError:
            return False
    several = patterns.split(",")
    if any(fnmatch.fnmatchcase(name, one[1:]) for one in several if one.startswith("!")):
        return False
    return any(fnmatch.fnmatchcase(name, one.replace("[", "[[]", 1)) for one in several)
