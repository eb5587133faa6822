"""The `[[alert]]` tables of policy files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bursar.alerts.routes import MAX_PER_MINUTE, PER_MINUTE, Alerts, Route
from bursar.alerts.sinks import OWNER, Apprise, Log, Sink, Webhook
from bursar.errors import PolicyError

Kind = Literal["threshold", "approval", "frozen", "detector", "policy", "resolved"]
_PASSWORD = re.compile(r"://[^/?#${}:]*:[^/?#${}@]+@")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class AlertEntry(BaseModel):
    """One `[[alert]]`: a sink, and what it is told of. Secrets stay in the environment: write `${NAME}` in an address."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=10_000, hide_input_in_errors=True)

    url: str | None = Field(
        default=None,
        description="an address of Apprise's: chat, mail, pager",
        examples=["slack://${SLACK_TOKEN}/#spend"],
    )
    webhook: str | None = Field(default=None, description="where signed JSON is posted")
    secret_env: str | None = Field(default=None, description="the environment variable that holds the webhook's secret")
    log: bool = Field(default=False, description="the log of the program")
    kinds: list[Kind] = Field(default_factory=list, description="only these kinds; else all")
    budgets: list[str] = Field(default_factory=list, description="only these budgets, * allowed; else all")
    owner: str | None = Field(
        default=None, description="only budgets with this owner, * allowed; {owner} in the address stands for it"
    )
    per_minute: int = Field(default=PER_MINUTE, ge=1, le=MAX_PER_MINUTE, description="the most messages a minute")

    @model_validator(mode="after")
    def _holds_together(self) -> AlertEntry:
        address = self.url or self.webhook or ""
        if [bool(self.url), bool(self.webhook), self.log].count(True) != 1:
            raise ValueError("an alert goes to one sink: give one of url, webhook and log")
        if bool(self.secret_env) != bool(self.webhook):
            raise ValueError("a webhook, and nothing else, has a secret_env: the variable that holds its secret")
        if self.secret_env and not _VARIABLE.fullmatch(f"${{{self.secret_env}}}"):
            raise ValueError("secret_env is the name of an environment variable, never the secret itself")
        if _PASSWORD.search(address):
            raise ValueError(
                "an address holds a password. Put it into an environment variable, and write ${NAME} instead"
            )
        if OWNER in address and not self.owner:
            raise ValueError('{owner} in an address needs owner: a pattern, such as owner = "#*"')
        return self

    def make(self, environ: Mapping[str, str] = os.environ) -> Route:
        """The route, with the secrets that the environment holds. Raises PolicyError."""
        return Route(
            self._sink(environ),
            kinds=self.kinds,
            budgets=self.budgets,
            owner=self.owner,
            per_minute=self.per_minute,
        )

    def _sink(self, environ: Mapping[str, str]) -> Sink:
        if self.webhook:
            return Webhook(_filled(self.webhook, environ), _variable(self.secret_env or "", environ))
        if not self.url:
            return Log()
        sink = Apprise(_filled(self.url, environ))
        if not _VARIABLE.search(self.url) and sink.holds_secret():
            raise PolicyError(
                "An alert's url holds a secret. Put the secret into an environment variable, and write ${NAME} in its place.",
                key="url",
            )
        return sink


def make_alerts(entries: list[AlertEntry], environ: Mapping[str, str] = os.environ) -> Alerts:
    """Who is told, by these entries. Raises PolicyError."""
    return Alerts([entry.make(environ) for entry in entries])


def _filled(address: str, environ: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda found: _variable(found[1], environ), address)


def _variable(name: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise PolicyError(f"An alert needs the environment variable {name}, which is not set. Set it.", key=name)
    return value
