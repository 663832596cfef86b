"""A Slurm cluster: what the director is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fieldlab_common.errors import DefinitionError

from fieldlab.infrastructure import InfrastructureSpec
from fieldlab.ssh import SSH

__all__ = ["Slurm"]

_LOGIN = ("key", "passphrase", "password", "host_keys")


@dataclass(frozen=True, kw_only=True)
class Slurm(InfrastructureSpec):
    """The nodes of a Slurm cluster; each deployment is a job.

    ``folder`` is one that all of the cluster sees under the same path: launch files, journals and environments are
    there. ``login`` is the host on which sbatch works, like ``ada@login.example.org``, with ``key``,
    ``passphrase``, ``password`` and ``host_keys`` as ``fl.SSH`` has them; without it, that is the director's own
    machine, which only an admin may attach. ``nodes`` is what is a node: the cluster's ``"hosts"``, or its
    ``"partitions"``, on which Slurm chooses the host. ``partition`` (by default the cluster's default),
    ``account``, ``qos``, ``constraint`` and ``reservation`` are what sbatch calls so; ``programs`` is the folder of
    sbatch, if it is not on ``PATH``, and ``config`` the path of slurm.conf, if it is not the usual one. ``slots``
    runs may have a host at a time. ``properties`` are added to what is known of each node, ``python`` names
    interpreters to try first.

    Raises:
        DefinitionError: the folder is no absolute path, or the login host cannot be understood.
    """

    kind: ClassVar[str] = "slurm"
    folder: str
    login: str | Mapping[str, Any] | None = None
    key: str | None = field(default=None, repr=False)
    passphrase: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    host_keys: Sequence[str] | None = None
    nodes: Literal["hosts", "partitions"] = "hosts"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    programs: str = ""
    config: str = ""
    slots: int = 1
    properties: Mapping[str, Any] = field(default_factory=dict)
    python: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.folder.startswith("/"):
            raise DefinitionError(f"Slurm(folder={self.folder!r}): give its path from / on, as the cluster sees it.")
        if self.nodes not in ("hosts", "partitions"):
            raise DefinitionError(f"Slurm(nodes={self.nodes!r}): it is 'hosts' or 'partitions'.")
        if self.slots < 1:
            raise DefinitionError(f"Slurm(slots={self.slots!r}): a host has at least one.")
        if self.login is None and any(getattr(self, name) for name in _LOGIN):
            raise DefinitionError("Slurm(...) has a key, a password or host keys, and no login= to use them for.")
        self._ssh()

    def options(self) -> dict[str, Any]:
        """It, as the connector's options."""
        texts = ("folder", "nodes", "partition", "account", "qos", "constraint", "reservation", "programs", "config")
        python = [self.python] if isinstance(self.python, str) else list(self.python)
        given = {**{name: getattr(self, name) for name in texts}, "slots": self.slots, "python": python}
        return {**given, "properties": dict(self.properties), **self._login()}

    def _ssh(self) -> SSH | None:
        """The login host, as one behind SSH."""
        if self.login is None:
            return None
        return SSH(hosts=[self.login], **{name: getattr(self, name) for name in _LOGIN})

    def _login(self) -> dict[str, Any]:
        ssh = self._ssh()
        if ssh is None:
            return {}
        options = ssh.options()
        (host,) = options["hosts"]
        login = {name: host[name] for name in ("host", "user", "port")}
        return {"login": login, **{name: options[name] for name in _LOGIN if name in options}}
