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
from fieldlab_common.accounts import (
    AddUser,
    ChangePassword,
    ChangeUser,
    CreateToken,
    Login,
    NewToken,
    Principal,
    TokenList,
    UserInfo,
    UserList,
)
from fieldlab_common.events import Event
from fieldlab_common.joining import (
    AgentAnswers,
    AgentCall,
    AgentCalls,
    AgentInfo,
    AgentList,
    AgentPoll,
    Credential,
    Join,
    Joined,
    JoinToken,
    NewJoinToken,
)
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
    CheckLine,
    CheckList,
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
    Hold,
    InfrastructureInfo,
    InfrastructureList,
    Launch,
    NodeList,
    Poll,
    Problem,
    RecordEntry,
    RecordPage,
    Refusal,
    RerunRequest,
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
    Ready,
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
    "AgentAnswers",
    "AgentCall",
    "AgentCalls",
    "AgentInfo",
    "AgentList",
    "AgentPoll",
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
    "CheckLine",
    "CheckList",
    "Claim",
    "ClaimRequest",
    "Credential",
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
    "Hold",
    "InfrastructureInfo",
    "InfrastructureList",
    "Join",
    "JoinToken",
    "Joined",
    "Lane",
    "Launch",
    "LogRecord",
    "NewJoinToken",
    "NodeList",
    "Poll",
    "Principal",
    "Problem",
    "Ready",
    "Record",
    "RecordEntry",
    "RecordPage",
    "Refusal",
    "RerunRequest",
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
    VIEWER = "viewer"  # any user, with any token: looks at what is the user's; all else does not exist
    MEMBER = "member"  # a user who may also change things: role member or admin, and a token of scope run or admin
    ADMIN = "admin"  # a user with the role admin, and a token of scope admin: administers users and the director
    ACCOUNT = "account"  # a user of any role, with a token of scope admin: the user's own tokens and password
    EXECUTOR = "executor"  # the token of a deployment and epoch, while that is the present launch and has not ended
    AGENT = "agent"  # the credential of a machine that joined
    RENEWER = "renewer"  # the same, for some time after it expired: it may be renewed
    UPLOADER = "uploader"  # the same once the deployment has ended or was launched anew: uploads what is left


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One row: what is asked and answered, by whom, and which errors are documented.

    ``callers`` names the least: an admin is also a member, and a member also a viewer.
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
    callers: tuple[Caller, ...] = (Caller.MEMBER,)
    status: int = 200
    safe: bool = True
    streams: bool = False


_CURSOR: Mapping[str, type] = {"after": int, "limit": int, "wait": float}
_VIEWER, _ACCOUNT, _ADMIN = (Caller.VIEWER,), (Caller.ACCOUNT,), (Caller.ADMIN,)
_EXECUTOR, _UPLOADER = (Caller.EXECUTOR,), (Caller.EXECUTOR, Caller.UPLOADER)
_RUN = "/v1/experiments/{experiment}"
_INFRASTRUCTURE = "/v1/infrastructures/{infrastructure}"

_ROWS = (
    Endpoint(name="health", method="GET", path="/v1/health", response=Health, callers=(Caller.ANYONE,)),
    Endpoint(name="executable", method="GET", path="/v1/fieldlab.pyz", response=bytes, callers=(Caller.ANYONE,)),
    Endpoint(
        name="login",
        method="POST",
        path="/v1/login",
        callers=(Caller.ANYONE,),
        request=Login,
        response=NewToken,
        status=201,
        safe=False,
        errors=(e.AuthenticationError, e.RateLimited),
    ),
    Endpoint(
        name="logout", method="POST", path="/v1/logout", callers=_VIEWER, request=Empty, response=Empty, safe=False
    ),
    Endpoint(
        name="change_password",
        method="PUT",
        path="/v1/me/password",
        callers=_ACCOUNT,
        request=ChangePassword,
        response=Empty,
        safe=False,
        errors=(e.IllegalState,),
    ),
    Endpoint(name="tokens", method="GET", path="/v1/tokens", callers=_VIEWER, response=TokenList),
    Endpoint(
        name="create_token",
        method="POST",
        path="/v1/tokens",
        callers=_ACCOUNT,
        request=CreateToken,
        response=NewToken,
        status=201,
        safe=False,
    ),
    Endpoint(
        name="revoke_token",
        method="DELETE",
        path="/v1/tokens/{token}",
        callers=_ACCOUNT,
        response=Empty,
        errors=(e.NotFound,),
    ),
    Endpoint(name="users", method="GET", path="/v1/users", callers=_ADMIN, response=UserList),
    Endpoint(
        name="add_user",
        method="POST",
        path="/v1/users",
        callers=_ADMIN,
        request=AddUser,
        response=UserInfo,
        status=201,
        safe=False,
        errors=(e.IllegalState,),
    ),
    Endpoint(
        name="change_user",
        method="PATCH",
        path="/v1/users/{user}",
        callers=_ADMIN,
        request=ChangeUser,
        response=UserInfo,
        errors=(e.NotFound, e.IllegalState),
    ),
    Endpoint(
        name="remove_user",
        method="DELETE",
        path="/v1/users/{user}",
        callers=_ADMIN,
        response=Empty,
        errors=(e.NotFound, e.IllegalState),
    ),
    Endpoint(name="whoami", method="GET", path="/v1/me", callers=_VIEWER, response=Principal),
    Endpoint(name="nodes", method="GET", path="/v1/nodes", callers=_VIEWER, response=NodeList),
    Endpoint(
        name="infrastructures", method="GET", path="/v1/infrastructures", callers=_VIEWER, response=InfrastructureList
    ),
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
    Endpoint(
        name="detach_infrastructure",
        method="DELETE",
        path=_INFRASTRUCTURE,
        query={"drain": bool},
        response=InfrastructureInfo,
        safe=False,
        errors=(e.NotFound, e.IllegalState, e.PermissionDenied),
    ),
    Endpoint(
        name="check_infrastructure",
        method="POST",
        path=_INFRASTRUCTURE + "/check",
        request=Empty,
        response=CheckList,
        errors=(e.NotFound, e.IllegalState, e.ConnectorError, e.PermissionDenied),
    ),
    Endpoint(
        name="share_infrastructure",
        method="PUT",
        path=_INFRASTRUCTURE + "/access/{user}",
        request=Empty,
        response=InfrastructureInfo,
        errors=(e.NotFound, e.PermissionDenied),
    ),
    Endpoint(
        name="unshare_infrastructure",
        method="DELETE",
        path=_INFRASTRUCTURE + "/access/{user}",
        response=InfrastructureInfo,
        errors=(e.NotFound, e.PermissionDenied),
    ),
    Endpoint(
        name="join_token",
        method="POST",
        path=_INFRASTRUCTURE + "/join-tokens",
        request=NewJoinToken,
        response=JoinToken,
        status=201,
        safe=False,
        errors=(e.NotFound, e.PermissionDenied),
    ),
    Endpoint(
        name="agents",
        method="GET",
        path=_INFRASTRUCTURE + "/agents",
        callers=_VIEWER,
        response=AgentList,
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="remove_agent",
        method="DELETE",
        path=_INFRASTRUCTURE + "/agents/{agent}",
        response=Empty,
        safe=False,
        errors=(e.NotFound, e.PermissionDenied),
    ),
    Endpoint(
        name="join",
        method="POST",
        path="/v1/agents",
        request=Join,
        response=Joined,
        status=201,
        safe=False,
        callers=(Caller.ANYONE,),
    ),
    Endpoint(
        name="authority",
        method="GET",
        path="/v1/ca.pem",
        response=bytes,
        callers=(Caller.ANYONE,),
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="agent_poll",
        method="POST",
        path="/v1/agent/poll",
        request=AgentPoll,
        response=AgentCalls,
        query={"wait": float},
        callers=(Caller.AGENT,),
        errors=(e.DoubledIdentity,),
    ),
    Endpoint(
        name="agent_answers",
        method="POST",
        path="/v1/agent/answers",
        request=AgentAnswers,
        response=Empty,
        callers=(Caller.AGENT,),
        errors=(e.DoubledIdentity,),
    ),
    Endpoint(
        name="renew_agent",
        method="POST",
        path="/v1/agent/credential",
        request=Empty,
        response=Credential,
        callers=(Caller.RENEWER,),
        errors=(e.DoubledIdentity,),
    ),
    Endpoint(name="secrets", method="GET", path="/v1/secrets", callers=_VIEWER, response=SecretList),
    Endpoint(
        name="put_secret",
        method="PUT",
        path="/v1/secrets/{secret}",
        request=SecretValue,
        response=SecretInfo,
        errors=(e.PermissionDenied,),
    ),
    Endpoint(name="delete_secret", method="DELETE", path="/v1/secrets/{secret}", response=Empty, errors=(e.NotFound,)),
    Endpoint(
        name="missing_blobs",
        method="POST",
        path="/v1/blobs/missing",
        callers=_VIEWER,
        request=BlobList,
        response=BlobList,
    ),
    Endpoint(
        name="blob_status",
        method="GET",
        path="/v1/blobs/{digest}/status",
        response=BlobStatus,
        callers=(Caller.VIEWER, *_UPLOADER),
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="get_blob",
        method="GET",
        path="/v1/blobs/{digest}",
        response=bytes,
        callers=(Caller.VIEWER, *_EXECUTOR),
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="put_blob",
        method="PUT",
        path="/v1/blobs/{digest}",
        request=bytes,
        response=BlobStatus,
        query={"offset": int, "size": int},
        callers=(Caller.MEMBER, *_UPLOADER),
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
        callers=_VIEWER,
        query={"state": str, "name": str, "since": float, "limit": int, "after": str},
        response=ExperimentPage,
    ),
    Endpoint(
        name="experiment", method="GET", path=_RUN, callers=_VIEWER, response=ExperimentInfo, errors=(e.NotFound,)
    ),
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
        name="rerun",
        method="POST",
        path=_RUN + "/rerun",
        request=RerunRequest,
        response=ExperimentInfo,
        status=202,
        errors=(e.NotFound, e.PermissionDenied),
    ),
    Endpoint(
        name="delete_experiment",
        method="DELETE",
        path=_RUN,
        query={"force": bool},
        response=Empty,
        errors=(e.NotFound, e.IllegalState, e.PermissionDenied),
    ),
    Endpoint(
        name="records",
        method="GET",
        path=_RUN + "/records",
        callers=_VIEWER,
        query={"lane": str, "deployment": str, **_CURSOR},
        response=RecordPage,
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="events",
        method="GET",
        path=_RUN + "/events",
        callers=_VIEWER,
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
    Endpoint(
        name="artifacts",
        method="GET",
        path=_RUN + "/artifacts",
        callers=_VIEWER,
        response=ArtifactList,
        errors=(e.NotFound,),
    ),
    Endpoint(
        name="claim",
        method="POST",
        path="/v1/executor/claim",
        request=ClaimRequest,
        response=Claim,
        callers=_UPLOADER,
        errors=(e.ClaimRefused, e.ProtocolMismatch),
    ),
    Endpoint(
        name="report",
        method="POST",
        path="/v1/executor/records",
        request=bytes,
        response=Ack,
        query={"lane": str, "journal": str},
        callers=_UPLOADER,
        errors=(e.ClaimRefused, e.TooLarge, e.Unavailable),
    ),
    Endpoint(
        name="poll",
        method="GET",
        path="/v1/executor/poll",
        query={"after": int, "wait": float, "journal": str},
        response=Poll,
        callers=_UPLOADER,
        errors=(e.ClaimRefused,),
    ),
)

COMMON_ERRORS: tuple[type[e.FieldlabError], ...] = (
    e.AuthenticationError,
    e.ProtocolMismatch,
    e.PermissionDenied,
    e.InvalidRequest,
    e.TooLarge,
    e.UnsupportedEncoding,
    e.RateLimited,
    e.InternalError,
    e.Unavailable,
)

ENDPOINTS: Mapping[str, Endpoint] = {row.name: row for row in _ROWS}
