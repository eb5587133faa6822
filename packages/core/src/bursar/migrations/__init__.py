"""Migrations of the SQL stores, run by Alembic when a store of an older schema is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

# Every revision, oldest first; a store at none of these was written by a newer Bursar.
REVISIONS = ("0001", "0002", "0003")
HEAD = REVISIONS[-1]


def upgrade(connection: Connection, revision: str = HEAD) -> None:
    """Bring the schema behind this connection, inside its open transaction, to this revision."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
