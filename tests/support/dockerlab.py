"""A Docker engine for tests: a dockerd of its own, on a bridge of its own, with an image that has this Python.

Started by root from Debian's docker.io. It leaves the machine's packet filter alone, and nothing is pulled: the image
is made of this machine's interpreter and the libraries it takes. All is gone when the ``DockerLab`` is closed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["IMAGE", "DockerLab", "missing"]

PATIENCE = 60.0
IMAGE = "fieldlab-test:latest"


def missing() -> str:
    """What this machine lacks for a ``DockerLab``; empty: nothing."""
    if os.geteuid() != 0:
        return "dockerd takes root"
    absent = [name for name in ("dockerd", "docker", "docker-init", "ip", "ldd") if shutil.which(name) is None]
    return f"there is no {', '.join(absent)}" if absent else ""


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


class DockerLab:
    """An engine. ``address`` is where it listens, ``here`` this machine as containers see it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fld-", dir="/tmp"))  # paths of sockets must be short
        self.bridge = f"fld{os.getpid() % 100_000}b"
        self.here = f"10.250.{os.getpid() % 250}.1"
        self.address = f"unix://{self._folder}/docker.sock"
        self._daemon: subprocess.Popen[bytes] | None = None
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.here}/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")
        self.start()
        self.derive(IMAGE)

    def start(self) -> None:
        """Start dockerd; containers that ran when it was stopped still do."""
        folder = self._folder
        options = {"data-root": folder / "data", "exec-root": folder / "exec", "pidfile": folder / "pid"}
        command = ["dockerd", "--host", self.address, "--bridge", self.bridge, "--live-restore"]
        command += ["--iptables=false", "--ip6tables=false", "--ip-masq=false"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with (folder / "log").open("ab") as log:
            self._daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while subprocess.run(self.command("version"), capture_output=True, timeout=PATIENCE, check=False).returncode:
            said = (folder / "log").read_text()[-2000:]
            assert self._daemon.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)  # nothing tells of it

    def stop(self) -> None:
        """Stop dockerd; containers go on."""
        assert self._daemon is not None
        self._daemon.terminate()
        self._daemon.wait(PATIENCE)
        self._daemon = None

    def docker(self, *words: str) -> str:
        """What a docker(1) command prints."""
        return _run(*self.command(*words))

    def containers(self, *labels: str) -> list[str]:
        """The ids of the containers with these labels, whether they run or not."""
        filters = [word for label in labels for word in ("--filter", f"label={label}")]
        return self.docker("ps", "--all", "--quiet", "--no-trunc", *filters).split()

    def derive(self, image: str, *changes: str) -> None:
        """An image that differs in some instructions of a Dockerfile."""
        _import_image(self.command("import", *(f"--change={change}" for change in changes), "-", image))

    @contextmanager
    def relay(self, port: int) -> Iterator[str]:
        """A URL for containers that leads to a port of this machine's loopback."""

        class Relayed(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", port)) as there:
                    back = threading.Thread(target=_pass, args=(there, self.request), daemon=True)
                    back.start()
                    _pass(self.request, there)
                    back.join(PATIENCE)

        with socketserver.ThreadingTCPServer((self.here, 0), Relayed) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield f"http://{self.here}:{server.server_address[1]}"
            finally:
                server.shutdown()

    def close(self) -> None:
        """Remove the containers, the engine and the bridge."""
        if self._daemon is None:
            self.start()
        if left := self.containers():
            with contextlib.suppress(subprocess.CalledProcessError):  # somebody else is removing them
                self.docker("rm", "--force", "--volumes", *left)
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
        _run("ip", "link", "delete", self.bridge)

    def command(self, *words: str) -> list[str]:
        """A docker(1) command line for this engine."""
        return ["docker", "--host", self.address, *words]


def _pass(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


# --- the image -------------------------------------------------------------------------------------------------------


def _import_image(command: list[str]) -> None:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as importing:
        assert importing.stdin is not None
        with tarfile.open(fileobj=importing.stdin, mode="w|", dereference=True) as archive:
            _fill(archive)
        importing.stdin.close()
        assert importing.wait(PATIENCE) == 0


def _fill(archive: tarfile.TarFile) -> None:
    python = os.path.realpath(sys.executable)
    library = Path(sysconfig.get_path("stdlib"))
    programs = [shutil.which(name) or name for name in ("sh", "sleep", "cat")]
    for folder in ("tmp", "root", "etc", "proc", "sys", "dev"):
        entry = tarfile.TarInfo(folder)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
        archive.addfile(entry)
    for path, content in {"etc/passwd": "root:x:0:0::/root:/bin/sh\nwho:x:1000:1000::/:/bin/sh\n"}.items():
        entry = tarfile.TarInfo(path)
        entry.size, entry.mode = len(content), 0o644
        archive.addfile(entry, io.BytesIO(content.encode()))
    link = tarfile.TarInfo("usr/local/bin/python3")
    link.type, link.linkname = tarfile.SYMTYPE, python
    archive.addfile(link)
    modules = [str(path) for path in (library / "lib-dynload").glob("*.so")]
    for path in sorted({python, *_libraries(python, *programs, *modules)}):
        archive.add(path, path)
    for path in programs:
        archive.add(path, f"/bin/{Path(path).name}")
    archive.add(library, str(library), filter=_wanted)


def _wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    unwanted = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib"}
    return None if unwanted & set(Path(entry.name).parts) or entry.name.endswith(".a") else entry


def _libraries(*programs: str) -> Iterator[str]:
    """The shared libraries that programs take, by their absolute paths."""
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, timeout=PATIENCE, check=False).stdout
    for line in said.splitlines():
        if found := re.match(r"\s+(?:\S+ => )?(/\S+) \(0x", line):
            yield found[1]
