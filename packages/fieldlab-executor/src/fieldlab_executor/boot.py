"""How a spawner begins: ``python -P -c BOOT DESCRIPTOR SITE``, where SITE is the folder of fieldlab's own modules.

Nothing but this is imported before the hooks for forks are collected.
"""

from fieldlab_executor import forkhooks

__all__ = ["BOOT", "main"]

BOOT = "import sys; sys.path.insert(0, sys.argv[2]); from fieldlab_executor.boot import main; main()"


def main() -> None:
    """Load the spawner, then run it."""

    def load() -> None:
        import fieldlab_executor.spawner  # noqa: F401

    forkhooks.collect(load)
    from fieldlab_executor.spawner import main as run

    run()
