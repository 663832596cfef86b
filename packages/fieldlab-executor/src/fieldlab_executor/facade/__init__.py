"""What ``import fieldlab`` gives on a node: the nouns that tasks and their modules use, and nothing of the client.

A module of the user's is imported on the node as it is on the client, so every name of the client's must be there at
import. Nouns come from ``fieldlab_common``, each when it is first used; what only a client can do is there too, and
says so when it is called.
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

_NOUNS = (
    "fieldlab_common.context",
    "fieldlab_common.builtin",
    "fieldlab_common.task",
    "fieldlab_common.step",
    "fieldlab_common.selector",
    "fieldlab_common.node",
    "fieldlab_common.environment",
    "fieldlab_common.events",
    "fieldlab_common.lifecycle",
    "fieldlab_common.errors",
    "fieldlab_common.dag",
    "fieldlab_common.experiment",
)
_VERBS = frozenset(
    (
        "Agents",
        "Client",
        "DeploymentResults",
        "Local",
        "NodePool",
        "Plan",
        "Results",
        "Run",
        "SSH",
        "Simulation",
        "StepResult",
        "plan",
        "run",
        "simulate",
    )
)


class ClientOnly:
    """Stands on a node for something that only the client has; calling it says so."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        from fieldlab_common.errors import UnsupportedError

        raise UnsupportedError(
            f"fieldlab.{self._name} is for the client, and this is a task on a node.",
            advice="Call it in the program that submits the experiment; if it stands in a module that tasks import,"
            " put it under `if __name__ == '__main__':` or into a function.",
        )

    def __or__(self, other: object) -> ClientOnly:
        return self  # an annotation such as ``fl.Run | None`` is evaluated when the user's module is imported

    __ror__ = __or__

    def __repr__(self) -> str:
        return f"<fieldlab.{self._name}, for the client only>"


def __getattr__(name: str) -> Any:
    value = _find(name)
    globals()[name] = value
    return value


def _find(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("fieldlab_common.errors")
    if name == "map":
        return importlib.import_module("fieldlab_common.dag").map_
    if name == "__version__":
        return importlib.import_module("fieldlab_executor").__version__
    if name in _VERBS:
        return ClientOnly(name)
    if not name.startswith("_"):
        for module in _NOUNS:
            found = importlib.import_module(module)
            if name in found.__all__:
                return getattr(found, name)
    raise AttributeError(
        f"module 'fieldlab' has no attribute {name!r} on a node, where it has what tasks use and nothing of the client"
    )
