"""Passwords: hashed with argon2id, a few at a time, in threads; and the brake on guessing them.

A hash costs 64 MiB and tens of milliseconds on purpose. So no more than ``AT_ONCE`` are computed at a time and no more
than ``WAITING`` wait, whoever asks; and a user name that does not exist costs the same as a wrong password.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import argon2
from fieldlab_common.accounts import MAX_PASSWORD, MIN_PASSWORD
from fieldlab_common.errors import InvalidRequest, RateLimited, Unavailable

__all__ = ["Brake", "Passwords", "hash_password", "network_of"]

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


class Brake:
    """Lets so many attempts of one key through at once, and then one each ``every`` seconds (GCRA).

    It is of this process: several directors on one database brake each on their own.
    """

    def __init__(
        self, burst: int, every: float, *, most: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every, self._slack, self._most, self._clock = every, every * (burst - 1), most, clock
        self._free_at: dict[str, float] = {}  # when the key has its whole burst again

    def attempt(self, key: str, what: str) -> None:
        """Count an attempt.

        Raises:
            RateLimited: there were too many; ``what`` they are said to be.
        """
        now = self._clock()
        free_at = max(self._free_at.get(key, now), now)
        wait = free_at - now - self._slack
        if wait > 0:
            raise RateLimited(
                f"There were too many attempts {what}.",
                advice=f"Try again in {wait:.0f} s. Tokens go on working.",
                details={"retry_after": max(1.0, round(wait, 1))},
            )
        if key not in self._free_at and len(self._free_at) >= self._most:
            self._make_room(now)
        self._free_at[key] = free_at + self._every

    def forgive(self, key: str) -> None:
        """Count one attempt less: it was a good one."""
        if key in self._free_at:
            self._free_at[key] -= self._every

    def _make_room(self, now: float) -> None:
        self._free_at = {key: at for key, at in self._free_at.items() if at > now}
        if len(self._free_at) >= self._most:
            del self._free_at[min(self._free_at, key=self._free_at.__getitem__)]


def network_of(address: str) -> str:
    """What one person has of addresses: one of IPv4, a /64 of IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4 or parsed.ipv4_mapped is not None:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
