"""Reading a policy file: from a path to a checked PolicyFile, or to an error that names every fault's line and key."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from pydantic import ValidationError

from bursar.errors import PolicyError
from bursar.files import read_text
from bursar.policy_file.entries import ALTERNATIVES
from bursar.policy_file.file import PolicyFile
from bursar.policy_file.lines import Lines, parse_toml, parse_yaml

MAX_BYTES = 1_000_000
MAX_FAULTS = 20


def read_policy(path: str | Path) -> PolicyFile:
    """The policy in a `.toml`, `.yaml` or `.yml` file. Raises PolicyError naming file, line and key of everything wrong."""
    path = Path(path)
    try:
        text = read_text(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"{path} cannot be read: {error}. Check its path and that it is UTF-8. Split a policy that is too large.",
            file=str(path),
        ) from error
    form = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        data, lines = parse_toml(text) if form == "TOML" else parse_yaml(text)
    # Absurd nesting, numbers and dates are no syntax errors to the parsers; a program that watches a file has to survive them.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise PolicyError(
            f"{path} is no valid {form}: {error}. Correct that line.", file=str(path), line=_line_of(error)
        ) from error
    try:
        return PolicyFile.model_validate(data)
    except ValidationError as error:
        raise _policy_error(path, error, lines) from error


def _line_of(error: Exception) -> int | None:
    """Where a parser stumbled, as far as it says so."""
    if isinstance(error, tomllib.TOMLDecodeError):
        line = re.search(r"line (\d+)", str(error))
        return int(line[1]) if line else None
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else None


def _policy_error(path: Path, error: ValidationError, lines: Lines) -> PolicyError:
    said = []
    first: tuple[str, int | None] | None = None
    for fault in error.errors(include_url=False, include_input=False)[:MAX_FAULTS]:
        where = tuple(part for part in fault["loc"] if part not in ALTERNATIVES)
        within = getattr(fault.get("ctx", {}).get("error"), "place", ())
        if within and (*where, *within) in lines:
            where = (*where, *within)
        key = ".".join(str(part) for part in where) or "policy"
        line = next((lines[where[:size]] for size in range(len(where), 0, -1) if where[:size] in lines), None)
        message = fault["msg"].removeprefix("Value error, ").rstrip(".")
        if fault["type"] == "extra_forbidden":
            message = "there is no such key: remove it, or correct its spelling"
        said.append(f"{path}:{line or '?'}: {key}: {message}.")
        first = first or (key, line)
    key, line = first or ("policy", None)
    return PolicyError("\n".join(said), file=str(path), line=line, key=key)
