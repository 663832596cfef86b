"""Has the agent run from every boot on: as a user's service of systemd, or as the admin sets it up.

A user's service only runs while the user is logged in, unless the user *lingers* (loginctl(1)), which often takes an
admin: what could not be done here is said, as the command to give them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from fieldlab_common.errors import ConfigurationError

from fieldlab_executor.keeper import state_folder

__all__ = ["UNIT", "install", "unit"]

UNIT = "fieldlab-agent.service"
SECONDS = 30.0


def unit(python: str, executable: Path) -> str:
    """The unit (systemd.service(5)): it is started again whatever ends it, but for an identity that is not known."""
    return (
        "[Unit]\nDescription=fieldlab agent: runs experiments for the director that this machine joined\n"
        "After=network-online.target\nStartLimitIntervalSec=0\n\n"
        f'[Service]\nExecStart="{python}" "{executable}" agent\nRestart=always\nRestartSec=10\n'
        "RestartPreventExitStatus=5\nKillMode=process\n\n"
        "[Install]\nWantedBy=default.target\n"
    )


def install(executable: Path, environ: Mapping[str, str] | None = None) -> Iterator[str]:
    """Install and start the service; what was done, and what is left to do, a line each.

    Raises:
        ConfigurationError: the files cannot be written.
    """
    environ = os.environ if environ is None else environ
    kept = state_folder(environ) / "fieldlab.pyz"
    folder = Path(environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "systemd" / "user"
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if executable.is_file() and executable.resolve() != kept.resolve():
            shutil.copyfile(executable, kept)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNIT).write_text(unit(sys.executable, kept))
    except OSError as error:
        raise ConfigurationError(f"The service cannot be installed: {error}.") from error
    yield f"Wrote {folder / UNIT}."
    for words in (("systemctl", "--user", "daemon-reload"), ("systemctl", "--user", "enable", "--now", UNIT)):
        yield from _tried(words, " ".join(words))
    user = environ.get("USER") or environ.get("LOGNAME") or str(os.getuid())
    yield from _tried(("loginctl", "enable-linger", user), f"sudo loginctl enable-linger {user}")


def _tried(words: tuple[str, ...], otherwise: str) -> Iterator[str]:
    """Run a command; if it fails, say what somebody has to do instead."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
        failure = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        yield f"{' '.join(words)} did not work ({failure}). Ask for: {otherwise}"
    else:
        yield f"{' '.join(words)}: done."
