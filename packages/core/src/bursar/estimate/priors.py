"""What is expected of a request before anything was observed: a few numbers per product line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bursar.estimate.media import guess_tokens
from bursar.estimate.request import Request


@dataclass(frozen=True, slots=True)
class Line:
    """`weights`, one per feature of a request; the cold estimate is `factor` x expected + `margin` tokens."""

    weights: tuple[float, ...]
    factor: float
    margin: float

    def expected(self, request: Request) -> float:
        """The tokens that a request of this size usually has."""
        tokens = sum(map(float.__mul__, self.weights, map(float, request.features))) + request.token_ids
        for item in request.media:
            tokens += guess_tokens(item, request.family, request.model.lower())
        return max(tokens, 1.0)


@dataclass(frozen=True, slots=True)
class Priors:
    """All lines, with families and `*` (any model) to fall back on; `additions`: tokens, per kind of request, that the
    provider adds on its side and no line explains (the 95th percentile of the recorded answers)."""

    lines: dict[str, Line]
    additions: dict[str, int]

    def line(self, request: Request) -> Line:
        lines = self.lines
        return lines.get(request.line) or lines.get(request.family) or lines["*"]


@lru_cache(maxsize=1)
def packaged() -> Priors:
    """The priors that come with the package (`priors.json`, written by `tools/fit_priors.py`)."""
    data = json.loads(Path(__file__).with_name("priors.json").read_text("utf-8"))
    lines = {
        name: Line(tuple(map(float, row["weights"])), row["factor"], row["margin"])
        for name, row in data["lines"].items()
    }
    return Priors(lines, data["additions"])
