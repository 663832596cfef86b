"""How a spawner begins: ``python -P -c BOOT DESCRIPTOR SITE``, where SITE is the folder of fieldlab's own modules.

Nothing but this is imported before the hooks for forks are collected. ``command`` is the executor's whole command line,
run from such a folder, for whoever is the executor already and knows no other way to it.
"""

import os

from fieldlab_executor import forkhooks

__all__ = ["ASKED", "BOOT", "command", "main"]

ASKED = "FIELDLAB_ASKED"  # the name of a variable that is for the spawner itself, and for nothing that it starts

BOOT = "import sys; sys.path.insert(0, sys.argv[2]); from fieldlab_executor.boot import main; main()"
_COMMAND = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from fieldlab_executor.__main__ import main; sys.exit(main())"
)


def command(python: str, site: str) -> list[str]:
    """What runs the executor's command line on ``python``, with its modules in ``site``."""
    return [python, "-P", "-c", _COMMAND, site]


def main() -> None:
    """Load the spawner, then run it."""
    if (asked := os.environ.pop(ASKED, None)) is not None:
        os.environ.pop(asked, None)

    def load() -> None:
        import fieldlab_executor.spawner  # noqa: F401

    forkhooks.collect(load)
    from fieldlab_executor.spawner import main as run

    run()
