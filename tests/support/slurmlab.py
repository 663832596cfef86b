"""A Slurm cluster for tests: one controller and some nodes on this machine, with an authentication of its own.

Made with munged(8), slurmctld(8) and slurmd(8), by root, on free ports of the loopback. The nodes differ in their
names alone; that the folders of tests are shared by all of them takes no file system. Everything is gone when the
``Slurmlab`` is closed. Its ``config`` is the file by which Slurm's programs find it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["Slurmlab", "missing"]

PATIENCE = 60.0
_SETTINGS = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=10000,bf_interval=1,batch_sched_delay=0
KillWait=5
MessageTimeout=4
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP DefMemPerCPU=100
PartitionName=small Nodes={first} MaxTime=10 State=UP
"""


def missing() -> str:
    """What this machine lacks for a ``Slurmlab``; empty: nothing."""
    if os.geteuid() != 0:
        return "a Slurm cluster takes root"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "squeue") if shutil.which(name) is None]
    return f"there is no {', '.join(absent)}" if absent else ""


class Slurmlab:
    """A cluster of nodes ``names`` with four processors each: all are in partition ``main``, the first in ``small``."""

    def __init__(self, folder: Path, names: Sequence[str] = ("c1", "c2", "c3")) -> None:
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        self.config = folder / "slurm.conf"
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        ports = list(_free(1 + len(names)))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=2000"
            for name, port in zip(names, ports[1:], strict=True)
        )
        self.config.write_text(_SETTINGS.format(host=host, ports=ports, folder=folder, nodes=nodes, first=names[0]))
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        self._start("munged", "--foreground", "--force", *self._munge())
        self.until(lambda: (folder / "munge.socket").exists())
        self.switch_on()
        for name in names:
            self._start(f"slurmd-{name}", "-D", "-N", name, program="slurmd")
        self.until(
            lambda: (
                self.run("sinfo", "--noheader", "--Node", "--states=idle", "--partition=main").count("\n") == len(names)
            )
        )

    def run(self, *words: str) -> str:
        """What one of Slurm's programs prints; nothing if it fails."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "SLURM_CONF": str(self.config)}
        )
        return done.stdout if done.returncode == 0 else ""

    def switch_on(self) -> None:
        """Start the controller."""
        self._start("slurmctld", "-D", "-i")
        self.until(lambda: self.run("sinfo", "--noheader"))

    def switch_off(self) -> None:
        """End the controller; nodes and jobs go on."""
        self._end(self._programs.pop("slurmctld"))

    def close(self) -> None:
        """End everything, jobs first."""
        if "slurmctld" in self._programs:
            self.run("scancel", "--full", "--signal=KILL", "--user=root")
            self.until(lambda: not self.run("squeue", "--noheader"))
        for program in reversed(self._programs.values()):
            self._end(program)
        self._programs.clear()

    def _munge(self) -> list[str]:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder / f'munge.{name}'}" for option, name in files.items()]

    def _start(self, name: str, *arguments: str, program: str = "") -> None:
        path = shutil.which(program or name)
        assert path is not None
        with (self.folder / f"{name}.log").open("ab") as log:
            self._programs[name] = subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "SLURM_CONF": str(self.config)},
            )

    def _end(self, program: subprocess.Popen[bytes]) -> None:
        program.terminate()
        try:
            program.wait(PATIENCE / 4)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait(PATIENCE)

    def until(self, true: Callable[[], object]) -> None:
        """Wait for something that Slurm tells nobody of."""
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < deadline, self._said()
            time.sleep(0.05)

    def _said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1000:] for path in self.folder.glob("*.log"))


def _free(count: int) -> Iterator[int]:
    """Ports that nobody has: all are held until the last is known."""
    with contextlib.ExitStack() as held:
        for _ in range(count):
            yield held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
