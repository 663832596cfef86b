"""Infrastructures can be detached, and shared with users."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("infrastructures", sa.Column("leaving", sa.Float(53)))
    op.add_column("infrastructures", sa.Column("detached", sa.Float(53)))
    op.create_table(
        "grants",
        sa.Column("infrastructure_id", sa.String(40), nullable=False),
        sa.Column("user_id", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("infrastructure_id", "user_id", name="pk_grants"),
        sa.ForeignKeyConstraint(
            ["infrastructure_id"], ["infrastructures.id"], name="fk_grants_infrastructure_id", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    op.drop_table("grants")
    op.drop_column("infrastructures", "detached")
    op.drop_column("infrastructures", "leaving")
