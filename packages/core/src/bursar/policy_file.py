"""Policy files: TOML or YAML from outside, validated by pydantic, errors with file, line and key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bursar.budget import Budget
from bursar.errors import BursarError, PolicyError
from bursar.policy import Policy
from bursar.prices import Override, PriceBook

MAX_BYTES = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=10_000)


class BudgetEntry(_Strict):
    """One `[[budget]]`: the arguments of `bursar.Budget`."""

    name: str
    limit: str = Field(examples=["5 USD", "60 requests/minute", "8 slots"])
    window: str = "total"
    tz: str = "UTC"
    per: str | list[str] = Field(default_factory=list)
    match: dict[str, str | list[str]] | None = None
    estimate: Literal["learned", "strict"] = "learned"
    on_exceed: str = "refuse"
    on_unreachable: Literal["closed", "open"] = "closed"
    mode: Literal["enforce", "shadow", "off"] = "enforce"
    owner: str | None = None

    def make(self) -> Budget:
        return Budget(**self.model_dump())

    @model_validator(mode="after")
    def _is_a_budget(self) -> BudgetEntry:
        _checked(self.make)
        return self


class PriceEntry(_Strict):
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
        _checked(self.make)
        return self


class PolicyFile(_Strict):
    """A whole policy: the store, the budgets, own prices, prices of own tools, and rates of other currencies."""

    store: str = "sqlite:///bursar.db"
    budget: list[BudgetEntry] = Field(default_factory=list, max_length=1_000)
    price: list[PriceEntry] = Field(default_factory=list, max_length=10_000)
    ceiling: PriceEntry | None = Field(
        default=None, description="the rates at which an unknown model is priced; else it is refused"
    )
    tools: dict[str, str] = Field(default_factory=dict, examples=[{"web_search": "0.002 USD"}])
    rates: dict[str, str] = Field(default_factory=dict, description="US dollars per unit of another currency")

    @field_validator("rates")
    @classmethod
    def _are_rates(cls, rates: dict[str, str]) -> dict[str, str]:
        for currency, rate in rates.items():
            if (
                not re.fullmatch(r"[A-Z]{3}", currency)
                or not re.fullmatch(r"\d{1,9}(\.\d{1,12})?", rate)
                or not float(rate)
            ):
                raise _Wrong(f'{currency} = {rate!r} is no rate. Write it like EUR = "1.08", US dollars each', currency)
        return rates

    @model_validator(mode="after")
    def _holds_together(self) -> PolicyFile:
        _checked(lambda: Policy(self.make_budgets(), rates=self.rates))
        _checked(self.make_prices)
        return self

    def make_budgets(self) -> list[Budget]:
        """The budgets, ready for Bursar."""
        return [entry.make() for entry in self.budget]

    def make_prices(self) -> PriceBook:
        """The packaged prices with this policy's overrides, ceiling and tools."""
        ceiling = None if self.ceiling is None else self.ceiling.make()
        return PriceBook.packaged().with_overrides([entry.make() for entry in self.price], ceiling, self.tools)


class _Wrong(ValueError):
    """What is wrong, and under which key of the entry, where that is known."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def _checked(make: Any) -> None:
    """Bursar's own errors inside a validator, as pydantic wants them; it then adds the key."""
    try:
        make()
    except BursarError as error:
        raise _Wrong(str(error), error.fields.get("key")) from error


def read_policy(path: str | Path) -> PolicyFile:
    """The policy in a `.toml`, `.yaml` or `.yml` file. Raises PolicyError naming file, line and key of everything wrong."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PolicyError(f"{path} is larger than {MAX_BYTES} bytes. Split the policy.", file=str(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(
            f"{path} cannot be read: {error}. Check its path and that it is UTF-8.", file=str(path)
        ) from error
    try:
        data, lines = _parse_toml(text) if path.suffix == ".toml" else _parse_yaml(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise PolicyError(
            f"{path} is no valid TOML: {error}. Correct that line.", file=str(path), line=int(line[1]) if line else None
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise PolicyError(
            f"{path} is no valid YAML: {error}. Correct that line.",
            file=str(path),
            line=mark.line + 1 if mark else None,
        ) from error
    try:
        return PolicyFile.model_validate(data)
    except ValidationError as error:
        raise _policy_error(path, error, lines) from error


Lines = dict[tuple[str | int, ...], int]


def _policy_error(path: Path, error: ValidationError, lines: Lines) -> PolicyError:
    said = []
    first: tuple[str, int | None] | None = None
    for fault in error.errors(include_url=False)[:20]:
        where = tuple(fault["loc"])
        within = getattr(fault.get("ctx", {}).get("error"), "key", None)
        if isinstance(within, str) and (*where, within) in lines:
            where = (*where, within)
        key = ".".join(str(part) for part in where) or "policy"
        line = next((lines[where[:size]] for size in range(len(where), 0, -1) if where[:size] in lines), None)
        message = fault["msg"].removeprefix("Value error, ").rstrip(".")
        if fault["type"] == "extra_forbidden":
            message = "there is no such key: remove it, or correct its spelling"
        said.append(f"{path}:{line or '?'}: {key}: {message}.")
        first = first or (key, line)
    key, line = first or ("policy", None)
    return PolicyError("\n".join(said), file=str(path), line=line, key=key)


def _parse_toml(text: str) -> tuple[dict[str, Any], Lines]:
    return tomllib.loads(text), _toml_lines(text)


def _toml_lines(text: str) -> Lines:
    """The line of every table and of every key of a plain `key = value`; tomllib keeps no positions."""
    lines: Lines = {}
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str | int, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        header = re.fullmatch(r"\s*(\[\[?)\s*([\w.\"-]+)\s*\]\]?\s*(#.*)?", line)
        key = re.match(r"\s*([\w\"-]+)\s*=", line)
        if header:
            table = tuple(part.strip('"') for part in header[2].split("."))
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            elif table[:1] in counts and len(table) > 1:
                table = (table[0], counts[table[:1]], *table[1:])
            lines[table] = number
        elif key:
            lines[(*table, key[1].strip('"'))] = number
    return lines


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain data, where no anchor can blow up a small file into a large one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed in a policy",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> tuple[Any, Lines]:
    loader = _PlainLoader(text)
    try:
        root = loader.get_single_node()
        lines: Lines = {}
        if root is None:
            return {}, lines
        _yaml_lines(root, (), lines)
        return loader.construct_document(root), lines
    finally:
        loader.dispose()


def _yaml_lines(node: yaml.Node, where: tuple[str | int, ...], lines: Lines) -> None:
    lines[where] = node.start_mark.line + 1
    children: Sequence[tuple[str | int, yaml.Node, yaml.Node]] = ()
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, value, value) for index, value in enumerate(node.value)]
    for key, at, value in children:
        _yaml_lines(value, (*where, key), lines)
        lines[(*where, key)] = at.start_mark.line + 1
