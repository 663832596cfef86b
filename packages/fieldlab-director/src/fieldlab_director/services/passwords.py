"""Passwords: hashed with argon2id, a few at a time, in threads.

A hash costs 64 MiB and tens of milliseconds on purpose. So no more than ``AT_ONCE`` are computed at a time and no more
than ``WAITING`` wait, whoever asks; and a user name that does not exist costs the same as a wrong password.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import argon2
from fieldlab_common.accounts import MAX_PASSWORD, MIN_PASSWORD
from fieldlab_common.errors import InvalidRequest, Unavailable

__all__ = ["Passwords", "hash_password", "network_of"]

T = TypeVar("T")

AT_ONCE = 2
WAITING = 50
_HASHER = argon2.PasswordHasher()


def hash_password(password: str) -> str:
    """The argon2id hash of a password. It takes tens of milliseconds on purpose: on an event loop use ``Passwords``.

    Raises:
        InvalidRequest: it is too short, or too long.
    """
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise InvalidRequest(
            f"A password has {MIN_PASSWORD} to {MAX_PASSWORD} characters; this one has {len(password)}.",
            advice="Choose another one.",
            details={"path": "$.password"},
        )
    return _HASHER.hash(password)


class Passwords:
    """Hashes and checks passwords without holding up the event loop."""

    def __init__(self, verify: Callable[[str, str], bool] = _HASHER.verify) -> None:
        self._verify = verify
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="password")
        self._busy = 0
        self._nobody = _hash_of_nothing()

    async def hash(self, password: str) -> str:
        """The hash of a password (see ``hash_password``)."""
        return await self._run(lambda: hash_password(password))

    async def check(self, hashed: str | None, password: str) -> bool:
        """Whether it is the password that was hashed. Without a hash it is not, and that takes as long to find out."""
        return await self._run(lambda: self._check(hashed or self._nobody, password[:MAX_PASSWORD]))

    def _check(self, hashed: str, password: str) -> bool:
        try:
            return self._verify(hashed, password)
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False

    async def _run(self, work: Callable[[], T]) -> T:
        if self._busy >= AT_ONCE + WAITING:
            raise Unavailable("Too many people log in just now.", advice="Try again in a moment.")
        self._busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._busy -= 1


def _hash_of_nothing() -> str:
    """What has the form and the cost of a hash, and is that of no password."""
    salt, digest = (base64.b64encode(os.urandom(size)).decode().rstrip("=") for size in (16, 32))
    cost = f"m={_HASHER.memory_cost},t={_HASHER.time_cost},p={_HASHER.parallelism}"
    return f"$argon2id$v=19${cost}${salt}${digest}"


def network_of(address: str) -> str:
    """What one person has of addresses: one of IPv4, a /64 of IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4 or parsed.ipv4_mapped is not None:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
