"""Who asks: users with passwords and tokens, and executors with the token of one deployment and epoch.

A user's token is ``flu_<id>_<secret>``, 256 random bits, of which the database has the SHA-256: there is nothing to
guess, so a slow hash would only cost time (``passwords`` has what people choose).
An executor's token is ``fle_<deployment>.<epoch>.<HMAC-SHA-256>``: nothing of it is stored. How much it is good for is
read off the deployment each time: for everything that an executor asks while its launch is the present one, for
uploading what is left once that has ended or was launched anew, for nothing once everything is here or ``drain_for``
has passed. Every wrong token gets the same answer; why a right one is not good any more is told to who holds it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from fieldlab_common.accounts import Role, Scope
from fieldlab_common.errors import AuthenticationError, Drained
from fieldlab_common.protocol import Caller

from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx

__all__ = [
    "ExecutorCaller",
    "UserCaller",
    "digest_of",
    "executor_caller",
    "executor_token",
    "new_id",
    "user_caller",
    "utc",
]

_USER_TOKEN = re.compile(r"flu_([0-9a-z]{20})_[A-Za-z0-9_-]{43}")
_EXECUTOR_TOKEN = re.compile(r"fle_([0-9a-z]{20})\.([1-9][0-9]{0,8})\.([0-9a-f]{64})")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, kw_only=True)
class UserCaller:
    """A user who asks, with a token of ``scope``. ``expires`` is the token's, in seconds since the epoch."""

    id: str
    name: str
    role: Role
    scope: Scope = Scope.ADMIN
    expires: float | None = None
    token_id: str = ""

    @property
    def may(self) -> frozenset[Caller]:
        """Which callers of the table of endpoints this user is, with this token."""
        power = min(list(Role).index(self.role), list(Scope).index(self.scope))
        account = {Caller.ACCOUNT} if self.scope is Scope.ADMIN else set()
        return frozenset({*_POWERS[: power + 1], *account})


@dataclass(frozen=True, kw_only=True)
class ExecutorCaller:
    """An executor that asks, in the name of a deployment and the epoch under which it was launched.

    ``over``: the deployment has ended, or was launched anew; only what is left to upload is taken.
    """

    deployment_id: str
    epoch: int
    over: bool = False

    @property
    def may(self) -> frozenset[Caller]:
        """Which callers of the table of endpoints this executor is."""
        return frozenset({Caller.UPLOADER if self.over else Caller.EXECUTOR})


_POWERS = (Caller.VIEWER, Caller.MEMBER, Caller.ADMIN)  # in the order of Role and of Scope


@dataclass(frozen=True, kw_only=True)
class _TokenRow:
    user_id: str
    user: str
    role: str
    disabled: float | None
    token_id: str
    scope: str
    digest: str
    expires: float | None
    revoked: float | None


@dataclass(frozen=True, kw_only=True)
class _Standing:
    epoch: int
    ended: float | None
    drained: bool


def new_id() -> str:
    """A new identifier: 100 random bits, in letters and digits that are not mistaken for each other."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(20))


def user_caller(tx: Tx, token: str) -> UserCaller:
    """The user whose token this is.

    Raises:
        AuthenticationError: nobody's. To who holds a right one: expired, revoked, or its user is disabled.
    """
    match = _USER_TOKEN.fullmatch(token)
    row = tx.one(queries.TOKEN, _TokenRow, id=match[1]) if match else None
    if row is None or not hmac.compare_digest(row.digest, digest_of(token)):
        raise AuthenticationError("The token is not valid.")
    if row.disabled is not None:
        raise AuthenticationError(f"User {row.user!r} is disabled.", advice="Ask the director's admin.")
    if row.revoked is not None:
        raise AuthenticationError("The token was revoked.")
    if row.expires is not None and row.expires <= tx.now:
        raise AuthenticationError(f"The token expired on {utc(row.expires)}.", details={"expired": row.expires})
    return UserCaller(
        id=row.user_id,
        name=row.user,
        role=Role(row.role),
        scope=Scope(row.scope),
        expires=row.expires,
        token_id=row.token_id,
    )


def utc(seconds: float) -> str:
    """A time for people."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def executor_token(key: bytes, deployment_id: str, epoch: int) -> str:
    """The token with which the executor of a deployment's ``epoch`` reports."""
    return f"fle_{deployment_id}.{epoch}.{_sign(key, deployment_id, epoch)}"


def executor_caller(tx: Tx, key: bytes, token: str, *, drain_for: float) -> ExecutorCaller:
    """The deployment and epoch of an executor's token, which is good for ``drain_for`` seconds after the end.

    Raises:
        AuthenticationError: the director did not make it, or its time is over.
        Drained: everything of this launch is here.
    """
    match = _EXECUTOR_TOKEN.fullmatch(token)
    signed = match and hmac.compare_digest(match[3], _sign(key, match[1], int(match[2])))
    row = tx.one(queries.STANDING, _Standing, id=match[1]) if match and signed else None
    if match is None or row is None:
        raise AuthenticationError("The token is not valid.")
    epoch = int(match[2])
    if row.drained and epoch == row.epoch:
        raise Drained("The director has everything of this deployment.")
    if row.ended is not None and tx.now >= row.ended + drain_for:
        raise AuthenticationError(
            f"The deployment ended more than {drain_for / 86_400:g} days ago; nothing of it is taken any more.",
            advice="What was not delivered is in the executor's journal, on the node.",
        )
    return ExecutorCaller(deployment_id=match[1], epoch=epoch, over=row.ended is not None or epoch != row.epoch)


def digest_of(token: str) -> str:
    """What of a token is stored."""
    return hashlib.sha256(token.encode()).hexdigest()


def _sign(key: bytes, deployment_id: str, epoch: int) -> str:
    return hmac.new(key, f"{deployment_id}.{epoch}".encode(), hashlib.sha256).hexdigest()
