"""Alembic's entry: runs the migrations on the connection that the store hands over, in the store's own transaction."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=False)
context.run_migrations()
