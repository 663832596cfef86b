"""Who asks a director, and what may be asked: roles, scopes, and the messages about users and their tokens.

What a request may do is the lesser of two: the user's role, which an admin gives, and the token's scope, which is
chosen when the token is made. A text that opens anything (a password, a token) is in a request or in the one answer
that makes it, never in a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Principal", "Role", "Scope"]


class Role(StrEnum):
    """What a user may do. Each may all that those before it may."""

    VIEWER = "viewer"  # looks at what is the user's, and changes nothing
    MEMBER = "member"  # runs experiments, attaches infrastructure, stores secrets
    ADMIN = "admin"  # also administers: users, their tokens, and the director's own machine


class Scope(StrEnum):
    """What a token is good for, of what its user may do. Each is good for all that those before it are."""

    READ = "read"  # looking
    RUN = "run"  # looking and changing: what a member does
    ADMIN = "admin"  # everything that the user may do, the user's own tokens and password included


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who a token belongs to, and what it is good for. ``expires`` is in seconds since the epoch; None: never."""

    user: str
    role: str
    scope: str = Scope.ADMIN.value
    expires: float | None = None
