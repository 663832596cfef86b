"""A deployment's folder on the node, as its steps find it: what stands in it before the first of them starts.

``blobs`` is there already, with all that the graph names; here come ``context.json``, which tells steps where they
are, and a folder for each attempt. To make one costs as much processor time as a warm step, and most steps leave theirs
empty: such a folder is lent to another attempt, and never to two at a time. Where a step left files they stay, because
it may have told somebody of them, and ``steps/<step>.<iteration>-<attempt>`` leads there.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from pathlib import Path

from fieldlab_common.deployment import Graph, inlined
from fieldlab_common.protocol import Claim
from fieldlab_common.wire import encode

from fieldlab_executor.instructions import Key

__all__ = ["Workplace", "place_of"]

MAX_SCANNED, SCANNED_BYTES = 1000, 65536  # steps and bytes of blobs that are searched for what to import ahead
_MODE = 0o777  # less the umask, as of any other folder


class Workplace:
    """``folder`` is the deployment's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free: list[str] = []
        self._made = 0

    def furnish(self, claim: Claim, graph: Graph, clock: tuple[float, float]) -> None:
        """Make what every step needs. ``clock``: the offset to the director's, and its bound, in seconds."""
        for name in ("values", "scratch", "steps", "artifacts", "files"):
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

    def lend(self) -> str:
        """An empty folder, for one attempt.

        Raises:
            OSError: it cannot be made.
        """
        if self._free:
            return self._free.pop()
        self._made += 1
        path = f"{self._folder}/scratch/{self._made}"
        os.mkdir(path, _MODE)
        return path

    def take_back(self, path: str, key: Key, *, again: bool) -> None:
        """The attempt ``key`` has ended. ``again``: nobody uses its folder any more; if it is empty, another may."""
        try:
            untouched = stat.S_ISDIR(os.lstat(path).st_mode) and not os.listdir(path)
            if untouched and again:
                self._free.append(path)
            elif not untouched:
                named = f"{self._folder}/steps/{place_of(key)}"
                os.makedirs(os.path.dirname(named), exist_ok=True)
                os.symlink(path, named)
        except OSError:  # the step has removed it, or the disk is full: then it is found by its number only
            return


def place_of(key: Key) -> str:
    """What is an attempt's alone is called by this name."""
    return f"{key.step}.{key.iteration or 0}-{key.attempt}"
