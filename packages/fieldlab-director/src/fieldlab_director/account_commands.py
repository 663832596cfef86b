"""The commands about users and tokens: one transaction each, beside directors that may be serving the database.

Whoever may open the data folder may run them. Each returns what it has to say.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from fieldlab_common.accounts import Role, Scope
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import ConfigurationError

from fieldlab_director.store.base import Tx
from fieldlab_director.upkeep_commands import add_places, existing, is_there, settings_of

if TYPE_CHECKING:
    from fieldlab_director.settings import Settings

__all__ = ["add_commands"]

T = TypeVar("T")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``user …`` and ``token …`` to the command line."""
    user = commands.add_parser("user", help="users").add_subparsers(required=True, metavar="COMMAND")
    add = _named(user, "add", _add_user, "make a user; the password is asked for, or read from a pipe")
    add.add_argument(
        "--role", choices=[role.value for role in Role], default="member", help="what it may do (default: %(default)s)"
    )
    add.add_argument("--no-password", action="store_true", help="a user who only uses tokens")
    _located(user.add_parser("list", help="list users"), _list_users)
    _named(user, "disable", _disable, "end all that a user may do, for now; what runs goes on")
    _named(user, "enable", _enable, "let a disabled user back in")
    role = _named(user, "role", _set_role, "give a user another role")
    role.add_argument("role", choices=[role.value for role in Role])
    _named(user, "password", _set_password, "set a user's password, and end the user's logins")
    _named(user, "remove", _remove_user, "remove a user with experiments, results, secrets, infrastructures and tokens")
    token = commands.add_parser("token", help="tokens").add_subparsers(required=True, metavar="COMMAND")
    create = _named(token, "create", _create_token, "print a new token of a user; it is shown this once")
    create.add_argument("--label", default="", help="what it is for")
    create.add_argument(
        "--scope", choices=[scope.value for scope in Scope], default="run", help="good for (default: %(default)s)"
    )
    create.add_argument("--expires", metavar="TIME", help="how long it is good for, like 90d (default: for good)")
    _named(token, "list", _list_tokens, "list a user's tokens, without their texts")
    revoke = _named(token, "revoke", _revoke_token, "end a token of a user, at once")
    revoke.add_argument("id", help="as `token list` shows it")


def _named(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], str],
    what: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what)
    parser.add_argument("user", help="the user's name")
    return _located(parser, run)


def _located(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], str]) -> argparse.ArgumentParser:
    add_places(parser)
    parser.set_defaults(run=run)
    return parser


# --- users -----------------------------------------------------------------------------------------------------------


def _add_user(options: argparse.Namespace) -> str:
    from fieldlab_director.services.accounts import add_user
    from fieldlab_director.services.passwords import hash_password

    hashed = None if options.no_password else hash_password(_ask_password())
    new = not is_there(settings_of(options))
    _transact(settings_of(options), lambda tx: add_user(tx, options.user, password=hashed, role=Role(options.role)))
    where = f" There was no director's data in {options.data}: it was made, too." if new else ""
    return f"User {options.user!r} was made, as {options.role}.{where}"


def _list_users(options: argparse.Namespace) -> str:
    from fieldlab_director.services.accounts import users

    found = _command(options, users).users
    rows = [
        (user.name, user.role, _state(user.disabled), "password" if user.password else "tokens only") for user in found
    ]
    return _table(("name", "role", "state", "logs in with"), rows)


def _disable(options: argparse.Namespace) -> str:
    return _change(options, f"User {options.user!r} is disabled.", disabled=True)


def _enable(options: argparse.Namespace) -> str:
    return _change(options, f"User {options.user!r} is enabled.", disabled=False)


def _set_role(options: argparse.Namespace) -> str:
    return _change(options, f"User {options.user!r} is {options.role} now.", role=Role(options.role))


def _set_password(options: argparse.Namespace) -> str:
    from fieldlab_director.services.passwords import hash_password

    return _change(
        options,
        f"User {options.user!r} has a new password; the logins there were have ended.",
        password=hash_password(_ask_password()),
    )


def _remove_user(options: argparse.Namespace) -> str:
    from fieldlab_director.services.accounts import remove_user

    _command(options, lambda tx: remove_user(tx, options.user))
    return f"User {options.user!r} and all that was the user's is removed."


def _change(
    options: argparse.Namespace,
    said: str,
    *,
    role: Role | None = None,
    disabled: bool | None = None,
    password: str | None = None,
) -> str:
    from fieldlab_director.services.accounts import change_user

    _command(options, lambda tx: change_user(tx, options.user, role=role, disabled=disabled, password=password))
    return said


# --- tokens ----------------------------------------------------------------------------------------------------------


def _create_token(options: argparse.Namespace) -> str:
    from fieldlab_director.services.accounts import check_lasting, create_token

    lasts = None if options.expires is None else parse_duration(options.expires)
    check_lasting(lasts)

    def make(tx: Tx) -> str:
        expires = tx.now + lasts if lasts is not None else None
        scope = Scope(options.scope)
        return create_token(tx, options.user, label=options.label, scope=scope, expires=expires).token

    return _command(options, make)


def _list_tokens(options: argparse.Namespace) -> str:
    from fieldlab_director.services.accounts import find_user, tokens
    from fieldlab_director.services.identity import utc

    found = _command(options, lambda tx: tokens(tx, find_user(tx, options.user).id)).tokens
    rows = [(one.id, one.scope, one.label, "never" if one.expires is None else utc(one.expires)) for one in found]
    return _table(("id", "scope", "label", "expires"), rows)


def _revoke_token(options: argparse.Namespace) -> str:
    from fieldlab_director.services.accounts import find_user, revoke_token

    _command(options, lambda tx: revoke_token(tx, find_user(tx, options.user).id, options.id))
    return f"Token {options.id} has ended."


# --- inside ----------------------------------------------------------------------------------------------------------


def _ask_password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise ConfigurationError("The two passwords differ.")
    return password


def _command(options: argparse.Namespace, fn: Callable[[Tx], T]) -> T:
    return _transact(existing(options), fn)


def _transact(settings: Settings, fn: Callable[[Tx], T]) -> T:
    from fieldlab_director.app import open_store

    async def run() -> T:
        _, store = await open_store(settings)
        try:
            return await store.write(fn)
        finally:
            await store.close()

    return asyncio.run(run())


def _state(disabled: bool) -> str:
    return "disabled" if disabled else "enabled"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
