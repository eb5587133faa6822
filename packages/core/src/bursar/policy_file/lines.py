"""TOML and YAML with the line of every key, so that a fault can be named by its place."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from typing import Any

import yaml

from bursar.errors import shown

Place = tuple[str | int, ...]
Lines = dict[Place, int]

MAX_DEPTH = 32
MAX_DOTS = 500

# What valid TOML consists of; a string of several lines is one token.
_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{},=\n]|[^\s\[\]{},=#"\']+', re.DOTALL
)  # fmt: skip
_KEY = re.compile(r'"((?:\\.|[^"\\])*)"|\'([^\']*)\'|([\w-]+)')


def parse_toml(text: str) -> tuple[dict[str, Any], Lines]:
    """The data of a TOML text and its lines. Raises tomllib.TOMLDecodeError; ValueError and RecursionError for absurd texts."""
    if any(
        piece.count(".") > MAX_DOTS for piece in re.split(r"[=\n]", text)
    ):  # its parser takes an hour for a long key
        raise ValueError(f"a key has more than {MAX_DOTS} parts")
    data = tomllib.loads(text)
    _check_depth(data)
    return data, _TomlLines(text).lines


def _check_depth(data: Any) -> None:
    """Raise ValueError where tables lie in tables beyond all use: the place of each key is kept, with all above it."""
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")


class _TomlLines:
    """Finds the lines of a text that is known to be valid; tomllib keeps no positions."""

    def __init__(self, text: str) -> None:
        self.lines: Lines = {}
        self._tokens: list[tuple[str, int]] = []
        line, end = 1, 0
        for found in _TOKEN.finditer(text):
            line += text.count("\n", end, found.start())
            end = found.start()
            if not found[0].startswith("#"):
                self._tokens.append((found[0], line))
        self._at = 0
        self._tables: dict[Place, int] = {}  # arrays of tables, and the index of the newest of each
        table: Place = ()
        while self._at < len(self._tokens):
            token, _ = self._tokens[self._at]
            if token == "[":
                table = self._header()
            elif token == "\n":
                self._at += 1
            else:
                self._pair(table)

    def _header(self) -> Place:
        line = self._tokens[self._at][1]
        self._at += 1
        of_many = self._tokens[self._at][0] == "["
        self._at += of_many
        names = self._names("]")
        self._at += of_many
        table: Place = ()
        for name in names[:-1]:
            self.lines.setdefault((*table, name), line)
            table = self._newest((*table, name))
        table = (*table, names[-1])
        self.lines.setdefault(table, line)
        if of_many:
            self._tables[table] = self._tables.get(table, -1) + 1
        table = self._newest(table)
        self.lines.setdefault(table, line)
        return table

    def _newest(self, table: Place) -> Place:
        return (*table, self._tables[table]) if table in self._tables else table

    def _pair(self, table: Place) -> None:
        line = self._tokens[self._at][1]
        for name in self._names("="):
            table = (*table, name)
            self.lines.setdefault(table, line)
        self._value(table)

    def _names(self, until: str) -> list[str]:
        """The parts of a key, which may be dotted and quoted; what ends it is passed."""
        begun = self._at
        while self._tokens[self._at][0] != until:
            self._at += 1
        text = " ".join(token for token, _ in self._tokens[begun : self._at])
        self._at += 1
        return [next(filter(None, found.groups()), "") for found in _KEY.finditer(text)]

    def _value(self, where: Place) -> None:
        token, line = self._tokens[self._at]
        self.lines.setdefault(where, line)
        if token not in ("[", "{"):
            while self._at < len(self._tokens) and self._tokens[self._at][0] not in (",", "]", "}", "\n"):
                self._at += 1
            return
        self._at += 1
        index = 0
        while (inner := self._tokens[self._at][0]) not in ("]", "}"):
            if inner in (",", "\n"):
                self._at += 1
            elif token == "{":
                self._pair(where)
            else:
                self._value((*where, index))
                index += 1
        self._at += 1


_BOOL = "tag:yaml.org,2002:bool"


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain data, where no anchor can blow up a small file into a large one.

    `off`, `on`, `yes` and `no` are words, as in YAML 1.2: `mode: off` means "off".
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - of the class, as PyYAML has it
        first: [(tag, pattern) for tag, pattern in found if tag != _BOOL or first in "tTfF"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed in a policy",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> tuple[Any, Lines]:
    """The data of a YAML text and its lines. Raises yaml.YAMLError; ValueError and RecursionError for absurd texts."""
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


def _yaml_lines(node: yaml.Node, where: Place, lines: Lines) -> None:
    if len(where) > MAX_DEPTH:
        raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
    lines[where] = node.start_mark.line + 1
    children: Sequence[tuple[str | int, yaml.Node, yaml.Node]] = ()
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, value, value) for index, value in enumerate(node.value)]
    for key, at, value in children:
        if (*where, key) in lines:  # YAML would take the last of two, so that a budget were gone without a word
            raise yaml.MarkedYAMLError(problem=f"the key {shown(key)} stands here twice", problem_mark=at.start_mark)
        _yaml_lines(value, (*where, key), lines)
        lines[(*where, key)] = at.start_mark.line + 1
