"""The endpoints of ``fieldlab.testing``'s director: requests to answers, in memory.

``FakeTransport`` is what a client has in place of HTTP; it finds the row of ``protocol.ENDPOINTS`` and asks ``Desk``,
which has a function for each row that a user may call. How a run goes is none of its business: it is a ``Source``, be
it played or run for real. ``tests/contract`` holds all this to what the real director answers.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from fieldlab_common import errors as e
from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.events import MAX_EVENT_BYTES, RESERVED_PREFIX
from fieldlab_common.lifecycle import ExperimentState
from fieldlab_common.node import Node
from fieldlab_common.step import check_name
from fieldlab_common.submission import at, check_submit

from fieldlab.ship import Blobs, Order
from fieldlab.source import Readable
from fieldlab.text import listed
from fieldlab.transport import Answer, Request, Stream, json_of

__all__ = ["Ask", "Begin", "Desk", "FakeTransport"]

MOST_PAGE = 1000
MOST_DEPLOYMENTS = 10_000  # as a director allows, unless it is told otherwise
_JSON = {"content-type": "application/json"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ON_THE_WAY = (e.DirectorUnreachable, e.DirectorTimeout, e.BadAnswer)  # errors of the line, not of the director

Begin = Callable[[Order, str, str, bool, Mapping[str, str]], Readable]  # order, name, id, start, secrets


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request, decoded."""

    row: p.Endpoint
    path: Mapping[str, str]
    query: Mapping[str, Any]
    headers: Mapping[str, str]
    body: Any

    @property
    def limit(self) -> int:
        """How many entries are wanted, at most."""
        limit = int(self.query.get("limit", MOST_PAGE))
        if limit < 1:
            raise e.InvalidRequest("limit must be at least 1.", details={"path": "?limit"})
        return min(limit, MOST_PAGE)


@dataclass(kw_only=True)
class _Kept:
    """A run that the desk knows."""

    id: str
    name: str
    request: p.SubmitExperiment
    run: Readable


@dataclass
class _Planned:
    """What a test wants to go wrong at an endpoint."""

    errors: list[e.FieldlabError] = field(default_factory=list)
    lost: int = 0


class FakeTransport:
    """Moves requests to a desk in this process."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def send(self, request: Request) -> Answer:
        """Have it answered."""
        return self._desk.answer(request)

    @contextmanager
    def stream(self, request: Request) -> Iterator[Stream]:
        """Have it answered, and hand the body out in two pieces."""
        answer = self._desk.answer(request)
        half = len(answer.body) // 2
        whole = answer.status < 300
        yield Stream(answer, iter((answer.body[:half], answer.body[half:])) if whole else iter(()))

    def close(self) -> None:
        """Nothing is open."""


class Desk:
    """Answers everything that a user may ask. ``begin`` makes a run of an order."""

    def __init__(self, begin: Begin, clock: Callable[[], float], nodes: Sequence[Node], token: str) -> None:
        self._begin, self._clock, self._token = begin, clock, token
        self._nodes: dict[str, Node] = {node.name: node for node in nodes}
        self._infrastructures: dict[str, p.InfrastructureInfo] = {}
        self._leaving: dict[str, Node] = {}  # nodes of infrastructures that go when the runs on them have ended
        self._secrets: dict[str, tuple[str, float]] = {}
        self._blobs = Blobs()
        self._parts: dict[str, bytearray] = {}
        self._runs: dict[str, _Kept] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._planned: dict[str, _Planned] = {}
        self._numbers = count(1)
        self._lock = threading.RLock()
        self.asked: list[str] = []

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def fail(self, endpoint: str, error: e.FieldlabError, times: int) -> None:
        """Answer so many requests to an endpoint with an error."""
        self._at(endpoint).errors += [error] * times

    def lose(self, endpoint: str, times: int) -> None:
        """Carry out so many requests to an endpoint, and lose the answers."""
        self._at(endpoint).lost += times

    def _at(self, endpoint: str) -> _Planned:
        if endpoint not in p.ENDPOINTS:
            raise e.UnknownNameError(
                f"There is no endpoint {endpoint!r}.", advice=f"There are: {listed(ENDPOINTS, 99)}."
            )
        return self._planned.setdefault(endpoint, _Planned())

    # --- requests and answers -----------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        """Answer a request; what goes wrong on the way is raised, as a transport does."""
        row, path = _route(request)
        with self._lock:
            self.asked.append(row.name)
            planned = self._planned.get(row.name, _Planned())
            wrong = planned.errors.pop(0) if planned.errors else None
            lost = not wrong and planned.lost > 0
            planned.lost -= lost
        if isinstance(wrong, _ON_THE_WAY):
            raise wrong
        try:
            if wrong is not None:
                raise wrong
            answer = self._answer(row, path, request)
        except e.FieldlabError as error:
            answer = _problem(error)
        if lost:
            raise e.DirectorUnreachable("The answer was lost, as the test wanted it.", details={"sent": True})
        return answer

    def _answer(self, row: p.Endpoint, path: Mapping[str, str], request: Request) -> Answer:
        _check_protocol(request.headers)
        if p.Caller.ANYONE not in row.callers and request.headers.get("authorization") != f"Bearer {self._token}":
            raise e.AuthenticationError("The token is not valid.")
        handler = getattr(self, f"_on_{row.name}", None)
        if handler is None:
            raise e.NotFound(f"The fake director has no endpoint {row.name!r}.", advice="Use an embedded director.")
        found = handler(
            Ask(
                row=row,
                path=path,
                query=_query(row, request.url),
                headers=request.headers,
                body=_body(row, request.body or b""),
            )
        )
        if isinstance(found, Answer):
            return found
        return Answer(status=row.status, headers=_JSON, body=wire.dumps(found))

    # --- the director, nodes, secrets ---------------------------------------------------------------------------------

    def _on_health(self, ask: Ask) -> p.Health:
        return p.Health(version="fake", time=self._clock())

    def _on_whoami(self, ask: Ask) -> p.Principal:
        return p.Principal(user="me", role="admin")

    def _on_nodes(self, ask: Ask) -> p.NodeList:
        return p.NodeList(nodes=tuple(self._nodes.values()))

    def _on_infrastructures(self, ask: Ask) -> p.InfrastructureList:
        for name in [one.name for one in self._infrastructures.values() if one.state == "leaving"]:
            if not self._used(name):
                self._let_go(name)
        return p.InfrastructureList(infrastructures=tuple(self._infrastructures.values()))

    def _on_check_infrastructure(self, ask: Ask) -> p.CheckList:
        name = ask.path["infrastructure"]
        if name not in self._infrastructures:
            raise e.NotFound("There is no such infrastructure of yours.")
        mine = [node.name for node in self._nodes.values() if node.infrastructure == name]
        return p.CheckList(lines=tuple(p.CheckLine(node=node, what="executor", said="It is played.") for node in mine))

    def _on_detach_infrastructure(self, ask: Ask) -> p.InfrastructureInfo:
        name = ask.path["infrastructure"]
        if name not in self._infrastructures:
            raise e.NotFound("There is no such infrastructure of yours.")
        users = self._used(name)
        if users and not ask.query.get("drain"):
            raise e.IllegalState(f"Infrastructure {name!r} is used by runs: {', '.join(users)}.")
        if not users:
            return replace(self._let_go(name), state="detached")
        info = self._infrastructures[name] = replace(self._infrastructures[name], state="leaving")
        self._leaving.update({key: node for key, node in self._nodes.items() if node.infrastructure == name})
        self._nodes = {key: node for key, node in self._nodes.items() if node.infrastructure != name}
        return info

    def _used(self, infrastructure: str) -> list[str]:
        """Names of runs that have not ended, with a node of an infrastructure."""
        nodes = {**self._nodes, **self._leaving}
        mine = {name for name, node in nodes.items() if node.infrastructure == infrastructure}
        open_runs = [kept for kept in self._runs.values() if not kept.run.info().state.terminal]
        return [kept.name for kept in open_runs if mine & {spec.node for spec in kept.request.deployments}]

    def _let_go(self, infrastructure: str) -> p.InfrastructureInfo:
        for nodes in (self._nodes, self._leaving):
            for name in [name for name, node in nodes.items() if node.infrastructure == infrastructure]:
                del nodes[name]
        return self._infrastructures.pop(infrastructure)

    def _on_attach_infrastructure(self, ask: Ask) -> p.InfrastructureInfo:
        name, spec = ask.body.name, ask.body.spec
        at("$.name", lambda: check_name(name, "an infrastructure"))
        if name in self._infrastructures:
            raise e.IllegalState(f"There is an infrastructure {name!r} already.", advice="Choose another name.")
        if spec.kind != "local":
            raise e.UnknownConnector(f"There is no connector {spec.kind!r}. There are: local.")
        options: Mapping[str, Any] = spec.body
        prefix, common = options.get("prefix", "local"), options.get("properties", {})
        named: Any = options.get("nodes", 1)
        if isinstance(named, int):
            named = [{"name": f"{prefix}-{n}"} for n in range(1, named + 1)]
        made = [Node.dummy(one["name"], **common, **one.get("properties", {})) for one in named]
        self._nodes.update({node.name: replace(node, infrastructure=name) for node in made})
        url = ask.body.director_url
        info = p.InfrastructureInfo(name=name, kind="local", nodes=len(made), director_url=url)
        self._infrastructures[name] = info
        return info

    def _on_secrets(self, ask: Ask) -> p.SecretList:
        stored = sorted(self._secrets.items())
        return p.SecretList(secrets=tuple(p.SecretInfo(name=name, updated=at) for name, (_, at) in stored))

    def _on_put_secret(self, ask: Ask) -> p.SecretInfo:
        name = at("$.name", lambda: check_name(ask.path["secret"], "a secret"))
        if not 0 < len(ask.body.value) <= p.MAX_SECRET:
            raise e.InvalidRequest(f"A secret has 1 to {p.MAX_SECRET} characters.", details={"path": "$.value"})
        self._secrets[name] = (ask.body.value, self._clock())
        return p.SecretInfo(name=name, updated=self._clock())

    def _on_delete_secret(self, ask: Ask) -> p.Empty:
        if self._secrets.pop(ask.path["secret"], None) is None:
            raise e.NotFound(f"There is no secret {ask.path['secret']!r}.")
        return p.Empty()

    # --- blobs --------------------------------------------------------------------------------------------------------

    def _on_missing_blobs(self, ask: Ask) -> p.BlobList:
        for digest in ask.body.digests:
            _hold_digest(digest)
        return p.BlobList(digests=tuple(d for d in dict.fromkeys(ask.body.digests) if d not in self._blobs.data))

    def _on_blob_status(self, ask: Ask) -> p.BlobStatus:
        digest = _hold_digest(ask.path["digest"])
        if digest in self._blobs.data:
            return p.BlobStatus(digest=digest, offset=len(self._blobs.data[digest]), complete=True)
        return p.BlobStatus(digest=digest, offset=len(self._parts.get(digest, b"")))

    def _on_put_blob(self, ask: Ask) -> p.BlobStatus:
        digest = _hold_digest(ask.path["digest"])
        offset, size = (_needed(ask, name) for name in ("offset", "size"))
        with self._lock:
            if digest not in self._blobs.data:
                part = self._parts.setdefault(digest, bytearray())
                if offset != len(part):
                    raise e.BlobMismatch(f"The next byte is {len(part)}, not {offset}.", details={"offset": len(part)})
                part += ask.body
                if len(part) >= size:
                    self._complete(digest, bytes(self._parts.pop(digest)), size)
        return self._on_blob_status(ask)

    def _complete(self, digest: str, data: bytes, size: int) -> None:
        found = hashlib.sha256(data).hexdigest()
        if len(data) > size or found != digest:
            raise e.BlobMismatch(f"The {len(data)} bytes that came have the SHA-256 {found}, not {digest}.")
        self._blobs.data[digest] = data

    def _on_get_blob(self, ask: Ask) -> Answer:
        data = self._read(ask.path["digest"])
        headers = {"content-type": "application/octet-stream", "accept-ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", ask.headers.get("range", ""))
        if asked is None or not data:
            return Answer(status=200, headers=headers, body=data)
        start, end = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        if start >= len(data):
            refused = _problem(e.InvalidRequest(f"There are only {len(data)} bytes."))
            return Answer(status=416, headers=refused.headers, body=refused.body)
        return Answer(status=206, headers=headers, body=data[start:end])

    def _read(self, digest: str) -> bytes:
        if digest in self._blobs.data:
            return self._blobs.data[digest]
        for kept in list(self._runs.values()):
            try:
                return b"".join(kept.run.blob(digest, 0))
            except e.NotFound:
                continue
        raise e.NotFound("There is no such blob.")

    # --- experiments --------------------------------------------------------------------------------------------------

    def _on_submit(self, ask: Ask) -> p.ExperimentInfo:
        request: p.SubmitExperiment = ask.body
        check_submit(request, most=MOST_DEPLOYMENTS)

        def submitted() -> _Kept:
            there = self._named(request.name)
            if there is not None and request.if_exists == "error":
                raise e.ExperimentExists(f"There is an experiment {request.name!r}.")
            if there is not None and request.if_exists == "attach":
                return there
            return self._store(request, request.name if there is None else self._free_name(request.name))

        return self._once(ask, submitted).run.info()

    def _on_rerun(self, ask: Ask) -> p.ExperimentInfo:
        def again() -> _Kept:
            old = self._kept(ask)
            settings = replace(old.request.settings, start_at=None)
            name = self._free_name(re.sub(r"#\d+$", "", old.name))
            return self._store(replace(old.request, settings=settings, start=ask.body.start), name)

        return self._once(ask, again).run.info()

    def _once(self, ask: Ask, make: Callable[[], _Kept]) -> _Kept:
        """What a request makes; if it is repeated, under the same key, what it made the first time."""
        key, digest = ask.headers.get("idempotency-key", ""), hashlib.sha256(wire.dumps(ask.body)).hexdigest()
        with self._lock:
            if key in self._keys:
                known, made = self._keys[key]
                if known != digest:
                    raise e.InvalidRequest("Idempotency-Key was used for another request.", details={"path": "header"})
                return self._runs[made]
            kept = make()
            if key:
                self._keys[key] = (digest, kept.id)
            return kept

    def _free_name(self, name: str) -> str:
        return next(free for n in count(2) if self._named(free := f"{name}#{n}") is None)

    def _store(self, request: p.SubmitExperiment, name: str) -> _Kept:
        self._hold_there(request)
        placed = tuple((spec, self._nodes[spec.node]) for spec in request.deployments)
        order = Order(name=request.name, deployments=placed, blobs=self._blobs, settings=request.settings)
        secrets = {name: value for name, (value, _) in self._secrets.items()}
        made = f"run-{next(self._numbers)}"
        run = self._begin(order, name, made, request.start, secrets)
        kept = self._runs[made] = _Kept(id=made, name=name, request=request, run=run)
        return kept

    def _on_delete_experiment(self, ask: Ask) -> p.Empty:
        kept = self._kept(ask)
        if not kept.run.info().state.terminal:
            if not ask.query.get("force"):
                raise e.IllegalState(
                    f"Experiment {kept.name!r} has not ended.", advice="Delete it with force, which cancels it first."
                )
            kept.run.cancel("It was deleted.", ())
        del self._runs[kept.id]
        return p.Empty()

    def _hold_there(self, request: p.SubmitExperiment) -> None:
        """Hold that what the request names is here."""
        absent = sorted({spec.node for spec in request.deployments} - set(self._nodes))
        if absent:
            there = ", ".join(self._nodes) or "none"
            raise e.NotFound(f"There is no node {', '.join(absent)}. There are: {there}.", details={"nodes": absent})
        secrets = {name for spec in request.deployments for name in spec.secrets} - set(self._secrets)
        if secrets:
            raise e.NotFound(f"There is no secret {', '.join(sorted(secrets))}.")
        named = {digest for spec in request.deployments for digest in (spec.graph, *spec.blobs)}
        missing = sorted(named - set(self._blobs.data))
        if missing:
            raise e.NotFound(
                f"{len(missing)} blobs of the experiment are not here.", details={"digests": missing[:1000]}
            )

    def _named(self, name: str) -> _Kept | None:
        return next((kept for kept in self._runs.values() if kept.name == name), None)

    def _kept(self, ask: Ask) -> _Kept:
        wanted = ask.path["experiment"]
        kept = self._runs.get(wanted) or self._named(wanted)
        if kept is None:
            raise e.NotFound("There is no such experiment.", advice="client.experiments() lists yours.")
        return kept

    def _of(self, ask: Ask) -> Readable:
        return self._kept(ask).run

    def _on_experiments(self, ask: Ask) -> p.ExperimentPage:
        state, after, limit = ask.query.get("state", ""), ask.query.get("after", ""), ask.limit
        pattern, since = ask.query.get("name", "*").lower(), ask.query.get("since", 0.0)
        if state and state not in {one.value for one in ExperimentState}:
            raise e.InvalidRequest("state must be that of an experiment.", details={"path": "?state"})
        if after and after not in self._runs:
            raise e.InvalidRequest("after must be the `next` of an earlier page.", details={"path": "?after"})
        newest = list(reversed(self._runs))
        infos = [self._runs[one].run.info() for one in newest[newest.index(after) + 1 if after else 0 :]]
        found = [
            replace(info, deployments=(), waits_for=())
            for info in infos
            if state in ("", info.state.value)
            and info.created >= since
            and fnmatchcase(info.name.lower(), pattern.replace("[", "[[]"))
        ]
        page = tuple(found[:limit])
        return p.ExperimentPage(experiments=page, next=page[-1].id if len(found) > limit else None)

    def _on_experiment(self, ask: Ask) -> p.ExperimentInfo:
        return self._of(ask).info()

    def _on_start(self, ask: Ask) -> p.ExperimentInfo:
        return self._of(ask).start()

    def _on_cancel(self, ask: Ask) -> p.ExperimentInfo:
        return self._of(ask).cancel(ask.body.reason, ask.body.deployments)

    def _on_records(self, ask: Ask) -> p.RecordPage:
        run, lane = self._of(ask), str(_needed(ask, "lane"))
        if lane not in set(p.Lane):
            raise e.InvalidRequest("lane must be control or bulk.", details={"path": "?lane"})
        after = ask.query.get("after", 0)
        page = run.records(p.Lane(lane), after, _wait(ask), ask.query.get("deployment", ""))
        if len(page.records) <= ask.limit:
            return page
        return replace(page, records=page.records[: ask.limit], cursor=page.records[ask.limit - 1].seq)

    def _on_events(self, ask: Ask) -> p.EventPage:
        after = ask.query.get("after", 0)
        page = self._of(ask).events(after, _wait(ask))
        return replace(page, events=page.events[: ask.limit], cursor=min(page.cursor, after + ask.limit))

    def _on_send_event(self, ask: Ask) -> Any:
        event = ask.body
        if not event.name or len(event.name) > 200 or event.name.startswith(RESERVED_PREFIX):
            raise e.InvalidRequest("$.name cannot be an event's.", details={"path": "$.name"})
        if len(event.key) > 100:
            raise e.InvalidRequest("$.key must have at most 100 characters.", details={"path": "$.key"})
        if len(json_of(event.data).encode()) > MAX_EVENT_BYTES:
            raise e.EventTooLarge(f"The data of event {event.name!r} is over {MAX_EVENT_BYTES} bytes.")
        return self._of(ask).send(event)

    def _on_artifacts(self, ask: Ask) -> p.ArtifactList:
        return p.ArtifactList(artifacts=self._of(ask).artifacts())


ENDPOINTS = tuple(name for name in p.ENDPOINTS if hasattr(Desk, f"_on_{name}"))


# --- requests ---------------------------------------------------------------------------------------------------------


def _route(request: Request) -> tuple[p.Endpoint, Mapping[str, str]]:
    parts = urlsplit(request.url).path.split("/")
    for row in p.ENDPOINTS.values():
        wanted = row.path.split("/")
        if row.method == request.method and len(wanted) == len(parts):
            pairs = list(zip(wanted, parts, strict=True))
            if all(want == have or want.startswith("{") for want, have in pairs):
                return row, {want[1:-1]: unquote(have) for want, have in pairs if want.startswith("{")}
    raise e.ConfigurationError(f"The fake director is asked for {request.url}, which no row of ENDPOINTS has.")


def _check_protocol(headers: Mapping[str, str]) -> None:
    spoken = headers.get("fieldlab-protocol", "")
    if spoken and spoken not in map(str, p.PROTOCOLS):
        ours = ", ".join(map(str, p.PROTOCOLS))
        raise e.ProtocolMismatch(f"The request speaks protocol {spoken!r}; this director speaks {ours}.")


def _query(row: p.Endpoint, url: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in parse_qsl(urlsplit(url).query):
        if name in row.query:
            try:
                found[name] = text == "true" if row.query[name] is bool else row.query[name](text)
            except ValueError as error:
                raise e.InvalidRequest(
                    f"The query parameter {name!r} is no {row.query[name].__name__}.", details={"path": f"?{name}"}
                ) from error
            if row.query[name] is int and found[name] < 0:
                raise e.InvalidRequest(f"The query parameter {name!r} is out of range.", details={"path": f"?{name}"})
    return found


def _body(row: p.Endpoint, data: bytes) -> Any:
    if row.request is None or row.request is bytes:
        return data
    try:
        return wire.loads(row.request, data or b"{}")
    except e.InvalidMessage as error:
        raise e.InvalidRequest(
            f"The body is not of the documented form: {error.message}", details=error.details
        ) from error


def _needed(ask: Ask, name: str) -> Any:
    if name not in ask.query:
        raise e.InvalidRequest(f"The query parameter {name!r} is missing.", details={"path": f"?{name}"})
    return ask.query[name]


def _wait(ask: Ask) -> float:
    wait = float(ask.query.get("wait", 0.0))
    if not wait >= 0:
        raise e.InvalidRequest("wait must be zero or more seconds.", details={"path": "?wait"})
    return min(wait, 60.0)


def _hold_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise e.InvalidRequest(f"{digest[:80]!r} is not a SHA-256.", details={"path": "digest"})
    return digest


def _problem(error: e.FieldlabError) -> Answer:
    problem = p.Problem(
        title=(type(error).__doc__ or error.code).strip().splitlines()[0],
        status=error.status,
        code=error.code,
        detail=error.message,
        advice=error.advice,
        details=error.details,
        request_id="fake",
    )
    return Answer(
        status=error.status, headers={"content-type": p.PROBLEM, "x-request-id": "fake"}, body=wire.dumps(problem)
    )
