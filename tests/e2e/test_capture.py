"""A capture in the background leaves a file that can be read, however it comes to its end.

``tcpdump`` is the real one. The stand-in keeps what it sees in memory and writes it out when it is asked to stop, by
the one signal that it knows: if it is killed instead, there is no file.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import fieldlab as fl
import pytest

STANDIN = """
import io, signal, socket, struct, sys, time

def end(number, frame):
    with open(sys.argv[2], "wb") as file:
        file.write(kept.getvalue())
    sys.exit()

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, end)
kept = io.BytesIO()
kept.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 147))
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", int(sys.argv[1])))
print("listening on 127.0.0.1", file=sys.stderr, flush=True)
while True:
    data, sender = sock.recvfrom(65536)
    at = time.time()
    kept.write(struct.pack("<IIII", int(at), int(at % 1 * 1e6), len(data), len(data)) + data)
    sock.sendto(b"kept", sender)
"""
PAYLOAD = b"a datagram of the test"


def watch(tool: str, port: int, *, ctx: fl.TaskContext) -> fl.Artifact:
    path = ctx.artifact("trace.pcap")
    if tool == "tcpdump":
        command = ["tcpdump", "-Z", "root", "-U", "--immediate-mode", "-i", "lo", "-w", str(path), f"udp port {port}"]
    else:
        command = [sys.executable, "-c", STANDIN, str(port), str(path)]
    stopping = ctx.stopping
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "listening on" not in process.stderr.readline():
            assert process.poll() is None
        ctx.store[tool] = str(path)
        ctx.ready()
        stopping.wait()
        process.wait()
    return path


capture, capture_for_a_while = fl.task(watch), fl.task(timeout=8.0)(watch)


@fl.task
def talk(tool: str, port: int, then: str, *, ctx: fl.TaskContext) -> None:
    """Send until the capture has seen something; then end, or stay."""
    deadline = time.monotonic() + 60
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.1)
        heard = False
        while not heard:
            assert time.monotonic() < deadline
            sock.sendto(PAYLOAD, ("127.0.0.1", port))
            try:
                heard = sock.recv(10) == b"kept"
            except (TimeoutError, ConnectionRefusedError):  # nobody listens where tcpdump does
                heard = tool == "tcpdump" and os.path.getsize(ctx.store[tool]) > 24
    if then != "stop":
        ctx.events.send("heard")
        signal.pause()


def _packets(path: Path) -> list[bytes]:
    """The packets of a pcap file, which must end where its last one does (draft-ietf-opsawg-pcap, sections 4 and 5)."""
    data = path.read_bytes()
    magic, major, minor = struct.unpack_from("<IHH", data)
    assert (magic, major, minor) == (0xA1B2C3D4, 2, 4)
    found, at = [], 24
    while at < len(data):
        _, _, length, original = struct.unpack_from("<IIII", data, at)
        found.append(data[at + 16 : at + 16 + length])
        assert len(found[-1]) == length == original
        at += 16 + length
    return found


def _port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("end", ["stop", "timeout", "cancel"])
def test_the_file_can_be_read(end: str, tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("tcpdump") is None:
        pytest.skip("a capture takes tcpdump and root")
    tools = ("tcpdump", "standin")
    with fl.DAG("capturing", stop_on_failure=False) as dag:
        for tool in tools:
            port = _port()
            capturing = (capture_for_a_while if end == "timeout" else capture)(tool, port).named(tool)
            talk(tool, port, end).during(fl.background(capturing, stop=signal.SIGINT))
    run = fl.run(fl.Experiment("capture").map(dag, fl.Node.dummy("a")), wait=False)
    if end == "cancel":
        run.events.wait("heard", count=2, timeout=60)
        run.cancel()
    run.wait(timeout=60)
    reasons = {"stop": fl.Reason.STOPPED, "timeout": fl.Reason.TIMEOUT, "cancel": fl.Reason.CANCELLED}
    assert [run.results["a"][tool].reason for tool in tools] == [reasons[end]] * 2
    files = [Path(path) for path in run.artifacts.download(tmp_path)]
    run.close()
    assert sorted(path.relative_to(tmp_path).parts[1] for path in files) == sorted(tools)
    for path in files:
        packets = _packets(path)
        assert packets
        assert all(packet.endswith((PAYLOAD, b"kept")) for packet in packets)
