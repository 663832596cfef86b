"""What makes the tables, step by step (Alembic). It runs when a director starts, before anything reads.

A step, once released, is never changed: the next one changes what it made. Between its steps a database is what some
release of fieldlab knew; ``upgrade`` brings it to this release, and refuses one that a newer release made. Steps are
files named after their revision, in order, so that a database that is up to date is known without loading Alembic,
which takes longer than the rest of a start. Of several directors that start at once on PostgreSQL, one takes the steps
and the others wait for it; all steps of an upgrade are one transaction.
"""

from __future__ import annotations

import ast
from pathlib import Path

import sqlalchemy as sa
from fieldlab_common.errors import ConfigurationError

__all__ = ["pending", "upgrade"]

_HERE = Path(__file__).parent
_LOCK = 0x6669656C64  # of PostgreSQL's advisory locks; any number that nobody else on the database uses


def upgrade(engine: sa.Engine, to: str = "head") -> None:
    """Bring the database to the tables of this release (or of the step ``to``); nothing when it has them.

    Raises:
        ConfigurationError: a newer release made this database.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            for limit in ("statement_timeout", "lock_timeout"):
                connection.execute(sa.text(f"SET LOCAL {limit} = 0"))
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        if _after(_revision(connection)):
            _run(connection, to)


def pending(engine: sa.Engine) -> list[str]:
    """The steps that ``upgrade`` would take, in order: revision and title of each.

    Raises:
        ConfigurationError: a newer release made this database.
    """
    with engine.connect() as connection:
        return [f"{path.name.split('_')[0]}: {_title(path)}" for path in _after(_revision(connection))]


def _after(present: str | None) -> list[Path]:
    steps = {path.name.split("_")[0]: path for path in sorted((_HERE / "versions").glob("[0-9]*.py"))}
    if present is not None and present not in steps:
        raise ConfigurationError(
            f"The database was made by a newer release of fieldlab (its schema is {present!r}).",
            advice="Start that release, or give another data folder or database.",
        )
    return [path for step, path in steps.items() if present is None or step > present]


def _title(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
    return text.splitlines()[0]


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return revision


def _run(connection: sa.Connection, to: str) -> None:
    import alembic.command
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", str(_HERE).replace("%", "%%"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, to)
