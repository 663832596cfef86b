"""One Docker engine: each deployment in a container of its own, in which a keeper does what keepers do on hosts.

Options: ``engine`` is its address, ``unix:///path`` or ``tcp://host:port``, the latter with ``ca``, ``certificate`` and
``key`` as PEM (an engine that listens without TLS is refused); those that name nodes (``named``): a node is no more
than the leave to have a run's containers on the engine, so an unused one costs nothing. ``image`` is what deployments
run in that name none (``python:X.Y-slim``); ``cpus`` and ``memory`` are what a container may have that asks for
nothing; ``network``, ``mounts`` (``/there:/here:ro``) and ``capabilities`` are as of ``docker run``. ``director_url``
is where containers reach the director; ``executable`` another executor, by its path in the image.

What must hold: a container is found by its labels, never by memory, and made once; its first process only waits and
reaps, so that it outlives every connection; secrets are in files of it, not in its labels, variables or command lines.
A container that was ended keeps its files: it is started again to be drained, and removed when it is cleaned up.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ssl
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from fieldlab_common.environment import Container, Resources, Venv
from fieldlab_common.errors import ConnectorError
from fieldlab_common.keeping import KeeperOpening
from fieldlab_common.messages import CheckLine, Launch, environment_of
from fieldlab_common.node import Availability, Node

from fieldlab_director.connectors.base import (
    Checked,
    Done,
    DrainRequest,
    Launched,
    LaunchRequest,
    Listed,
    Liveness,
    Nothing,
    Notice,
    Observation,
    Observations,
    ObserveRequest,
    Opening,
    Prepared,
    PrepareRequest,
    Stopped,
    Target,
)
from fieldlab_director.connectors.engine import Engine, ExecChannel
from fieldlab_director.connectors.kept import Heard, KeptNodes
from fieldlab_director.connectors.named import named_nodes
from fieldlab_director.connectors.remote import Remote

__all__ = ["DockerConnector"]

HERE = "/fieldlab"  # in a container: the executor's file, and the folders of its keeper
LABEL = "fieldlab"
_OPTIONS = frozenset(
    {
        *("engine", "ca", "certificate", "key", "image", "cpus", "memory", "network", "mounts", "capabilities"),
        *("director_url", "executable"),
    }
)
_CPU = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386"}


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What every container of an infrastructure is made with."""

    image: str = ""
    resources: Resources = field(default_factory=Resources)
    network: str = ""
    mounts: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()

    def container(self, image: str, asked: Resources, labels: Mapping[str, str]) -> dict[str, Any]:
        """The body of ``POST /containers/create`` (Docker Engine API)."""
        cpus, memory = asked.cpus or self.resources.cpus, asked.memory_bytes or self.resources.memory_bytes
        host: dict[str, Any] = {
            "Init": True,
            "Binds": list(self.mounts),
            "CapAdd": list(self.capabilities),
            "NanoCpus": int((cpus or 0) * 1e9),
            "Memory": memory or 0,
            "MemorySwap": memory or 0,  # as much as memory: a step that is over it is ended, not slowed down
        }
        if self.network:
            host["NetworkMode"] = self.network
        if self.network in ("", "bridge"):
            host["ExtraHosts"] = ["host.docker.internal:host-gateway"]
        return {
            "Image": image,
            "Entrypoint": ["sleep"],
            "Cmd": ["infinity"],
            "Env": [f"FIELDLAB_CONTAINER={image}", f"FIELDLAB_CACHE={HERE}/cache"],  # a user may have no home
            "Labels": dict(labels),
            "HostConfig": host,
        }


class DockerConnector:
    """The connector of kind ``docker`` (see ``base.Connector``)."""

    observe_every: ClassVar[float] = 15.0

    def __init__(self, opening: Opening, notice: Notice) -> None:
        options = dict(opening.options)
        self._name, self._id = opening.infrastructure, Path(opening.folder).name
        self._executable = Path(opening.executable)
        self._nodes = named_nodes("docker", options, _OPTIONS)
        self._settings = _settings(options)
        self._url = str(options.get("director_url") or "")
        address = str(options.get("engine") or "unix:///var/run/docker.sock")
        self._engine = Engine(address, _context(address, options))
        self._facts: dict[str, Any] = {}
        opened = KeeperOpening(root=f"{HERE}/nodes", executable=str(options.get("executable") or ""))

        def reach(deployment: str, name: str, heard: Heard) -> Remote:
            return Remote(name, lambda: self._keeper(deployment), opened, notice=heard)

        self._inside = KeptNodes(lambda name: (name, f"The keeper in the container of {name}"), reach, notice)

    async def check(self, request: Nothing) -> Checked:
        """Hold that the engine answers, and runs Linux containers; what is in one shows when it is prepared."""
        info = await self._engine.info()
        system = info.get("OSType")
        _hold(system == "linux", f"needs an engine that runs Linux containers, not {system}")
        said = f"Docker {info.get('ServerVersion')} at {self._engine.address}"
        return Checked(lines=(CheckLine(what="engine", ok=True, said=said),))

    async def nodes(self, request: Nothing) -> Listed:
        """The nodes, as the engine says its machine is; offline, with the reason, while it is away."""
        availability, reason = Availability.AVAILABLE, ""
        try:
            self._facts = self._facts_of(await self._engine.info())
        except ConnectorError as error:
            availability, reason = Availability.OFFLINE, str(error)
        properties = self._facts.get("properties", {})
        return Listed(
            nodes=tuple(
                Node(
                    infrastructure=self._name,
                    architecture=self._facts.get("architecture", ""),
                    os="linux",
                    environments=("container", "venv", "host"),
                    availability=availability,
                    reason=reason,
                    **{**one, "properties": {**properties, **one["properties"]}},
                )
                for one in self._nodes
            )
        )

    async def prepare(self, request: PrepareRequest) -> Prepared:
        """Make the container, and in it what the environment takes."""
        environment = environment_of(request.environment)
        image = environment.image if isinstance(environment, Container) else ""
        python = request.python or (environment.python if isinstance(environment, Venv) else "")
        image = image or self._settings.image or f"python:{python or _own_python()}-slim"
        made = {"image": image, "cpus": request.resources.cpus, "memory": request.resources.memory_bytes}
        await self._engine.fetch_image(image)
        await self._present(replace(request.target, prepared=made))
        inside = await self._inside.prepare(replace(request, target=_of(request.target), resources=Resources()))
        return Prepared(prepared={**made, **(inside.prepared or {})})

    async def launch(self, request: LaunchRequest) -> Launched:
        """Start the executor of an epoch, in the deployment's container."""
        await self._present(request.target)
        launch = self._reachable(request.launch)
        return await self._inside.launch(replace(request, target=_of(request.target), launch=launch))

    async def observe(self, request: ObserveRequest) -> Observations:
        """Look at all containers at once; then ask the keepers of those that run."""
        there = await self._containers()
        running = tuple(_of(one) for one in request.targets if _runs(there.get(one.deployment)))
        found = [
            await self._ended(one, there.get(one.deployment)) for one in request.targets if _of(one) not in running
        ]
        if running:
            with contextlib.suppress(ConnectorError):  # none of them answers: they are unknown, the others are not
                found.extend((await self._inside.observe(ObserveRequest(targets=running))).observations)
        return Observations(observations=tuple(found))

    async def stop(self, target: Target) -> Stopped:
        """End the executor; nothing if its container does not run."""
        container = (await self._containers(target)).get(target.deployment)
        if not _runs(container):
            return Stopped(tail=(await self._ended(target, container)).tail)
        return await self._inside.stop(_of(target))

    async def drain(self, request: DrainRequest) -> Done:
        """Ship what a dead executor's journal holds, from its container, which is started again if it has ended."""
        if not await self._containers(request.target):
            return Done()
        await self._present(request.target)
        launch = self._reachable(request.launch)
        return await self._inside.drain(replace(request, target=_of(request.target), launch=launch))

    async def clean_up(self, target: Target) -> Done:
        """Remove the container. An executor in it that is about to leave gets the time to."""
        for container in (await self._containers(target)).values():
            if _runs(container):
                with contextlib.suppress(ConnectorError):  # it is ended all the same
                    await self._inside.clean_up(_of(target))
            await self._inside.forget(_of(target).node)
            await self._engine.remove(container["Id"])
        return Done()

    async def close(self) -> None:
        """Let go of the engine. Containers go on."""
        await self._inside.close()
        await self._engine.close()

    # --- containers --------------------------------------------------------------------------------------------------

    def _labels(self, target: Target | None = None) -> dict[str, str]:
        labels = {LABEL: self._id}
        return labels if target is None else {**labels, f"{LABEL}.deployment": target.deployment}

    async def _containers(self, target: Target | None = None) -> dict[str, dict[str, Any]]:
        """The containers of this infrastructure (of a target), by deployment."""
        found = await self._engine.containers(self._labels(target))
        return {one["Labels"][f"{LABEL}.deployment"]: one for one in found}

    async def _present(self, target: Target) -> None:
        """Have the deployment's container there, and running; made anew as it was prepared if it was removed."""
        container = (await self._containers(target)).get(target.deployment)
        if _runs(container):
            return
        if container is None:
            made = target.prepared
            if not isinstance(made, Mapping):
                raise ConnectorError("The deployment's container is gone.", transient=False)
            asked = Resources(cpus=made.get("cpus"), memory=made.get("memory"))
            labels = {**self._labels(target), f"{LABEL}.infrastructure": self._name, f"{LABEL}.node": target.node}
            body = self._settings.container(made["image"], asked, labels)
            identity = await self._engine.make(f"fieldlab-{self._id}-{target.deployment}", body)
        else:
            identity = str(container["Id"])
        await self._engine.start(identity, await asyncio.to_thread(_archive, self._executable))

    async def _keeper(self, deployment: str) -> ExecChannel:
        target = Target(deployment=deployment, node="")
        container = (await self._containers(target)).get(deployment)
        if container is None or not _runs(container):
            raise ConnectorError(f"The container of {deployment} does not run.")
        return await self._engine.run(container["Id"], "python3", f"{HERE}/fieldlab.pyz", "keep")

    async def _ended(self, target: Target, container: Mapping[str, Any] | None) -> Observation:
        """How the executor of a container that does not run is: dead, if it was ever started."""
        started = f"{HERE}/nodes/{target.deployment}/{target.epoch}.pid"
        if container is None or not await self._engine.has(container["Id"], started):
            return Observation(deployment=target.deployment, executor=Liveness.ABSENT)
        tail = await self._engine.ending(container["Id"])
        return Observation(deployment=target.deployment, executor=Liveness.DEAD, tail=tail)

    def _reachable(self, launch: Launch) -> Launch:
        return replace(launch, director=self._url) if self._url else launch

    def _facts_of(self, info: Mapping[str, Any]) -> dict[str, Any]:
        cpu = str(info.get("Architecture", ""))
        limits = self._settings.resources
        known = {
            "cpus": limits.cpus or info.get("NCPU"),
            "memory": limits.memory_bytes or info.get("MemTotal"),
            "kernel": info.get("KernelVersion"),
            "docker": info.get("ServerVersion"),
            "hostname": info.get("Name"),
            "root": True,
            "memory_limit": "group",
        }
        properties = {name: value for name, value in known.items() if value is not None}
        return {"architecture": f"linux/{_CPU.get(cpu, cpu)}", "properties": properties}


def _of(target: Target) -> Target:
    """The target as the keeper of its container has it: that container is the node."""
    return replace(target, node=target.deployment)


def _runs(container: Mapping[str, Any] | None) -> bool:
    return container is not None and container["State"] == "running"


def _archive(executable: Path) -> bytes:
    """The files of a container: the executor's, and a folder in which any user of the image may keep things."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        folder = tarfile.TarInfo(HERE.strip("/"))
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        archive.addfile(folder)
        content = executable.read_bytes()
        file = tarfile.TarInfo(f"{HERE.strip('/')}/fieldlab.pyz")
        file.size, file.mode = len(content), 0o644
        archive.addfile(file, io.BytesIO(content))
    return packed.getvalue()


# --- options ---------------------------------------------------------------------------------------------------------


def _hold(true: object, what: str) -> None:
    if not true:
        raise ConnectorError(f"A docker infrastructure {what}.", transient=False)


def _own_python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _settings(options: Mapping[str, Any]) -> _Settings:
    texts: dict[str, tuple[str, ...]] = {}
    for name in ("mounts", "capabilities"):
        given = options.get(name) or []
        _hold(
            isinstance(given, list) and all(isinstance(one, str) for one in given), f"takes {name} as a list of texts"
        )
        texts[name] = tuple(given)
    return _Settings(
        image=str(options.get("image") or ""),
        resources=Resources(cpus=options.get("cpus"), memory=options.get("memory")),
        network=str(options.get("network") or ""),
        mounts=texts["mounts"],
        capabilities=texts["capabilities"],
    )


def _context(address: str, options: Mapping[str, Any]) -> ssl.SSLContext | None:
    """What an engine on the network is held to, and shown."""
    if address.startswith("unix:///"):
        return None
    _hold(address.startswith("tcp://"), "takes engine as unix:///path or tcp://host:port")
    parts = [str(options.get(name) or "") for name in ("ca", "certificate", "key")]
    _hold(all(parts), "on the network takes ca, certificate and key: whoever can ask an engine is root there")
    ca, certificate, key = parts
    try:
        context = ssl.create_default_context(cadata=ca)
        with tempfile.NamedTemporaryFile(
            "w", prefix="fieldlab-", suffix=".pem"
        ) as file:  # ssl takes it from a file only
            file.write(f"{certificate}\n{key}\n")
            file.flush()
            context.load_cert_chain(file.name)
    except (ssl.SSLError, ValueError) as error:
        raise ConnectorError(f"ca, certificate and key cannot be used: {error}.", transient=False) from error
    return context
