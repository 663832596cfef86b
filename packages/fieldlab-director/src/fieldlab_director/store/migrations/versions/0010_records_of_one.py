"""The records of one deployment are found without reading those of the others."""

from alembic import op

revision = "0010"
down_revision = "0009"
_INDEX = "ix_records_deployment_id_lane_seq"


def upgrade() -> None:
    op.create_index(_INDEX, "records", ["deployment_id", "lane", "seq"])


def downgrade() -> None:
    op.drop_index(_INDEX, "records")
