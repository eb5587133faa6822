"""Thresholds of accounts, definitions of every kind in one table, and the outbox of alerts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("accounts", sa.Column("crossed", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("accounts", sa.Column("marks", sa.Text(), nullable=False, server_default=""))
    op.create_table(
        "definitions",
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("definition", sa.Text(), nullable=False),
        sa.Column("published_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version"),
    )
    op.execute(
        "INSERT INTO definitions(version, kind, name, definition, published_us) "
        "SELECT version, 'budget', name, definition, published_us FROM budgets"
    )
    op.drop_table("budgets")
    op.create_index(op.f("ix_definitions_name"), "definitions", ["name"], unique=False)
    op.create_table(
        "alerts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("due_us", sa.BigInteger(), nullable=False),
        sa.Column("claims", sa.BigInteger(), nullable=False),
        sa.Column("delivered_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_alerts_due", "alerts", ["delivered_us", "due_us"], unique=False)
