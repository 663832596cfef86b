"""What of a node is tried when somebody asks whether it will do: its space, its folders, its rights, its installers.

Everything is tried as the user that executors run as, and left as it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from fieldlab_common.messages import CheckLine

from fieldlab_executor.cache import cache_folder
from fieldlab_executor.environments import installer

__all__ = ["lines"]

ENOUGH = 512 * 1024 * 1024  # bytes: the executor, and an environment of a few packages
SUDO_SECONDS = 10.0


def lines(state: Path) -> tuple[CheckLine, ...]:
    """What came of each trial. ``state`` is the folder of the node's deployments."""
    trials: dict[str, Callable[[], CheckLine]] = {
        "folders": lambda: _folders(cache_folder(), state),
        "space": lambda: _space(cache_folder(), state),
        "privileges": _privileges,
        "packages": _packages,
    }
    return tuple(_tried(what, trial) for what, trial in trials.items())


def _tried(what: str, trial: Callable[[], CheckLine]) -> CheckLine:
    try:
        return trial()
    except (OSError, subprocess.SubprocessError) as error:
        return CheckLine(what=what, ok=False, said=f"It cannot be tried: {error}.", needed=what == "folders")


def _folders(*folders: Path) -> CheckLine:
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"fieldlab")
        except OSError as error:
            return CheckLine(
                what="folders",
                ok=False,
                said=f"{folder} cannot be written to: {error.strerror}.",
                advice="Give it to the node's user, or free the disk; FIELDLAB_CACHE and XDG_STATE_HOME move them.",
                needed=True,
            )
    return CheckLine(what="folders", said=f"{' and '.join(map(str, folders))} can be written to.")


def _space(cache: Path, state: Path) -> CheckLine:
    free = {name: shutil.disk_usage(_there(folder)).free for name, folder in (("cache", cache), ("state", state))}
    said = ", ".join(f"{count / 1024**3:.1f} GiB free for the {name}" for name, count in free.items())
    ok = min(free.values()) >= ENOUGH
    advice = "" if ok else "`fieldlab.pyz evict` removes environments that were not used for long."
    return CheckLine(what="space", ok=ok, said=f"{said}.", advice=advice)


def _there(folder: Path) -> Path:
    """The folder, or what it would be in."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _privileges() -> CheckLine:
    if os.geteuid() == 0:
        return CheckLine(what="privileges", said="It is root.")
    if _sudo():
        return CheckLine(what="privileges", said="It is not root, and sudo asks for no password.")
    return CheckLine(
        what="privileges",
        said="It is neither root nor may it use sudo without a password: no system packages, no raw sockets.",
    )


def _sudo() -> bool:
    if shutil.which("sudo") is None:
        return False
    asked = subprocess.run(
        ["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=SUDO_SECONDS, check=False
    )
    return asked.returncode == 0


def _packages() -> CheckLine:
    found = installer()
    if found:
        return CheckLine(what="packages", said=f"{found} makes environments.")
    return CheckLine(
        what="packages",
        ok=False,
        said="There is neither uv nor a pip, so no packages can be installed.",
        advice="Install uv on the node, or (Debian, Ubuntu) the package python3-venv.",
    )
