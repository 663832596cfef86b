"""The director's own secret: what is derived from it, and what is sealed with it.

The secret is 32 random bytes in a file that only the director's user may read, outside the database, so that a copy of
the database alone opens nothing. Two keys come of it (RFC 5869, HKDF): one signs executors' tokens, one seals options
of infrastructures. A canary in the database tells at the start whether file and database belong together.
"""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from fieldlab_common.errors import ConfigurationError

from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx

__all__ = ["Vault", "check_canary", "open_vault"]

_CANARY = "canary"


class Vault:
    """Seals JSON data, opens what it sealed, and has the key for executors' tokens."""

    def __init__(self, secret: bytes) -> None:
        self._fernet = Fernet(base64.urlsafe_b64encode(_derive(secret, b"fieldlab vault")))
        self.executor_key = _derive(secret, b"fieldlab executor token")

    def seal(self, data: Any) -> bytes:
        """``data`` (JSON) so that only a director with this secret reads it."""
        return self._fernet.encrypt(msgspec.json.encode(data))

    def open(self, sealed: bytes) -> Any:
        """What was sealed.

        Raises:
            ConfigurationError: another secret sealed it, or it was changed.
        """
        try:
            return msgspec.json.decode(self._fernet.decrypt(sealed))
        except InvalidToken as error:
            raise ConfigurationError(
                "Something in the database was sealed with another secret.",
                advice="Put back the secret.key that belongs to this database.",
            ) from error


def open_vault(path: Path) -> Vault:
    """The vault of the secret in ``path``, which is made if it is not there.

    Raises:
        ConfigurationError: the file is readable by others, or is no secret.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(32))
            file.flush()
            os.fsync(file.fileno())
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigurationError(f"{path} can be read by others.", advice=f"Run: chmod 600 {path}")
    secret = path.read_bytes()
    if len(secret) != 32:
        raise ConfigurationError(f"{path} is not a director's secret.", advice="Put the right one back.")
    return Vault(secret)


def check_canary(tx: Tx, vault: Vault) -> None:
    """Hold that the vault's secret is the one of this database; a new database takes it as its own.

    Raises:
        ConfigurationError: it is not.
    """
    sealed = tx.value(queries.META, name=_CANARY)
    if sealed is None:
        tx.execute(queries.ADD_META, name=_CANARY, value=vault.seal(_CANARY).decode())
    else:
        vault.open(sealed.encode())


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose).derive(secret)
