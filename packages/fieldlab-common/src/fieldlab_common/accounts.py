"""Who asks a director, and what may be asked: roles, scopes, and the messages about users and their tokens.

What a request may do is the lesser of two: the user's role, which an admin gives, and the token's scope, which is
chosen when the token is made. A text that opens anything (a password, a token) is in a request or in the one answer
that makes it, never in a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

__all__ = [
    "MAX_LABEL",
    "MAX_PASSWORD",
    "MIN_PASSWORD",
    "AddUser",
    "ChangePassword",
    "ChangeUser",
    "CreateToken",
    "Login",
    "NewToken",
    "Principal",
    "Role",
    "Scope",
    "TokenInfo",
    "TokenList",
    "UserInfo",
    "UserList",
]

MIN_PASSWORD, MAX_PASSWORD = 10, 1024  # characters
MAX_LABEL = 100  # characters


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

    def __repr__(self) -> str:
        until = "no end" if self.expires is None else f"{datetime.fromtimestamp(self.expires, UTC):%Y-%m-%d %H:%M} UTC"
        return f"<{self.user}, {self.role}; the token's scope: {self.scope}, its end: {until}>"


# --- logging in, and tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Login:
    """Log in. ``label`` tells the token that is made from others, in lists."""

    user: str
    password: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class CreateToken:
    """Make a token. ``expires_in`` is in seconds; None: it does not expire."""

    label: str = ""
    scope: Scope = Scope.RUN
    expires_in: float | None = None


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """A token that was made, and whose: the one answer that has its text."""

    token: str
    id: str
    user: str
    role: str
    scope: str
    label: str = ""
    expires: float | None = None

    def __repr__(self) -> str:
        return f"<token {self.id} of {self.user}, scope {self.scope}>"  # printing it by chance tells nobody


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What may be known of a token. Times are in seconds since the epoch. ``login``: made by logging in."""

    id: str
    scope: str
    created: float
    label: str = ""
    expires: float | None = None
    login: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenList:
    """The tokens of a user that are good, the newest first."""

    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChangePassword:
    """Change the password of the user who asks; ``current`` shows that it is not somebody else at the keyboard."""

    current: str
    new: str


# --- for admins -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AddUser:
    """Make a user. Without a password it can only use tokens."""

    name: str
    role: Role = Role.MEMBER
    password: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChangeUser:
    """Change what is given of a user; a new ``password`` ends every login."""

    role: Role | None = None
    disabled: bool | None = None
    password: str | None = None


@dataclass(frozen=True, kw_only=True)
class UserInfo:
    """A user. ``disabled``: neither logins nor tokens are good. ``password``: whether there is one."""

    name: str
    role: str
    created: float
    disabled: bool = False
    password: bool = False


@dataclass(frozen=True, kw_only=True)
class UserList:
    """All users, by name."""

    users: tuple[UserInfo, ...] = ()
