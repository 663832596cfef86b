"""What the parties say to each other: the one table of endpoints, with the messages and records that it is about.

The client, the executor, the director's router, the OpenAPI document and the authorisation tests all read
``ENDPOINTS``; nothing else declares a path. Bodies are JSON of ``messages`` (re-exported here, as ``records`` are),
except where the table says ``bytes``. Errors are problem documents (RFC 9457) whose ``code`` is one of
``errors.BY_CODE``.

A request may say which version of the protocol it speaks (``Fieldlab-Protocol``); where the director does not speak
that one, it answers ProtocolMismatch, whose ``details["protocols"]`` are those that it does. ``health`` and
``executable`` answer everybody, and an executor's claim settles the version in its body.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fieldlab_common import errors as e
from fieldlab_common.events import Event
from fieldlab_common.messages import (
    MAX_SECRET,
    PROBLEM,
    PROTOCOL,
    PROTOCOLS,
    Ack,
    ArtifactInfo,
    ArtifactList,
    AttachInfrastructure,
    BlobList,
    BlobStatus,
    CancelDeployment,
    CancelRequest,
    Claim,
    ClaimRequest,
    DeploymentInfo,
    DeploymentSpec,
    Empty,
    EventPage,
    ExperimentInfo,
    ExperimentPage,
    ExperimentSettings,
    Health,
    InfrastructureInfo,
    InfrastructureList,
    Launch,
    NodeList,
    Poll,
    Principal,
    Problem,
    RecordEntry,
    RecordPage,
    Refusal,
    SecretInfo,
    SecretList,
    SecretValue,
    SendEvent,
    SubmitExperiment,
    Tagged,
    WaitsFor,
    environment_of,
    spec_of,
)
from fieldlab_common.records import (
    CONTROL_KINDS,
    INLINE_VALUE_BYTES,
    RECORDS,
    ArtifactLost,
    ArtifactRecord,
    CancelRecord,
    Ended,
    EventRecord,
    GapRecord,
    Lane,
    LogRecord,
    Record,
    Started,
    StepRecord,
    Usage,
    ValueRef,
)

__all__ = [
    "COMMON_ERRORS",
    "CONTROL_KINDS",
    "ENDPOINTS",
    "INLINE_VALUE_BYTES",
    "MAX_SECRET",
    "PROBLEM",
    "PROTOCOL",
    "PROTOCOLS",
    "RECORDS",
    "Ack",
    "ArtifactInfo",
    "ArtifactList",
    "ArtifactLost",
    "ArtifactRecord",
    "AttachInfrastructure",
    "BlobList",
    "BlobStatus",
    "Caller",
    "CancelDeployment",
    "CancelRecord",
    "CancelRequest",
    "Claim",
    "ClaimRequest",
    "DeploymentInfo",
    "DeploymentSpec",
    "Empty",
    "Ended",
    "Endpoint",
    "EventPage",
    "EventRecord",
    "ExperimentInfo",
    "ExperimentPage",
    "ExperimentSettings",
    "GapRecord",
    "Health",
    "InfrastructureInfo",
    "InfrastructureList",
    "Lane",
    "Launch",
    "LogRecord",
    "NodeList",
    "Poll",
    "Principal",
    "Problem",
    "Record",
    "RecordEntry",
    "RecordPage",
    "Refusal",
    "SecretInfo",
    "SecretList",
    "SecretValue",
    "SendEvent",
    "Started",
    "StepRecord",
    "SubmitExperiment",
    "Tagged",
    "Usage",
    "ValueRef",
    "WaitsFor",
    "environment_of",
    "spec_of",
]

# --- the table -------------------------------------------------------------------------------------------------------


class Caller(StrEnum):
    """Who may call an endpoint."""

    ANYONE = "anyone"  # also without a token
    USER = "user"  # a user's token; what is not the user's does not exist
    ADMIN = "admin"  # a user's token with the role admin
    EXECUTOR = "executor"  # the token of one deployment and epoch


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One row: what is asked and answered, by whom, and which errors are documented.

    ``request`` and ``response`` are message classes, or ``bytes``; ``query`` names the query parameters and their
    types. ``safe``: asking twice does no more than asking once, so that a client may retry. ``streams``: who accepts
    ``text/event-stream`` gets server-sent events until the run ends, from ``after`` or the header ``Last-Event-ID`` on.
    """

    name: str
    method: str
    path: str
    response: type
    request: type | None = None
    query: Mapping[str, type] = field(default_factory=dict)
    errors: tuple[type[e.FieldlabError], ...] = ()
    callers: tuple[Caller, ...] = (Caller.USER,)
    status: int = 200
    safe: bool = True
    streams: bool = False


_CURSOR: Mapping[str, type] = {"after": int, "limit": int, "wait": float}
_USER, _BOTH, _EXECUTOR = (Caller.USER,), (Caller.USER, Caller.EXECUTOR), (Caller.EXECUTOR,)
_RUN = "/v1/experiments/{experiment}"

_ROWS = (
    Endpoint(name="health", method="GET", path="/v1/health", response=Health, callers=(Caller.ANYONE,)),
    Endpoint(name="executable", method="GET", path="/v1/fieldlab.pyz", response=bytes, callers=(Caller.ANYONE,)),
    Endpoint(name="whoami", method="GET", path="/v1/me", response=Principal),
    Endpoint(name="nodes", method="GET", path="/v1/nodes", response=NodeList),
    Endpoint(name="infrastructures", method="GET", path="/v1/infrastructures", response=InfrastructureList),
    Endpoint(
        name="attach_infrastructure",
        method="POST",
        path="/v1/infrastructures",
        request=AttachInfrastructure,
        response=InfrastructureInfo,
        status=201,
        safe=False,
        errors=(e.UnknownConnector, e.IllegalState, e.ConnectorError, e.PermissionDenied),
    ),
    Endpoint(name="secrets", method="GET", path="/v1/secrets", response=SecretList),
    Endpoint(
        name="put_secret",
        method="PUT",
        path="/v1/secrets/{secret}",
        request=SecretValue,
        response=SecretInfo,
        errors=(e.PermissionDenied,),
    ),
    Endpoint(name="delete_secret", method="DELETE", path="/v1/secrets/{secret}", response=Empty, errors=(e.NotFound,)),
    Endpoint(name="missing_blobs", method="POST", path="/v1/blobs/missing", request=BlobList, response=BlobList),
    Endpoint(
        name="blob_status",
        method="GET",
        path="/v1/blobs/{digest}/status",
        response=BlobStatus,
        callers=_BOTH,
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="get_blob",
        method="GET",
        path="/v1/blobs/{digest}",
        response=bytes,
        callers=_BOTH,
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="put_blob",
        method="PUT",
        path="/v1/blobs/{digest}",
        request=bytes,
        response=BlobStatus,
        query={"offset": int, "size": int},
        callers=_BOTH,
        errors=(e.NotFound, e.BlobMismatch, e.TooLarge, e.Unavailable),
    ),
    Endpoint(
        name="submit",
        method="POST",
        path="/v1/experiments",
        request=SubmitExperiment,
        response=ExperimentInfo,
        status=202,
        errors=(e.ExperimentExists, e.NotFound, e.BlobMismatch, e.PermissionDenied),
    ),
    Endpoint(
        name="experiments",
        method="GET",
        path="/v1/experiments",
        query={"state": str, "limit": int, "after": str},
        response=ExperimentPage,
    ),
    Endpoint(name="experiment", method="GET", path=_RUN, response=ExperimentInfo, errors=(e.NotFound,)),
    Endpoint(
        name="start",
        method="POST",
        path=_RUN + "/start",
        request=Empty,
        response=ExperimentInfo,
        status=202,
        errors=(e.NotFound, e.IllegalState, e.PermissionDenied),
    ),
    Endpoint(
        name="cancel",
        method="POST",
        path=_RUN + "/cancel",
        request=CancelRequest,
        response=ExperimentInfo,
        status=202,
        errors=(e.NotFound, e.PermissionDenied),
    ),
    Endpoint(
        name="records",
        method="GET",
        path=_RUN + "/records",
        query={"lane": str, **_CURSOR},
        response=RecordPage,
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="events",
        method="GET",
        path=_RUN + "/events",
        query=_CURSOR,
        response=EventPage,
        errors=(e.NotFound,),
        streams=True,
    ),
    Endpoint(
        name="send_event",
        method="POST",
        path=_RUN + "/events",
        request=SendEvent,
        response=Event,
        status=201,
        errors=(e.NotFound, e.EventTooLarge, e.IllegalState, e.PermissionDenied),
    ),
    Endpoint(name="artifacts", method="GET", path=_RUN + "/artifacts", response=ArtifactList, errors=(e.NotFound,)),
    Endpoint(
        name="claim",
        method="POST",
        path="/v1/executor/claim",
        request=ClaimRequest,
        response=Claim,
        callers=_EXECUTOR,
        errors=(e.ClaimRefused, e.ProtocolMismatch),
    ),
    Endpoint(
        name="report",
        method="POST",
        path="/v1/executor/records",
        request=bytes,
        response=Ack,
        query={"lane": str, "journal": str},
        callers=_EXECUTOR,
        errors=(e.ClaimRefused, e.TooLarge, e.Unavailable),
    ),
    Endpoint(
        name="poll",
        method="GET",
        path="/v1/executor/poll",
        query={"after": int, "wait": float, "journal": str},
        response=Poll,
        callers=_EXECUTOR,
        errors=(e.ClaimRefused,),
    ),
)

COMMON_ERRORS: tuple[type[e.FieldlabError], ...] = (
    e.AuthenticationError,
    e.ProtocolMismatch,
    e.InvalidRequest,
    e.TooLarge,
    e.UnsupportedEncoding,
    e.RateLimited,
    e.InternalError,
    e.Unavailable,
)

ENDPOINTS: Mapping[str, Endpoint] = {row.name: row for row in _ROWS}
