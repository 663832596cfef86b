"""Machines that dial out: tokens to join with, agents, and what they are asked."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    time, counter = sa.Float(53), sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "join_tokens",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("infrastructure_id", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("uses", sa.Integer, nullable=False),
        sa.Column("expires", time, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_join_tokens"),
        sa.ForeignKeyConstraint(
            ["infrastructure_id"],
            ["infrastructures.id"],
            name="fk_join_tokens_infrastructure_id",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_join_tokens_infrastructure_id", "join_tokens", ["infrastructure_id"])
    op.create_table(
        "agents",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("infrastructure_id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("next_digest", sa.String(64)),
        sa.Column("last_digest", sa.String(64)),
        sa.Column("expires", time, nullable=False),
        sa.Column("instance", sa.String(64)),
        sa.Column("last_instance", sa.String(64)),
        sa.Column("doubled", time),
        sa.Column("joined", time, nullable=False),
        sa.Column("last_seen", time),
        sa.PrimaryKeyConstraint("id", name="pk_agents"),
        sa.ForeignKeyConstraint(
            ["infrastructure_id"], ["infrastructures.id"], name="fk_agents_infrastructure_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("infrastructure_id", "name", name="uq_agents_infrastructure_id_name"),
    )
    op.create_table(
        "agent_calls",
        sa.Column("number", counter, nullable=False, autoincrement=True),
        sa.Column("agent_id", sa.String(40), nullable=False),
        sa.Column("method", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("deadline", time, nullable=False),
        sa.Column("taken", sa.String(64)),
        sa.Column("cancelled", sa.Boolean, nullable=False),
        sa.Column("answer", sa.Text),
        sa.PrimaryKeyConstraint("number", name="pk_agent_calls"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name="fk_agent_calls_agent_id", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_agent_calls_agent_id", "agent_calls", ["agent_id"])


def downgrade() -> None:
    op.drop_table("agent_calls")
    op.drop_table("agents")
    op.drop_table("join_tokens")
