"""Infrastructures may reach the director at a URL of their own."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("infrastructures", sa.Column("director_url", sa.Text))
    op.add_column("infrastructures", sa.Column("director_ca", sa.Text))


def downgrade() -> None:
    op.drop_column("infrastructures", "director_ca")
    op.drop_column("infrastructures", "director_url")
