"""A deployment's folder on the node, as its steps find it: what stands in it before the first of them starts.

``blobs`` is there already, with all that the graph names; here come ``context.json``, which tells steps where they
are, and a folder for each attempt, ``steps/<step>.<iteration>-<attempt>``: one for each, not one in another, because
making a folder costs as much processor time as a warm step. Those of first attempts are made ahead, in a thread: while
a disk is synced, making one may take a millisecond.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
from pathlib import Path

from fieldlab_common.deployment import Graph, inlined
from fieldlab_common.protocol import Claim
from fieldlab_common.wire import encode

__all__ = ["Workplace"]

MAX_SCANNED, SCANNED_BYTES = 1000, 65536  # steps and bytes of blobs that are searched for what to import ahead
MAX_FOLDERS = 10_000  # steps whose folders are made ahead


class Workplace:
    """``folder`` is the deployment's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ahead: set[str] = set()
        self._closed = False

    def furnish(self, claim: Claim, graph: Graph, clock: tuple[float, float]) -> None:
        """Make what every step needs. ``clock``: the offset to the director's, and its bound, in seconds."""
        for name in ("values", "steps", "artifacts", "files"):
            (self._folder / name).mkdir(mode=0o700, exist_ok=True)
        content = {
            "experiment": claim.experiment,
            "experiment_id": claim.experiment_id,
            "deployment": claim.deployment.name,
            "node": encode(claim.node),
            "members": encode(claim.members),
            "clock": [clock[0], clock[1] if clock[1] != float("inf") else 1e308],
        }
        (self._folder / "context.json").write_text(json.dumps(content))
        threading.Thread(target=self._make_ahead, args=(graph,), name="folders", daemon=True).start()

    def modules(self, graph: Graph) -> list[str]:
        """Those of fieldlab's own modules that the steps will need: better imported once than in each child."""
        wanted: set[str] = set()
        steps = (step for _, step in itertools.islice(graph.walk(), MAX_SCANNED) if step.graph is None)
        for sealed in dict.fromkeys(sealed for step in steps for sealed in (step.code, step.args)):
            data = inlined(sealed)
            if data is None:
                with open(f"{self._folder}/blobs/{sealed}", "rb") as file:
                    data = file.read(SCANNED_BYTES)
            wanted.update(name.decode() for name in re.findall(rb"fieldlab_common\.[a-z]+", data))
            if b"context" in data:
                wanted.add("fieldlab_executor.context")
        return sorted(wanted)

    def make(self, path: str) -> None:
        """Make the folder of an attempt, if it was not made ahead.

        Raises:
            OSError: it cannot be made.
        """
        if path not in self._ahead:
            os.makedirs(path, exist_ok=True)

    def close(self) -> None:
        """Make no more folders ahead."""
        self._closed = True

    def _make_ahead(self, graph: Graph) -> None:
        for plain, spec in itertools.islice(graph.walk(), MAX_FOLDERS):
            if self._closed:
                return
            if spec.graph is not None:
                continue
            path = f"{self._folder}/steps/{plain}.0-1"
            try:
                os.makedirs(path, exist_ok=True)
            except OSError:  # the step that needs it will say so
                return
            self._ahead.add(path)
