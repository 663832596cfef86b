"""What is imported in the parent of all steps, so that they need not; and what a step has imported besides."""

from __future__ import annotations

import gc
import os
import sys

from fieldlab_executor import forkhooks

TYPE_CHECKING = False  # the parent of all steps has this module, and is kept small (``spawner``)
if TYPE_CHECKING:
    from collections.abc import Iterable, Set

__all__ = ["imported", "load"]

# They act when they are imported, or look at variables that a step may have set.
_NEVER = frozenset({"antigravity", "multiprocessing", "this", "zoneinfo"})
_STANDARD = os.path.dirname(os.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_FOREIGN = f"{os.sep}site-packages{os.sep}"


def imported(before: Set[str]) -> list[str]:
    """Modules of the standard library, and of fieldlab, that this process has and that were not there ``before``."""
    return [name for name, module in list(sys.modules.items()) if name not in before and _is_known(name, module)]


def _is_known(name: str, module: object) -> bool:
    file = getattr(module, "__file__", None)
    if name.partition(".")[0] in _NEVER or name == "__main__":
        return False
    if not isinstance(file, str):
        return name in sys.builtin_module_names
    return (file.startswith(_STANDARD) and _FOREIGN not in file) or file.startswith(_OURS)


def load(names: Iterable[str]) -> None:
    """Import them; what libraries want to have run at forks is kept out of the spawner's (``forkhooks``)."""

    def load_all() -> None:
        for name in names:
            try:
                __import__(name)
            except Exception:  # noqa: BLE001 - it only looked like a module's name, or the step itself will say why
                continue

    forkhooks.collect(load_all)
    gc.collect()
    gc.freeze()
