"""The tables of policy files: one `[[budget]]`, its thresholds, one `[[price]]`, the `[detectors]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from datetime import date, datetime
from typing import TYPE_CHECKING, Annotated, Literal, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model, model_validator

from bursar.accounts import ACTIONS
from bursar.budget import Budget, Threshold
from bursar.detect import Detectors
from bursar.errors import BursarError
from bursar.prices import Override


class Strict(BaseModel):
    """A table in which every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=10_000, hide_input_in_errors=True)


class Wrong(ValueError):
    """What is wrong, and where below the table that is checked, as far as that is known."""

    def __init__(self, message: str, *place: str | int) -> None:
        super().__init__(message)
        self.place = place


def checked(make: Callable[[], object]) -> None:
    """Bursar's own errors inside a validator, as pydantic wants them; it then adds the table."""
    try:
        make()
    except BursarError as error:
        key = error.fields.get("key") or error.fields.get("argument")
        raise Wrong(str(error), *([key] if isinstance(key, str) else [])) from error


class ThresholdEntry(Strict):
    """One of a budget's `thresholds`: the arguments of `bursar.Threshold`."""

    model_config = ConfigDict(strict=True)

    at: str = Field(examples=["80%"])
    action: Literal["notify", "downgrade", "clamp", "throttle", "ask", "block", "kill"]
    models: dict[str, str] | None = Field(
        default=None, description="for downgrade", examples=[{"gpt-4o": "gpt-4o-mini"}]
    )
    max_output_tokens: int | None = Field(default=None, description="for clamp")
    rate: str | None = Field(default=None, description="for throttle", examples=["6 requests/minute"])

    @model_validator(mode="after")
    def _is_a_threshold(self) -> ThresholdEntry:
        checked(lambda: Threshold(**self.model_dump()))
        return self


assert get_args(ThresholdEntry.model_fields["action"].annotation) == ACTIONS


class BudgetEntry(Strict):
    """One `[[budget]]`: the arguments of `bursar.Budget`."""

    name: str
    limit: str = Field(examples=["5 USD", "60 requests/minute", "8 slots"])
    window: str = "total"
    tz: str = "UTC"
    per: str | list[str] = Field(default_factory=list)
    match: dict[str, str | list[str]] | None = None
    thresholds: list[ThresholdEntry] = Field(default_factory=list, max_length=100)
    estimate: Literal["learned", "strict"] = "learned"
    on_exceed: str = "refuse"
    on_unreachable: Literal["closed", "open"] = "closed"
    mode: Literal["enforce", "shadow", "off"] = "enforce"
    owner: str | None = None

    def make(self) -> Budget:
        return Budget(**self.model_dump())

    @model_validator(mode="after")
    def _is_a_budget(self) -> BudgetEntry:
        checked(self.make)
        return self


class PriceEntry(Strict):
    """One `[[price]]`: the arguments of `bursar.Override`. Prices are US dollars as text, per million tokens for `*_mtok`."""

    model: str
    provider: str | None = None
    input_mtok: str | None = None
    output_mtok: str | None = None
    cache_read_mtok: str | None = None
    cache_write_mtok: str | None = None
    cache_write_1h_mtok: str | None = None
    reasoning_mtok: str | None = None
    input_audio_mtok: str | None = None
    input_image_mtok: str | None = None
    input_video_mtok: str | None = None
    cache_read_audio_mtok: str | None = None
    cache_read_image_mtok: str | None = None
    cache_read_video_mtok: str | None = None
    output_audio_mtok: str | None = None
    output_image_mtok: str | None = None
    per_call: str | None = None
    input_audio_hour: str | None = None
    output_audio_hour: str | None = None
    input_mchars: str | None = None
    per_image: str | None = None
    per_page: str | None = None
    per_search_unit: str | None = None
    discount: str | None = Field(default=None, examples=["15%"])
    tools: dict[str, str] = Field(default_factory=dict)
    effective_from: date | datetime | str | None = None
    effective_to: date | datetime | str | None = None
    match: dict[str, str] = Field(default_factory=dict)
    context_window: int | None = None
    max_output_tokens: int | None = None

    def make(self) -> Override:
        return Override(**self.model_dump())

    @model_validator(mode="after")
    def _is_a_price(self) -> PriceEntry:
        checked(self.make)
        return self


class _DetectorsTable(Strict):
    """`[detectors]`: the settings of `bursar.detect.Detectors`."""

    model_config = ConfigDict(strict=True)

    def make(self) -> Detectors:
        return Detectors(**self.model_dump())

    @model_validator(mode="after")
    def _are_detectors(self) -> _DetectorsTable:
        checked(self.make)
        return self


if TYPE_CHECKING:
    DetectorsEntry = _DetectorsTable
else:  # made of the fields of Detectors, so that there is one list of them
    _HINTS = get_type_hints(Detectors)
    _KEYS = {one.name: (_HINTS[one.name], one.default) for one in fields(Detectors)}
    DetectorsEntry = create_model("DetectorsEntry", __base__=_DetectorsTable, __doc__=_DetectorsTable.__doc__, **_KEYS)

# What pydantic puts into the place of a fault, to say which of several forms it has taken a value for.
ALTERNATIVES = ("as a word", "as a table")
DetectorsValue = Annotated[
    Annotated[Literal["report", "off"], Tag("as a word")] | Annotated[DetectorsEntry, Tag("as a table")],
    Discriminator(lambda value: "as a word" if isinstance(value, str) else "as a table"),
]
