"""The composition root: the one place that knows which store, blobs, connectors and server there are.

``serve`` starts a director in a fixed order: the folder is locked, the secret opened, the database brought up to date
and matched with the secret, the executor packed, then the reconcile loop and HTTP begin. It stops the other way round:
first every long-poll ends, then open requests have a moment to finish, then the loop, the connectors and the store.
Killed at any point, the next start finds what was acknowledged, and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import structlog
import uvicorn
from fieldlab_common.accounts import Role
from fieldlab_common.errors import ConfigurationError

from fieldlab_director import descriptors
from fieldlab_director.agents import AgentInfrastructure
from fieldlab_director.connectors.fleet import Builtin, ConnectorFleet
from fieldlab_director.http import make_http
from fieldlab_director.reconcile import Reconciler
from fieldlab_director.services import accounts
from fieldlab_director.services.agents import KIND
from fieldlab_director.services.desk import Desk
from fieldlab_director.services.experiments import cancel_everything
from fieldlab_director.services.identity import new_id
from fieldlab_director.services.infrastructures import Fleet
from fieldlab_director.services.passwords import hash_password
from fieldlab_director.services.sweep import Sweeper, Swept
from fieldlab_director.services.vault import Vault, check_canary, open_vault
from fieldlab_director.serving import server_config
from fieldlab_director.settings import Settings
from fieldlab_director.store import queries
from fieldlab_director.store.base import WORK, Store, Tx
from fieldlab_director.store.blobs import Blobs
from fieldlab_director.store.databases import Database
from fieldlab_director.store.rows import ExperimentRow, UserRow
from fieldlab_director.store.shelves import BucketShelf, FolderShelf, Shelf

__all__ = ["Started", "make_private", "open_blobs", "open_store", "serve", "sweep"]

log = structlog.get_logger("fieldlab.director")

FIRST_ADMIN = "admin"
PACK_SECONDS = 120.0  # to pack the executor
END_RUNS_SECONDS = 30.0  # an ephemeral director waits so long for its runs to end


def check_listening(settings: Settings) -> None:
    """Hold that nobody listens in: beyond loopback there is TLS, here or in a proxy in front.

    It comes before anything is made: of a first start that fails later, nobody would see the password.

    Raises:
        ConfigurationError: it would not be so, or the port or the files of TLS cannot be used.
    """
    if not 0 <= settings.port <= 65535:
        raise ConfigurationError(
            f"There is no port {settings.port}.", advice="Give one from 1 to 65535; 0: a free one."
        )
    if (settings.certificate is None) is not (settings.key is None):
        raise ConfigurationError("A certificate and its key are given together, or neither.")
    if settings.certificate is not None and settings.key is not None:
        _check_certificate(settings.certificate, settings.key)
    if settings.ca is not None:
        _check_ca(settings.ca)
    if settings.certificate or settings.behind_proxy or _is_loopback(settings.host):
        return
    raise ConfigurationError(
        f"Listening at {settings.host!r} would send tokens in the clear.",
        advice="Give --certificate and --key, or --behind-proxy if a proxy does TLS, or listen at 127.0.0.1.",
    )


def _check_certificate(certificate: Path, key: Path) -> None:
    for path in (certificate, key):
        _check_readable(path)
    try:
        # A key with a passphrase would be asked for at the terminal, which a service does not have.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        why = error.reason or "they are not PEM files"
        raise ConfigurationError(
            f"The certificate {certificate} and the key {key} cannot be used: {why}.",
            advice="Both are PEM files, the key without a passphrase, and they belong together.",
        ) from error


def _check_ca(ca: Path) -> None:
    _check_readable(ca)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigurationError(f"{ca} has no certificate.", advice="Give a PEM file with the CA's.") from error


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True, kw_only=True)
class Started:
    """That requests are answered at ``url``; ``token`` is the bootstrapped user's, or "".

    ``admin`` and ``password`` are of the first user, if this start made it: nobody else has the password.
    """

    url: str
    token: str = ""
    admin: str = ""
    password: str = field(default="", repr=False)


async def serve(
    settings: Settings, *, ready: Callable[[Started], None] = lambda started: None, lifeline: int | None = None
) -> None:
    """Run a director until SIGTERM or SIGINT, or until the descriptor ``lifeline`` ends.

    ``ready`` is called once requests are answered.

    Raises:
        ConfigurationError: the settings, the folder or the port cannot be used.
    """
    check_listening(settings)
    log.info("starting", open_files=descriptors.limit())
    with _locked(settings), listening(settings) as listener:
        url = f"{settings.scheme}://{_bracketed(settings.host)}:{listener.getsockname()[1]}"
        vault, store = await open_store(settings)
        try:
            await asyncio.to_thread(_pack, settings.executable)
            started = await _first(store, settings)
            blobs = await open_blobs(settings)
            home = await asyncio.to_thread(_home, settings.name_file)
            where = settings.advertise or url
            async with _reconciling(settings, store, vault, where, home) as fleet:
                desk = Desk(settings, store, blobs, vault, fleet, version("fieldlab-director"), home, where)
                async with _sweeping(Sweeper(store, blobs, settings.limits)):
                    await _answer(desk, listener, lambda: ready(replace(started, url=url)), lifeline)
        finally:
            await store.close()
    if settings.ephemeral:
        shutil.rmtree(settings.data, ignore_errors=True)


async def open_store(settings: Settings) -> tuple[Vault, Store]:
    """The secret and the database of a data folder, made if they are not there, and matched.

    Raises:
        ConfigurationError: they cannot be used, or do not belong together.
    """
    make_private(settings.data)
    vault = open_vault(settings.key_file)
    store = await Database(path=settings.database, url=settings.database_url).open()
    try:
        await store.write(lambda tx: check_canary(tx, vault))
    except ConfigurationError:
        await store.close()
        raise
    return vault, store


async def sweep(settings: Settings) -> Swept:
    """Remove every blob that nothing refers to, beside directors that may be serving.

    Raises:
        ConfigurationError: the database or the blobs cannot be used.
    """
    _, store = await open_store(settings)
    try:
        return await Sweeper(store, await open_blobs(settings), settings.limits).all()
    finally:
        await store.close()


# --- the order of starting -------------------------------------------------------------------------------------------


def make_private(folder: Path) -> None:
    """Make the data folder, if it is not there, and keep others out of it.

    Raises:
        ConfigurationError: it cannot be used.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigurationError(f"The data folder {folder} cannot be used: {error.strerror}.") from error


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    make_private(settings.data)
    with settings.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigurationError(
                f"Another director has the data folder {settings.data} (process {file.read().strip() or 'unknown'}).",
                advice="Stop that one, or give another folder.",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """The port that the settings name.

    Raises:
        ConfigurationError: it cannot be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With its protocol named, asyncio turns Nagle's algorithm off (TCP_NODELAY): else an answer's body waits for the
    # acknowledgement of its head, which its receiver delays by 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigurationError(
                f"Port {settings.port} of {settings.host} cannot be used: {error.strerror}.",
                advice="Give another --port; 0 takes a free one.",
            ) from error
        yield listener


async def open_blobs(settings: Settings) -> Blobs:
    """The blobs of a director, of which the bucket, if there is one, was tried.

    Raises:
        ConfigurationError: the bucket cannot be used.
    """
    shelf: Shelf = FolderShelf(settings.complete_blobs)
    if settings.blobs_url is not None:
        shelf = bucket = BucketShelf(settings.blobs_url, endpoint=settings.blobs_endpoint)
        await bucket.check()
    limits = settings.limits
    uploads = settings.blobs / "partial"
    return Blobs(shelf, uploads, most=limits.blob, reserve=limits.free_disk, patience=limits.body_silence)


def _pack(path: Path) -> None:
    """Make ``fieldlab.pyz`` anew from what is installed.

    The executor's distribution does it, in a process of its own: to the director, the executor is data.
    """
    made = path.with_name(f"{path.name}.new")
    command = [sys.executable, "-P", "-m", "fieldlab_executor", "pack", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PACK_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(f"The executor was not packed within {PACK_SECONDS:.0f} s.") from error
    if done.returncode or not made.exists():
        last = (done.stderr or done.stdout).strip()[-500:]
        raise ConfigurationError(f"The executor could not be packed: {last}", advice="Install fieldlab-director anew.")
    os.replace(made, path)


async def _first(store: Store, settings: Settings) -> Started:
    """Make the first user, if there is nobody to let others in."""
    if settings.bootstrap is not None:
        return Started(url="", token=await _bootstrap(store, settings, settings.bootstrap))
    password = "-".join(new_id()[:5] for _ in range(4))  # 100 random bits
    hashed = await asyncio.to_thread(hash_password, password)

    def first(tx: Tx) -> Started:
        if tx.all(queries.USERS, UserRow):
            return Started(url="")
        accounts.add_user(tx, FIRST_ADMIN, password=hashed, role=Role.ADMIN)
        return Started(url="", admin=FIRST_ADMIN, password=password)

    return await store.write(first)


async def _bootstrap(store: Store, settings: Settings, name: str) -> str:
    if settings.token_file.exists():
        return settings.token_file.read_text().strip()

    def first(tx: Tx) -> str:
        if tx.one(queries.USER_BY_NAME, UserRow, name=name) is None:
            accounts.add_user(tx, name, role=Role.ADMIN)
        return accounts.create_token(tx, name, label="bootstrap").token

    token = await store.write(first)
    _keep(settings.token_file, token)
    return token


def _home(path: Path) -> str:
    """The name of the data folder, which it keeps for good."""
    if not path.exists():
        _keep(path, new_id())
    return path.read_text().strip()


def _keep(path: Path, text: str) -> None:
    written = path.with_suffix(".new")
    with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def _authority(settings: Settings) -> str | None:
    """The PEM text of the CA that executors are to trust."""
    if settings.ca is None:
        return None
    try:
        text = settings.ca.read_text()
        ssl.create_default_context(cadata=text)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigurationError(f"The certificates in {settings.ca} cannot be used: {error}.") from error
    return text


@asynccontextmanager
async def _reconciling(settings: Settings, store: Store, vault: Vault, url: str, home: str) -> AsyncIterator[Fleet]:
    """The connectors, and the loop that uses them, for as long as the director serves."""
    agents: Mapping[str, Builtin] = {KIND: lambda id, notice: AgentInfrastructure(store, id, notice)}
    fleet = ConnectorFleet(
        settings.connectors,
        settings.executable,
        builtin=agents,
        allowed=settings.allowed_addresses,
        open_files=settings.open_files,
    )
    loop = Reconciler(store, fleet, vault, url, home=home, ca=_authority(settings))
    try:
        await loop.start()
        yield fleet
    finally:
        await loop.stop()
        await fleet.close()


@asynccontextmanager
async def _sweeping(sweeper: Sweeper) -> AsyncIterator[None]:
    task = asyncio.create_task(sweeper.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- serving ---------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn, with signals left to ``_answer``, and a word when it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()


async def _answer(desk: Desk, listener: socket.socket, ready: Callable[[], None], lifeline: int | None) -> None:
    settings = desk.settings
    config = server_config(make_http(desk), settings)
    server = _Server(config, ready)
    stopping = asyncio.Event()
    with _stop_on(stopping, lifeline):
        ending = asyncio.create_task(_end(desk, server, stopping))
        try:
            await server.serve(sockets=[listener])
        finally:
            ending.cancel()


async def _end(desk: Desk, server: _Server, stopping: asyncio.Event) -> None:
    await stopping.wait()
    log.info("stopping")
    desk.leaving = True  # nobody is sent here any more, who looks at /readyz
    await asyncio.sleep(desk.settings.stop_delay)
    if desk.settings.ephemeral:
        await _end_runs(desk.store)
    desk.store.notifier.close()
    server.should_exit = True


async def _end_runs(store: Store) -> None:
    """Cancel every run and wait for their ends, so that no executor looks for a director that is gone for good."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + END_RUNS_SECONDS
    with store.notifier.watch(WORK) as watch:
        left = await store.write(lambda tx: cancel_everything(tx, "the director ends"))
        while left and await watch.wait(deadline - loop.time()):
            left = await store.read(lambda tx: len(tx.all(queries.OPEN_EXPERIMENTS, ExperimentRow)))


@contextmanager
def _stop_on(stopping: asyncio.Event, lifeline: int | None) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if lifeline is not None:
        loop.add_reader(lifeline, _hear, lifeline, stopping)
    try:
        yield
    finally:
        if lifeline is not None:
            loop.remove_reader(lifeline)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _hear(lifeline: int, stopping: asyncio.Event) -> None:
    if not os.read(lifeline, 1024):
        asyncio.get_running_loop().remove_reader(lifeline)
        stopping.set()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
