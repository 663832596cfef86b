"""What makes the tables, step by step (Alembic). It runs when a director starts, before anything reads.

A step, once released, is never changed: the next one changes what it made. Between its steps a database is what some
release of fieldlab knew; ``upgrade`` brings it to this release, and refuses one that a newer release made.
"""

from __future__ import annotations

from pathlib import Path

import alembic.command
import alembic.config
import alembic.script
import alembic.util
import sqlalchemy as sa
from alembic.migration import MigrationContext
from fieldlab_common.errors import ConfigurationError

__all__ = ["upgrade"]


def upgrade(engine: sa.Engine) -> None:
    """Bring the database to the tables of this release; nothing when it has them.

    Raises:
        ConfigurationError: a newer release made this database.
    """
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    script = alembic.script.ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        present = MigrationContext.configure(connection).get_current_revision()
        if present is not None and present not in {step.revision for step in script.walk_revisions()}:
            raise ConfigurationError(
                f"The database was made by a newer release of fieldlab (its schema is {present!r}).",
                advice="Start that release, or give another data folder.",
            )
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
