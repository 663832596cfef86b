"""Users who are disabled; tokens that were made by logging in, which end with a new password."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("users", sa.Column("disabled", sa.Float(53), nullable=True))
    op.add_column("tokens", sa.Column("login", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("tokens", "login")
    op.drop_column("users", "disabled")
