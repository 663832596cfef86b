"""The messages: what is asked and answered, as JSON of the dataclasses here (``wire``); ``protocol`` says by whom.

Polymorphic values are ``Tagged`` here, not unions: the director decodes these classes with msgspec, which has no
unions of dataclasses, and it must be able to keep a kind that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common import errors as e
from fieldlab_common.deployment import Deployment
from fieldlab_common.environment import ENVIRONMENTS, Resources
from fieldlab_common.events import Event, Member
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason
from fieldlab_common.node import Node
from fieldlab_common.records import Record
from fieldlab_common.wire import decode, encode

__all__ = [
    "MAX_SECRET",
    "PROBLEM",
    "PROTOCOL",
    "PROTOCOLS",
    "Ack",
    "ArtifactInfo",
    "ArtifactList",
    "AttachInfrastructure",
    "BlobList",
    "BlobStatus",
    "CancelDeployment",
    "CancelRequest",
    "CheckLine",
    "CheckList",
    "Claim",
    "ClaimRequest",
    "DeploymentInfo",
    "DeploymentSpec",
    "Empty",
    "EventPage",
    "ExperimentInfo",
    "ExperimentPage",
    "ExperimentSettings",
    "Health",
    "Hold",
    "InfrastructureInfo",
    "InfrastructureList",
    "Launch",
    "NodeList",
    "Poll",
    "Problem",
    "RecordEntry",
    "RecordPage",
    "Refusal",
    "RerunRequest",
    "SecretInfo",
    "SecretList",
    "SecretValue",
    "SendEvent",
    "SubmitExperiment",
    "Tagged",
    "WaitsFor",
    "environment_of",
    "spec_of",
]

PROTOCOL = 1  # the version this release speaks
PROTOCOLS = (1,)  # every version it can speak
FIRST = (1,)  # what a party speaks that does not say: whatever else changes, this does not
PROBLEM = "application/problem+json"
MAX_SECRET = 16 * 1024  # characters


@dataclass(frozen=True, kw_only=True)
class Tagged:
    """A value of one of several types: ``kind`` names the type, ``body`` has its JSON fields."""

    kind: str
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Empty:
    """No content."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem document (RFC 9457, section 3) with fieldlab's members."""

    title: str
    status: int
    code: str
    detail: str = ""
    advice: str = ""
    type: str = "about:blank"
    request_id: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


# --- a deployment as it is submitted and claimed ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DeploymentSpec:
    """A deployment for the director: the graph and everything it names are blobs, by digest; nothing of it is read.

    ``infrastructure`` tells nodes of one name apart; empty: the caller's own first.
    ``template``: its node is to be made, under the name ``node``, from the elastic one of that name.
    """

    name: str
    node: str
    environment: Tagged
    graph: str
    blobs: tuple[str, ...] = ()
    resources: Resources = field(default_factory=Resources)
    role: str | None = None
    python: str = ""
    steps: int = 0
    secrets: tuple[str, ...] = ()
    infrastructure: str = ""
    template: str = ""


def spec_of(deployment: Deployment, graph: str) -> DeploymentSpec:
    """The form in which ``deployment`` is submitted; ``graph`` is the digest of its graph's JSON."""
    return DeploymentSpec(
        name=deployment.name,
        node=deployment.node.name,
        environment=Tagged(kind=deployment.environment.kind, body=encode(deployment.environment)),
        graph=graph,
        blobs=(graph, *deployment.graph.blobs()),
        resources=deployment.resources,
        role=deployment.role,
        python=deployment.python,
        steps=sum(1 for _ in deployment.graph.walk()),
        secrets=deployment.graph.secrets(),
        infrastructure=deployment.node.infrastructure,
        template=deployment.node.template,
    )


def environment_of(tagged: Tagged) -> Any:
    """The environment that ``tagged`` describes; InvalidMessage if its kind is unknown."""
    if tagged.kind not in ENVIRONMENTS:
        raise e.InvalidMessage(f"{tagged.kind!r} is no kind of environment; there are {', '.join(ENVIRONMENTS)}.")
    return decode(ENVIRONMENTS[tagged.kind], dict(tagged.body))


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """How a run treats its nodes. Times are in seconds; ``start_at`` in seconds since the epoch.

    ``reporting`` is ``live``, ``quiet`` or ``silent``; a node that was silent for ``lost_after`` is lost; with
    ``min_nodes`` the run goes on when at least so many deployments could be prepared and launched.
    """

    reporting: str = "live"
    lost_after: float = 6 * 3600.0
    min_nodes: int | None = None
    start_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class SubmitExperiment:
    """The request that makes a run. ``if_exists``: ``error``, ``attach`` or ``new``. ``start``: once it is ready."""

    name: str
    deployments: tuple[DeploymentSpec, ...]
    settings: ExperimentSettings = field(default_factory=ExperimentSettings)
    if_exists: str = "error"
    start: bool = False


@dataclass(frozen=True, kw_only=True)
class DeploymentInfo:
    """How a deployment stands. ``drained``: nothing more of its logs is to come. ``message`` is for people."""

    name: str
    node: str
    state: DeploymentState
    role: str | None = None
    reason: Reason | None = None
    message: str = ""
    graph: str = ""
    epoch: int = 0
    steps: int = 0
    drained: bool = False
    started: float | None = None
    ended: float | None = None
    last_seen: float | None = None


@dataclass(frozen=True, kw_only=True)
class WaitsFor:
    """A node (or the template of elastic ones) that a run waits for, and who has it or is to have it first.

    ``since``: when the first of those that hold it got it; None: nobody holds it. ``runs``: those of them that are the
    caller's own; ``others``: how many are not. ``before``: runs that stand before it in the line and want it too.
    """

    node: str
    since: float | None = None
    runs: tuple[str, ...] = ()
    others: int = 0
    before: int = 0


@dataclass(frozen=True, kw_only=True)
class ExperimentInfo:
    """How a run stands.

    ``queued``: from when it wants its nodes, its place in the line; ``granted``: since when it has had them. While it
    stands in the line, ``waits_for`` says for which (at most 100; a list of experiments leaves it out).
    """

    id: str
    name: str
    state: ExperimentState
    owner: str = ""
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    message: str = ""
    settings: ExperimentSettings = field(default_factory=ExperimentSettings)
    deployments: tuple[DeploymentInfo, ...] = ()
    queued: float | None = None
    granted: float | None = None
    waits_for: tuple[WaitsFor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExperimentPage:
    """Some of the caller's experiments, newest first (their deployments left out); ``next`` continues, or is None."""

    experiments: tuple[ExperimentInfo, ...] = ()
    next: str | None = None


@dataclass(frozen=True, kw_only=True)
class RerunRequest:
    """Run an experiment once more, under a name of its own, its code and settings as they were. ``start``: as soon as
    it is ready. A ``start_at`` is not repeated: it is past.
    """

    start: bool = True


@dataclass(frozen=True, kw_only=True)
class CancelRequest:
    """Stop the run, or only the named deployments of it."""

    reason: str = ""
    deployments: tuple[str, ...] = ()


# --- records as the director has them ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RecordEntry:
    """A record as the director has it. ``seq`` orders all records of an experiment's lane and is the cursor.

    ``late``: it came after its deployment had ended, or under an older epoch; it is shown, and changes no state.
    """

    seq: int
    deployment: str
    number: int
    record: Record
    late: bool = False


@dataclass(frozen=True, kw_only=True)
class RecordPage:
    """Records after a cursor, in order; ``cursor`` is the one to ask with next. ``state``: the experiment's, now."""

    records: tuple[RecordEntry, ...] = ()
    cursor: int = 0
    state: ExperimentState = ExperimentState.PREPARING


# --- executor and director ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a connector puts beside the executor (``launch.json``, mode 0600): where to report, and as whom.

    ``ca`` is the PEM text of the certificates that are trusted for that, if not those of the node's system.
    """

    director: str
    token: str
    experiment: str
    deployment: str
    epoch: int
    ca: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClaimRequest:
    """An executor asks for its deployment. The first ``journal_id`` that asks under the present epoch has it.

    ``protocols`` are the versions that it speaks; the claim says which of them is spoken from then on.
    """

    journal_id: str
    epoch: int
    protocols: tuple[int, ...] = FIRST
    python: str = ""
    pid: int = 0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Everything an executor needs of the director to run alone from now on, but the blobs.

    ``server_time`` is the director's clock in seconds since the epoch. ``control`` and ``bulk`` are the numbers up to
    which this journal was acknowledged (0 at first). ``secrets`` are those that the deployment names, as far as they
    are stored; the executor keeps them in memory alone. ``start_at``: when it begins, by the director's clock; if that
    is past, at once. None: it says when it is ``ready``, and the event ``fieldlab.start`` says when all begin.
    """

    experiment_id: str
    experiment: str
    deployment: DeploymentSpec
    node: Node
    members: tuple[Member, ...] = ()
    settings: ExperimentSettings = field(default_factory=ExperimentSettings)
    protocol: int = FIRST[0]
    server_time: float = 0.0
    control: int = 0
    bulk: int = 0
    secrets: Mapping[str, str] = field(default_factory=dict)
    start_at: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The director kept record ``number`` out, for ``message``; its step fails visibly, nothing else is held up."""

    number: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Ack:
    """Everything up to ``acked`` is on the director's disk, or refused. ``missing``: blobs announced and not there."""

    acked: int
    refusals: tuple[Refusal, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CancelDeployment:
    """The order to stop."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Poll:
    """The answer to an executor's one long-poll: events after its cursor, an order to stop, the director's clock."""

    events: tuple[Event, ...] = ()
    cursor: int = 0
    cancel: CancelDeployment | None = None
    server_time: float = 0.0


# --- the rest of what a user asks ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether the director serves, its version, and the protocol versions it speaks."""

    status: str = "ok"
    version: str = ""
    protocols: tuple[int, ...] = FIRST
    time: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A run has a node, since a time. ``run``: its name, if it is the caller's own; others' are not named.

    Of an elastic template, ``node`` is the one that was made.
    """

    node: str
    infrastructure: str
    since: float
    run: str | None = None
    template: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeList:
    """Nodes that the caller may use or see, and who has them."""

    nodes: tuple[Node, ...] = ()
    holds: tuple[Hold, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SecretValue:
    """The text of a secret, at most ``MAX_SECRET`` characters. It is never sent back to a user."""

    value: str


@dataclass(frozen=True, kw_only=True)
class SecretInfo:
    """What may be known of a stored secret. ``updated`` is in seconds since the epoch."""

    name: str
    updated: float


@dataclass(frozen=True, kw_only=True)
class SecretList:
    """The caller's secrets, by name."""

    secrets: tuple[SecretInfo, ...]


@dataclass(frozen=True, kw_only=True)
class AttachInfrastructure:
    """Attach target infrastructure: ``spec.kind`` names the connector, ``spec.body`` has its options.

    ``access`` names the users who may use it beside its owner, or has ``*`` for everybody, which takes an admin; None:
    nobody, or everybody if an admin attaches it. ``director_url`` is where executors of its nodes reach the director,
    and ``director_ca`` the PEM text of the certificates that they trust there, if not as the director itself says.
    """

    name: str
    spec: Tagged
    access: tuple[str, ...] | None = None
    director_url: str = ""
    director_ca: str = ""


@dataclass(frozen=True, kw_only=True)
class InfrastructureInfo:
    """An attached infrastructure. ``state``: ``ready``, ``unavailable``, ``leaving`` or ``detached``; ``message``: why.

    ``access``: who may use it beside its ``owner`` (``*``: everybody), as far as the caller may know, who is the owner.
    ``director_url``: where its executors reach the director, if that was said when it was attached.
    """

    name: str
    kind: str
    state: str = "ready"
    message: str = ""
    nodes: int = 0
    owner: str = ""
    access: tuple[str, ...] = ()
    director_url: str = ""


@dataclass(frozen=True, kw_only=True)
class InfrastructureList:
    """The infrastructures that the caller may see."""

    infrastructures: tuple[InfrastructureInfo, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckLine:
    """What came of one trial: ``what`` was tried, what came back (``said``), and what to do if it is not ``ok``.

    ``node`` is empty if it is of all nodes. ``needed``: while it is not ok, nothing runs on the node.
    """

    node: str = ""
    what: str
    ok: bool = True
    said: str = ""
    advice: str = ""
    needed: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckList:
    """An infrastructure that was tried, node by node."""

    lines: tuple[CheckLine, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlobList:
    """Digests (SHA-256, lower-case hexadecimal)."""

    digests: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlobStatus:
    """How much of a blob is there: ``offset`` bytes of it, and whether it is ``complete`` (and its digest right)."""

    digest: str
    offset: int = 0
    complete: bool = False


@dataclass(frozen=True, kw_only=True)
class SendEvent:
    """An event sent by hand. ``key`` makes a repeated request send it once."""

    name: str
    data: Any = None
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class EventPage:
    """Events after a cursor, in order; ``cursor`` is the number to ask with next."""

    events: tuple[Event, ...] = ()
    cursor: int = 0
    state: ExperimentState = ExperimentState.PREPARING


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """An artifact of a run. ``stored``: its bytes are at the director; else ``lost`` may say why they never will be."""

    deployment: str
    step: str
    name: str
    size: int
    sha256: str
    attempt: int = 1
    iteration: int | None = None
    stored: bool = False
    lost: str = ""


@dataclass(frozen=True, kw_only=True)
class ArtifactList:
    """The artifacts of a run, in the order in which they were announced (spilled values left out)."""

    artifacts: tuple[ArtifactInfo, ...] = ()
