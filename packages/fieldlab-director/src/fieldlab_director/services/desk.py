"""The desk: for each row of ``protocol.ENDPOINTS`` the service of the same name, as HTTP calls it.

Here is what is not of one transaction: the wait of a long-poll, the bytes of a blob, the connector that is asked before
anything is stored. What is asked and answered are messages of the protocol; what is not allowed is a ``FieldlabError``.

A long-poll watches before it reads, so that nothing falls between; it ends when there is something to say, when
its time is up, when its caller has gone, and when the director stops.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fieldlab_common.accounts import Role
from fieldlab_common.errors import IllegalState, InvalidRequest, NotFound, PermissionDenied, Unavailable
from fieldlab_common.events import Event
from fieldlab_common.protocol import (
    PROTOCOLS,
    Ack,
    AgentCalls,
    AgentList,
    ArtifactList,
    BlobList,
    BlobStatus,
    Caller,
    CheckList,
    Claim,
    Credential,
    Empty,
    EventPage,
    ExperimentInfo,
    ExperimentPage,
    Health,
    InfrastructureInfo,
    InfrastructureList,
    Joined,
    JoinToken,
    Lane,
    NodeList,
    Poll,
    Principal,
    RecordPage,
    SecretInfo,
    SecretList,
)
from fieldlab_common.submission import check_submit

from fieldlab_director.services import (
    agents,
    blobs,
    events,
    experiments,
    infrastructures,
    journals,
    quotas,
    records,
    removal,
    secrets,
    survey,
)
from fieldlab_director.services.agents import AgentCaller, agent_caller
from fieldlab_director.services.familiar import Familiar
from fieldlab_director.services.identity import ExecutorCaller, UserCaller, executor_caller, new_id, user_caller
from fieldlab_director.services.infrastructures import Fleet
from fieldlab_director.services.intake import read_upload
from fieldlab_director.services.recent import Recent
from fieldlab_director.services.reception import Reception
from fieldlab_director.services.streams import follow
from fieldlab_director.services.vault import Vault
from fieldlab_director.settings import Settings
from fieldlab_director.store import queries
from fieldlab_director.store.base import Store, Tx, deployment_topic, events_topic, experiment_topic
from fieldlab_director.store.blobs import Blobs
from fieldlab_director.store.shelves import begun

__all__ = ["Ask", "Bytes", "Desk", "EventStream"]

T = TypeVar("T")

POLL_WAIT = 30.0  # an executor's poll is its sign of life, so it comes back before it is missed
TRUSTED = 1.0  # seconds that a token is taken for good: it may be revoked while its owner waits
READY_SECONDS = 5.0  # so long the database may take to answer when somebody looks whether it does
TOLD_WAIT = 5.0  # an executor that was told to stop needs no answer at once, each time again
MOST_TOLD = 10_000  # executors that were told; forgetting them costs each one answer that comes at once
_OFF_LOOP = 256 * 1024  # an upload of more bytes is read in a thread


def _authority(certificate: Path | None) -> bytes:
    """The last certificate of the file, which has issued those before it; empty: there is none."""
    if certificate is None:
        return b""
    begin = b"-----BEGIN CERTIFICATE-----"
    return begin + certificate.read_bytes().rpartition(begin)[2]


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _nobody() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request, decoded: who, what, and ways to read a long body or to learn that the caller has gone.

    ``streaming``: the caller would have a stream; ``allowed`` raises when it may no longer have this. ``address`` is
    where it came from.
    """

    caller: UserCaller | ExecutorCaller | AgentCaller | None
    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any
    stream: Callable[[], AsyncIterator[bytes]]
    gone: Callable[[], Awaitable[None]]
    key: str = ""
    digest: str = ""
    start: int = 0
    end: int | None = None
    streaming: bool = False
    allowed: Callable[[], Awaitable[object]] = _nobody
    address: str = ""

    @property
    def user(self) -> UserCaller:
        """The user who asks; the endpoint's row admits nobody else."""
        assert isinstance(self.caller, UserCaller)
        return self.caller

    @property
    def executor(self) -> ExecutorCaller:
        """The executor that asks; the endpoint's row admits nobody else."""
        assert isinstance(self.caller, ExecutorCaller)
        return self.caller

    @property
    def agent(self) -> AgentCaller:
        """The agent that asks; the endpoint's row admits nobody else."""
        assert isinstance(self.caller, AgentCaller)
        return self.caller

    @property
    def someone(self) -> UserCaller | ExecutorCaller:
        """The user or executor who asks; the endpoint's row admits nobody else."""
        assert isinstance(self.caller, UserCaller | ExecutorCaller)
        return self.caller

    def needed(self, name: str) -> Any:
        """A query parameter that must be there."""
        if name not in self.query:
            raise InvalidRequest(f"The query parameter {name!r} is missing.", details={"path": f"?{name}"})
        return self.query[name]


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """An answer of bytes: ``chunks`` are those from ``start`` up to ``end`` of ``total``."""

    chunks: AsyncIterator[bytes]
    start: int
    end: int
    total: int


@dataclass(frozen=True, kw_only=True)
class EventStream:
    """An answer of server-sent events; None: there will be none any more."""

    chunks: AsyncIterator[bytes] | None


@dataclass
class Desk(Reception):
    """All services, over one store. ``home``: the name of the director's data folder; ``url``: where nodes reach it."""

    settings: Settings
    store: Store
    blobs: Blobs
    vault: Vault
    fleet: Fleet
    version: str
    home: str = ""
    url: str = ""
    leaving: bool = field(default=False, init=False)
    _told: set[tuple[str, str]] = field(default_factory=set, init=False)
    _members: journals.Members = field(default_factory=journals.Members, init=False)
    _recent: Recent = field(default_factory=Recent, init=False)
    _familiar: Familiar = field(default_factory=Familiar, init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.store.notifier.listen(self._familiar.forget)
        limits = self.settings.limits
        self._logs = quotas.Brake(limits.log_burst, every=1 / limits.log_pace)

    async def unready(self) -> str:
        """Why nobody should ask here; "" if all is well."""
        if self.leaving or self.store.notifier.closed:
            return "the director stops"
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.store.read(lambda tx: tx.value(queries.META, name="canary"))
        except (Unavailable, TimeoutError):
            return "the database does not answer"
        return ""

    async def identify(self, token: str) -> UserCaller | ExecutorCaller | AgentCaller:
        """Whose token this is.

        Raises:
            AuthenticationError: nobody's, or not good any more.
        """
        if token.startswith("fle_"):
            known = self._familiar.of(token)
            if known is None:
                key, drain_for = self.vault.executor_key, self.settings.limits.drain_for
                known = await self.store.read(lambda tx: executor_caller(tx, key, token, drain_for=drain_for))
                self._familiar.keep(token, known)
            return known
        if token.startswith("fla_"):
            return await self.store.read(lambda tx: agent_caller(tx, token))
        return await self.store.read(lambda tx: user_caller(tx, token))

    # --- the director ------------------------------------------------------------------------------------------------

    async def health(self, ask: Ask) -> Health:
        """Whether the director serves: the database answers."""
        now = await self.store.read(lambda tx: tx.now)
        if self.store.notifier.closed:
            raise Unavailable("The director is stopping.")
        return Health(version=self.version, protocols=PROTOCOLS, time=now)

    async def executable(self, ask: Ask) -> Bytes:
        """The executor as one file."""
        path = self.settings.executable
        size = (await asyncio.to_thread(path.stat)).st_size
        end = size if ask.end is None else min(ask.end, size)
        return Bytes(chunks=_file(path, ask.start, end), start=ask.start, end=end, total=size)

    async def whoami(self, ask: Ask) -> Principal:
        """Who the token belongs to."""
        user = ask.user
        return Principal(user=user.name, role=user.role.value, scope=user.scope.value, expires=user.expires)

    # --- nodes -------------------------------------------------------------------------------------------------------

    async def nodes(self, ask: Ask) -> NodeList:
        """The caller's nodes."""
        return await self.store.read(lambda tx: infrastructures.nodes(tx, ask.user))

    async def infrastructures(self, ask: Ask) -> InfrastructureList:
        """The caller's infrastructures."""
        return await self.store.read(lambda tx: infrastructures.infrastructures(tx, ask.user))

    async def attach_infrastructure(self, ask: Ask) -> InfrastructureInfo:
        """Ask the connector for the nodes, then store both."""
        name, spec = ask.body.name, ask.body.spec
        trusted = ask.user.role is Role.ADMIN
        if infrastructures.takes_an_admin(spec) and Caller.ADMIN not in ask.user.may:
            raise PermissionDenied(
                "Only an admin may attach the director's own machine, a Docker engine, or a cluster as its user.",
                advice="Ask the director's admin; for a Slurm cluster, give a login node: fl.Slurm(login=...).",
            )
        infrastructures.check_director(ask.body)
        await self.store.read(lambda tx: infrastructures.check_attach(tx, ask.user, name))
        infrastructure_id = new_id()
        found = (await self.fleet.survey(infrastructure_id, name, spec.kind, spec.body, trusted=trusted)).nodes
        user, most = ask.user, self.settings.limits.infrastructures

        def store(tx: Tx) -> InfrastructureInfo:
            made = infrastructures.attach(tx, user, self.vault, infrastructure_id, ask.body, found, self.home)
            quotas.hold_infrastructures(tx, user.id, most)
            return made

        return await self.store.write(store)

    async def check_infrastructure(self, ask: Ask) -> CheckList:
        """Try an infrastructure, and note which nodes it has now."""
        row = await self.store.read(lambda tx: infrastructures.own(tx, ask.user, ask.path["infrastructure"]))
        if row.home not in (None, self.home):
            raise IllegalState(f"{row.name!r} is the machine of another director.", advice="Ask that one to check it.")
        options, trusted = self.vault.open(row.options), ask.user.role is Role.ADMIN
        surveyed = await self.fleet.check(row.id, row.name, row.kind, options, trusted=trusted)
        await self.store.write(lambda tx: survey.note(tx, row.id, surveyed))
        return CheckList(lines=surveyed.checked.lines)

    async def detach_infrastructure(self, ask: Ask) -> InfrastructureInfo:
        """Let an infrastructure go."""
        name, drain = ask.path["infrastructure"], ask.query.get("drain", False)
        return await self.store.write(lambda tx: infrastructures.detach(tx, ask.user, name, drain=drain))

    async def share_infrastructure(self, ask: Ask) -> InfrastructureInfo:
        """Let a user use an infrastructure."""
        path = ask.path
        return await self.store.write(
            lambda tx: infrastructures.share(tx, ask.user, path["infrastructure"], path["user"])
        )

    async def unshare_infrastructure(self, ask: Ask) -> InfrastructureInfo:
        """Take that back."""
        path = ask.path
        return await self.store.write(
            lambda tx: infrastructures.unshare(tx, ask.user, path["infrastructure"], path["user"])
        )

    # --- machines that dial out --------------------------------------------------------------------------------------

    async def join_token(self, ask: Ask) -> JoinToken:
        """A token to join an infrastructure with."""
        name, request = ask.path["infrastructure"], ask.body
        token, expires, url = await self.store.write(lambda tx: agents.join_token(tx, ask.user, name, request))
        pem = await asyncio.to_thread(_authority, self.settings.ca or self.settings.certificate)
        pin = hashlib.sha256(pem).hexdigest() if pem else ""
        return JoinToken(token=token, url=url or self.url, expires=expires, uses=request.uses, pin=pin)

    async def agents(self, ask: Ask) -> AgentList:
        """The machines that joined an infrastructure."""
        return await self.store.read(lambda tx: agents.agents(tx, ask.user, ask.path["infrastructure"]))

    async def remove_agent(self, ask: Ask) -> Empty:
        """Let a machine be a node no longer."""
        path = ask.path
        await self.store.write(lambda tx: agents.remove(tx, ask.user, path["infrastructure"], path["agent"]))
        return Empty()

    async def join(self, ask: Ask) -> Joined:
        """Make a machine a node."""
        return await self.store.write(lambda tx: agents.join(tx, ask.body))

    async def authority(self, ask: Ask) -> Bytes:
        """The certificate that agents are to trust, if the director has one of its own."""
        pem = await asyncio.to_thread(_authority, self.settings.ca or self.settings.certificate)
        if not pem:
            raise NotFound("The director has no certificate of its own.")
        return Bytes(chunks=_once(pem), start=0, end=len(pem), total=len(pem))

    async def agent_poll(self, ask: Ask) -> AgentCalls:
        """What an agent is asked; asking is its sign of life."""
        agent, request = ask.agent, ask.body
        if not 0 < len(request.instance) <= 64:
            raise InvalidRequest("$.instance must have 1 to 64 characters.", details={"path": "$.instance"})

        def take(tx: Tx) -> AgentCalls:
            return agents.poll(tx, agent, request)

        found = await self.store.write(take)
        if found.calls or found.cancelled or not self._wait(ask):
            return found

        def question(tx: Tx) -> bool:
            return agents.waiting(tx, agent, request.instance)

        news = await self._until(ask, question, bool, self._wait(ask), agents.agent_topic(agent.agent_id))
        return await self.store.write(take) if news else found

    async def agent_answers(self, ask: Ask) -> Empty:
        """Take what an agent answers."""
        await self.store.write(lambda tx: agents.take_answers(tx, ask.agent, ask.body))
        return Empty()

    async def renew_agent(self, ask: Ask) -> Credential:
        """Give an agent its next credential."""
        return await self.store.write(lambda tx: agents.renew(tx, ask.agent))

    # --- secrets -----------------------------------------------------------------------------------------------------

    async def secrets(self, ask: Ask) -> SecretList:
        """The caller's secrets, without their texts."""
        return await self.store.read(lambda tx: secrets.secrets(tx, ask.user))

    async def put_secret(self, ask: Ask) -> SecretInfo:
        """Store a secret."""
        name, value = ask.path["secret"], ask.body.value
        return await self.store.write(lambda tx: secrets.put(tx, ask.user, self.vault, name, value))

    async def delete_secret(self, ask: Ask) -> Empty:
        """Forget a secret."""
        return await self.store.write(lambda tx: secrets.delete(tx, ask.user, ask.path["secret"]))

    # --- blobs -------------------------------------------------------------------------------------------------------

    async def missing_blobs(self, ask: Ask) -> BlobList:
        """Which of some blobs the caller has yet to send."""
        found = await self.store.write(lambda tx: blobs.missing(tx, ask.user, ask.body.digests))
        return BlobList(digests=found)

    async def blob_status(self, ask: Ask) -> BlobStatus:
        """How much of a blob is here."""
        digest = ask.path["digest"]
        admission = await self.store.read(lambda tx: blobs.admit(tx, ask.someone, digest))
        there = admission.size
        if there is not None:
            if isinstance(ask.caller, ExecutorCaller):  # another deployment sent the same bytes: these need not be sent
                await self.store.write(lambda tx: blobs.arrived(tx, ask.executor, digest, there))
            return BlobStatus(digest=digest, offset=there, complete=True)
        return BlobStatus(digest=digest, offset=await asyncio.to_thread(self.blobs.offset, admission.scope, digest))

    async def get_blob(self, ask: Ask) -> Bytes:
        """The bytes of a blob."""
        digest = ask.path["digest"]
        size = await self.store.read(lambda tx: blobs.locate(tx, ask.someone, digest))
        end = size if ask.end is None else min(ask.end, size)
        start = min(ask.start, size + 1)
        chunks = await begun(self.blobs.shelf.read(digest, start, end))
        return Bytes(chunks=chunks, start=start, end=end, total=size)

    async def put_blob(self, ask: Ask) -> BlobStatus:
        """Take bytes of a blob, from an offset on."""
        digest, offset, size = ask.path["digest"], ask.needed("offset"), ask.needed("size")
        most = self.settings.limits.user_bytes if offset == 0 else None
        admission = await self.store.read(lambda tx: blobs.admit(tx, ask.someone, digest, size, most=most))
        there = admission.size
        if there is None:
            reached = await self.blobs.write(admission.scope, digest, offset, size, ask.stream())
            if reached < size:
                return BlobStatus(digest=digest, offset=reached)
            there = size
        await self.store.write(lambda tx: blobs.arrived(tx, ask.someone, digest, there))
        return BlobStatus(digest=digest, offset=there, complete=True)

    # --- experiments -------------------------------------------------------------------------------------------------

    async def submit(self, ask: Ask) -> ExperimentInfo:
        """Store an experiment."""
        check_submit(ask.body, most=self.settings.limits.deployments)
        return await self._store_experiment(
            ask, lambda tx: experiments.submit(tx, ask.user, ask.body, key=ask.key, digest=ask.digest)
        )

    async def experiments(self, ask: Ask) -> ExperimentPage:
        """A page of the caller's experiments."""
        texts = {name: ask.query.get(name, "") for name in ("state", "name", "after")}
        since, limit = ask.query.get("since", 0.0), self._limit(ask)
        return await self.store.read(
            lambda tx: experiments.experiments(tx, ask.user, **texts, since=since, limit=limit)
        )

    async def experiment(self, ask: Ask) -> ExperimentInfo:
        """How an experiment stands."""
        return await self.store.read(lambda tx: experiments.experiment(tx, ask.user, ask.path["experiment"]))

    async def start(self, ask: Ask) -> ExperimentInfo:
        """Ask for its start."""
        return await self.store.write(lambda tx: experiments.start(tx, ask.user, ask.path["experiment"]))

    async def cancel(self, ask: Ask) -> ExperimentInfo:
        """Ask for its stop."""
        return await self.store.write(lambda tx: experiments.cancel(tx, ask.user, ask.path["experiment"], ask.body))

    async def rerun(self, ask: Ask) -> ExperimentInfo:
        """Store an experiment once more."""
        return await self._store_experiment(
            ask,
            lambda tx: experiments.rerun(
                tx, ask.user, ask.path["experiment"], ask.body, key=ask.key, digest=ask.digest
            ),
        )

    async def delete_experiment(self, ask: Ask) -> Empty:
        """Let an experiment go."""
        force = bool(ask.query.get("force", False))
        await self.store.write(lambda tx: removal.delete(tx, ask.user, ask.path["experiment"], force=force))
        return Empty()

    async def records(self, ask: Ask) -> RecordPage:
        """Records of a lane after a cursor."""
        lane, after, limit = _lane(ask.needed("lane")), ask.query.get("after", 0), self._limit(ask)
        most, only = self.settings.limits.page_bytes, ask.query.get("deployment", "")

        def question(tx: Tx) -> tuple[str, RecordPage, bool]:
            return records.records(
                tx, ask.user, ask.path["experiment"], lane, only, after=after, limit=limit, most_bytes=most
            )

        experiment_id, first, whole = await self.store.read(question)
        if first.records or whole or not self._wait(ask):
            return first

        def news(found: tuple[str, RecordPage, bool]) -> bool:
            return bool(found[1].records) or found[2] or found[1].state is not first.state

        return (await self._until(ask, question, news, self._wait(ask), experiment_topic(experiment_id)))[1]

    async def events(self, ask: Ask) -> EventPage | EventStream:
        """Events after a cursor."""
        after, limit, most = ask.query.get("after", 0), self._limit(ask), self.settings.limits.page_bytes

        def question(tx: Tx, after: int = after) -> tuple[str, EventPage]:
            return events.events(tx, ask.user, ask.path["experiment"], after=after, limit=limit, most_bytes=most)

        async def read(after: int) -> EventPage:
            return (await self.store.read(lambda tx: question(tx, after)))[1]

        experiment_id, first = await self.store.read(question)
        if ask.streaming:
            if first.state.terminal and not first.events:
                return EventStream(chunks=None)
            alive, notifier = self.settings.limits.keep_alive, self.store.notifier
            return EventStream(
                chunks=follow(notifier, experiment_id, after, read=read, allowed=ask.allowed, alive_every=alive)
            )
        if first.events or first.state.terminal or not self._wait(ask):
            return first

        def news(found: tuple[str, EventPage]) -> bool:
            return bool(found[1].events) or found[1].state is not first.state

        return (await self._until(ask, question, news, self._wait(ask), events_topic(experiment_id)))[1]

    async def send_event(self, ask: Ask) -> Event:
        """Append an event."""
        most = self.settings.limits.events

        def send(tx: Tx) -> Event:
            return events.send_event(tx, ask.user, ask.path["experiment"], ask.body, most=most)

        return await self.store.write(send)

    async def artifacts(self, ask: Ask) -> ArtifactList:
        """Every artifact that was announced."""
        return await self.store.read(lambda tx: records.artifacts(tx, ask.user, ask.path["experiment"]))

    # --- executors ---------------------------------------------------------------------------------------------------

    async def claim(self, ask: Ask) -> Claim:
        """Give a deployment to the executor that asks first."""
        if not ask.body.journal_id or len(ask.body.journal_id) > 64:
            raise InvalidRequest("$.journal_id must have 1 to 64 characters.", details={"path": "$.journal_id"})
        return await self.store.write(lambda tx: journals.claim(tx, ask.executor, self.vault, self._members, ask.body))

    async def report(self, ask: Ask) -> Ack:
        """Take records of a journal."""
        lane, journal, limits = _lane(ask.needed("lane")), ask.needed("journal"), self.settings.limits
        if lane is Lane.BULK:
            quotas.hold_pace(self._logs, ask.executor.deployment_id, len(ask.body), limits.log_pace)
        if len(ask.body) > _OFF_LOOP:
            upload = await asyncio.to_thread(read_upload, lane, ask.body)
        else:
            upload = read_upload(lane, ask.body)
        return await self.store.write(lambda tx: journals.report(tx, ask.executor, journal, upload, limits))

    async def poll(self, ask: Ask) -> Poll:
        """What an executor is to be told; asking is its sign of life."""
        after, journal, limits = ask.query.get("after", 0), ask.needed("journal"), self.settings.limits

        def question(tx: Tx) -> tuple[Any, Poll]:
            bounds = {"limit": limits.page, "most_bytes": limits.page_bytes}
            return journals.poll(tx, ask.executor, self._recent, journal, after, **bounds)

        row, first = await self.store.read(question)
        if journals.wants_sign(row, first.server_time):
            await self.store.write(lambda tx: journals.seen(tx, journals.deployment_of(tx, ask.executor)))
        told = (row.id, journal)
        wait = min(self._wait(ask), TOLD_WAIT if told in self._told else POLL_WAIT)
        if first.cancel is not None:
            fresh = told not in self._told
            if len(self._told) >= MOST_TOLD:
                self._told.clear()
            self._told.add(told)
            wait = 0.0 if fresh else wait
        topics = events_topic(row.experiment_id), deployment_topic(row.id)
        if first.events and await self._in_turn(topics[0]):
            return (await self.store.read(question))[1]
        if first.events or not wait:
            return first

        def news(found: tuple[Any, Poll]) -> bool:
            return bool(found[1].events) or (found[1].cancel is not None and first.cancel is None)

        return (await self._until(ask, question, news, wait, *topics))[1]

    async def _store_experiment(self, ask: Ask, store: Callable[[Tx], ExperimentInfo]) -> ExperimentInfo:
        def run(tx: Tx) -> ExperimentInfo:
            info = store(tx)
            quotas.hold_experiments(tx, ask.user.id, self.settings.limits.experiments)
            return info

        return await self.store.write(run)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _limit(self, ask: Ask) -> int:
        limit = int(ask.query.get("limit", self.settings.limits.page))
        if limit < 1:
            raise InvalidRequest("limit must be at least 1.", details={"path": "?limit"})
        return min(limit, self.settings.limits.page)

    def _wait(self, ask: Ask) -> float:
        wait = float(ask.query.get("wait", 0.0))
        if not wait >= 0:
            raise InvalidRequest("wait must be zero or more seconds.", details={"path": "?wait"})
        return min(wait, self.settings.limits.wait)

    async def _in_turn(self, topic: str) -> bool:
        """Wait until it is a wide topic's turn again; whether there was a wait."""
        pause = self.store.notifier.pause(topic)
        if pause > 0:
            with self.store.notifier.watch() as watch:  # over nothing: it ends with the director, or in time
                await watch.wait(pause)
        return pause > 0

    async def _until(
        self, ask: Ask, question: Callable[[Tx], T], news: Callable[[T], bool], wait: float, *topics: str
    ) -> T:
        """The answer to ``question`` when it is ``news``, or when ``wait`` seconds are over, to who may still ask."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = began + wait
        with self.store.notifier.watch(*topics) as watch:
            leaving = asyncio.ensure_future(ask.gone())
            leaving.add_done_callback(lambda _: watch.leave())
            try:
                while True:
                    found = await self.store.read(question)
                    if news(found) or not await watch.wait(deadline - loop.time()):
                        if loop.time() - began > TRUSTED:
                            await ask.allowed()
                        return found
            finally:
                leaving.cancel()


def _lane(text: str) -> Lane:
    try:
        return Lane(text)
    except ValueError:
        raise InvalidRequest("lane must be control or bulk.", details={"path": "?lane"}) from None


async def _file(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    with await asyncio.to_thread(path.open, "rb") as file:
        await asyncio.to_thread(file.seek, start)
        while start < end and (chunk := await asyncio.to_thread(file.read, min(1 << 20, end - start))):
            start += len(chunk)
            yield chunk
