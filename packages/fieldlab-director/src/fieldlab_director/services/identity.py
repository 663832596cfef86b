"""Who asks: users with passwords and tokens, and executors with the token of one deployment and epoch.

A user's token is ``flu_<id>_<secret>``, 256 random bits, of which the database has the SHA-256: there is nothing to
guess, so a slow hash would only cost time. A password is chosen by a person: it is hashed with argon2id, in a thread.
An executor's token is ``fle_<deployment>.<epoch>.<HMAC-SHA-256>``: nothing is stored, and an older epoch's token stays
good for delivering what it measured, not for claiming. Every wrong token gets the same answer.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Any

import argon2
from fieldlab_common.errors import AuthenticationError, ConfigurationError, UnknownNameError

from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx
from fieldlab_director.store.rows import UserRow

__all__ = [
    "ExecutorCaller",
    "UserCaller",
    "add_user",
    "check_password",
    "create_token",
    "executor_caller",
    "executor_token",
    "hash_password",
    "new_id",
    "user_caller",
]

ROLES = ("user", "admin")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_USER_TOKEN = re.compile(r"flu_([0-9a-z]{20})_[A-Za-z0-9_-]{43}")
_EXECUTOR_TOKEN = re.compile(r"fle_([0-9a-z]{20})\.([1-9][0-9]{0,8})\.([0-9a-f]{64})")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, kw_only=True)
class UserCaller:
    """A user who asks. ``expires`` is the token's, in seconds since the epoch."""

    id: str
    name: str
    role: str
    expires: float | None = None


@dataclass(frozen=True, kw_only=True)
class ExecutorCaller:
    """An executor that asks, in the name of a deployment and the epoch under which it was launched."""

    deployment_id: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class _TokenRow:
    user_id: str
    user: str
    role: str
    digest: str
    expires: float | None
    revoked: float | None


def new_id() -> str:
    """A new identifier: 100 random bits, in letters and digits that are not mistaken for each other."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(20))


def add_user(tx: Tx, name: str, *, password: str | None = None, role: str = "user") -> UserRow:
    """Make a user. ``password`` is the hash that ``hash_password`` gave.

    Raises:
        ConfigurationError: the name is taken or not a user's name, or the role is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} cannot be a user's name.", advice="Use letters, digits and . _ @ + -")
    if role not in ROLES:
        raise ConfigurationError(f"{role!r} is not a role; there are {', '.join(ROLES)}.")
    if tx.one(queries.USER_BY_NAME, UserRow, name=name):
        raise ConfigurationError(f"There is a user {name!r} already.", advice="Choose another name.")
    row = UserRow(id=new_id(), name=name, password=password, role=role, created=tx.now)
    tx.execute(queries.ADD_USER, **vars(row))
    return row


def create_token(tx: Tx, user: str, *, label: str = "", expires: float | None = None) -> str:
    """A new token of ``user``. It is shown this once: the database has its hash only.

    Raises:
        UnknownNameError: there is no such user.
    """
    owner = tx.one(queries.USER_BY_NAME, UserRow, name=user)
    if owner is None:
        raise UnknownNameError(f"There is no user {user!r}.", advice="Make one with: fieldlab-director user add")
    token_id = new_id()
    token = f"flu_{token_id}_{secrets.token_urlsafe(32)}"
    values: dict[str, Any] = {"user_id": owner.id, "label": label, "created": tx.now, "expires": expires}
    tx.execute(queries.ADD_TOKEN, id=token_id, digest=_digest(token), revoked=None, **values)
    return token


def user_caller(tx: Tx, token: str) -> UserCaller:
    """The user whose token this is.

    Raises:
        AuthenticationError: nobody's, expired or revoked.
    """
    match = _USER_TOKEN.fullmatch(token)
    row = tx.one(queries.TOKEN, _TokenRow, id=match[1]) if match else None
    if row is None or not hmac.compare_digest(row.digest, _digest(token)):
        raise AuthenticationError("The token is not valid.")
    if row.revoked is not None or (row.expires is not None and row.expires <= tx.now):
        raise AuthenticationError("The token is not valid.")
    return UserCaller(id=row.user_id, name=row.user, role=row.role, expires=row.expires)


def executor_token(key: bytes, deployment_id: str, epoch: int) -> str:
    """The token with which the executor of a deployment's ``epoch`` reports."""
    return f"fle_{deployment_id}.{epoch}.{_sign(key, deployment_id, epoch)}"


def executor_caller(key: bytes, token: str) -> ExecutorCaller:
    """The deployment and epoch of an executor's token.

    Raises:
        AuthenticationError: the director did not make it.
    """
    match = _EXECUTOR_TOKEN.fullmatch(token)
    if not match or not hmac.compare_digest(match[3], _sign(key, match[1], int(match[2]))):
        raise AuthenticationError("The token is not valid.")
    return ExecutorCaller(deployment_id=match[1], epoch=int(match[2]))


def hash_password(password: str) -> str:
    """The argon2id hash of a password. It takes tens of milliseconds on purpose: call it in a thread."""
    if len(password) < 10:
        raise ConfigurationError("The password is shorter than 10 characters.", advice="Choose a longer one.")
    return argon2.PasswordHasher().hash(password)


def check_password(hashed: str, password: str) -> bool:
    """Whether ``password`` is the one that was hashed. Slow like ``hash_password``: call it in a thread."""
    try:
        return argon2.PasswordHasher().verify(hashed, password)
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
        return False


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _sign(key: bytes, deployment_id: str, epoch: int) -> str:
    return hmac.new(key, f"{deployment_id}.{epoch}".encode(), hashlib.sha256).hexdigest()
