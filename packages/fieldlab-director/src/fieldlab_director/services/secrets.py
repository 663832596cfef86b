"""What users store for their tasks: texts that only executors of their own deployments get, sealed at rest.

A value goes in and never comes back to a user, not even to the one who stored it.
"""

from __future__ import annotations

from collections.abc import Iterable

from fieldlab_common.errors import FieldlabError, InvalidRequest, NotFound
from fieldlab_common.protocol import MAX_SECRET, Empty, SecretInfo, SecretList
from fieldlab_common.step import check_name

from fieldlab_director.services.identity import UserCaller, new_id
from fieldlab_director.services.vault import Vault
from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx
from fieldlab_director.store.rows import SecretRow

__all__ = ["MOST", "delete", "hold_stored", "put", "secrets", "values"]

MOST = 1000  # of one user


def put(tx: Tx, caller: UserCaller, vault: Vault, name: str, value: str) -> SecretInfo:
    """Store a secret, in place of the one of that name.

    Raises:
        InvalidRequest: it cannot be a name, the text is empty or too long, or there are too many.
    """
    try:
        check_name(name, "a secret")
    except FieldlabError as error:
        raise InvalidRequest(f"$.name: {error.message}", advice=error.advice, details={"path": "$.name"}) from error
    if not 0 < len(value) <= MAX_SECRET:
        raise InvalidRequest(
            f"A secret has 1 to {MAX_SECRET} characters; this one has {len(value)}.", details={"path": "$.value"}
        )
    stored = {row.name for row in tx.all(queries.SECRETS, SecretRow, owner_id=caller.id)}
    if name not in stored and len(stored) >= MOST:
        raise InvalidRequest(f"There are {MOST} secrets already.", advice="Delete those that no task needs any more.")
    tx.execute(queries.DELETE_SECRET, guard_owner_id=caller.id, guard_name=name)
    row = SecretRow(id=new_id(), owner_id=caller.id, name=name, value=vault.seal(value), updated=tx.now)
    tx.execute(queries.ADD_SECRET, **vars(row))
    return SecretInfo(name=name, updated=row.updated)


def secrets(tx: Tx, caller: UserCaller) -> SecretList:
    """The caller's secrets, by name, without their texts."""
    rows = tx.all(queries.SECRETS, SecretRow, owner_id=caller.id)
    return SecretList(secrets=tuple(SecretInfo(name=row.name, updated=row.updated) for row in rows))


def delete(tx: Tx, caller: UserCaller, name: str) -> Empty:
    """Forget a secret.

    Raises:
        NotFound: there is none of that name.
    """
    if not tx.execute(queries.DELETE_SECRET, guard_owner_id=caller.id, guard_name=name):
        raise NotFound(f"There is no secret {name!r}.")
    return Empty()


def hold_stored(tx: Tx, caller: UserCaller, names: Iterable[str]) -> None:
    """Hold that the caller has stored secrets of these names.

    Raises:
        NotFound: one is missing.
    """
    missing = sorted(set(names) - {row.name for row in tx.all(queries.SECRETS, SecretRow, owner_id=caller.id)})
    if missing:
        raise NotFound(
            f"There is no secret {', '.join(map(repr, missing))}, which the experiment needs.",
            advice=f"Store it first: client.secrets.set({missing[0]!r}, ...).",
            details={"secrets": missing},
        )


def values(tx: Tx, vault: Vault, owner_id: str, names: Iterable[str]) -> dict[str, str]:
    """The texts of those of ``names`` that the owner has stored, for an executor of theirs."""
    wanted = set(names)
    rows = tx.all(queries.SECRETS, SecretRow, owner_id=owner_id) if wanted else []
    return {row.name: vault.open(row.value) for row in rows if row.name in wanted}
