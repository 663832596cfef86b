"""Several directors on one database; which blobs an experiment uses.

Records are numbered by a counter of their experiment instead of one of the whole table: a counter that is locked until
the commit lets no reader pass over a row that is committed late. That they are not doubled is held by ``journals``.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

TIME = sa.Float(53)
COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
CARRIED = "seq, experiment_id, deployment_id, journal_id, lane, number, late, data"


def upgrade() -> None:
    op.add_column("experiments", sa.Column("last_record", COUNTER, nullable=False, server_default="0"))
    op.execute(
        "UPDATE experiments SET last_record ="
        " coalesce((SELECT max(seq) FROM records WHERE records.experiment_id = experiments.id), 0)"
    )
    _make_records_anew()
    op.add_column("infrastructures", sa.Column("home", sa.String(40), nullable=True))
    op.add_column("infrastructures", sa.Column("holder", sa.String(40), nullable=True))
    op.add_column("infrastructures", sa.Column("held_until", TIME, nullable=True))
    op.add_column("blobs", sa.Column("doomed", TIME, nullable=True))
    op.create_index("ix_blob_refs_digest", "blob_refs", ["digest"])
    _make_blob_uses()
    if op.get_bind().dialect.name == "postgresql":  # the integers of SQLite have 64 bits as they are
        for table, column in (("events", "iteration"), ("artifacts", "attempt"), ("artifacts", "iteration")):
            op.alter_column(table, column, type_=sa.BigInteger(), existing_type=sa.Integer())


def _make_records_anew() -> None:
    op.rename_table("records", "records_old")
    if op.get_bind().dialect.name == "postgresql":  # there, the name of a key is taken for as long as it is there
        op.drop_constraint("pk_records", "records_old")
    op.create_table(
        "records",
        sa.Column("experiment_id", sa.String(40), nullable=False),
        sa.Column("lane", sa.String(32), nullable=False),
        sa.Column("seq", COUNTER, nullable=False),
        sa.Column("deployment_id", sa.String(40), nullable=False),
        sa.Column("journal_id", sa.String(64), nullable=False),
        sa.Column("number", COUNTER, nullable=False),
        sa.Column("late", sa.Boolean(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["experiment_id"], ["experiments.id"], name="fk_records_experiment_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("experiment_id", "lane", "seq", name="pk_records"),
    )
    op.execute(f"INSERT INTO records ({CARRIED}) SELECT {CARRIED} FROM records_old")
    op.drop_table("records_old")


def _make_blob_uses() -> None:
    """A deployment's blobs stand in its spec as JSON, which the two databases read each in its own way."""
    op.create_table(
        "blob_uses",
        sa.Column("experiment_id", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(
            ["experiment_id"], ["experiments.id"], name="fk_blob_uses_experiment_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("experiment_id", "digest", name="pk_blob_uses"),
    )
    op.create_index("ix_blob_uses_digest", "blob_uses", ["digest"])
    if op.get_bind().dialect.name == "postgresql":
        graph, blobs = "spec::json->>'graph'", "json_array_elements_text(coalesce(spec::json->'blobs', '[]'::json))"
        inside = f"SELECT experiment_id, {blobs} AS digest FROM deployments"
    else:
        graph = "json_extract(spec, '$.graph')"
        inside = "SELECT experiment_id, value AS digest FROM deployments, json_each(spec, '$.blobs')"
    op.execute(
        "INSERT INTO blob_uses (experiment_id, digest)"
        f" SELECT experiment_id, {graph} AS digest FROM deployments UNION {inside}"
        " UNION SELECT experiment_id, sha256 AS digest FROM artifacts WHERE stored"
    )
