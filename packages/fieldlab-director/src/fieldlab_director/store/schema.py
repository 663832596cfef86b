"""The tables, as SQLAlchemy Core sees them; ``migrations`` makes the same, and a test compares the two.

Every table that holds a user's things leads to its owner. Times are seconds since the epoch, by the director's clock.
States and messages are parsed where a row is read and checked where it is written (``Named``, ``Message``), so that
nothing inside the director handles a state as text or a message as a dictionary. Both work on SQLite and PostgreSQL.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec
import sqlalchemy as sa
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason
from fieldlab_common.node import Node
from fieldlab_common.protocol import DeploymentSpec, Ended, ExperimentSettings, Lane

__all__ = [
    "LEAP",
    "Message",
    "Named",
    "agent_calls",
    "agents",
    "artifacts",
    "blob_refs",
    "blob_uses",
    "blobs",
    "deployments",
    "events",
    "experiments",
    "grants",
    "holds",
    "idempotency",
    "infrastructures",
    "join_tokens",
    "journals",
    "line",
    "meta",
    "metadata",
    "nodes",
    "records",
    "secrets",
    "tokens",
    "users",
]


class Named(sa.types.TypeDecorator[Any]):
    """A member of an enumeration, stored as its value."""

    impl = sa.String(32)
    cache_ok = True

    def __init__(self, cls: type[Enum]) -> None:
        super().__init__()
        self.cls = cls

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        """The value of a member; anything else is refused."""
        return None if value is None else self.cls(value).value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        """The member."""
        return None if value is None else self.cls(value)


class Message(sa.types.TypeDecorator[Any]):
    """A message of the protocol, or other JSON data (``Any``), stored as JSON text."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.cls = cls

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        """The message's JSON."""
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        """The message."""
        return None if value is None else msgspec.json.decode(value, type=self.cls)


metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

LEAP = 2**40  # the numbers of events and records leap by so much at each restore (``backup``); 2**13 of them have room

_ID, _NAME, _DIGEST, _TIME = sa.String(40), sa.String(200), sa.String(64), sa.Float(53)
_COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts up in INTEGER columns only


def _where(condition: str) -> dict[str, Any]:
    """Options of an index over some rows only: those that are few, however long the history."""
    return {f"{database}_where": sa.text(condition) for database in ("sqlite", "postgresql")}


def _to(column: str) -> sa.ForeignKey:
    return sa.ForeignKey(column, ondelete="CASCADE")


meta = sa.Table(  # facts about the database itself: the canary that tells whether the key file belongs to it
    "meta",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

users = sa.Table(
    "users",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("name", _NAME, nullable=False, unique=True),
    sa.Column("password", sa.Text),  # argon2id; none: the user can only use tokens
    sa.Column("role", sa.String(16), nullable=False),  # a ``Role``
    sa.Column("disabled", _TIME),  # since when neither password nor tokens are good
    sa.Column("created", _TIME, nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("user_id", _ID, _to("users.id"), nullable=False, index=True),
    sa.Column("digest", _DIGEST, nullable=False),  # SHA-256 of the whole token
    sa.Column("label", _NAME, nullable=False),
    sa.Column("scope", sa.String(16), nullable=False, server_default="admin"),  # a ``Scope``
    sa.Column("login", sa.Boolean, nullable=False, server_default=sa.false()),  # by a password, with which it ends
    sa.Column("created", _TIME, nullable=False),
    sa.Column("expires", _TIME),
    sa.Column("revoked", _TIME),
)

infrastructures = sa.Table(
    "infrastructures",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("owner_id", _ID, _to("users.id"), nullable=False),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("options", sa.LargeBinary, nullable=False),  # sealed by services.vault: options may hold credentials
    sa.Column("state", sa.String(16), nullable=False),  # "ready" or "unavailable"
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("created", _TIME, nullable=False),
    sa.Column("home", _ID),  # the one director that can reach it; none: each that shares the database
    sa.Column("holder", _ID),  # the director that works on it now
    sa.Column("held_until", _TIME),
    sa.Column("leaving", _TIME),  # since when it takes no new deployments, because it is to be detached
    sa.Column("director_url", sa.Text),  # where its executors reach the director; none: where the director says
    sa.Column("director_ca", sa.Text),  # what they trust there, as PEM
    sa.Column("detached", _TIME),  # since when it is gone; the row stays, for the deployments that were on it
    sa.UniqueConstraint("owner_id", "name"),
)

grants = sa.Table(  # who may use an infrastructure beside its owner
    "grants",
    metadata,
    sa.Column("infrastructure_id", _ID, _to("infrastructures.id"), primary_key=True),
    sa.Column("user_id", _ID, primary_key=True),  # or "*": everybody. No foreign key, for the sake of that
)

secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("owner_id", _ID, _to("users.id"), nullable=False),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("value", sa.LargeBinary, nullable=False),  # sealed by services.vault
    sa.Column("updated", _TIME, nullable=False),
    sa.UniqueConstraint("owner_id", "name"),
)

join_tokens = sa.Table(  # with which machines become nodes of an infrastructure
    "join_tokens",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("infrastructure_id", _ID, _to("infrastructures.id"), nullable=False, index=True),
    sa.Column("digest", _DIGEST, nullable=False),  # SHA-256 of the whole token
    sa.Column("uses", sa.Integer, nullable=False),  # that are left
    sa.Column("expires", _TIME, nullable=False),
)

agents = sa.Table(  # machines that joined
    "agents",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("infrastructure_id", _ID, _to("infrastructures.id"), nullable=False),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("node", Message(Node), nullable=False),  # as it said last
    sa.Column("digest", _DIGEST, nullable=False),  # of its credential
    sa.Column("next_digest", _DIGEST),  # of the one that it was given, and has not used yet
    sa.Column("last_digest", _DIGEST),  # of the one before: whoever still has that is a copy
    sa.Column("expires", _TIME, nullable=False),
    sa.Column("instance", sa.String(64)),  # the start of its program that asks
    sa.Column("last_instance", sa.String(64)),  # the one before: if that asks again, there are two machines
    sa.Column("doubled", _TIME),  # when a second machine with its identity was found
    sa.Column("joined", _TIME, nullable=False),
    sa.Column("last_seen", _TIME),
    sa.UniqueConstraint("infrastructure_id", "name"),
)

agent_calls = sa.Table(  # what agents are asked; who asked removes it
    "agent_calls",
    metadata,
    sa.Column("number", _COUNTER, primary_key=True, autoincrement=True),
    sa.Column("agent_id", _ID, _to("agents.id"), nullable=False, index=True),
    sa.Column("method", sa.String(32), nullable=False),
    sa.Column("body", Message(Any), nullable=False),
    sa.Column("deadline", _TIME, nullable=False),  # nobody waits for the answer any longer than this
    sa.Column("taken", sa.String(64)),  # by which start of the agent's program
    sa.Column("cancelled", sa.Boolean, nullable=False),
    sa.Column("answer", Message(Any)),
    sqlite_autoincrement=True,
)

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("infrastructure_id", _ID, _to("infrastructures.id"), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),  # as the connector listed them
    sa.Column("name", _NAME, nullable=False),
    sa.Column("node", Message(Node), nullable=False),
    sa.Column("slots", sa.Integer, nullable=False),  # so many runs may hold it at a time; of a template: nodes
    sa.Column("updated", _TIME, nullable=False),
    sa.UniqueConstraint("infrastructure_id", "name"),
)

experiments = sa.Table(
    "experiments",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("owner_id", _ID, _to("users.id"), nullable=False),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("state", Named(ExperimentState), nullable=False, index=True),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("settings", Message(ExperimentSettings), nullable=False),
    sa.Column("start_requested", _TIME),  # when its owner asked for the start
    sa.Column("queued", _TIME, nullable=False),  # from when it wants its nodes: its place in the line for them
    sa.Column("number", _COUNTER, nullable=False),  # of all that were submitted: its place beside others of that time
    sa.Column("granted", _TIME),  # since when it has had its nodes
    sa.Column("cancel_requested", _TIME),
    sa.Column("cancel_reason", sa.Text, nullable=False),
    sa.Column("last_event", _COUNTER, nullable=False),  # the number of its newest event: the counter of its log
    sa.Column("last_record", _COUNTER, nullable=False, server_default="0"),  # the same of its records
    sa.Column("deleted", _TIME),  # when its owner let it go: it is seen no more, and removed once its nodes are clean
    sa.Column("created", _TIME, nullable=False),
    sa.Column("started", _TIME),  # when all executors begin, as they were told; none: they were not yet
    sa.Column("ended", _TIME),
    sa.UniqueConstraint("owner_id", "name"),
    sa.Index("ix_experiments_owner_id_created", "owner_id", "created", "id"),
)

deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("experiment_id", _ID, _to("experiments.id"), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),  # as the experiment lists them
    sa.Column("name", _NAME, nullable=False),
    sa.Column("infrastructure_id", _ID, _to("infrastructures.id"), nullable=False),
    sa.Column("place", _NAME, nullable=False),  # what is reserved: its node, or the template that makes it
    sa.Column("node_name", _NAME, nullable=False),
    sa.Column("node", Message(Node), nullable=False),  # as it was when the experiment was submitted
    sa.Column("spec", Message(DeploymentSpec), nullable=False),
    sa.Column("state", Named(DeploymentState), nullable=False),
    sa.Column("reason", Named(Reason)),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),  # committed before a launch; 0: never launched
    sa.Column("journal_id", sa.String(64)),  # who claimed the present epoch
    sa.Column(
        "ending", Message(Ended)
    ),  # what the executor said last; the deployment ends once its artifacts are there
    sa.Column("ready", _TIME),  # its executor could begin: how far its clock may be off, in seconds; none: not yet
    sa.Column("drained", sa.Boolean, nullable=False),  # nothing more of it is to come
    sa.Column("cancel_requested", _TIME),
    sa.Column("cancel_reason", sa.Text, nullable=False),
    sa.Column("prepared", Message(Any)),  # what the connector's prepare gave back, unread
    sa.Column("handle", Message(Any)),  # what the connector's launch gave back, unread
    sa.Column("attempts", sa.Integer, nullable=False),  # of the connector's present job; back to 0 when it is done
    sa.Column("look_at", _TIME, nullable=False),  # the reconcile loop looks at it again from then on
    sa.Column("lease", sa.String(64)),  # which worker of the reconcile loop has it
    sa.Column("lease_until", _TIME),
    sa.Column("state_since", _TIME, nullable=False),
    sa.Column("started", _TIME),
    sa.Column("ended", _TIME),
    sa.Column("last_seen", _TIME),  # when its executor was last heard of
    sa.UniqueConstraint("experiment_id", "name"),
    sa.Index("ix_deployments_state_look_at", "state", "look_at"),
    sa.Index("ix_deployments_waiting", "infrastructure_id", "place", **_where("state = 'pending'")),
    sa.Index("ix_deployments_lease", "lease", **_where("lease IS NOT NULL")),
)

line = sa.Table(  # one row, locked by whoever serves the line for nodes until the commit
    "line",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", _COUNTER, nullable=False),  # the newest experiment's
)

holds = sa.Table(  # which run has which node: the key sees to it that no slot is ever held twice
    "holds",
    metadata,
    sa.Column("infrastructure_id", _ID, _to("infrastructures.id"), primary_key=True),
    sa.Column("place", _NAME, primary_key=True),  # the node, or the template that makes it
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("experiment_id", _ID, _to("experiments.id"), nullable=False, index=True),
    sa.Column("node_name", _NAME, nullable=False),
    sa.Column("since", _TIME, nullable=False),
)

journals = sa.Table(
    "journals",
    metadata,
    sa.Column("deployment_id", _ID, _to("deployments.id"), primary_key=True),
    sa.Column("journal_id", sa.String(64), primary_key=True),
    sa.Column("lane", Named(Lane), primary_key=True),
    sa.Column("acked", _COUNTER, nullable=False),  # everything up to this number is stored, or was refused
    # The database was restored, and nothing new was taken of this journal since: it may have been acknowledged more.
    sa.Column("restored", sa.Boolean, nullable=False, server_default=sa.false()),
)

records = (
    sa.Table(  # no constraint holds off a doubled number: that is ``journals.acked``, and an index would cost more
        "records",
        metadata,
        sa.Column("experiment_id", _ID, _to("experiments.id"), primary_key=True),
        sa.Column("lane", Named(Lane), primary_key=True),
        sa.Column("seq", _COUNTER, primary_key=True),  # of the experiment, in the order of commits
        sa.Column("deployment_id", _ID, nullable=False),
        sa.Column("journal_id", sa.String(64), nullable=False),
        sa.Column("number", _COUNTER, nullable=False),
        sa.Column("late", sa.Boolean, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),  # the record's JSON, as it came
        sa.Index("ix_records_deployment_id_lane_seq", "deployment_id", "lane", "seq"),
    )
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("experiment_id", _ID, _to("experiments.id"), primary_key=True),
    sa.Column("number", _COUNTER, primary_key=True),
    sa.Column("key", _NAME, nullable=False),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("data", Message(Any)),
    sa.Column("sender", _NAME),
    sa.Column("step", _NAME),
    sa.Column("iteration", _COUNTER, nullable=False),
    sa.Column("sent_at", _TIME, nullable=False),
    sa.UniqueConstraint("experiment_id", "key"),
)

blobs = sa.Table(  # what is complete and in the blob store; a partial upload is a file and nothing else
    "blobs",
    metadata,
    sa.Column("digest", _DIGEST, primary_key=True),
    sa.Column("size", _COUNTER, nullable=False),
    sa.Column("created", _TIME, nullable=False),
    sa.Column("doomed", _TIME),  # since when its bytes are being removed: it takes no new owner
)

blob_refs = sa.Table(  # who has a blob: without a row here it does not exist for that owner
    "blob_refs",
    metadata,
    sa.Column("owner_id", _ID, _to("users.id"), primary_key=True),
    sa.Column("digest", _DIGEST, _to("blobs.digest"), primary_key=True, index=True),
    sa.Column("created", _TIME, nullable=False),  # or when it was last asked for by somebody about to use it
)

blob_uses = sa.Table(  # which blobs an experiment needs: what it was submitted with, artifacts, spilled values
    "blob_uses",
    metadata,
    sa.Column("experiment_id", _ID, _to("experiments.id"), primary_key=True),
    sa.Column("digest", _DIGEST, primary_key=True, index=True),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("id", _COUNTER, primary_key=True, autoincrement=True),
    sa.Column("experiment_id", _ID, _to("experiments.id"), nullable=False, index=True),
    sa.Column("deployment_id", _ID, _to("deployments.id"), nullable=False),
    sa.Column("step", _NAME, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("size", _COUNTER, nullable=False),
    sa.Column("sha256", _DIGEST, nullable=False),
    sa.Column("attempt", _COUNTER, nullable=False),
    sa.Column("iteration", _COUNTER),
    sa.Column("value", sa.Boolean, nullable=False),  # a spilled value: no artifact to its user
    sa.Column("stored", sa.Boolean, nullable=False),
    sa.Column("lost", sa.Text, nullable=False),  # why its bytes will never come; empty: they may
    sa.Index("ix_artifacts_deployment_id_sha256", "deployment_id", "sha256"),
    sqlite_autoincrement=True,
)

idempotency = sa.Table(  # a submit that is repeated, after an answer that got lost, finds what the first one made
    "idempotency",
    metadata,
    sa.Column("owner_id", _ID, _to("users.id"), primary_key=True),
    sa.Column("key", _NAME, primary_key=True),
    sa.Column("digest", _DIGEST, nullable=False),  # of the request: another request under the same key is refused
    sa.Column("experiment_id", _ID, nullable=False),  # which may be gone: its request makes no second one
    sa.Column("created", _TIME, nullable=False),
)
