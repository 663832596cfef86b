"""``fieldlab.contrib.netunicorn`` on a node, where netunicorn's tasks run but none is converted.

A module that defines such tasks may convert them where it stands, and is imported on the node for its tasks: what it
makes there of the names of this module is never asked for anything, so it is a stand-in that takes everything.
"""

from __future__ import annotations

from typing import Any


class StandIn:
    """Stands for what was converted on the client."""

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return self

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def __getattr__(name: str) -> StandIn:
    if name.startswith("__"):
        raise AttributeError(name)
    return StandIn()
