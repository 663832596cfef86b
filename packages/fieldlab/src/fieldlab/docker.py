"""A Docker engine: what the director is told of it.

Files of certificates are read here, when the options are made. The director keeps what it is sent encrypted, and never
gives it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fieldlab_common.environment import Resources, parse_size
from fieldlab_common.errors import ConfigurationError, DefinitionError

from fieldlab.infrastructure import InfrastructureSpec, Local

__all__ = ["Docker"]


@dataclass(frozen=True, kw_only=True)
class Docker(InfrastructureSpec):
    """The containers of one Docker engine; each deployment gets one of its own.

    Only admins attach one. ``engine`` is ``unix:///path`` on the director's machine, or ``tcp://host:port`` with the
    paths of ``ca``, ``certificate`` and ``key``. ``nodes``, ``prefix``, ``properties``, ``slots`` and ``elastic`` are
    as of ``Local``: how many runs may have containers there at a time. ``image`` is for deployments that name none
    (``fl.Container(image=...)`` names one): without, ``python:X.Y-slim`` of the version their code needs. ``cpus`` and
    ``memory`` are what a container may have whose deployment asks for nothing. ``network``, ``mounts``
    (``"/there:/here:ro"``) and ``capabilities`` (``"NET_ADMIN"``) are as of ``docker run``. ``director_url`` is where
    containers reach the director, if not at the URL that all executors are given; the machine of the engine is
    ``host.docker.internal`` for them.

    Raises:
        DefinitionError: the engine cannot be understood. ConfigurationError: a file cannot be read.
    """

    kind: ClassVar[str] = "docker"
    engine: str = "unix:///var/run/docker.sock"
    ca: str | None = None
    certificate: str | None = None
    key: str | None = field(default=None, repr=False)
    nodes: int | Sequence[str | Mapping[str, Any]] = 1
    prefix: str = "docker"
    properties: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 1
    elastic: int | None = None
    image: str = ""
    cpus: float | None = None
    memory: int | str | None = None
    network: str = ""
    mounts: Sequence[str] = ()
    capabilities: Sequence[str] = ()
    director_url: str = ""

    def __post_init__(self) -> None:
        files = (self.ca, self.certificate, self.key)
        if not self.engine.startswith(("unix:///", "tcp://")):
            raise DefinitionError(f"Docker(engine={self.engine!r}): it is unix:///path or tcp://host:port.")
        if self.engine.startswith("tcp://") and not all(files):
            raise DefinitionError(
                f"Docker(engine={self.engine!r}) takes ca, certificate and key.",
                advice="An engine that listens without them makes everybody root; see dockerd --tlsverify.",
            )
        for name in ("mounts", "capabilities"):
            if isinstance(getattr(self, name), str):
                raise DefinitionError(f"Docker({name}=...) takes a list of texts.")
        Resources(cpus=self.cpus, memory=self.memory)
        self._named()

    def options(self) -> dict[str, Any]:
        """It, as the connector's options."""
        given: dict[str, Any] = {
            **self._named().options(),
            "engine": self.engine,
            **{name: _read(path) for name in ("ca", "certificate", "key") if (path := getattr(self, name))},
            "image": self.image,
            "cpus": self.cpus,
            "memory": None if self.memory is None else parse_size(self.memory),
            "network": self.network,
            "mounts": list(self.mounts),
            "capabilities": list(self.capabilities),
            "director_url": self.director_url,
        }
        return {name: value for name, value in given.items() if value not in (None, "", [])}

    def _named(self) -> Local:
        return Local(
            nodes=self.nodes,
            prefix=self.prefix,
            properties=self.properties,
            slots=self.slots,
            elastic=self.elastic,
        )


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The file {path} cannot be read: {error}.") from error
