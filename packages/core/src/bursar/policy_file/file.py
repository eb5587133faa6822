"""A whole policy file: what may stand in it, and the settings of a Bursar that are made of it."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from bursar.alerts import Alerts
from bursar.alerts.config import AlertEntry, make_alerts
from bursar.budget import Budget
from bursar.errors import BursarError
from bursar.policy_file.entries import BudgetEntry, DetectorsValue, PriceEntry, Strict, Wrong, checked
from bursar.prices import PriceBook
from bursar.settings import Settings
from bursar.signing import check_public


class PolicyFile(Strict):
    """A whole policy: the store, budgets, prices, detectors, and who is told. The names are those of `Bursar`'s arguments."""

    store: str = "sqlite:///bursar.db"
    operator: str | None = Field(
        default=None, description="the public key of the one operator that is trusted; BURSAR_OPERATOR overrides it"
    )
    require: list[str] = Field(default_factory=list, description="tags that every call has to carry")
    default_limit: str | None = Field(
        default=None, description="what a run may spend whose calls no budget limits", examples=["1 USD"]
    )
    detectors: DetectorsValue = Field(
        default="report", description="what is done about runs that loop, retry or spend too fast"
    )
    budget: list[BudgetEntry] = Field(default_factory=list, max_length=1_000)
    price: list[PriceEntry] = Field(default_factory=list, max_length=10_000)
    ceiling: PriceEntry | None = Field(
        default=None, description="the rates at which an unknown model is priced; else it is refused"
    )
    tools: dict[str, str] = Field(default_factory=dict, examples=[{"web_search": "0.002 USD"}])
    rates: dict[str, str] = Field(default_factory=dict, description="US dollars per unit of another currency")
    alert: list[AlertEntry] = Field(default_factory=list, max_length=100)

    @field_validator("operator")
    @classmethod
    def _is_a_public_key(cls, operator: str | None) -> str | None:
        if operator is not None:
            checked(lambda: check_public(operator))
        return operator

    @field_validator("rates")
    @classmethod
    def _are_rates(cls, rates: dict[str, str]) -> dict[str, str]:
        for currency, rate in rates.items():
            if (
                not re.fullmatch(r"[A-Z]{3}", currency)
                or not re.fullmatch(r"\d{1,9}(\.\d{1,12})?", rate)
                or not float(rate)
            ):
                raise Wrong(f'{currency} = {rate!r} is no rate. Write it like EUR = "1.08", US dollars each', currency)
        return rates

    @model_validator(mode="after")
    def _holds_together(self) -> PolicyFile:
        try:
            Settings.of(**self.options())
        except BursarError as error:
            raise Wrong(str(error), *self._place(error)) from error
        return self

    def _place(self, error: BursarError) -> tuple[str | int, ...]:
        """Where in the file the cause of an error lies, as far as it says so."""
        key = error.fields.get("key") or error.fields.get("argument")
        names = [entry.name for entry in self.budget]
        if error.fields.get("budget") in names:
            newest = len(names) - 1 - names[::-1].index(error.fields["budget"])
            return ("budget", newest, *([key] if key else []))
        return (key,) if key else ()

    def make_budgets(self) -> list[Budget]:
        """The budgets, ready for Bursar."""
        return [entry.make() for entry in self.budget]

    def make_prices(self) -> PriceBook:
        """The packaged prices with this policy's overrides, ceiling and tools."""
        ceiling = None if self.ceiling is None else self.ceiling.make()
        return PriceBook.packaged().with_overrides([entry.make() for entry in self.price], ceiling, self.tools)

    def options(self) -> dict[str, Any]:
        """What Settings are made of, except for `alerts`: these need the secrets of the environment."""
        return {
            "budgets": self.make_budgets(),
            "prices": self.make_prices(),
            "rates": self.rates,
            "detectors": self.detectors if isinstance(self.detectors, str) else self.detectors.make(),
            "require": self.require,
            "default_limit": self.default_limit,
        }

    def make_alerts(self) -> Alerts | None:
        """Who is told, with secrets from the environment; None where only the log is. Raises PolicyError."""
        return make_alerts(self.alert) if self.alert else None
