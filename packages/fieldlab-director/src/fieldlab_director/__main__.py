"""The command line: ``fieldlab-director serve``, ``user add``, ``token create``."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fieldlab_common.accounts import Role
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import ConfigurationError, FieldlabError

__all__ = ["main"]

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What is wrong with it goes to standard error, as a sentence."""
    options = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except FieldlabError as error:
        print(f"fieldlab-director: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fieldlab-director", description="The services of fieldlab.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="answer users and executors until told to stop")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8420, help="port to listen at; 0: a free one (default: %(default)s)")
    serve.add_argument("--certificate", type=Path, help="PEM file: serve TLS")
    serve.add_argument("--key", type=Path, help="PEM file of the certificate's key")
    serve.add_argument("--behind-proxy", action="store_true", help="a proxy in front does TLS")
    serve.add_argument("--advertise", metavar="URL", help="where executors reach it, if not at the address above")
    serve.add_argument("--bootstrap", metavar="USER", help="make this admin, with a token in DIR/token, if not there")
    serve.add_argument("--ephemeral", action="store_true", help="at the end, cancel every run and remove the data")
    serve.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    serve.add_argument("--lifeline-fd", type=int, help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)
    user = commands.add_parser("user", help="users").add_subparsers(required=True, metavar="COMMAND")
    add = user.add_parser("add", help="make a user; the password is asked for, or read from a pipe")
    add.add_argument("name")
    add.add_argument("--role", choices=list(Role), default=Role.MEMBER, help="what it may do (default: %(default)s)")
    add.add_argument("--no-password", action="store_true", help="a user who only uses tokens")
    add.set_defaults(run=_add_user)
    token = commands.add_parser("token", help="tokens").add_subparsers(required=True, metavar="COMMAND")
    create = token.add_parser("create", help="print a new token of a user; it is shown this once")
    create.add_argument("user")
    create.add_argument("--label", default="", help="what it is for")
    create.add_argument("--expires", metavar="TIME", help="how long it is good for, like 90d (default: for good)")
    create.set_defaults(run=_create_token)
    for command in (serve, add, create):
        command.add_argument("--data", type=Path, required=True, metavar="DIR", help="the director's data folder")
        command.add_argument("--database", metavar="URL", help="postgresql://… (default: an SQLite file in DIR)")
    return parser


def _serve(options: argparse.Namespace) -> None:
    from fieldlab_director.app import serve
    from fieldlab_director.logs import configure
    from fieldlab_director.settings import Settings

    settings = Settings(
        data=options.data.absolute(),
        host=options.host,
        port=options.port,
        certificate=options.certificate,
        key=options.key,
        behind_proxy=options.behind_proxy,
        advertise=options.advertise,
        bootstrap=options.bootstrap,
        ephemeral=options.ephemeral,
        database_url=options.database,
    )
    for descriptor in (options.ready_fd, options.lifeline_fd):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    configure(settings.log)
    asyncio.run(serve(settings, ready=_announce(options.ready_fd), lifeline=options.lifeline_fd))


def _announce(descriptor: int | None) -> Callable[[str, str], None]:
    def announce(url: str, token: str) -> None:
        if descriptor is None:
            print(f"fieldlab-director answers at {url}", file=sys.stderr)
            return
        os.write(descriptor, json.dumps({"url": url, "token": token}).encode() + b"\n")
        os.close(descriptor)

    return announce


def _add_user(options: argparse.Namespace) -> None:
    from fieldlab_director.services.identity import add_user, hash_password

    hashed = None if options.no_password else hash_password(_password())
    _command(options, lambda tx: add_user(tx, options.name, password=hashed, role=options.role))
    print(f"User {options.name!r} was made.")


def _password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise ConfigurationError("The two passwords differ.")
    return password


def _create_token(options: argparse.Namespace) -> None:
    from fieldlab_director.services.identity import create_token

    expires = time.time() + parse_duration(options.expires) if options.expires else None
    print(_command(options, lambda tx: create_token(tx, options.user, label=options.label, expires=expires)))


def _command(options: argparse.Namespace, fn: Callable[..., T]) -> T:
    """Run one transaction on the director's database, beside directors that may be serving it."""
    from fieldlab_director.app import open_store
    from fieldlab_director.settings import Settings

    settings = Settings(data=options.data.absolute(), database_url=options.database)

    async def run() -> T:
        _, store = await open_store(settings)
        try:
            return await store.write(fn)
        finally:
            await store.close()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
