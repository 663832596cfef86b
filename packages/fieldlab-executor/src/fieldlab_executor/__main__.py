"""The executor's command line, as ``python fieldlab.pyz …`` or ``python -m fieldlab_executor …``.

    run DIR [--pipe FD]     run the deployment that DIR/launch.json names, and report; FD: a local run's socket
    drain DIR [--pipe FD]   ship what a dead executor left in DIR
    facts                   print what this node is, as JSON
    keep                    keep the executors of this node for who asks, in frames on standard input and output
    join URL TOKEN [--name NAME] [--slots N] [--properties JSON] [--install]
                            make this machine a node of the director at URL, and serve it; with --install: from every
                            boot on, as a service of this user
    agent                   serve the director that was joined
    starter FD              fork executors for a keeper, which has the other end of the socket FD
    pack FILE               write the executor as one file, fieldlab.pyz
    prepare --environment JSON [--python VERSION] [--cache DIR] [--leash FD]
                            make the environment, or find it made; print {"python": path}, or {"error": ...}; what its
                            builders say goes to standard error; with FD: end, with all of them, when FD is closed
    evict [--age DURATION] [--size SIZE] [--cache DIR]
                            remove the environments that were not used for so long (FIELDLAB_CACHE_AGE, 30d), and the
                            least recently used beyond that size (FIELDLAB_CACHE_SIZE, 10 GiB); print their keys

Exit codes: 0 done, and everything is with the director; 1 failed, standard error says why; 2 bad usage; 3 the claim is
another's, or another executor holds DIR: nothing was done; 4 not everything could be shipped: ``drain`` goes on; 5 the
director does not know this agent.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fieldlab_common.errors import (
    AuthenticationError,
    ConfigurationError,
    FieldlabError,
    InvalidMessage,
    UnsupportedError,
)

__all__ = ["main"]

USAGE = 2
UNKNOWN = 5  # an agent that its director does not know: starting it again changes nothing


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "drain": _drain,
        "facts": _facts,
        "keep": _keep,
        "join": _join,
        "agent": _agent,
        "starter": _starter,
        "pack": _pack,
        "prepare": _prepare,
        "evict": _evict,
    }
    if not words or words[0] not in commands:
        sys.stderr.write((__doc__ or "").strip() + "\n")
        return 0 if words[:1] in (["--help"], ["-h"]) else USAGE
    try:
        return commands[words[0]](words[1:])
    except (FieldlabError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _options(words: list[str], known: Sequence[str], places: int) -> tuple[list[str], dict[str, str]]:
    """Positional words and ``--name value`` options; leaves with the usage if they are not as they should be."""
    found: dict[str, str] = {}
    left: list[str] = []
    rest = iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        if name.removeprefix("--") in known and name.startswith("--"):
            found[name.removeprefix("--")] = value if sign else next(rest, "")
        else:
            left.append(word)
    if len(left) != places or any(word.startswith("--") for word in left):
        sys.stderr.write((__doc__ or "").strip() + "\n")
        raise SystemExit(USAGE)
    return left, found


def _run(words: list[str]) -> int:
    places, options = _options(words, ["pipe"], 1)
    _require_linux()
    from fieldlab_executor import session

    folder = Path(places[0]).absolute()
    launch = _launch(folder)
    if "pipe" in options:  # no process started from here may keep the client's socket open
        os.set_inheritable(int(options["pipe"]), False)
    try:
        held = session.locked(folder)
    except session.Busy as error:
        sys.stderr.write(f"{error}\n")
        return session.REFUSED
    from fieldlab_executor import zipapp
    from fieldlab_executor.cache import cache_folder

    try:
        site = zipapp.unpacked(cache_folder())
        return session.Session(folder, launch, lambda: _transport(launch, options.get("pipe")), site).run()
    finally:
        os.close(held)


def _require_linux() -> None:
    """Say plainly what docs/adr/009 says at length: other systems lack what steps are started, found and ended with."""
    if not sys.platform.startswith("linux"):
        raise UnsupportedError(
            f"The executor runs on Linux so far, and this node is {sys.platform}.",
            advice="Run it in a container or a virtual machine there; `facts`, `drain` and `pack` work as they are.",
        )


def _launch(folder: Path) -> Any:
    from fieldlab_common.protocol import Launch
    from fieldlab_common.wire import loads

    try:
        return loads(Launch, (folder / "launch.json").read_bytes())
    except FileNotFoundError as error:
        raise ConfigurationError(f"There is no {folder / 'launch.json'}.", advice="A connector writes it.") from error


def _transport(launch: Any, pipe: str | None) -> Any:
    from fieldlab_executor import transport

    if pipe is not None:
        from fieldlab_executor.pipe import pipe_of

        return pipe_of(int(pipe))
    proxy = transport.proxy_for(launch.director, os.environ)
    return transport.HttpTransport(launch.director, launch.token, ca=launch.ca, proxy=proxy)


def _drain(words: list[str]) -> int:
    places, options = _options(words, ["pipe"], 1)
    from fieldlab_executor import session

    folder = Path(places[0]).absolute()
    launch = _launch(folder)
    try:
        held = session.locked(folder)
    except session.Busy as error:
        sys.stderr.write(f"{error}\n")
        return session.REFUSED
    try:
        return session.drain(folder, lambda: _transport(launch, options.get("pipe")))
    finally:
        os.close(held)


def _facts(words: list[str]) -> int:
    _options(words, [], 0)
    from fieldlab_common.wire import dumps

    from fieldlab_executor.facts import facts

    print(dumps(facts()).decode())
    return 0


def _keep(words: list[str]) -> int:
    _options(words, [], 0)
    import asyncio

    from fieldlab_executor import keeper

    asyncio.run(keeper.serve(_own_command()))
    return 0


def _join(words: list[str]) -> int:
    install = "--install" in words
    places, options = _options([w for w in words if w != "--install"], ["name", "slots", "properties"], 2)
    from fieldlab_executor import agent

    path = agent.identity_file()
    try:
        properties = json.loads(options.get("properties") or "{}")
        slots = int(options.get("slots") or 1)
    except ValueError:
        properties, slots = None, 0
    if not isinstance(properties, dict) or slots < 1:
        raise ConfigurationError("--slots takes a number from 1 on, and --properties a JSON object.")
    url, token = places
    joined = agent.join(url.rstrip("/"), token, path, name=options.get("name", ""), slots=slots, properties=properties)
    agent.warn(f"This machine is node {joined.name!r} of {joined.url}.")
    if install:
        from fieldlab_executor import service

        for line in service.install(Path(sys.argv[0])):
            agent.warn(line)
        return 0
    command = _own_command()
    os.execv(command[0], [*command, "agent"])  # the token must not stay in the list of processes


def _own_command() -> list[str]:
    """What runs this command line, from a folder that stays as it is."""
    from fieldlab_executor import boot, zipapp
    from fieldlab_executor.cache import cache_folder

    return boot.command(sys.executable, str(zipapp.unpacked(cache_folder())))


def _agent(words: list[str]) -> int:
    _options(words, [], 0)
    import signal

    from fieldlab_executor import agent

    running = agent.Agent(agent.identity_file(), _own_command(), say=agent.warn)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: running.stop())
    try:
        running.run()
    except AuthenticationError as error:
        agent.warn(str(error))
        return UNKNOWN
    return 0


def _starter(words: list[str]) -> int:
    places, _ = _options(words, [], 1)
    from fieldlab_executor import starter

    starter.serve(int(places[0]))
    return 0


def _pack(words: list[str]) -> int:
    places, _ = _options(words, [], 1)
    from fieldlab_executor import zipapp

    zipapp.build(places[0])
    return 0


def _prepare(words: list[str]) -> int:
    _, options = _options(words, ["environment", "python", "cache", "leash"], 0)
    from fieldlab_common.protocol import Tagged, environment_of
    from fieldlab_common.wire import loads

    from fieldlab_executor import environments, preparing

    try:
        environment = environment_of(loads(Tagged, options.get("environment", "").encode()))
    except InvalidMessage as error:
        sys.stderr.write(f"--environment: {error}\n")
        return USAGE
    preparing.guard(int(options["leash"]) if options.get("leash") else None)

    def log(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    try:
        made = environments.ensure(environment, python=options.get("python", ""), cache=_cache(options), log=log)
    except (FieldlabError, OSError) as error:
        print(json.dumps({"error": preparing.problem(error)}))
        return 1
    finally:
        preparing.sweep()
    made.close()
    print(json.dumps({"python": made.python}))
    return 0


def _cache(options: dict[str, str]) -> Path:
    from fieldlab_executor.cache import cache_folder

    return Path(options["cache"]).absolute() if options.get("cache") else cache_folder()


def _evict(words: list[str]) -> int:
    _, options = _options(words, ["age", "size", "cache"], 0)
    from fieldlab_executor.environments import shelf_of
    from fieldlab_executor.shelf import Bounds

    given = {f"FIELDLAB_CACHE_{name.upper()}": options[name] for name in ("age", "size") if options.get(name)}
    for key in shelf_of(_cache(options)).evict(Bounds.of({**os.environ, **given}), time.time()):
        print(key)
    return 0


if __name__ == "__main__":
    sys.exit(main())
