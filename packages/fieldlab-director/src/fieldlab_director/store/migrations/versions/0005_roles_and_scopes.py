"""The role ``user`` is called ``member``; a token has a scope, and those there are were good for everything."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("UPDATE users SET role = 'member' WHERE role = 'user'")
    op.add_column("tokens", sa.Column("scope", sa.String(16), nullable=False, server_default="admin"))


def downgrade() -> None:
    op.drop_column("tokens", "scope")
    op.execute("UPDATE users SET role = 'user' WHERE role IN ('member', 'viewer')")
