"""The command line: ``fieldlab-director serve``, and what an admin does beside it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fieldlab_common.errors import FieldlabError

from fieldlab_director.account_commands import add_commands
from fieldlab_director.upkeep_commands import add_places, add_upkeep, settings_of

if TYPE_CHECKING:
    from fieldlab_director.app import Started

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What is wrong with it goes to standard error, as a sentence."""
    options = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], str] = options.run
        said = run(options)
    except FieldlabError as error:
        print(f"fieldlab-director: {error}", file=sys.stderr)
        return 1
    if said:
        print(said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fieldlab-director", description="The services of fieldlab.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="answer users and executors until told to stop")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8420, help="port to listen at; 0: a free one (default: %(default)s)")
    serve.add_argument("--certificate", type=Path, help="PEM file: serve TLS")
    serve.add_argument("--key", type=Path, help="PEM file of the certificate's key")
    serve.add_argument("--ca", type=Path, help="PEM file of the CA that signed it, for executors to trust")
    serve.add_argument("--behind-proxy", action="store_true", help="a proxy in front does TLS")
    serve.add_argument(
        "--proxy",
        action="append",
        metavar="ADDRESS",
        help="where that proxy asks from; its X-Forwarded-For is believed (default: this machine)",
    )
    serve.add_argument(
        "--stop-delay",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="at the end, answer so long after /readyz says no, for a balancer to notice (default: %(default)s)",
    )
    serve.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="change a limit, like experiments=500; docs/limits.md has all of them",
    )
    serve.add_argument(
        "--allow-address",
        action="append",
        default=[],
        metavar="CIDR",
        help="a network that infrastructures of users may be in although it is loopback, link-local or of a cloud",
    )
    serve.add_argument("--advertise", metavar="URL", help="where executors reach it, if not at the address above")
    serve.add_argument("--bootstrap", metavar="USER", help="make this admin, with a token in DIR/token, if not there")
    serve.add_argument("--ephemeral", action="store_true", help="at the end, cancel every run and remove the data")
    serve.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    serve.add_argument("--lifeline-fd", type=int, help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)
    add_places(serve)
    add_upkeep(commands)
    add_commands(commands)
    return parser


def _serve(options: argparse.Namespace) -> str:
    from fieldlab_director.addresses import networks
    from fieldlab_director.app import make_private, serve
    from fieldlab_director.descriptors import raise_limit
    from fieldlab_director.logs import configure
    from fieldlab_director.settings import Settings, limits_of

    settings = settings_of(
        options,
        host=options.host,
        port=options.port,
        certificate=options.certificate,
        ca=options.ca,
        key=options.key,
        behind_proxy=options.behind_proxy,
        proxies=tuple(options.proxy or Settings.proxies),
        stop_delay=options.stop_delay,
        limits=limits_of(options.limit),
        advertise=options.advertise,
        bootstrap=options.bootstrap,
        ephemeral=options.ephemeral,
        allowed_addresses=networks(options.allow_address),
        open_files=raise_limit(),
    )
    for descriptor in (options.ready_fd, options.lifeline_fd):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    make_private(settings.data)
    configure(settings.log)
    # The loop answers everybody, and may have to wait so long for a thread that reads logs, each time that it wakes.
    sys.setswitchinterval(0.001)
    asyncio.run(serve(settings, ready=_announce(options.ready_fd), lifeline=options.lifeline_fd))
    return ""


def _announce(descriptor: int | None) -> Callable[[Started], None]:
    def announce(started: Started) -> None:
        if descriptor is None:
            print(f"fieldlab-director answers at {started.url}", file=sys.stderr)
            if started.admin:
                print(_welcome(started), file=sys.stderr, flush=True)
            return
        os.write(descriptor, json.dumps({"url": started.url, "token": started.token}).encode() + b"\n")
        os.close(descriptor)

    return announce


def _welcome(started: Started) -> str:
    """How the first admin logs in. It is said once, and stands in no file."""
    return f"""
This director is new. Its first user is {started.admin!r}, an admin; the password is shown this once:

    {started.password}

To log in from Python, paste:

    import fieldlab as fl
    client = fl.Client.login({started.url!r}, {started.admin!r}, {started.password!r})

Then client.change_password() sets one of your own, and `fieldlab-director user add NAME` makes others.
"""


if __name__ == "__main__":
    sys.exit(main())
