"""Hosts behind SSH: a keeper on each, over one connection that is made anew when it is lost.

Options: ``hosts`` is a list of ``{"name", "host", "user", "port", "properties"}``; ``key`` (a private key as OpenSSH
or PEM has it, with ``passphrase`` if it has one) or ``password`` is what they are logged in with; without either, a
key pair of the director's own, whose public half stands in every refusal. ``host_keys`` are lines of known_hosts: a
host whose key is not among them is refused, never taken on trust. ``jump`` is one more host, through which all are
reached. ``python`` names interpreters to try before the usual ones, ``executable`` another executor than the
director's, by its path on the hosts. ``link`` is ``direct`` (executors dial the director's URL) or ``tunnel`` (a port
on the host's loopback leads to the director, through this connection).

What must hold: an executor outlives the connection, and everything here; the executor's file gets its name when it is
whole, and is not sent again; a tunnel keeps its port for as long as an executor was told of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import asyncssh
from fieldlab_common.errors import ConnectorError
from fieldlab_common.keeping import KeeperOpening
from fieldlab_common.messages import CheckLine, Launch
from fieldlab_common.node import Availability, Node
from fieldlab_common.step import check_name

from fieldlab_director.addresses import AddressPolicy, resolved
from fieldlab_director.connectors.base import (
    Checked,
    Done,
    DrainRequest,
    Launched,
    LaunchRequest,
    Listed,
    Nothing,
    Notice,
    Observations,
    ObserveRequest,
    Opening,
)
from fieldlab_director.connectors.kept import Heard, KeptNodes
from fieldlab_director.connectors.remote import Remote

__all__ = ["PYTHONS", "Line", "SshConnector", "host_of", "login_of"]

MOST_HOSTS = 1000
AT_ONCE = 32  # hosts that are listed at a time
CONNECT_SECONDS = 20.0
CHECK_SECONDS = 50.0  # what was not tried by then is a line that says so
ALIVE_EVERY, ALIVE_MISSED = 15.0, 4  # a connection that is silent for longer is given up
PYTHONS = ("python3", "python3.14", "python3.13", "python3.12", "python3.11")
_OPTIONS = {"hosts", "key", "passphrase", "password", "host_keys", "jump", "python", "executable", "link"}
_HOST_OPTIONS = {"name", "host", "user", "port", "properties"}


@dataclass(frozen=True, kw_only=True)
class Host:
    host: str
    user: str
    port: int = 22
    name: str = ""
    properties: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" + (f":{self.port}" if self.port != 22 else "")


@dataclass(frozen=True, kw_only=True)
class Login:
    """How all hosts are logged in to, and which keys they may have."""

    known: asyncssh.SSHKnownHosts
    key: asyncssh.SSHKey | None = None
    password: str | None = None
    own: str = ""  # the public half of the director's own key, if that is the one
    addresses: AddressPolicy = field(default_factory=AddressPolicy)

    @property
    def what(self) -> str:
        """What it is, for people."""
        if self.password is not None:
            return "the password"
        return "the director's own key" if self.own else "the key that was given"

    async def connect(self, host: Host, through: asyncssh.SSHClientConnection | None) -> asyncssh.SSHClientConnection:
        """A new connection. What is not dialled through another host is resolved here, and held to the policy.

        Raises:
            ConnectorError: with what to do about it.
        """
        try:
            found = (host.host,) if through else await resolved(host.host, host.port, self.addresses)
            for address in found[:-1]:
                with contextlib.suppress(OSError):
                    return await self._dial(host, address, through, CONNECT_SECONDS / len(found))
            return await self._dial(host, found[-1], through, CONNECT_SECONDS / len(found))
        except asyncssh.PermissionDenied as error:
            raise self._refused(host) from error
        except (asyncssh.Error, OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            raise ConnectorError(f"{host} cannot be reached: {why}.", advice="Is it up, and is SSH there?") from error

    async def _dial(
        self, host: Host, address: str, through: asyncssh.SSHClientConnection | None, seconds: float
    ) -> asyncssh.SSHClientConnection:
        try:
            return await asyncssh.connect(
                address,
                host.port,
                host_key_alias=host.host,
                username=host.user,
                client_keys=[self.key] if self.key else None,
                password=self.password,
                known_hosts=self.known,
                tunnel=through or (),
                config=None,
                agent_path=None,
                connect_timeout=seconds,
                keepalive_interval=ALIVE_EVERY,
                keepalive_count_max=ALIVE_MISSED,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise await self._strange(host, address, through) from error

    async def _strange(self, host: Host, address: str, through: asyncssh.SSHClientConnection | None) -> ConnectorError:
        offered = None
        with contextlib.suppress(asyncssh.Error, OSError):
            offered = await asyncssh.get_server_host_key(address, host.port, tunnel=through or (), config=None)
        said = f" It has {offered.get_fingerprint()}." if offered else ""
        line = offered.export_public_key().decode().strip() if offered else "its public key"
        where = host.host if host.port == 22 else f"[{host.host}]:{host.port}"
        return ConnectorError(
            f"{host} has a host key that was not given.{said}",
            advice=f"Compare it on the host; if it is right, add this line to host_keys or known_hosts: {where} {line}",
            transient=False,
        )

    def _refused(self, host: Host) -> ConnectorError:
        advice = "Is the key among the user's authorized_keys there, or the password right?"
        if self.own:
            advice = f"Add the director's key to the authorized_keys of {host.user} there: {self.own}"
        return ConnectorError(f"{host} did not let the director in.", advice=advice, transient=False)


class _SshChannel:
    """A ``Channel`` to a command on a host."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._process = process

    async def read(self) -> bytes:
        return await self._some(self._process.stdout)

    async def read_errors(self) -> bytes:
        return await self._some(self._process.stderr)

    @staticmethod
    async def _some(stream: asyncssh.SSHReader[bytes]) -> bytes:
        try:
            return await stream.read(65536)
        except (asyncssh.Error, OSError):  # the connection is lost, which is the end of it
            return b""

    def write(self, data: bytes) -> None:
        with contextlib.suppress(asyncssh.Error, OSError):
            if not self._process.stdin.is_closing():
                self._process.stdin.write(data)

    def end_input(self) -> None:
        with contextlib.suppress(asyncssh.Error, OSError):
            if not self._process.stdin.is_closing():
                self._process.stdin.write_eof()

    def kill(self) -> None:
        with contextlib.suppress(asyncssh.Error, OSError):
            self._process.kill()
        self._process.close()

    async def wait(self) -> int | None:
        await self._process.wait_closed()
        return self._process.exit_status


class Line:
    """The connection to one host, while there is one, and what goes through it."""

    def __init__(self, host: Host, login: Login, jump: Line | None, pythons: tuple[str, ...]) -> None:
        self.host = host
        self._login, self._jump, self._pythons = login, jump, pythons
        self._connection: asyncssh.SSHClientConnection | None = None
        self._connecting = asyncio.Lock()
        self._forwards: dict[tuple[str, int], int] = {}  # of this connection: where to → port on the host

    async def connection(self) -> asyncssh.SSHClientConnection:
        """The connection, made if there is none."""
        async with self._connecting:
            if self._connection is None or self._connection.is_closed():
                through = await self._jump.connection() if self._jump else None
                self._forwards.clear()
                self._connection = await self._login.connect(self.host, through)
            return self._connection

    async def keeper(self, executable: Path, **variables: str) -> _SshChannel:
        """A keeper on the host, from the executor's file, which is sent if it is not there.

        ``variables`` are in its environment.
        """
        connection = await self.connection()
        try:
            python, path = await self._find(connection, executable)
            given = shlex.join(f"{name}={value}" for name, value in variables.items())
            command = f"exec env {given} {shlex.quote(python)} {path} keep"
            return _SshChannel(await connection.create_process(_sh(command), encoding=None))
        except (asyncssh.Error, OSError) as error:
            raise ConnectorError(f"{self.host}: {error}.") from error

    async def forward(self, host: str, port: int, wanted: int) -> int:
        """A port on the host's loopback that leads to ``host:port`` from here; ``wanted`` if it is not 0."""
        connection = await self.connection()
        if (host, port) not in self._forwards:
            try:
                listener = await connection.forward_remote_port("127.0.0.1", wanted, host, port)
            except (asyncssh.Error, OSError) as error:
                raise ConnectorError(
                    f"{self.host} gives no port for a tunnel: {error}.",
                    advice="Does its sshd allow AllowTcpForwarding? A port that was held is free again in a moment.",
                ) from error
            self._forwards[host, port] = listener.get_port()
        return self._forwards[host, port]

    async def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.close()
            await self._connection.wait_closed()

    async def _find(self, connection: asyncssh.SSHClientConnection, executable: Path) -> tuple[str, str]:
        """An interpreter on the host that will do, and the executor's file there, as a shell writes it."""
        content = await asyncio.to_thread(executable.read_bytes)
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.pyz"
        tried = " ".join(map(shlex.quote, self._pythons))
        probe = f"""
f="${{XDG_CACHE_HOME:-$HOME/.cache}}/fieldlab/executables/{name}"
for p in {tried}; do
  if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    command -v "$p"; echo "$f"; [ -f "$f" ] && echo there; exit 0
  fi
done
exit 3
"""
        said = await connection.run(_sh(probe), timeout=CONNECT_SECONDS)
        lines = str(said.stdout or "").splitlines()
        if said.exit_status == 3:
            raise ConnectorError(
                f"{self.host} has no Python 3.11 or newer among {', '.join(self._pythons)}.",
                advice="Install one there, or name it: fl.SSH(python=...).",
                transient=False,
            )
        if said.exit_status or len(lines) < 2:
            raise ConnectorError(f"{self.host} answered a shell command with: {said.stderr or said.stdout!r}")
        if "there" not in lines[2:]:
            await _send(connection, content, lines[1])
        return lines[0], shlex.quote(lines[1])


async def _send(connection: asyncssh.SSHClientConnection, content: bytes, path: str) -> None:
    """Put the executor's file on the host, whole or not at all."""
    async with connection.start_sftp_client() as sftp:
        await sftp.makedirs(os.path.dirname(path), asyncssh.SFTPAttrs(permissions=0o700), exist_ok=True)
        part = f"{path}.{os.urandom(6).hex()}.part"
        async with sftp.open(part, "wb", asyncssh.SFTPAttrs(permissions=0o600)) as file:
            await file.write(content)
        await sftp.posix_rename(part, path)


def _sh(script: str) -> str:
    """A script for /bin/sh, whatever the user's own shell is."""
    return f"exec /bin/sh -c {shlex.quote(script)}"


class SshConnector(KeptNodes):
    """The connector of kind ``ssh`` (see ``base.Connector``)."""

    observe_every: ClassVar[float] = 15.0

    def __init__(self, opening: Opening, notice: Notice) -> None:
        options = dict(opening.options)
        unknown = sorted(set(options) - _OPTIONS)
        _hold(not unknown, f"has no option {', '.join(unknown)}; there are {', '.join(sorted(_OPTIONS))}")
        self._name, self._folder = opening.infrastructure, Path(opening.folder)
        self._executable = Path(opening.executable)
        self._hosts = {host.name: host for host in _hosts(options.get("hosts"))}
        self._tunnel = _choice(options.get("link", "direct")) == "tunnel"
        login = self._login = replace(login_of(options, self._folder), addresses=opening.addresses)
        pythons = (*_texts(options.get("python", ())), *PYTHONS)
        jump = Line(host_of(options["jump"], {}), login, None, pythons) if options.get("jump") else None
        self._jump = jump
        self._lines = {str(host): Line(host, login, jump, pythons) for host in self._hosts.values()}
        self._listing = asyncio.Semaphore(AT_ONCE)
        self._facts: dict[str, Node] = {}
        other = str(options.get("executable") or "")
        opened = KeeperOpening(root=f"nodes/{self._folder.name}", executable=other)

        def reach(key: str, name: str, heard: Heard) -> Remote:
            return Remote(name, lambda: self._lines[key].keeper(self._executable), opened, notice=heard)

        super().__init__(self._whose, reach, notice)

    async def check(self, request: Nothing) -> Checked:
        """Try every host. One that does not know the director's own key yet may come to know it."""
        until = asyncio.get_running_loop().time() + CHECK_SECONDS
        found = await asyncio.gather(*(self._checked(node, until) for node in self._hosts))
        lines = tuple(chain.from_iterable(found))
        pending = bool(self._login.own) and any(line.what == "login" and not line.ok for line in lines)
        return Checked(lines=lines, pending=pending)

    async def nodes(self, request: Nothing) -> Listed:
        """Every host: as it says it is, or offline, with the reason."""
        return Listed(nodes=tuple(await asyncio.gather(*map(self._node, self._hosts.values()))))

    async def launch(self, request: LaunchRequest) -> Launched:
        """Start the executor of an epoch; where it is told to dial a tunnel, that is there."""
        if not self._tunnel:
            return await super().launch(request)
        launch, tunnel = await self._through(request.target.node, request.launch)
        launched = await super().launch(replace(request, launch=launch))
        return Launched(handle={"handle": launched.handle, "tunnel": tunnel})

    async def drain(self, request: DrainRequest) -> Done:
        """Ship what a dead executor's journal holds."""
        if self._tunnel:
            request = replace(request, launch=(await self._through(request.target.node, request.launch))[0])
        return await super().drain(request)

    async def observe(self, request: ObserveRequest) -> Observations:
        """Tell how executors are, and hold up the tunnels that they were told of."""
        tunnels = {
            (target.node, *target.handle["tunnel"])
            for target in request.targets
            if isinstance(target.handle, Mapping) and "tunnel" in target.handle
        }
        forwards = [self._line(node).forward(host, port, wanted) for node, wanted, host, port in tunnels]
        await asyncio.gather(*forwards, return_exceptions=True)  # what is not up is tried again at the next look
        return await super().observe(request)

    async def close(self) -> None:
        """Let go of the connections."""
        await super().close()
        await asyncio.gather(*(line.close() for line in (*self._lines.values(), *filter(None, [self._jump]))))

    def _whose(self, node: str) -> tuple[str, str]:
        if node not in self._hosts:
            raise ConnectorError(f"Infrastructure {self._name!r} has no node {node!r}.", transient=False)
        return str(self._hosts[node]), f"The keeper of node {node!r} ({self._hosts[node]})"

    def _line(self, node: str) -> Line:
        return self._lines[self._whose(node)[0]]

    async def _checked(self, node: str, until: float) -> tuple[CheckLine, ...]:
        reached: tuple[CheckLine, ...] = ()
        try:
            async with asyncio.timeout_at(until), self._listing:
                reached = await self._reached(node)
                return (*reached, *(await self.check_node(node) if all(line.ok for line in reached) else ()))
        except TimeoutError:
            said = f"{self._hosts[node]} was not tried to the end within {CHECK_SECONDS:.0f} s."
            late = CheckLine(node=node, what="executor" if reached else "reachable", ok=False, said=said, needed=True)
            return (*reached, replace(late, advice="Check it again."))

    async def _reached(self, node: str) -> tuple[CheckLine, ...]:
        """Whether a host answers, is the one it should be, and lets the director in; up to the first that fails."""
        host = self._hosts[node]
        through = f", through {self._jump.host}" if self._jump else ""
        answers = CheckLine(node=node, what="reachable", said=f"{host} answers{through}.", needed=True)
        try:
            if self._jump:
                await self._jump.connection()
        except ConnectorError as error:
            return (replace(answers, what="jump host", ok=False, said=error.message, advice=error.advice),)
        try:
            await self._line(node).connection()
        except ConnectorError as error:
            failed = replace(answers, ok=False, said=error.message, advice=error.advice)
            if isinstance(error.__cause__, asyncssh.HostKeyNotVerifiable):
                return answers, replace(failed, what="host key")
            if isinstance(error.__cause__, asyncssh.PermissionDenied):
                return answers, replace(failed, what="login")
            return (failed,)
        return answers, replace(answers, what="login", said=f"{host.user} is let in with {self._login.what}.")

    async def _node(self, host: Host) -> Node:
        try:
            async with self._listing:
                facts = self._facts[host.name] = await self.facts(host.name)
        except ConnectorError as error:
            known = self._facts.get(host.name, Node(name=host.name))
            facts = replace(known, availability=Availability.OFFLINE, reason=str(error))
        properties = {**facts.properties, **host.properties}
        return replace(facts, name=host.name, infrastructure=self._name, properties=properties)

    async def _through(self, node: str, launch: Launch) -> tuple[Launch, list[Any]]:
        """The launch with the tunnel's end in place of the director's URL, and what the tunnel is: port, host, port."""
        parts = urlsplit(launch.director)
        if parts.scheme != "http" or parts.path.strip("/"):
            raise ConnectorError(
                f"A tunnel leads to a director at a plain address, not to {launch.director}.",
                advice='Let the director listen at 127.0.0.1 without TLS (SSH encrypts), or use link="direct".',
                transient=False,
            )
        host, port = parts.hostname or "127.0.0.1", parts.port or 80
        ports = self._folder / "tunnels.json"
        known: dict[str, int] = await asyncio.to_thread(_read, ports)
        key = f"{self._hosts[node]} {host}:{port}"
        there = await self._line(node).forward(host, port, known.get(key, 0))
        if known.get(key) != there:
            await asyncio.to_thread(_note, ports, {**known, key: there})
        return replace(launch, director=f"http://127.0.0.1:{there}"), [there, host, port]


# --- options ---------------------------------------------------------------------------------------------------------


def _hold(true: object, what: str) -> None:
    if not true:
        raise ConnectorError(f"An SSH infrastructure {what}.", transient=False)


def _choice(link: Any) -> str:
    _hold(link in ("direct", "tunnel"), "takes link as direct or tunnel")
    return str(link)


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _hosts(wanted: Any) -> list[Host]:
    _hold(isinstance(wanted, list) and 1 <= len(wanted) <= MOST_HOSTS, f"takes hosts as a list of 1 to {MOST_HOSTS}")
    hosts = [host_of(entry, {"name": check_name}) for entry in wanted]
    doubled = {host.name for host in hosts if sum(other.name == host.name for other in hosts) > 1}
    _hold(not doubled, f"was given two nodes of one name ({', '.join(sorted(doubled))})")
    return hosts


def host_of(entry: Any, needs: Mapping[str, Any]) -> Host:
    """The host that an option describes.

    Raises:
        ConnectorError: it lacks something, one of ``needs`` for instance, or has what no host has.
    """
    _hold(isinstance(entry, Mapping), "takes each host as an object")
    unknown = sorted(set(entry) - _HOST_OPTIONS)
    _hold(not unknown, f"has no option {', '.join(unknown)} for a host; there are {', '.join(sorted(_HOST_OPTIONS))}")
    for part in ("host", "user", *needs):
        _hold(isinstance(entry.get(part), str) and entry[part], f"takes each host with a {part}")
    port, properties = entry.get("port", 22), entry.get("properties", {})
    _hold(type(port) is int and 0 < port < 65536, "takes a host's port as a number up to 65535")
    _hold(isinstance(properties, Mapping), "takes a node's properties as an object")
    if "name" in needs:
        check_name(entry["name"], "a node")
    name = str(entry.get("name", entry["host"]))
    return Host(host=entry["host"], user=entry["user"], port=port, name=name, properties=properties)


def login_of(options: Mapping[str, Any], folder: Path) -> Login:
    """How hosts are logged in to, as options say; the director's own key is kept in ``folder``.

    Raises:
        ConnectorError: a key cannot be used, or host keys are not of known_hosts' form.
    """
    try:
        known = asyncssh.import_known_hosts("\n".join(_texts(options.get("host_keys", ()))))
    except ValueError as error:
        raise ConnectorError(f"host_keys is not of known_hosts' form: {error}.", transient=False) from error
    if options.get("password"):
        return Login(known=known, password=str(options["password"]))
    if options.get("key"):
        try:
            return Login(known=known, key=asyncssh.import_private_key(options["key"], options.get("passphrase")))
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
            raise ConnectorError(f"The key cannot be used: {error}.", transient=False) from error
    key = _own_key(folder / "id_ed25519")
    return Login(known=known, key=key, own=key.export_public_key().decode().strip())


def _own_key(path: Path) -> asyncssh.SSHKey:
    """The director's key for this infrastructure, made when it is first needed."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = asyncssh.generate_private_key("ssh-ed25519", comment="fieldlab").export_private_key()
        part = path.with_name(path.name + ".part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(made)
        part.replace(path)
    return asyncssh.read_private_key(path)


def _read(path: Path) -> dict[str, int]:
    try:
        found: dict[str, int] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _note(path: Path, ports: Mapping[str, int]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(ports))
    part.replace(path)
