"""What ``import fieldlab`` gives on a node: the nouns that tasks and their modules use, and nothing of the client.

A module of the user's is imported on the node as it is on the client, so every name of the client's must be there at
import. Nouns come from ``fieldlab_common``, each when it is first used; what only a client can do is there too, and
says so when it is called. Modules of the client (``fieldlab.runs``, say) are there in the same way: a name that does
not exist was missed on the client already, so here every name can be imported, and only its use fails.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
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
    "fieldlab_common.forms",
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
        "Slurm",
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

    def __getitem__(self, key: object) -> ClientOnly:
        return self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()  # a class that is derived from it can be defined, and has nothing of it

    def __repr__(self) -> str:
        return f"<fieldlab.{self._name}, for the client only>"


class _Modules:
    """Finds, after all others, the modules that only the client has."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, _Modules, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            noun = _noun(name)
            return ClientOnly(f"{module.__name__}.{name}".partition(".")[2]) if noun is None else noun

        module.__getattr__ = find  # type: ignore[method-assign]


sys.meta_path.append(_Modules)


def __getattr__(name: str) -> Any:
    value = _find(name)
    globals()[name] = value
    return value


def _find(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("fieldlab_common.errors")
    if name == "map":
        return importlib.import_module("fieldlab_common.forms").map_
    if name == "__version__":
        return importlib.import_module("fieldlab_executor").__version__
    if name in _VERBS:
        return ClientOnly(name)
    if (noun := _noun(name)) is not None:
        return noun
    raise AttributeError(
        f"module 'fieldlab' has no attribute {name!r} on a node, where it has what tasks use and nothing of the client"
    )


def _noun(name: str) -> Any:
    """What ``fieldlab_common`` has under that public name; None if it has nothing."""
    if not name.startswith("_"):
        for module in _NOUNS:
            found = importlib.import_module(module)
            if name in found.__all__:
                return getattr(found, name)
    return None
