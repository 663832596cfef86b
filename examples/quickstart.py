"""Measure this machine's network stack with three nodes: round trips and throughput over real TCP sockets.

    make demo        (or: python examples/quickstart.py)

One node serves, two measure against it, at the same time. A director runs for as long as this program does; with
`fl.Client()` and nodes of a real director, nothing else changes. What comes back lands in `demo-output/`.
"""

import csv
import json
import math
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fieldlab as fl
from fieldlab_director import embedded

OUTPUT = Path("demo-output")

# --- the server: echoes what comes after an "e", counts what comes after a "c" ---


class Conversation(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        link: socket.socket = self.request
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if link.recv(1) == b"e":
            while data := link.recv(4096):
                link.sendall(data)
        else:
            count = 0
            while data := link.recv(1 << 18):
                count += len(data)
            link.sendall(count.to_bytes(8, "big"))


@fl.task
def serve(*, ctx: fl.TaskContext) -> dict[str, Any]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Conversation) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {"host": "127.0.0.1", "port": server.server_address[1]}
        print("serving at", address)
        ctx.events.send("listening", address)  # this is how the other nodes learn where it is
        ctx.ready()  # steps that are `during` this one may start now
        ctx.stopping.wait()  # until nothing is `during` it any more
        server.shutdown()
    return address


# --- the measurements ---


def connect(address: dict[str, Any], mode: bytes) -> socket.socket:
    link = socket.create_connection((address["host"], address["port"]), timeout=30)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.sendall(mode)
    return link


class RoundTrips(fl.Task):
    """Times `count` exchanges of `size` bytes; the value has microseconds."""

    def __init__(self, count: int, size: int = 64) -> None:
        self.count, self.size = count, size

    def run(self, address: dict[str, Any], *, ctx: fl.TaskContext) -> dict[str, Any]:
        message, times = bytes(self.size), []
        with connect(address, b"e") as link:
            for _ in range(self.count):
                start = time.perf_counter_ns()
                link.sendall(message)
                missing = self.size
                while missing:
                    missing -= len(link.recv(missing)) or sys.exit("the server hung up")
                times.append((time.perf_counter_ns() - start) / 1000)
        with open(ctx.artifact("round-trips.csv"), "w", newline="") as file:
            csv.writer(file).writerows([["exchange", "microseconds"], *enumerate(times, 1)])
        cuts = [round(cut, 2) for cut in statistics.quantiles(times, n=100)]
        ctx.log.info("%d round trips, the median took %.1f µs", len(times), cuts[49])
        return {"exchanges": len(times), "p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "percentiles": cuts}


def pour(address: dict[str, Any], seconds: float, send: Callable[[socket.socket], Any]) -> dict[str, Any]:
    with connect(address, b"c") as link:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            send(link)
        link.shutdown(socket.SHUT_WR)
        received = int.from_bytes(link.recv(8), "big")  # the server's count, not what we believe to have sent
        took = time.perf_counter() - start
    print(f"{received / 1e6:.0f} MB in {took:.2f} s")
    return {"bytes": received, "seconds": took, "gbit_per_second": round(received * 8e-9 / took, 2)}


@fl.task(timeout=60)
def throughput(address: dict[str, Any], seconds: float) -> dict[str, Any]:
    buffer = bytes(1 << 18)
    return pour(address, seconds, lambda link: link.sendall(buffer))


@throughput.implementation(when=(fl.node.os == "linux") & (fl.node["sender"] == "sendfile"))
def throughput_sendfile(address: dict[str, Any], seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(1 << 22))
        file.flush()
        return pour(address, seconds, lambda link: link.sendfile(file))


# --- the interface counters, beside the measurements; each kind of system has its own ---


def record(ctx: fl.TaskContext, every: float, read: Callable[[], Iterable[tuple[str, int, int]]]) -> int:
    samples, stopped = 0, False
    with open(ctx.artifact("counters.csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["time", "interface", "received_bytes", "sent_bytes"])
        ctx.ready()
        while not stopped:
            stopped = ctx.stopping.wait(every)
            now = round(time.time(), 3)
            table.writerows((now, *row) for row in read())
            samples += 1
    return samples


@fl.task
def counters(every: float, *, ctx: fl.TaskContext) -> int:
    def netstat() -> Iterable[tuple[str, int, int]]:
        shown = subprocess.run(["netstat", "-ibn"], capture_output=True, text=True, check=True).stdout
        for words in (line.split() for line in shown.splitlines() if "<Link#" in line):
            yield words[0], int(words[-5]), int(words[-2])

    return record(ctx, every, netstat)


@counters.implementation(when=fl.node.os == "linux")
def counters_linux(every: float, *, ctx: fl.TaskContext) -> int:
    def proc() -> Iterable[tuple[str, int, int]]:
        for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
            interface, _, numbers = line.partition(":")
            yield interface.strip(), int(numbers.split()[0]), int(numbers.split()[8])

    return record(ctx, every, proc)


# --- one plot of everything, drawn on the serving node from what the others told it ---


@fl.task
def plot(parties: int, *, ctx: fl.TaskContext) -> str:
    told = [event.data for event in ctx.events.wait("measured", count=parties, timeout=60)]
    span = math.log10(max(one["round_trips"]["p99"] for one in told))
    shapes = ['<path d="M60 20V340H600" fill="none" stroke="black"/>']
    for share in (0, 25, 50, 75, 100):
        shapes.append(f'<text x="52" y="{344 - 3.2 * share}" text-anchor="end">{share} %</text>')
    for power in range(int(span) + 1):
        shapes.append(f'<text x="{60 + 540 * power / span}" y="360" text-anchor="middle">{10**power}</text>')
    for index, (one, color) in enumerate(zip(told, ("crimson", "steelblue", "seagreen", "darkorange"), strict=False)):
        cuts = one["round_trips"]["percentiles"]
        places = [(60 + 540 * math.log10(max(cut, 1)) / span, 340 - 3.2 * share) for share, cut in enumerate(cuts, 1)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        legend = f"{one['node']}: p50 {cuts[49]:.0f} µs, {one['throughput']['gbit_per_second']} Gbit/s"
        shapes.append(f'<text x="70" y="{40 + 20 * index}" fill="{color}">{legend}</text>')
    shapes.append('<text x="330" y="385" text-anchor="middle">share of exchanges that took at most so many µs</text>')
    style = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="13"'
    path = Path(ctx.artifact("round-trips.svg"))
    path.write_text(f'<svg {style}><rect width="640" height="400" fill="white"/>{"".join(shapes)}</svg>', "utf-8")
    return path.name


# --- what runs where ---


def define(nodes: fl.NodePool, *, exchanges: int = 5000, seconds: float = 2.5) -> fl.Experiment:
    server_node = nodes.where(fl.node["place"] == "rack").take(1)
    client_nodes = nodes.where((fl.node["place"] == "desk") & (fl.node["cpus"] >= 1)).take(2)

    with fl.DAG("serving") as serving:
        service, sampler = fl.background(serve()), fl.background(counters(0.1))
        start = fl.barrier("start", timeout=120).named("start").during(service, sampler)
        finish = fl.barrier("finish", timeout=300).named("finish").during(service, sampler).after(start)
        plot(len(client_nodes)).after(finish)

    with fl.DAG("measuring") as measuring:
        sampler = fl.background(counters(0.1))
        address = fl.wait_for("listening", timeout=120)
        start = fl.barrier("start", timeout=120).named("start").after(address)
        trips = RoundTrips(exchanges)(address).named("round_trips").during(sampler).after(start)
        rate = throughput(address, seconds).during(sampler).after(trips)
        told = fl.send("measured", {"node": fl.node.name, "round_trips": trips, "throughput": rate})
        told >> fl.barrier("finish", timeout=300).named("finish")

    experiment = fl.Experiment("quickstart").map(serving, server_node, role="server")
    return experiment.map(measuring, client_nodes, role="client")


def main() -> int:
    here = [{"name": "server", "place": "rack"}, {"name": "plain", "place": "desk"}]
    with embedded(nodes=[*here, {"name": "zero-copy", "place": "desk", "sender": "sendfile"}]) as director:
        client = fl.Client(director.url, token=director.token)
        print(nodes := client.nodes(), end="\n\n")
        experiment = define(nodes)
        print(fl.plan(experiment), end="\n\n")

        run = client.submit(experiment)
        state = run.watch()
        print("\n", run.results, sep="", end="\n\n")
        print("The log of plain/round_trips:", run.logs(deployment="plain", step="round_trips"), sep="\n", end="\n\n")

        print("Written:", *run.artifacts.download(OUTPUT), OUTPUT / "results.json", sep="\n  ")
        (OUTPUT / "results.json").write_text(json.dumps(summary(run.results), indent=2))
    return 0 if state is fl.ExperimentState.SUCCEEDED else 1


def summary(results: fl.Results) -> dict[str, dict[str, Any]]:
    def fields(step: fl.StepResult) -> dict[str, Any]:
        value = step.value if step.status is fl.StepState.SUCCEEDED else None
        times = {"started": step.started, "ended": step.ended}
        return {"status": step.status, "value": value, **times, "attempts": step.attempts}

    return {name: {step: fields(one) for step, one in results[name].items()} for name in results}


if __name__ == "__main__":
    sys.exit(main())
