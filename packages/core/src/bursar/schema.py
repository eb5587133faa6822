"""The tables of the SQL stores: what reports, finops and billing may read, and what migrations build."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Text
from sqlmodel import Field, SQLModel


def _integer(default: int | None = 0) -> Column[int]:
    return Column(BigInteger, nullable=default is None, default=default)


class AccountRow(SQLModel, table=True):
    """One limit in one window; amounts are integers in the unit (USD: nano-dollars)."""

    __tablename__ = "accounts"
    __table_args__ = {"sqlite_with_rowid": False}

    key: str = Field(primary_key=True, sa_type=Text)
    budget: str = Field(sa_type=Text)
    scope: str = Field(sa_type=Text)
    unit: str = Field(sa_type=Text)
    kind: str = Field(sa_type=Text)
    limit: int = Field(sa_column=_integer())
    start_us: int = Field(sa_column=_integer())
    end_us: int | None = Field(sa_column=_integer(None))
    period_us: int = Field(sa_column=_integer())
    enforce: bool
    spent: int = Field(sa_column=_integer())
    reserved: int = Field(sa_column=_integer())
    overrun: int = Field(sa_column=_integer())
    refused: int = Field(sa_column=_integer())
    refused_minute: int = Field(sa_column=_integer())
    refused_in_minute: int = Field(sa_column=_integer())
    level: int = Field(sa_column=_integer())
    remainder: int = Field(sa_column=_integer())
    at_us: int = Field(sa_column=_integer())
    buckets: str = Field(sa_type=Text)
    crossed: int = Field(sa_column=_integer())
    marks: str = Field(sa_type=Text)


class ReservationRow(SQLModel, table=True):
    """One open reservation; ending it deletes the row. `held` and `draft` are JSON."""

    __tablename__ = "reservations"
    __table_args__ = {"sqlite_with_rowid": False}

    id: str = Field(primary_key=True, sa_type=Text)
    held: str = Field(sa_type=Text)
    reserved_us: int = Field(sa_column=_integer())
    expires_us: int = Field(sa_column=_integer())
    on_expiry: str = Field(sa_type=Text)
    digest: str = Field(sa_type=Text)
    draft: str = Field(sa_type=Text)


class RecordRow(SQLModel, table=True):
    """One usage record: append-only (I4). `usage`, `amounts`, `draft`, `facts` are JSON; times are microseconds."""

    __tablename__ = "records"
    __table_args__ = {"sqlite_with_rowid": False}

    id: str = Field(primary_key=True, sa_type=Text)
    kind: str = Field(sa_type=Text)
    corrects: str | None = Field(sa_type=Text)
    outcome: str = Field(sa_type=Text)
    estimated: bool
    reason: str = Field(sa_type=Text)
    cost_nanos: int = Field(sa_column=_integer())
    usage: str = Field(sa_type=Text)
    amounts: str = Field(sa_type=Text)
    reserved_us: int = Field(sa_column=_integer())
    settled_us: int = Field(sa_column=_integer())
    digest: str = Field(sa_type=Text)
    draft: str = Field(sa_type=Text)
    facts: str = Field(sa_type=Text)
    org: str | None = Field(sa_type=Text)
    team: str | None = Field(sa_type=Text)
    project: str | None = Field(sa_type=Text)
    user: str | None = Field(sa_type=Text)
    customer: str | None = Field(sa_type=Text)
    workflow: str | None = Field(sa_type=Text)
    agent: str | None = Field(sa_type=Text)
    run: str | None = Field(sa_type=Text)
    tool: str | None = Field(sa_type=Text)
    connection: str | None = Field(sa_type=Text)
    provider: str | None = Field(sa_type=Text)
    model: str | None = Field(sa_type=Text)
    model_answered: str | None = Field(sa_type=Text)


class DefinitionRow(SQLModel, table=True):
    """Every version of every definition, as JSON; the newest of a kind and name is in force. Append-only."""

    __tablename__ = "definitions"

    version: int = Field(primary_key=True)
    kind: str = Field(sa_type=Text)
    name: str = Field(sa_type=Text, index=True)
    definition: str = Field(sa_type=Text)
    published_us: int = Field(sa_column=_integer())


class AlertRow(SQLModel, table=True):
    """One alert of the outbox. `facts` is JSON; `delivered_us` is 0 until somebody was told, `due_us` when to try next."""

    __tablename__ = "alerts"
    __table_args__ = {"sqlite_with_rowid": False}

    id: str = Field(primary_key=True, sa_type=Text)
    kind: str = Field(sa_type=Text)
    at_us: int = Field(sa_column=_integer())
    facts: str = Field(sa_type=Text)
    due_us: int = Field(sa_column=_integer())
    claims: int = Field(sa_column=_integer())
    delivered_us: int = Field(sa_column=_integer())


class AccountCountRow(SQLModel, table=True):
    """How many accounts a budget has, against `max_accounts`."""

    __tablename__ = "account_counts"
    __table_args__ = {"sqlite_with_rowid": False}

    budget: str = Field(primary_key=True, sa_type=Text)
    accounts: int
