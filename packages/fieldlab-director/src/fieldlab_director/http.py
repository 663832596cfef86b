"""HTTP in front of the desk: one handler for every row of ``protocol.ENDPOINTS``. No decision lives here.

Authenticate, authorise by the row's callers, decode strictly, call the service of the row's name, encode. Every error
leaves as a problem document (RFC 9457) with a stable code and the request's id, never as a traceback; what nobody
foresaw is logged with that id. A body is read no further than its limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import structlog
from fieldlab_common.accounts import Scope
from fieldlab_common.errors import (
    AuthenticationError,
    FieldlabError,
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ProtocolMismatch,
    Unavailable,
)
from fieldlab_common.protocol import ENDPOINTS, PROBLEM, PROTOCOLS, Caller, Endpoint, Problem
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fieldlab_director.encoding import opener
from fieldlab_director.openapi import openapi
from fieldlab_director.services.agents import AgentCaller
from fieldlab_director.services.desk import Ask, Bytes, Desk, EventStream
from fieldlab_director.services.identity import ExecutorCaller, UserCaller
from fieldlab_director.settings import Limits

__all__ = ["make_http"]

log = structlog.get_logger("fieldlab.http")

Principals = UserCaller | ExecutorCaller | AgentCaller

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
_WHERE = re.compile(r" - at `(\$[^`]*)`$")
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_DRAINED = 16 * 1024 * 1024  # so much of a refused body is read, so that its sender gets to read the answer
_DRAIN_SECONDS = 5.0
_FOR_ALL_VERSIONS = frozenset({"health", "executable", "claim"})  # from which a caller learns what is spoken here
_USERS = frozenset({Caller.VIEWER, Caller.MEMBER, Caller.ADMIN, Caller.ACCOUNT})
_ENCODE = msgspec.json.Encoder().encode


def make_http(desk: Desk, *, lifespan: Callable[[Starlette], Any] | None = None) -> Starlette:
    """The ASGI application."""
    document = _ENCODE(openapi(desk.version))

    async def described(request: Request) -> Response:
        return Response(document, media_type="application/json")

    routes = [Route(row.path, _endpoint(desk, row), methods=[row.method]) for row in ENDPOINTS.values()]
    routes.append(Route("/openapi.json", described, methods=["GET"]))
    routes.append(Route("/healthz", _alive, methods=["GET"]))
    routes.append(Route("/readyz", _ready(desk), methods=["GET"]))
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})


def _endpoint(desk: Desk, row: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    service: Callable[[Ask], Awaitable[Any]] = getattr(desk, row.name)
    decoder: msgspec.json.Decoder[Any] | None = None
    if row.request not in (None, bytes):
        decoder = msgspec.json.Decoder(row.request)

    async def endpoint(request: Request) -> Response:
        began, request_id = time.perf_counter(), secrets.token_hex(8)
        run = {"experiment": name} if (name := request.path_params.get("experiment")) else {}
        with structlog.contextvars.bound_contextvars(request_id=request_id, endpoint=row.name, **run):
            try:
                _settle(row, request)
                caller = await _authorise(desk, row, request)
                ask = await _decode(desk, row, request, caller, decoder)
                response = _respond(row, request, await service(ask))
            except ClientDisconnect:
                response = Response(status_code=499)
            except FieldlabError as error:
                response = await _refuse(request, error, request_id)
            except Exception as error:  # the last place where a fault can become an answer
                log.exception("fault", error=repr(error))
                response = await _refuse(request, InternalError("The director failed."), request_id)
            response.headers["x-request-id"] = request_id
            log.info("request", status=response.status_code, ms=round((time.perf_counter() - began) * 1000, 1))
            return response

    return endpoint


async def _alive(request: Request) -> Response:
    """For who restarts processes: this one lives."""
    return Response(b'{"status":"ok"}', media_type="application/json")


def _ready(desk: Desk) -> Callable[[Request], Awaitable[Response]]:
    """For who sends requests: they would be answered here."""

    async def ready(request: Request) -> Response:
        why = await desk.unready()
        body = {"status": "unready", "why": why} if why else {"status": "ok"}
        return Response(_ENCODE(body), 503 if why else 200, media_type="application/json")

    return ready


# --- how -------------------------------------------------------------------------------------------------------------


def _settle(row: Endpoint, request: Request) -> None:
    """Hold that the caller speaks a version of the protocol that the director does, if it says which."""
    spoken = request.headers.get("fieldlab-protocol", "").strip()
    if not spoken or row.name in _FOR_ALL_VERSIONS or spoken in map(str, PROTOCOLS):
        return
    ours = ", ".join(map(str, PROTOCOLS))
    raise ProtocolMismatch(
        f"The request speaks protocol {spoken[:20]!r}; this director speaks {ours}.",
        advice="Use a fieldlab of this director's release, or have the director upgraded.",
        details={"protocols": list(PROTOCOLS)},
    )


# --- who -------------------------------------------------------------------------------------------------------------


async def _authorise(desk: Desk, row: Endpoint, request: Request) -> Principals | None:
    if Caller.ANYONE in row.callers:
        return None
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise AuthenticationError("The request has no token.")
    caller = await desk.identify(token.strip())
    structlog.contextvars.bind_contextvars(**_logged(caller))  # each request has a context of its own
    if caller.may.isdisjoint(row.callers):
        raise PermissionDenied(f"This token may not call {row.name!r}.", advice=_advice(row, caller))
    return caller


def _logged(caller: Principals) -> dict[str, str]:
    if isinstance(caller, UserCaller):
        return {"user": caller.name}
    return {"deployment": caller.deployment_id} if isinstance(caller, ExecutorCaller) else {}


def _advice(row: Endpoint, caller: Principals) -> str:
    """What somebody needs who may not call an endpoint."""
    if not isinstance(caller, UserCaller) or not _USERS.intersection(row.callers):
        return ""
    wanted = replace(caller, scope=Scope.ADMIN)
    if not wanted.may.isdisjoint(row.callers):
        return f"The token is of scope {caller.scope.value!r}; it takes one of a wider scope, or to log in."
    return f"{caller.name!r} has the role {caller.role.value!r}; an admin can give another."


# --- what ------------------------------------------------------------------------------------------------------------


async def _decode(
    desk: Desk,
    row: Endpoint,
    request: Request,
    caller: Principals | None,
    decoder: msgspec.json.Decoder[Any] | None,
) -> Ask:
    raw, limits = b"", desk.settings.limits
    if row.name == "put_blob":  # its bytes are never gathered in memory, and are hashed as they come
        opener(request.headers.get("content-encoding", ""), 0, {})
    elif row.request is not None:
        raw = await _body(request, _most(row, limits), limits)
    start, end = _range(request) if row.response is bytes else (0, None)
    return Ask(
        caller=caller,
        path=request.path_params,
        query=_query(row, request),
        body=raw if decoder is None else _message(decoder, raw or b"{}"),
        stream=lambda: _stream(request, limits),
        gone=lambda: _gone(request),
        key=_key(request),
        digest=_digest(row, request, raw) if row.request is not None and request.headers.get("idempotency-key") else "",
        start=start,
        end=end,
        streaming=_streams(row, request),
        allowed=lambda: _authorise(desk, row, request),
        address=request.client.host if request.client else "",
    )


def _most(row: Endpoint, limits: Limits) -> int:
    if Caller.ANYONE in row.callers:
        return limits.open_body
    return limits.report_body if row.request is bytes else limits.json_body


async def _stream(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    parts = request.stream().__aiter__()
    began, size = time.monotonic(), 0
    while True:
        try:
            async with asyncio.timeout(limits.body_silence):  # not wait_for: it makes a task, for what is mostly there
                part = await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise Unavailable("The body stopped coming.", advice="Send the rest again.") from error
        size += len(part)
        lasted = time.monotonic() - began
        if lasted > limits.body_silence and size < lasted * limits.body_pace:
            raise Unavailable("The body comes too slowly.", advice="Send it again, from a better line.")
        yield part


async def _body(request: Request, most: int, limits: Limits) -> bytes:
    opened = opener(request.headers.get("content-encoding", ""), most)
    parts = [opened(part) async for part in _stream(request, limits) if part]
    return b"".join([*parts, opened(b"")])


def _message(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        where = _WHERE.search(str(error))
        path = where[1] if where else "$"
        raise InvalidRequest(
            f"The body is not of the documented form: {error}.",
            advice="GET /openapi.json has the forms.",
            details={"path": path},
        ) from error


def _streams(row: Endpoint, request: Request) -> bool:
    return row.streams and "text/event-stream" in request.headers.get("accept", "").lower()


def _query(row: Endpoint, request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given = dict(request.query_params)
    if _streams(row, request) and (last := request.headers.get("last-event-id", "")):
        given["after"] = last  # a browser that was cut off asks again with the query that it had
    for name, kind in row.query.items():
        if name not in given:
            continue
        try:
            found[name] = msgspec.convert(given[name], kind, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidRequest(
                f"The query parameter {name!r} is not a {kind.__name__}.", details={"path": f"?{name}"}
            ) from error
        if kind is int and not 0 <= found[name] < 2**53:
            raise InvalidRequest(f"The query parameter {name!r} is out of range.", details={"path": f"?{name}"})
    return found


def _digest(row: Endpoint, request: Request, raw: bytes) -> str:
    """What tells a request that is repeated from another one: what it is, and where it goes if that may differ."""
    where = request.url.path.encode() if "{" in row.path else b""
    return hashlib.sha256(where + raw).hexdigest()


def _key(request: Request) -> str:
    key = request.headers.get("idempotency-key", "")
    if key and not _KEY.fullmatch(key):
        raise InvalidRequest("Idempotency-Key must have 1 to 200 visible ASCII characters.", details={"path": "header"})
    return key


def _range(request: Request) -> tuple[int, int | None]:
    """One range of bytes (RFC 9110, section 14); every other form is ignored, as the RFC allows."""
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if not match:
        return 0, None
    return int(match[1]), int(match[2]) + 1 if match[2] else None


async def _gone(request: Request) -> None:
    """Return when the caller has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- the answer ------------------------------------------------------------------------------------------------------


def _respond(row: Endpoint, request: Request, answer: Any) -> Response:
    if isinstance(answer, EventStream):
        # Neither kept by anybody on the way, nor gathered: nginx, for one, waits for a block unless told not to.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        if answer.chunks is None:
            return Response(None, 204, headers)
        return StreamingResponse(answer.chunks, row.status, headers, "text/event-stream")
    if not isinstance(answer, Bytes):
        return Response(_ENCODE(answer), row.status, media_type="application/json")
    headers = {"accept-ranges": "bytes"}
    if answer.start >= answer.end and answer.start > 0:
        headers["content-range"] = f"bytes */{answer.total}"
        problem = _problem(InvalidRequest(f"There are only {answer.total} bytes."), "")
        return Response(problem, 416, headers, media_type=PROBLEM)
    headers["content-length"] = str(answer.end - answer.start)
    partial = _RANGE.fullmatch(request.headers.get("range", "")) is not None and answer.total > 0
    if partial:
        headers["content-range"] = f"bytes {answer.start}-{answer.end - 1}/{answer.total}"
    return StreamingResponse(answer.chunks, 206 if partial else row.status, headers, "application/octet-stream")


async def _refuse(request: Request, error: FieldlabError, request_id: str) -> Response:
    await _drain(request)
    headers: dict[str, str] = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (429, 503):
        asked = error.details.get("retry_after")
        headers["retry-after"] = str(math.ceil(asked)) if isinstance(asked, int | float) else "1"
    return Response(_problem(error, request_id), error.status, headers, media_type=PROBLEM)


def _problem(error: FieldlabError, request_id: str, status: int | None = None) -> bytes:
    title = (type(error).__doc__ or error.code).strip().splitlines()[0]
    return _ENCODE(
        Problem(
            title=title,
            status=status or error.status,
            code=error.code,
            detail=error.message,
            advice=error.advice,
            request_id=request_id or None,
            details=error.details,
        )
    )


async def _drain(request: Request) -> None:
    """Read on in a body that nobody wants: a sender that is cut off while it sends would never see why."""
    size = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > _DRAINED:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):
        return  # RuntimeError: the body was read to its end already


async def _no_route(request: Request, error: Exception) -> Response:
    known = error.status_code if isinstance(error, HTTPException) else 500
    if known == 405:
        refusal: FieldlabError = InvalidRequest(f"{request.method} is not for this path.")
    else:
        refusal = NotFound("There is no such path.", advice="GET /openapi.json lists them all.")
    request_id = secrets.token_hex(8)
    return Response(_problem(refusal, request_id, known), known, {"x-request-id": request_id}, media_type=PROBLEM)
