"""Fits the packaged priors of the learned estimate on recorded answers: `python tools/fit_priors.py [CORPUS] [OUT]`.

Method: per product line, the tokens are a weighted sum of the request's measures with weights of 0 or more, found by
iterated least squares on the relative error (so the middle of the answers, not their mean), drawn towards the family's
weights, and those towards all answers', where answers are few. Near-copies of one source file share one weight. On top
stand a factor and a margin in tokens, chosen so that hardly an answer exceeds the estimate. No randomness: the same
corpus gives the same file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bursar.estimate.priors import Line, Priors
from bursar.estimate.request import FEATURES, Request

OUT = Path(__file__).parents[1] / "packages/core/src/bursar/estimate/priors.json"
CORPUS = Path(__file__).parents[2] / "shared/corpus/responses.jsonl.gz"
# Per measure: the least weight, where it starts when nothing is known, and the most. A byte makes less than a token (a
# digit or a sign up to one, with what the provider adds); random text makes 0.6 a byte with every tokenizer.
WEIGHTS = {
    "constant": (0.0, 5.0, 200.0),
    "has_tools": (0.0, 40.0, 700.0),
    "has_format": (0.0, 20.0, 300.0),
    "thinks": (0.0, 10.0, 60.0),
    "letters": (0.0, 0.2, 0.35),
    "dense": (0.0, 0.5, 1.2),
    "wide": (0.0, 0.35, 0.7),
    "unbroken": (0.4, 0.45, 0.6),
    "data": (0.1, 0.35, 0.6),
    "schema": (0.0, 0.2, 1.0),
    "format": (0.0, 0.1, 0.5),
    "reasoning": (0.0, 0.1, 0.4),
    "stale": (0.0, 0.02, 0.3),
    "messages": (0.0, 4.0, 60.0),
    "calls": (15.0, 20.0, 80.0),
    "tools": (0.0, 10.0, 200.0),
    "hidden": (0.0, 1_200.0, 1_600.0),
}
# Tokens that every cold estimate has on top: little money, and most of what small requests are short by.
FLOOR = 60
ALLOWED = 0.01  # share of answers that may lie above the estimate of their line
_TEXT = re.compile(r"\.\.\.\[trimmed (\d+) chars\]$")
_ITEMS = re.compile(r"^\.\.\.\[trimmed \d+ items\]$")
# Recordings whose request or counts were edited by hand: they report more tokens than their text can make.
EDITED = {
    "xdbab8532c80f89": "18,135 tokens for 46 characters: the system prompt was replaced in the recording",
    "xb3146aca410333": "18,135 tokens for 46 characters: the system prompt was replaced in the recording",
    "x45eac9f128fcc7": "107 tokens, 100 + 5 + 2, for 'Hello!': invented counts",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One recorded answer: its request, its counts, and where it comes from."""

    id: str
    source: str
    provider: str
    model: str
    request: Request
    input_tokens: int
    output_tokens: int
    whole: bool


def whole(value: Any) -> Any:
    """The body with shortened strings filled up to their length; None where list items are missing."""
    if isinstance(value, str):
        found = _TEXT.search(value)
        if found is None:
            return value
        head, size = value[: found.start()], int(found[1])
        return (head * (size // max(1, len(head)) + 1))[:size] if head else "x" * size
    if isinstance(value, dict):
        return _all({key: whole(part) for key, part in value.items()})
    if isinstance(value, list):
        if any(isinstance(part, str) and _ITEMS.match(part) for part in value):
            return None
        return _all([whole(part) for part in value])
    return _Null if value is None else value


class _Null:
    """Stands for JSON null while `whole` uses None for `not whole`."""


def _all(parts: Any) -> Any:
    values = parts.values() if isinstance(parts, dict) else parts
    return None if any(part is None for part in values) else parts


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_nulls(part) for part in value]
    return None if value is _Null else value


def samples(lines: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    """Every recorded answer that has a request and a count of its input. Repeats and edited recordings are left out."""
    for line in lines:
        usage, body = line.get("usage_norm") or {}, line["request"].get("body")
        tags = line.get("tags", ())
        if body is None or not usage.get("input_tokens") or line["id"] in EDITED:
            continue
        if "suspect_synthetic" in tags or "repeat_of_same_response" in tags:
            continue
        if line["request"].get("body_trimmed"):
            body = whole(body)
            if body is None:
                continue
            body = _nulls(body)
        model = line.get("model") or line.get("response_model") or ""
        request = Request(line["provider"], model, body=body, endpoint=line["endpoint_kind"])
        yield Sample(
            line["id"],
            re.split("[@#]", line["source"])[0],
            line["provider"],
            model,
            request,
            usage["input_tokens"],
            usage.get("output_tokens") or 0,
            not line["request"].get("body_trimmed"),
        )


def read(path: Path) -> list[Sample]:
    """All samples of a corpus file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(samples(map(json.loads, file)))


def fit_weights(rows: Sequence[Sample], towards: Sequence[float], pull: float = 0.5) -> list[float]:
    """Weights of 0 or more that meet the middle of `rows`; `pull`: what `towards` weighs, in source files."""
    size = len(FEATURES)
    bounds = [WEIGHTS[name] for name in FEATURES]
    weights = list(towards)
    copies = Counter(row.source for row in rows)
    data = [
        (
            [float(value) for value in row.request.features],
            float(max(1, row.input_tokens - row.request.token_ids)),
            1 / math.sqrt(copies[row.source]),
        )
        for row in rows
    ]
    for _ in range(25):
        matrix = [[0.0] * size for _ in range(size)]
        right = [0.0] * size
        for features, actual, share in data:
            expected = max(1e-9, sum(w * x for w, x in zip(weights, features, strict=True)))
            scale = math.sqrt(actual * expected)
            weight = share / max(abs(actual - expected) / scale, 0.03) / scale / scale
            used = [i for i in range(size) if features[i]]
            for i in used:
                term = weight * features[i]
                right[i] += term * actual
                for j in used:
                    matrix[i][j] += term * features[j]
        for i in range(size):
            strength = pull / max(towards[i], bounds[i][1] / 2) ** 2
            matrix[i][i] += strength
            right[i] += strength * towards[i]
        for _ in range(100):  # coordinate descent, no weight below 0
            for i in range(size):
                rest = right[i] - sum(matrix[i][j] * weights[j] for j in range(size))
                weights[i] = min(bounds[i][2], max(bounds[i][0], weights[i] + rest / matrix[i][i]))
    return weights


def widen(rows: Sequence[Sample], weights: Sequence[float], unseen: float = 0.0) -> Line:
    """The factor and margin that leave at most ALLOWED of `rows` above the estimate, at the least excess.

    `unseen` widens the factor of a family, which stands in for its product lines of which too little was seen.
    """
    base = Line(tuple(round(weight, 4) for weight in weights), 1.0, 0.0)
    pairs = [(base.expected(row.request), row.input_tokens) for row in rows]
    best: tuple[float, Line] | None = None
    sources = len({row.source for row in rows})
    least = 1.2 + 0.5 / math.sqrt(sources) + unseen  # few sources say little of the next one
    for step in range(41):
        factor = least + step * 0.025
        short = sorted((actual - factor * expected for expected, actual in pairs), reverse=True)
        margin = max(FLOOR + 200 / sources, short[math.floor(ALLOWED * len(short))] + 4)
        cost = sum(math.log((factor * expected + margin) / actual) for expected, actual in pairs if actual > 100)
        if best is None or cost < best[0]:
            best = (cost, Line(base.weights, round(factor, 3), math.ceil(margin)))
    assert best is not None
    return best[1]


def fit(rows: Sequence[Sample]) -> Priors:
    """Priors for every line with at least 8 answers of 3 source files, every family, and any model."""
    text = [row for row in rows if row.request.kind == "text"]
    families, lines = defaultdict(list), defaultdict(list)
    for row in text:
        families[row.request.family].append(row)
        lines[row.request.line].append(row)
    everything = fit_weights(text, [start for _, start, _ in map(WEIGHTS.__getitem__, FEATURES)])
    result = {"*": widen(text, everything)}
    for family, members in families.items():
        weights = fit_weights(members, everything)
        named = sorted({row.request.line for row in members} - {family})
        result[family] = widen(members, weights, 0.5 / len(named) if named else 0.0)
        for name in named:
            if len(lines[name]) >= 8 and len({row.source for row in lines[name]}) >= 3:
                result[name] = widen(lines[name], fit_weights(lines[name], weights))
    priors = Priors(result, {})
    for kind in ("server_tools", "stored", "session"):
        added = sorted(
            row.input_tokens - priors.line(row.request).expected(row.request)
            for row in rows
            if row.request.kind == kind
        )
        priors.additions[kind] = max(0, math.ceil(added[math.floor(0.95 * (len(added) - 1))])) if added else 0
    return priors


def error(rows: Sequence[Sample], priors: Priors) -> dict[str, float]:
    """Share of text answers above the cold estimate, and the median of estimate over actual above 500 tokens.

    `exceeded_by_source` gives each source file one vote, because near-copies share one.
    """
    ratios = []
    by_source: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        line = priors.line(row.request)
        estimate = line.factor * line.expected(row.request) + line.margin
        ratios.append((estimate / row.input_tokens, row.input_tokens))
        by_source[row.source].append(estimate < row.input_tokens)
    large = sorted(ratio for ratio, tokens in ratios if tokens > 500)
    return {
        "answers": len(ratios),
        "exceeded": round(sum(ratio < 1 for ratio, _ in ratios) / max(1, len(ratios)), 4),
        "exceeded_by_source": round(
            sum(sum(votes) / len(votes) for votes in by_source.values()) / max(1, len(by_source)), 4
        ),
        "median_above_500": round(large[len(large) // 2], 3) if large else 0.0,
    }


def part(source: str, split: int) -> int:
    """In which half of a split a source file lies."""
    return int(hashlib.sha256(f"{split}/{source}".encode()).hexdigest(), 16) % 2


def held_out(rows: Sequence[Sample], splits: int = 5) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Split, tested half and error, for priors fitted on the one half of the source files and tested on the other."""
    for split in range(splits):
        for tested in (0, 1):
            priors = fit([row for row in rows if part(row.source, split) != tested])
            text = [row for row in rows if row.request.kind == "text" and part(row.source, split) == tested]
            yield split, tested, error(text, priors)


def main(corpus: Path = CORPUS, out: Path = OUT) -> None:
    """Fit on the whole corpus and write the packaged file, with its error on these answers and on held-out ones."""
    if not corpus.exists():
        print(f"No recorded answers at {corpus}: {out.name} stays as it is. Give the file of responses as argument.")
        return
    rows = read(corpus)
    priors = fit(rows)
    text = [row for row in rows if row.request.kind == "text"]
    halves = [found for _, _, found in held_out(rows)]
    data = {
        "fitted_on": "recorded answers of pydantic-ai, openinference, openllmetry and opentelemetry-python-contrib",
        "date": datetime.now(UTC).date().isoformat(),
        "features": FEATURES,
        "error": error(text, priors),
        "error_held_out": {name: round(sum(half[name] for half in halves) / len(halves), 4) for name in halves[0]},
        "additions": priors.additions,
        "lines": {
            name: {"weights": line.weights, "factor": line.factor, "margin": line.margin}
            for name, line in sorted(priors.lines.items())
        },
    }
    lines = json.dumps(data, separators=(",", ": ")).replace('"lines": {', '"lines": {\n').replace("},", "},\n")
    out.write_text(lines + "\n", encoding="utf-8")
    print(f"{out}: {len(priors.lines)} lines; {data['error']}; held out: {data['error_held_out']}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
