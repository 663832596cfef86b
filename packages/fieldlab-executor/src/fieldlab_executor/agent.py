"""A machine that dials out: it joins a director, and from then on keeps executors for it, asked through a long-poll.

Who it is stands in one file of the node's state folder (0600), written anew before a new credential is used, so that a
power cut at any moment leaves one that is good. ``Agent`` waits for calls in one thread and sends answers from another;
the keeper, which does the work, has the event loop. While the director cannot be reached it tries again, for days, with
growing pauses. What was started goes on without it; when it comes back, it finds that again.

Executors that it starts dial the same address, and trust the same certificate, as the agent itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import queue
import random
import secrets
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fieldlab_common.calls import Answerer
from fieldlab_common.errors import AuthenticationError, ConfigurationError, FieldlabError
from fieldlab_common.joining import AgentAnswers, AgentCalls, AgentPoll, Credential, Join, Joined
from fieldlab_common.keeping import (
    Done,
    DrainRequest,
    Frames,
    KeeperOpening,
    Launched,
    LaunchRequest,
    Listed,
    Nothing,
    frame,
)
from fieldlab_common.node import Node
from fieldlab_common.wire import dumps

from fieldlab_executor import transport
from fieldlab_executor.facts import facts
from fieldlab_executor.keeper import Keeper, state_folder
from fieldlab_executor.starter import private, write_private

__all__ = ["Agent", "Identity", "join", "load"]

WAIT = 60.0  # seconds that one poll may be held
MARGIN = 30.0  # seconds beyond that for the answer to come
ASK_SECONDS = 30.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
MOST_ANSWERS = 1000  # that wait to be sent; the director asks again for what was dropped


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who this machine is to a director. ``ca`` is a file of certificates to trust, or None: those of the system."""

    url: str
    agent: str
    name: str
    credential: str
    expires: float
    ca: str | None = None
    slots: int = 1
    properties: Mapping[str, Any] | None = None

    def transport(self) -> transport.HttpTransport:
        """A way to ask the director."""
        return _transport(self.url, self.credential, self.ca)

    def node(self) -> Node:
        """This machine as it is now, with what its owner said of it."""
        return _described(facts(self.name), self.slots, self.properties or {})


def identity_file(state: Path | None = None) -> Path:
    """Where the identity stands."""
    return (state or state_folder()) / "agent.json"


def load(path: Path) -> Identity:
    """The identity of this machine.

    Raises:
        ConfigurationError: it has not joined, or the file is not as it should be.
    """
    try:
        return Identity(**json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise ConfigurationError(
            "This machine has not joined a director.", advice="Join one: fieldlab.pyz join URL TOKEN"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} is not an agent's identity: {error}.", advice="Join again.") from error


def save(path: Path, identity: Identity) -> None:
    """Write the identity; it is on the disk, whole, when this returns."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, json.dumps(vars(identity)).encode())
    for name in (path, path.parent):
        fd = os.open(name, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def join(
    url: str, token: str, path: Path, *, name: str = "", slots: int = 1, properties: Mapping[str, Any] | None = None
) -> Identity:
    """Join the director at ``url``, and remember it in ``path``.

    ``token`` may end in ``.`` and the SHA-256 of the certificate to trust: that is then fetched, compared and kept.

    Raises:
        AuthenticationError: the token is not good. ConfigurationError: the certificate is another one.
    """
    token, _, pin = token.partition(".")
    ca = _pinned(url, pin, path.with_name("ca.pem")) if pin else None
    node = _described(facts(name), slots, properties or {})
    asked = _transport(url, "", ca)
    try:
        body = dumps(Join(token=token, node=node))
        joined: Joined = transport.interpret("join", asked.request("join", body=body, timeout=ASK_SECONDS))
    finally:
        asked.close()
    identity = Identity(
        url=url,
        agent=joined.agent,
        name=joined.name,
        credential=joined.credential,
        expires=joined.expires,
        ca=ca,
        slots=slots,
        properties=dict(properties or {}),
    )
    save(path, identity)
    return identity


def _described(node: Node, slots: int, properties: Mapping[str, Any]) -> Node:
    return replace(node, slots=slots, properties={**node.properties, **properties})


def _transport(url: str, credential: str, ca: str | None) -> transport.HttpTransport:
    return transport.HttpTransport(url, credential, ca=ca, proxy=transport.proxy_for(url, os.environ))


def _pinned(url: str, pin: str, path: Path) -> str:
    """The certificate of the director, which is fetched from anybody, and kept only if it is the one that was named."""
    import http.client

    parts = urlsplit(url)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what comes is compared with the pin
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, context=context, timeout=ASK_SECONDS)
    try:
        connection.request("GET", parts.path.rstrip("/") + "/v1/ca.pem")
        pem = connection.getresponse().read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigurationError(f"The certificate of {url} could not be fetched: {error}.") from error
    finally:
        connection.close()
    if hashlib.sha256(pem).hexdigest() != pin:
        raise ConfigurationError(
            f"What answers at {url} has another certificate than the join command names.",
            advice="Ask for a new join command; if that changes nothing, somebody stands between.",
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "wb", opener=private) as file:
        file.write(pem)
    return str(path)


class _OwnKeeper(Keeper):
    """A keeper whose executors dial what the agent dials."""

    identity: Identity

    async def nodes(self, request: Nothing) -> Listed:
        """This machine, with what its owner said of it."""
        return Listed(nodes=(await asyncio.to_thread(self.identity.node),))

    async def launch(self, request: LaunchRequest) -> Launched:
        """Start the executor of an epoch."""
        return await super().launch(replace(request, launch=self._own(request.launch)))

    async def drain(self, request: DrainRequest) -> Done:
        """Ship what a dead executor's journal holds."""
        return await super().drain(replace(request, launch=self._own(request.launch)))

    def _own(self, launch: Any) -> Any:
        return replace(launch, director=self.identity.url, ca=self.identity.ca)


class Agent:
    """The agent's life. ``command`` runs the executor's command line; ``say`` is told what people should know."""

    def __init__(
        self,
        path: Path,
        command: list[str],
        *,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._path, self._identity = path, load(path)
        self._command, self._say, self._clock, self._jitter = command, say, clock, jitter
        self._transport = self._identity.transport()
        self._instance = secrets.token_hex(16)
        self._stopped = threading.Event()
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue(MOST_ANSWERS)
        self._frames = Frames()
        self._failure: FieldlabError | None = None

    def run(self) -> None:
        """Serve until ``stop``.

        Raises:
            AuthenticationError: the director does not know this machine any more, or there are two of it.
        """
        asyncio.run(self._serve())
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End: what was started goes on."""
        self._stopped.set()
        self._transport.close()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        calls: asyncio.Queue[bytes] = asyncio.Queue()

        def give(data: bytes) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(calls.put_nowait, data)

        answerer = Answerer("The agent", self._open, self._answered)
        threads = [
            threading.Thread(target=self._poll, args=(give,), name="poll", daemon=True),
            threading.Thread(target=self._send, name="answers", daemon=True),
        ]
        root = KeeperOpening(root=f"agent/{self._identity.agent}")
        give(frame({"id": 0, "method": "open", "body": vars(root)}))
        for thread in threads:
            thread.start()
        await answerer.serve(calls.get)

    def _open(self, body: Any, notice: Callable[[str], None]) -> Keeper:
        keeper = _OwnKeeper(KeeperOpening(**body), notice, self._command)
        keeper.identity = self._identity
        return keeper

    # --- the thread that asks what there is to do ---

    def _poll(self, give: Callable[[bytes], None]) -> None:
        node: Node | None = self._identity.node()
        failures = 0
        while not self._stopped.is_set():
            try:
                self._renew()
                found = self._asked("agent_poll", AgentPoll(instance=self._instance, node=node), wait=WAIT)
                node, failures = None, 0
            except AuthenticationError as error:
                self._failure = error
                break
            except FieldlabError as error:
                failures += 1
                self._say(f"The director cannot be asked: {error}")
                self._stopped.wait(self._pause(failures))
                continue
            _hand_over(found, give)
        self._stopped.set()
        give(b"")

    def _pause(self, failures: int) -> float:
        grown = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 10))
        return grown * (0.5 + 0.5 * self._jitter())

    def _renew(self) -> None:
        """Have a new credential when half of the time of the present one is over."""
        if self._clock() < self._identity.expires - 12 * 3600.0:
            return
        credential: Credential = self._asked("renew_agent", None)
        self._identity = replace(self._identity, credential=credential.credential, expires=credential.expires)
        save(self._path, self._identity)
        self._transport = self._identity.transport()

    def _asked(self, endpoint: str, body: Any, wait: float = 0.0) -> Any:
        data = b"{}" if body is None else dumps(body)
        query = {"wait": wait} if wait else None
        timeout = wait + MARGIN if wait else ASK_SECONDS
        answer = self._transport.request(endpoint, query=query, body=data, timeout=timeout)
        return transport.interpret(endpoint, answer)

    # --- the thread that answers ---

    def _answered(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            entry = ("notice", message["notice"]) if "notice" in message else (str(message["id"]), message)
            if entry[0] != "0":
                with contextlib.suppress(queue.Full):
                    self._answers.put_nowait(entry)

    def _send(self) -> None:
        failures = 0
        while True:
            entries = [self._answers.get()]
            with contextlib.suppress(queue.Empty):
                while len(entries) < 100:
                    entries.append(self._answers.get_nowait())
            body = AgentAnswers(
                answers={name: _answer(message) for name, message in entries if name != "notice"},
                notices=tuple(text for name, text in entries if name == "notice"),
            )
            while not self._stopped.is_set():
                try:
                    self._asked("agent_answers", body)
                    failures = 0
                    break
                except AuthenticationError:
                    return  # the other thread finds out, too, and says it
                except FieldlabError:
                    failures += 1
                    self._stopped.wait(self._pause(failures))


def _answer(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: message[name] for name in ("body", "error") if name in message}


def _hand_over(found: AgentCalls, give: Callable[[bytes], None]) -> None:
    for call in found.calls:
        message = {"id": call.number, "method": call.method, "body": call.body, "deadline": call.deadline}
        give(frame(message))
    for number in found.cancelled:
        give(frame({"cancel": number}))


def warn(text: str) -> None:
    """Say it where people read."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
