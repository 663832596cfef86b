"""Rows as the services see them: frozen, typed, one class for each table that more than one service reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason
from fieldlab_common.node import Node
from fieldlab_common.protocol import DeploymentSpec, Ended, ExperimentSettings

__all__ = ["DeploymentRow", "ExperimentRow", "InfrastructureRow", "SecretRow", "UserRow"]


@dataclass(frozen=True, kw_only=True)
class UserRow:
    """A user; ``password`` is the argon2id hash, or None; ``disabled``: since when, or None."""

    id: str
    name: str
    password: str | None
    role: str
    created: float
    disabled: float | None = None


@dataclass(frozen=True, kw_only=True)
class InfrastructureRow:
    """An attached infrastructure; ``options`` are sealed (``services.vault``)."""

    id: str
    owner_id: str
    name: str
    kind: str
    options: bytes
    state: str
    message: str
    created: float
    home: str | None = None
    holder: str | None = None
    held_until: float | None = None
    leaving: float | None = None
    detached: float | None = None
    director_url: str | None = None
    director_ca: str | None = None


@dataclass(frozen=True, kw_only=True)
class SecretRow:
    """A user's secret; ``value`` is sealed (``services.vault``)."""

    id: str
    owner_id: str
    name: str
    value: bytes
    updated: float


@dataclass(frozen=True, kw_only=True)
class ExperimentRow:
    """An experiment; the columns are explained in ``schema``."""

    id: str
    owner_id: str
    name: str
    state: ExperimentState
    message: str
    settings: ExperimentSettings
    start_requested: float | None
    queued: float
    number: int
    granted: float | None
    cancel_requested: float | None
    cancel_reason: str
    deleted: float | None
    last_event: int
    last_record: int
    created: float
    started: float | None
    ended: float | None


@dataclass(frozen=True, kw_only=True)
class DeploymentRow:
    """A deployment; the columns are explained in ``schema``."""

    id: str
    experiment_id: str
    position: int
    name: str
    infrastructure_id: str
    place: str
    node_name: str
    node: Node
    spec: DeploymentSpec
    state: DeploymentState
    reason: Reason | None
    message: str
    epoch: int
    journal_id: str | None
    ending: Ended | None
    ready: float | None
    drained: bool
    cancel_requested: float | None
    cancel_reason: str
    prepared: Any
    handle: Any
    attempts: int
    look_at: float
    lease: str | None
    lease_until: float | None
    state_since: float
    started: float | None
    ended: float | None
    last_seen: float | None
