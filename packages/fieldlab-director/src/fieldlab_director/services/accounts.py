"""Users and their tokens, as an admin and they themselves manage them, over HTTP and on the command line.

A text that opens something leaves this module once, when it is made. Nothing here is remembered between requests: what
is revoked, disabled or removed is so for every director on the database, from the commit on.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace

from fieldlab_common.accounts import MAX_LABEL, NewToken, Role, Scope, TokenInfo, TokenList, UserInfo, UserList
from fieldlab_common.course import NEVER
from fieldlab_common.errors import AuthenticationError, IllegalState, InvalidRequest, NotFound, TooLarge

from fieldlab_director.services.identity import digest_of, new_id
from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx
from fieldlab_director.store.rows import UserRow

__all__ = [
    "MOST_TOKENS",
    "add_user",
    "change_user",
    "check_lasting",
    "create_token",
    "find_user",
    "log_in",
    "remove_user",
    "revoke_token",
    "set_password",
    "tokens",
    "users",
]

LOGIN_SECONDS = 30 * 86_400.0  # a login is good for so long
MOST_SECONDS = 10 * 365 * 86_400.0  # a token that expires does so within ten years
MOST_TOKENS = 200  # of one user, logins included
REMEMBERED = 90 * 86_400.0  # seconds: so long a token that is not good any more is told why
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class _Token:
    id: str
    user_id: str
    digest: str
    label: str
    scope: str
    login: bool
    created: float
    expires: float | None
    revoked: float | None


# --- users -----------------------------------------------------------------------------------------------------------


def add_user(tx: Tx, name: str, *, password: str | None = None, role: str = Role.MEMBER) -> UserRow:
    """Make a user. ``password`` is a hash (``passwords``); None: the user can only use tokens.

    Raises:
        InvalidRequest: it cannot be a user's name, or the role is none. IllegalState: the name is taken.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:80]!r} cannot be a user's name.",
            advice="Use 1 to 64 letters, digits and . _ @ + -",
            details={"path": "$.name"},
        )
    if role not in list(Role):
        raise InvalidRequest(f"{role!r} is not a role; there are {', '.join(Role)}.", details={"path": "$.role"})
    if tx.one(queries.USER_BY_NAME, UserRow, name=name):
        raise IllegalState(f"There is a user {name!r} already.", advice="Choose another name.")
    row = UserRow(id=new_id(), name=name, password=password, role=Role(role).value, created=tx.now)
    tx.execute(queries.ADD_USER, **vars(row))
    return row


def find_user(tx: Tx, name: str) -> UserRow:
    """The user of a name.

    Raises:
        NotFound: there is none.
    """
    row = tx.one(queries.USER_BY_NAME, UserRow, name=name)
    if row is None:
        raise NotFound(f"There is no user {name[:80]!r}.")
    return row


def users(tx: Tx) -> UserList:
    """All users, by name."""
    return UserList(users=tuple(_info(row) for row in tx.all(queries.USERS, UserRow)))


def change_user(
    tx: Tx, name: str, *, role: Role | None = None, disabled: bool | None = None, password: str | None = None
) -> UserInfo:
    """Change what is given of a user. ``password`` is a hash; with a new one every login ends.

    Raises:
        NotFound. IllegalState: nobody would be left who is an admin.
    """
    row = find_user(tx, name)
    changed = row
    if role is not None:
        changed = replace(changed, role=role.value)
    if disabled is not None:
        changed = replace(changed, disabled=(row.disabled or tx.now) if disabled else None)
    _hold_admin(tx, row, changed)
    _save(tx, changed)
    if password is not None:
        changed = set_password(tx, changed, password)
    return _info(changed)


def set_password(tx: Tx, row: UserRow, password: str, *, but: str = "") -> UserRow:
    """Give a user another password (a hash), and end every login; the row as it is now.

    Tokens that were made on purpose stay good. So does the one whose id is ``but``: it asks for this.
    """
    row = replace(row, password=password)
    _save(tx, row)
    for token in tx.all(queries.TOKENS, _Token, user_id=row.id, now=tx.now):
        if token.login and token.id != but:
            tx.execute(queries.REVOKE_TOKEN, guard_id=token.id, guard_user_id=row.id, revoked=tx.now)
    return row


def remove_user(tx: Tx, name: str) -> None:
    """Remove a user and all that is the user's: experiments with their results, secrets, infrastructures, tokens.

    Raises:
        NotFound. IllegalState: something of the user's still runs or is being cleaned up, others have runs on the
            user's infrastructures, or nobody would be left who is an admin.
    """
    row = find_user(tx, name)
    _hold_admin(tx, row, None)
    open_runs = tx.all(queries.UNFINISHED_OF_OWNER, _name, owner_id=row.id, never=NEVER)
    if open_runs:
        raise IllegalState(
            f"{name!r} has experiments that have not ended, or are being cleaned up: {_some(open_runs)}.",
            advice="Disable the user, cancel them, and remove the user when they have ended.",
        )
    used = tx.all(queries.GUESTS_OF_OWNER, _name, owner_id=row.id)
    if used:
        raise IllegalState(
            f"Others have experiments on infrastructures of {name!r}: {_some(used)}.",
            advice="Disable the user instead: removing it would remove their results.",
        )
    tx.execute(queries.DELETE_USER, guard_id=row.id)


# --- tokens ----------------------------------------------------------------------------------------------------------


def check_lasting(seconds: float | None) -> None:
    """Hold that a token, good for that long (None: for good), is good for some time.

    Raises:
        InvalidRequest.
    """
    if seconds is not None and not 0 < seconds <= MOST_SECONDS:
        raise InvalidRequest(
            "A token lasts more than no time, and at most ten years.", details={"path": "$.expires_in"}
        )


def create_token(
    tx: Tx,
    user: str,
    *,
    label: str = "",
    scope: Scope = Scope.ADMIN,
    expires: float | None = None,
    login: bool = False,
) -> NewToken:
    """Make a token of a user, good until ``expires``. Its text is here this once: the database has its hash only.

    Raises:
        NotFound: there is no such user. InvalidRequest: the label is too long. TooLarge: the user has too many.
    """
    owner = find_user(tx, user)
    if len(label) > MAX_LABEL:
        raise InvalidRequest(f"A label has at most {MAX_LABEL} characters.", details={"path": "$.label"})
    tx.execute(queries.FORGET_TOKENS, guard_user_id=owner.id, before=tx.now - REMEMBERED)
    if len(tx.all(queries.TOKENS, _Token, user_id=owner.id, now=tx.now)) >= MOST_TOKENS:
        raise TooLarge(f"{user!r} has {MOST_TOKENS} tokens already.", advice="Revoke those that nobody needs.")
    token_id = new_id()
    token = f"flu_{token_id}_{secrets.token_urlsafe(32)}"
    row = _Token(
        id=token_id,
        user_id=owner.id,
        digest=digest_of(token),
        label=label,
        scope=scope.value,
        login=login,
        created=tx.now,
        expires=expires,
        revoked=None,
    )
    tx.execute(queries.ADD_TOKEN, **vars(row))
    told = {"user": owner.name, "role": owner.role, "scope": scope.value}
    return NewToken(token=token, id=token_id, label=label, expires=expires, **told)


def log_in(tx: Tx, checked: UserRow, *, label: str) -> NewToken:
    """The token of a login, for a user whose password was found right in ``checked``.

    Raises:
        AuthenticationError: the user is disabled, or was changed or removed meanwhile.
    """
    row = tx.one(queries.USER_BY_NAME, UserRow, name=checked.name)
    if row is None or row.password != checked.password:
        raise AuthenticationError("The user was changed meanwhile.", advice="Log in again.")
    if row.disabled is not None:
        raise AuthenticationError(f"User {row.name!r} is disabled.", advice="Ask the director's admin.")
    oldest = [token for token in tx.all(queries.TOKENS, _Token, user_id=row.id, now=tx.now) if token.login]
    for token in oldest[MOST_TOKENS // 2 - 1 :]:  # who logs in all the time, and never out, keeps the newest
        tx.execute(queries.REVOKE_TOKEN, guard_id=token.id, guard_user_id=row.id, revoked=tx.now)
    return create_token(tx, row.name, label=label, expires=tx.now + LOGIN_SECONDS, login=True)


def tokens(tx: Tx, user_id: str) -> TokenList:
    """The tokens of a user that are good, the newest first, without their texts."""
    rows = tx.all(queries.TOKENS, _Token, user_id=user_id, now=tx.now)
    return TokenList(
        tokens=tuple(
            TokenInfo(
                id=row.id, label=row.label, scope=row.scope, created=row.created, expires=row.expires, login=row.login
            )
            for row in rows
        )
    )


def revoke_token(tx: Tx, user_id: str, token_id: str) -> None:
    """End a token of a user: no request that comes after this is answered under it.

    Raises:
        NotFound: the user has no such token that is good.
    """
    if not tx.execute(queries.REVOKE_TOKEN, guard_id=token_id, guard_user_id=user_id, revoked=tx.now):
        raise NotFound("There is no such token.", advice="client.tokens.list() has yours.")


# --- inside ----------------------------------------------------------------------------------------------------------


def _save(tx: Tx, row: UserRow) -> None:
    values = {"role": row.role, "disabled": row.disabled, "password": row.password}
    tx.execute(queries.SET_USER, guard_id=row.id, **values)


def _hold_admin(tx: Tx, row: UserRow, changed: UserRow | None) -> None:
    """Hold that somebody is left who can let others in, when ``row`` becomes ``changed`` or goes."""
    if not _rules(row) or (changed is not None and _rules(changed)):
        return
    if not any(_rules(other) for other in tx.all(queries.USERS, UserRow) if other.id != row.id):
        raise IllegalState(f"{row.name!r} is the only admin.", advice="Make another user an admin first.")


def _rules(row: UserRow) -> bool:
    return row.role == Role.ADMIN.value and row.disabled is None


def _info(row: UserRow) -> UserInfo:
    return UserInfo(
        name=row.name,
        role=row.role,
        created=row.created,
        disabled=row.disabled is not None,
        password=row.password is not None,
    )


def _name(name: str) -> str:
    return name


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
