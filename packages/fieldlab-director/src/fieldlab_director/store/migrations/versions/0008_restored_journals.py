"""Journals of a database that was restored may have gone on without it."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("journals", sa.Column("restored", sa.Boolean, nullable=False, server_default=sa.false()))
