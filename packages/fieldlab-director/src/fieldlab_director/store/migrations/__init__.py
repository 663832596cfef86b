"""What makes the tables, step by step (Alembic). It runs when a director starts, before anything reads.

A step, once released, is never changed: the next one changes what it made. Between its steps a database is what some
release of fieldlab knew; ``upgrade`` brings it to this release, and refuses one that a newer release made. Steps are
files named after their revision, in order, so that a database that is up to date is known without loading Alembic,
which takes longer than the rest of a start.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from fieldlab_common.errors import ConfigurationError

__all__ = ["upgrade"]

_HERE = Path(__file__).parent


def upgrade(engine: sa.Engine) -> None:
    """Bring the database to the tables of this release; nothing when it has them.

    Raises:
        ConfigurationError: a newer release made this database.
    """
    steps = sorted(path.name.split("_")[0] for path in (_HERE / "versions").glob("[0-9]*.py"))
    with engine.begin() as connection:
        present = _revision(connection)
        if present is not None and present not in steps:
            raise ConfigurationError(
                f"The database was made by a newer release of fieldlab (its schema is {present!r}).",
                advice="Start that release, or give another data folder.",
            )
        if present != steps[-1]:
            _run(connection)


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return revision


def _run(connection: sa.Connection) -> None:
    import alembic.command
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", str(_HERE).replace("%", "%%"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
