"""Hosts for tests: network namespaces on a bridge, each with an address, a name, processes and a home of its own.

Made with ip(8), unshare(1) and sshd(8), by root. Everything is gone when the ``Netlab`` is closed; traffic never leaves
the machine. A host is switched off as a machine is (all its processes at once), and its line is cut at the bridge.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from string import ascii_lowercase

__all__ = ["Host", "Netlab", "keypair", "missing"]

PATIENCE = 30.0
_made = itertools.count()


def missing() -> str:
    """What this machine lacks for a ``Netlab``; empty: nothing."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    absent = [name for name in ("ip", "unshare", "nsenter", "ssh-keygen") if shutil.which(name) is None]
    if not Path("/usr/sbin/sshd").exists():
        absent.append("sshd")
    return f"there is no {', '.join(absent)}" if absent else ""


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


class Host:
    """One host. ``address`` is its own on the bridge; ``home`` its root's home, as seen from here."""

    def __init__(self, lab: Netlab, number: int, name: str, settings: str) -> None:
        self.lab, self.name = lab, name
        self.address = f"{lab.network}.{number + 10}"
        self.space = f"{lab.tag}h{number}"
        self.folder = lab.folder / name
        self.home = self.folder / "home"
        self.home.mkdir(parents=True)
        self._line = f"{lab.tag}v{number}"
        self._machine: subprocess.Popen[bytes] | None = None
        _run("ip", "netns", "add", self.space)
        _run("ip", "link", "add", self._line, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        _run("ip", "link", "set", self._line, "master", lab.bridge, "up")
        for words in (("addr", "add", f"{self.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            _run("ip", "-n", self.space, *words)
        _run("ip", "-n", self.space, "link", "set", "lo", "up")
        _run("ip", "-n", self.space, "route", "add", "default", "via", f"{lab.network}.1")
        self._write_sshd(settings)

    @property
    def public_key(self) -> str:
        """The host's key, as a line of known_hosts."""
        return f"{self.address} {(self.folder / 'host_key.pub').read_text().strip()}"

    def authorize(self, public_key: str) -> None:
        """Let whoever has the key log in as root."""
        with (self.folder / "authorized_keys").open("a") as file:
            file.write(public_key.strip() + "\n")

    def switch_on(self) -> None:
        """Start the host: an init of its own, and sshd."""
        passwd = self.folder / "passwd"
        lines = Path("/etc/passwd").read_text().splitlines()
        passwd.write_text("".join(f"{_moved(line, self.home)}\n" for line in lines))
        Path("/run/sshd").mkdir(exist_ok=True)
        script = 'hostname "$1"; mount --bind "$2" /etc/passwd; exec /usr/sbin/sshd -D -e -f "$3"'
        inside = (
            "unshare",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "/bin/sh",
            "-c",
            script,
        )
        arguments = ("sh", self.name, str(passwd), str(self.folder / "sshd_config"))
        with (self.folder / "sshd.log").open("ab") as log:
            self._machine = subprocess.Popen(
                ["ip", "netns", "exec", self.space, *inside, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.lab.await_port(self.address, 22)

    def switch_off(self) -> None:
        """End all of its processes at once, as a power cut does."""
        if self._machine is not None:
            self._machine.kill()
            self._machine.wait(PATIENCE)
            self._machine = None

    def cut(self) -> None:
        """Cut its line: what it sends is lost, and what is sent to it."""
        _run("ip", "link", "set", self._line, "down")

    def mend(self) -> None:
        """Mend its line."""
        _run("ip", "link", "set", self._line, "up")

    def run(self, *words: str) -> str:
        """What a command on the host prints; it sees the host's processes and network."""
        return _run(*self.command(*words))

    def command(self, *words: str) -> list[str]:
        """The command line that runs ``words`` on the host."""
        assert self._machine is not None
        inner = int(_run("pgrep", "--parent", str(self._machine.pid)).split()[0])
        return [
            "nsenter",
            "--target",
            str(inner),
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "env",
            f"HOME={self.home}",
            *words,
        ]

    def remove(self) -> None:
        """Let go of everything."""
        self.switch_off()
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "netns", "delete", self.space)

    def _write_sshd(self, settings: str) -> None:
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(self.folder / "host_key"))
        (self.folder / "authorized_keys").touch(mode=0o600)
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {self.address}\nHostKey {self.folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f"Subsystem sftp internal-sftp\nMaxStartups 200\nMaxSessions 100\nLogLevel INFO\n{settings}\n"
        )


def _moved(line: str, home: Path) -> str:
    parts = line.split(":")
    return ":".join([*parts[:5], str(home), "/bin/sh"]) if parts[0] == "root" else line


class Netlab:
    """A bridge, and hosts on it. ``here`` is this machine's address there."""

    def __init__(self, folder: Path) -> None:
        number, which = os.getpid() % 250, next(_made) % 26  # a process may have several at a time
        self.tag = f"fl{os.getpid() % 100_000}{ascii_lowercase[which]}"
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.bridge = f"{self.tag}b"
        self.network = f"10.{213 + which}.{number}"
        self.here = f"{self.network}.1"
        self.hosts: list[Host] = []
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.here}/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")

    def host(self, name: str, *, on: bool = True, settings: str = "") -> Host:
        """One more host; ``settings`` are lines for its sshd_config(5)."""
        host = Host(self, len(self.hosts), name, settings)
        self.hosts.append(host)
        if on:
            host.switch_on()
        return host

    def await_port(self, address: str, port: int) -> None:
        """Wait until something listens there."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with socket.create_connection((address, port), timeout=1.0):
                    return
            except OSError:
                assert time.monotonic() < deadline, f"nothing listens at {address}:{port}"
                time.sleep(0.02)  # another process makes it true, and nothing tells of it

    def close(self) -> None:
        """Remove all hosts and the bridge."""
        for host in self.hosts:
            host.remove()
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "delete", self.bridge)


def keypair(folder: Path) -> tuple[str, str]:
    """A new key pair: the private half and the public one."""
    path = folder / "login_key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path))
    return path.read_text(), path.with_suffix(".pub").read_text().strip()
