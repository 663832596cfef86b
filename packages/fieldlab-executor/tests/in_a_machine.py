"""The first process of a User-Mode Linux (``test_limits``): finds out what control groups do, and prints it as JSON."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from fieldlab_common.builtin import shell
from fieldlab_common.deployment import Need, On
from fieldlab_common.environment import Resources
from fieldlab_executor import cgroups

GROUPS = Path("/sys/fs/cgroup")
LIMIT = 96 << 20
USER = 1000
_NEW_CGROUP, _NEW_MOUNTS = 0x02000000, 0x00020000


def mount() -> None:
    for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run"), ("cgroup2", str(GROUPS))):
        subprocess.run(["mount", "-t", kind, kind, place], check=True)


def stray() -> str:
    look = subprocess.run(["setsid", "cat", "/proc/self/cgroup"], stdout=subprocess.PIPE, check=True)
    return look.stdout.decode().strip()


def steps() -> dict[str, Any]:
    """What a deployment with limits makes of its steps."""
    sys.path.insert(0, os.path.dirname(__file__))
    from hub import Bench, Executor, Hub  # type: ignore[import-not-found]

    bench = Bench()
    bench.step("hog", lambda count: len(b"x" * count), 2 * LIMIT)
    bench.step("command", shell("tail /dev/zero").run, needs=(Need(step="hog", on=On.ALWAYS),))
    bench.step("stray", stray, needs=(Need(step="command", on=On.ALWAYS),))
    (GROUPS / "fieldlab-999999-0").mkdir()  # as an executor leaves one that is killed
    hub = Hub(bench, resources=Resources(memory=LIMIT, cpus=2))
    assert Executor(Path("/run/deployment"), hub, Path("/run/cache")).wait() == 0
    told = {
        name: [record.state, record.reason, record.message]
        for name in ("hog", "command", "stray")
        for record in [hub.settled(name)]
    }
    told["stray"][2] = hub.value("stray")
    left = [path.name for path in GROUPS.glob("fieldlab-*")]
    return {"steps": told, "log": hub.logs("", "executor"), "left": left}


def grouped() -> dict[str, Any] | None:
    """What a group holds that this process makes where it is; None: it cannot make one."""
    group = cgroups.make(LIMIT, 0.5)
    if group is None:
        return None
    found: dict[str, Any] = {name: (group.path / name).read_text().strip() for name in ("memory.max", "cpu.max")}
    process = subprocess.Popen(["/bin/sh", "-c", "read go && exec tail /dev/zero"], stdin=subprocess.PIPE)
    group.enter(process.pid)
    process.communicate(b"go\n")
    group.close()
    assert not group.path.exists()
    return {**found, "ended": process.returncode}


def below(group: Path, user: int = 0, *, contained: bool = False) -> Any:
    """What ``grouped`` finds in a process of ``user``'s in ``group``, in which there is another process, too.

    ``contained``: they see no other groups.
    """
    group.mkdir(exist_ok=True)
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            if contained:
                ctypes.CDLL(None).unshare(_NEW_CGROUP | _NEW_MOUNTS)
                subprocess.run(["umount", str(GROUPS)], check=True)
                subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(GROUPS)], check=True)
            other = subprocess.Popen(["sleep", "60"])
            os.setgid(user)
            os.setuid(user)
            os.write(theirs, json.dumps(grouped()).encode())
            os.kill(other.pid, signal.SIGKILL)
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with open(ours, "rb") as file:
        return json.loads(file.read())


def of_a_slice() -> Any:
    """A user's slice, as systemd delegates one: the process is in a group below it."""
    top, inner = GROUPS / "user", GROUPS / "user" / "shell"
    inner.mkdir(parents=True)
    (top / "cgroup.subtree_control").write_text("+memory +cpu")
    for folder in (top, inner):
        for path in (folder, folder / "cgroup.procs", folder / "cgroup.subtree_control"):
            os.chown(path, USER, USER)
    return below(inner, USER)


def of_a_service() -> Any:
    """A service that is limited."""
    group = GROUPS / "service"
    group.mkdir()
    (group / "memory.max").write_text(str(4 * LIMIT))
    return below(group)


def main() -> None:
    try:
        mount()
        os.environ |= {"HOME": "/run", "TMPDIR": "/run", "PATH": "/usr/local/bin:/usr/bin:/bin:/sbin"}
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.chdir("/run")
        (GROUPS / "cgroup.subtree_control").write_text("+memory +cpu")
        found = {"slice": of_a_slice(), "container": below(GROUPS / "container", contained=True)}
        print(json.dumps({**found, "limited": of_a_service(), **steps()}), flush=True)
    except Exception:  # noqa: BLE001 - whatever went wrong is to be seen in the test
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os.sync()
        ctypes.CDLL(None).reboot(0x4321FEDC)  # RB_POWER_OFF; without it the kernel complains of its first process's end


if __name__ == "__main__":
    main()
