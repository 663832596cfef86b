"""Where the node keeps what is worth keeping between deployments: unpacked executors and virtual environments."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fieldlab_common.errors import ConfigurationError

__all__ = ["cache_folder"]


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """The node's cache: ``$FIELDLAB_CACHE``, else ``fieldlab`` in ``$XDG_CACHE_HOME``, else ``~/.cache/fieldlab``.

    Who has no home to write to, as many users in containers, has it in the folder for temporary files, as
    ``fieldlab-cache-`` and the user's number.

    Raises:
        ConfigurationError: somebody else may write to that one.
    """
    environ = os.environ if environ is None else environ
    if chosen := environ.get("FIELDLAB_CACHE"):
        return _made(Path(chosen).expanduser())
    if chosen := environ.get("XDG_CACHE_HOME"):
        return _made(Path(chosen).expanduser() / "fieldlab")
    try:
        folder = _made(Path("~/.cache/fieldlab").expanduser())
    except (OSError, RuntimeError):  # RuntimeError: the user has no home at all
        return _temporary()
    return folder if os.access(folder, os.W_OK) else _temporary()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder.absolute()


def _temporary() -> Path:
    folder = _made(Path(tempfile.gettempdir()) / f"fieldlab-cache-{os.getuid()}")
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigurationError(
            f"The cache {folder} is not this user's alone.",
            advice="Remove it, or set FIELDLAB_CACHE to another folder.",
        )
    return folder
