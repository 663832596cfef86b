"""The line for nodes, and who holds which; experiments that are deleted, whose requests stay known."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

ID, NAME, TIME = sa.String(40), sa.String(200), sa.Float(53)
COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
KEPT = "owner_id, key, digest, experiment_id, created"
ENDS = ("succeeded", "failed", "cancelled", "lost")


def upgrade() -> None:
    op.create_table(
        "line",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", COUNTER, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_line"),
    )
    op.create_table(
        "holds",
        sa.Column("infrastructure_id", ID, nullable=False),
        sa.Column("place", NAME, nullable=False),
        sa.Column("slot", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("experiment_id", ID, nullable=False),
        sa.Column("node_name", NAME, nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["infrastructure_id"], ["infrastructures.id"], name="fk_holds_infrastructure_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["experiment_id"], ["experiments.id"], name="fk_holds_experiment_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("infrastructure_id", "place", "slot", name="pk_holds"),
    )
    op.create_index("ix_holds_experiment_id", "holds", ["experiment_id"])
    op.add_column("nodes", sa.Column("slots", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("experiments", sa.Column("queued", TIME, nullable=False, server_default="0"))
    op.add_column("experiments", sa.Column("number", COUNTER, nullable=False, server_default="0"))
    op.add_column("experiments", sa.Column("granted", TIME))
    op.add_column("experiments", sa.Column("deleted", TIME))
    op.add_column("deployments", sa.Column("ready", TIME))
    op.add_column("deployments", sa.Column("place", NAME, nullable=False, server_default=""))
    op.add_column("deployments", sa.Column("node_name", NAME, nullable=False, server_default=""))
    _fill()
    _make_idempotency_anew()
    op.create_index(
        "ix_deployments_waiting", "deployments", ["infrastructure_id", "place"], **_where("state = 'pending'")
    )
    op.create_index("ix_deployments_lease", "deployments", ["lease"], **_where("lease IS NOT NULL"))


def _make_idempotency_anew() -> None:
    """Without the key to an experiment that may be gone."""
    op.rename_table("idempotency", "idempotency_old")
    if op.get_bind().dialect.name == "postgresql":  # there, the name of a key is taken for as long as it is there
        op.drop_constraint("pk_idempotency", "idempotency_old")
        op.drop_constraint("fk_idempotency_owner_id", "idempotency_old")
    op.create_table(
        "idempotency",
        sa.Column("owner_id", ID, nullable=False),
        sa.Column("key", NAME, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("experiment_id", ID, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name="fk_idempotency_owner_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("owner_id", "key", name="pk_idempotency"),
    )
    op.execute(f"INSERT INTO idempotency ({KEPT}) SELECT {KEPT} FROM idempotency_old")
    op.drop_table("idempotency_old")


def _fill() -> None:
    """Runs that had begun have their nodes, also where several have one; those that had not stand in the line."""
    connection = op.get_bind()
    run = connection.execute
    run(sa.text("INSERT INTO line (id, number) VALUES (1, 0)"))
    run(sa.text("UPDATE experiments SET queued = created"))
    columns = "id, experiment_id, infrastructure_id, node, state, prepared, handle"
    found = run(sa.text(f"SELECT {columns} FROM deployments ORDER BY id")).mappings().all()
    names = {row["id"]: json.loads(row["node"])["name"] for row in found}
    for id, name in names.items():
        run(sa.text("UPDATE deployments SET place = :name, node_name = :name WHERE id = :id"), {"id": id, "name": name})
    begun = {row["experiment_id"] for row in found if row["state"] != "pending"}
    for id in begun:
        run(sa.text("UPDATE experiments SET granted = created WHERE id = :id"), {"id": id})
    holders: dict[tuple[str, str], dict[str, None]] = {}
    for row in found:
        there = row["state"] not in ENDS or (row["prepared"] or row["handle"]) not in (None, "null")
        if there and row["experiment_id"] in begun:
            holders.setdefault((row["infrastructure_id"], names[row["id"]]), {})[row["experiment_id"]] = None
    add = sa.text("INSERT INTO holds VALUES (:infrastructure, :place, :slot, :run, :place, 0)")
    for (infrastructure, place), runs in holders.items():
        for slot, experiment in enumerate(runs):
            run(add, {"infrastructure": infrastructure, "place": place, "slot": slot, "run": experiment})


def _where(condition: str) -> dict[str, Any]:
    return {f"{database}_where": sa.text(condition) for database in ("sqlite", "postgresql")}


def downgrade() -> None:
    op.drop_table("line")
    op.drop_index("ix_deployments_lease", "deployments")
    op.drop_index("ix_deployments_waiting", "deployments")
    for column in ("node_name", "place", "ready"):
        op.drop_column("deployments", column)
    for column in ("deleted", "granted", "number", "queued"):
        op.drop_column("experiments", column)
    op.drop_column("nodes", "slots")
    op.drop_table("holds")
