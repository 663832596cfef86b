"""The reception: for each endpoint that is about users and tokens, the service of the same name; a part of the desk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fieldlab_common.accounts import Login, NewToken, TokenList, UserInfo, UserList
from fieldlab_common.errors import AuthenticationError, IllegalState, InvalidRequest, RateLimited
from fieldlab_common.protocol import Empty

from fieldlab_director.services import accounts
from fieldlab_director.services.passwords import Passwords, network_of
from fieldlab_director.services.quotas import Brake
from fieldlab_director.settings import Settings
from fieldlab_director.store import queries
from fieldlab_director.store.base import Store, Tx
from fieldlab_director.store.rows import UserRow

if TYPE_CHECKING:
    from fieldlab_director.services.desk import Ask

__all__ = ["Reception"]


class Reception:
    """What is asked about accounts; a part of ``Desk``."""

    settings: Settings
    store: Store

    def __init__(self) -> None:
        self.passwords = Passwords()
        self._of_user, self._of_address = Brake(10, every=60.0), Brake(30, every=20.0)

    # --- logging in --------------------------------------------------------------------------------------------------

    async def login(self, ask: Ask) -> NewToken:
        """A token for a user name and a password."""
        request: Login = ask.body
        keys = request.user[:64], network_of(ask.address)
        _attempt(self._of_address, keys[1], "from this address")
        _attempt(self._of_user, keys[0], "to log in as this user")
        row = await self.store.read(lambda tx: tx.one(queries.USER_BY_NAME, UserRow, name=request.user[:200]))
        right = await self.passwords.check(row.password if row else None, request.password)
        if row is None or not right:
            raise AuthenticationError(
                "The user name or the password is wrong.", advice="An admin can set another password."
            )
        label = request.label or f"login from {ask.address}"
        made = await self.store.write(lambda tx: accounts.log_in(tx, row, label=label))
        self._of_user.forgive(keys[0])
        self._of_address.forgive(keys[1])
        return made

    async def logout(self, ask: Ask) -> Empty:
        """End the token that asks."""
        await self.store.write(lambda tx: accounts.revoke_token(tx, ask.user.id, ask.user.token_id))
        return Empty()

    async def change_password(self, ask: Ask) -> Empty:
        """Another password for the user who asks, and an end of all other logins."""
        user, request = ask.user, ask.body
        _attempt(self._of_user, user.name, "to change this user's password")
        row = await self.store.read(lambda tx: accounts.find_user(tx, user.name))
        if row.password is None:
            raise IllegalState(f"{user.name!r} has no password.", advice="An admin can set one.")
        if not await self.passwords.check(row.password, request.current):
            raise InvalidRequest("The current password is wrong.", details={"path": "$.current"})
        hashed = await self.passwords.hash(request.new)
        await self.store.write(
            lambda tx: accounts.set_password(tx, accounts.find_user(tx, user.name), hashed, but=user.token_id)
        )
        self._of_user.forgive(user.name)
        return Empty()

    # --- tokens ------------------------------------------------------------------------------------------------------

    async def tokens(self, ask: Ask) -> TokenList:
        """The caller's tokens."""
        return await self.store.read(lambda tx: accounts.tokens(tx, ask.user.id))

    async def create_token(self, ask: Ask) -> NewToken:
        """A token of the caller."""
        lasts = ask.body.expires_in
        accounts.check_lasting(lasts)

        def make(tx: Tx) -> NewToken:
            expires = None if lasts is None else tx.now + lasts
            return accounts.create_token(tx, ask.user.name, label=ask.body.label, scope=ask.body.scope, expires=expires)

        return await self.store.write(make)

    async def revoke_token(self, ask: Ask) -> Empty:
        """End a token of the caller."""
        await self.store.write(lambda tx: accounts.revoke_token(tx, ask.user.id, ask.path["token"]))
        return Empty()

    # --- users, for admins -------------------------------------------------------------------------------------------

    async def users(self, ask: Ask) -> UserList:
        """All users."""
        return await self.store.read(accounts.users)

    async def add_user(self, ask: Ask) -> UserInfo:
        """Make a user."""
        name, role = ask.body.name, ask.body.role
        hashed = None if ask.body.password is None else await self.passwords.hash(ask.body.password)

        def make(tx: Tx) -> UserInfo:
            accounts.add_user(tx, name, password=hashed, role=role)
            return accounts.change_user(tx, name)

        return await self.store.write(make)

    async def change_user(self, ask: Ask) -> UserInfo:
        """Change a user."""
        name, role, disabled = ask.path["user"], ask.body.role, ask.body.disabled
        hashed = None if ask.body.password is None else await self.passwords.hash(ask.body.password)
        return await self.store.write(
            lambda tx: accounts.change_user(tx, name, role=role, disabled=disabled, password=hashed)
        )

    async def remove_user(self, ask: Ask) -> Empty:
        """Remove a user and all that is the user's."""
        await self.store.write(lambda tx: accounts.remove_user(tx, ask.path["user"]))
        return Empty()


def _attempt(brake: Brake, key: str, what: str) -> None:
    wait = brake.take(key)
    if wait:
        raise RateLimited(
            f"There were too many attempts {what}.",
            advice=f"Try again in {wait:.0f} s. Tokens go on working.",
            details={"retry_after": max(1.0, round(wait, 1))},
        )
