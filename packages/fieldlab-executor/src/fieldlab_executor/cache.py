"""Where the node keeps what is worth keeping between deployments: unpacked executors and virtual environments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """The node's cache: ``$FIELDLAB_CACHE``, else ``fieldlab`` in ``$XDG_CACHE_HOME``, else ``~/.cache/fieldlab``."""
    environ = os.environ if environ is None else environ
    if chosen := environ.get("FIELDLAB_CACHE"):
        folder = Path(chosen).expanduser()
    else:
        folder = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fieldlab"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder.absolute()
