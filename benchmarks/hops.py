"""An event on its way: sent by a step in one executor, until a step in another executor has it from the director.

Both executors are real, started by the director's own connector, and both have a step that prints more than their bulk
lane ships, all the while. The steps throw the event to each other, each after a random moment's rest, so that nothing
falls into step with a timer. A time is of the clock that all processes of a machine share (CLOCK_MONOTONIC), from just
before ``ctx.events.send`` until ``ctx.events.wait`` has returned.

Beside it, in turns: a bare hop of server-sent events, from a request until its data has reached another process, by
the smallest server that Starlette and uvicorn make; and what the disk needs for an ``fdatasync``, of which an event
needs two: the executor's and the director's.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import director as d
import fieldlab as fl
from measure import Row, Versions, work

__all__ = ["events"]

HOPS = 100  # of a round, there and as many back
REST = 0.03  # seconds at most before an event is sent on
CHATTER = 4_000_000  # bytes a second that a node prints; its bulk lane ships a batch of 1 MiB twice a second
SYNCS = 200


def events(rounds: int, versions: Versions) -> list[Row]:
    """How long an event takes from executor to executor, beside a bare hop and the disk."""
    folder = work("events")
    ours: list[float] = []
    hops: list[float] = []
    syncs: list[float] = []
    with d.serving(folder / "director", nodes=2) as director, fl.Client(director.url, director.token) as client:
        for number in range(rounds):
            syncs += _syncs(folder / "file")
            hops += _bare()
            ours += _thrown(client, f"events-{number}")
    shutil.rmtree(folder)
    found = {name: [1000 * one for one in samples] for name, samples in (("us", ours), ("bare", hops), ("disk", syncs))}
    middle = {name: statistics.median(samples) for name, samples in found.items()}
    aim = round(10 * middle["bare"] + 2 * middle["disk"], 2)
    note = f"the aim is 10 × the bare hop + 2 × an fdatasync, {middle['disk']:.3f} ms here"
    bare = "a bare SSE hop"
    late = {name: [statistics.quantiles(found[name], n=100)[98]] for name in ("us", "bare")}
    peer, far = ({"peer": bare, "peer_samples": samples["bare"]} for samples in (found, late))
    return [
        Row(name="event to another executor, p50", unit="ms", samples=found["us"], aim=aim, note=note, **peer),
        Row(name="event to another executor, p99", unit="ms", samples=late["us"], **far),
        Row(name="an fdatasync of that disk", unit="ms", samples=found["disk"]),
    ]


# --- ours -------------------------------------------------------------------------------------------------------------


def _thrown(client: fl.Client, name: str) -> list[float]:
    """Seconds of each hop between two executors that print without end."""

    @fl.task
    def chatter(*, ctx: fl.TaskContext) -> None:
        line, begin, sent = "x" * 99 + "\n", time.monotonic(), 0
        ctx.ready()
        while not ctx.stopping.wait(0.02):
            while sent < CHATTER * (time.monotonic() - begin):
                print(line * 40, end="", flush=True)
                sent += 40 * len(line)

    @fl.task
    def throw(first: bool, *, ctx: fl.TaskContext) -> list[float]:
        here, there = ("ping", "pong") if first else ("pong", "ping")
        took: list[float] = []
        after = 0
        for number in range(HOPS):
            if first or number:
                time.sleep(random.uniform(0, REST))
                ctx.events.send(here, time.monotonic())
            (event,) = ctx.events.wait(there, after=after, timeout=60)
            took.append(time.monotonic() - event.data)
            after = event.number
        if not first:
            ctx.events.send(here, time.monotonic())
        return took

    nodes = client.nodes()
    described = fl.Experiment(name)
    for node, first in zip(nodes, (True, False), strict=True):
        with fl.DAG("throw") as dag:
            noise = fl.background(chatter())
            throw(first).during(noise)
        described = described.map(dag, node)
    run = client.submit(described)
    run.wait(timeout=120, raise_on_failure=True)
    return [hop for node in nodes for hop in run.results[node.name]["throw"].value]


# --- beside it --------------------------------------------------------------------------------------------------------


def _syncs(path: Path) -> list[float]:
    """Seconds of an ``fdatasync`` after a small write."""
    taken: list[float] = []
    with path.open("ab", buffering=0) as file:
        for _ in range(SYNCS):
            file.write(b"x" * 300)
            begin = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - begin)
    return taken


def _bare() -> list[float]:
    """Seconds from just before a request is sent until another process has read the event that it makes."""
    with _running("serve") as server:
        port = server.readline().strip()
        with _running("listen", port) as listener:
            listener.readline()
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=d.WAIT)
            for _ in range(2 * HOPS):
                time.sleep(random.uniform(0, REST))
                connection.request("POST", "/", str(time.monotonic()))
                connection.getresponse().read()
            connection.close()
            return [float(listener.readline()) for _ in range(2 * HOPS)]


@contextlib.contextmanager
def _running(*arguments: str) -> Iterator[object]:
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None  # PIPE was asked for
        try:
            yield process.stdout
        finally:
            process.kill()


def _serve() -> None:
    """A server that sends what is posted to all who listen."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    queues: list[asyncio.Queue[bytes]] = []

    async def listen(request: Request) -> Response:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        queues.append(queue)

        async def body() -> AsyncIterator[bytes]:
            yield b": welcome\n\n"
            while True:
                yield b"data: " + await queue.get() + b"\n\n"

        return StreamingResponse(body(), media_type="text/event-stream")

    async def post(request: Request) -> Response:
        data = await request.body()
        for queue in queues:
            queue.put_nowait(data)
        return Response()

    routes = [Route("/", listen, methods=["GET"]), Route("/", post, methods=["POST"])]
    # With its protocol named, asyncio sets TCP_NODELAY for its connections.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(Starlette(routes=routes), lifespan="off", log_config=None, access_log=False)
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def _listen(port: str) -> None:
    """Print how long each event took."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=d.WAIT)
    connection.request("GET", "/")
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b":"):
            print("listens", flush=True)
        elif line.startswith(b"data: "):
            print(time.monotonic() - json.loads(line[6:]), flush=True)


if __name__ == "__main__":
    {"serve": _serve, "listen": _listen}[sys.argv[1]](*sys.argv[2:])
