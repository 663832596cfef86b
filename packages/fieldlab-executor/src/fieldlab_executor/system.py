"""System packages: whether they are there, and apt-get where this process may use it.

A package is there when dpkg says so, or a program of its name is: not every node is a Debian, and a tool that its owner
put there by hand is as good.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable

from fieldlab_executor.builders import Builder, PrepareFailed

__all__ = ["install", "missing"]

QUERY_SECONDS = 60.0
LOCK_SECONDS = 600  # that apt-get waits for another apt-get


def missing(wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of the packages that the node lacks."""
    return tuple(name for name in wanted if not _is_installed(name))


def install(names: tuple[str, ...], builder: Builder) -> None:
    """Install the packages with apt-get.

    Raises:
        PrepareFailed: it failed, or the node has no apt-get, or this process is not root.
    """
    apt = shutil.which("apt-get")
    listed = " ".join(names)
    if apt is None or os.geteuid() != 0:
        lacks = "it has no apt-get" if apt is None else "the executor is not root there"
        raise PrepareFailed(
            f"The node lacks the system packages {listed}, and {lacks}.",
            advice=f"Ask the node's owner to install them: apt-get install {listed}",
        )
    variables = {"DEBIAN_FRONTEND": "noninteractive"}
    command = [apt, "-o", f"DPkg::Lock::Timeout={LOCK_SECONDS}", "--yes", "--no-install-recommends", "install", "--"]
    try:
        builder.run([*command, *names], f"Installing {listed}", env=variables)
    except PrepareFailed:  # a fresh node has no package lists, or old ones
        builder.run([apt, "update"], f"Installing {listed} needs new package lists; reading them", env=variables)
        builder.run([*command, *names], f"Installing {listed}", env=variables)


def _is_installed(name: str) -> bool:
    if shutil.which(name):
        return True
    query = shutil.which("dpkg-query")
    if query is None:
        return False
    command = [query, "--show", "--showformat=${db:Status-Status}", "--", name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    return run.returncode == 0 and run.stdout.strip() == "installed"
