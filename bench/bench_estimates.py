"""Prints how well calls are estimated on recorded answers: `python bench/bench_estimates.py [CORPUS FOLDER]`.

Strict: requests and refusals per class, and how many were billed more than their bound. Learned: fitted on one part of
the source files and tested on the other, cold and from the second call of linked runs on. The corpus (`responses.jsonl.gz`
and `runs.jsonl.gz`) is not part of the repository; without one it says so and prints the speed alone.
"""

from __future__ import annotations

import gzip
import json
import sys
import timeit
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from fit_priors import EDITED, Sample, error, fit, held_out, part, read  # noqa: E402  (a tool, not a package)

from bursar import Usage  # noqa: E402
from bursar.errors import BursarError, UnboundedEstimate  # noqa: E402
from bursar.estimate import Learner, Request, strict  # noqa: E402
from bursar.estimate.priors import Priors, packaged  # noqa: E402
from bursar.prices import PriceBook  # noqa: E402

AT_US = 1_795_348_800_000_000  # 2026-11-22T12:00Z
CLASSES = ("text", "media", "stored", "server_tools", "generated", "session", "routed")


def limits(book: PriceBook, sample: Sample) -> tuple[int | None, int | None]:
    """The model's context window and largest output from the price table; None where it knows none."""
    try:
        model = book.find(sample.provider, sample.model, at_us=AT_US)
    except BursarError:
        return None, None
    return model.context_window, model.max_output_tokens


def print_strict(rows: Iterable[Sample], book: PriceBook) -> None:
    """Per class: how many requests were admitted, refused, and billed above their bound."""
    seen, admitted, above = Counter[str](), Counter[str](), Counter[str]()
    no_output = Counter[str]()
    ratios: dict[str, list[float]] = defaultdict(list)
    exceeded = []
    for row in rows:
        kind = row.request.kind
        window, most = limits(book, row)
        seen[kind] += 1
        try:
            bound = strict(row.request, context_window=window, max_output_tokens=most)
        except UnboundedEstimate as refused:
            if "maximum output" not in refused.reason and "no maximum is known" not in refused.reason:
                continue
            no_output[kind] += 1  # the input is bounded, but neither the request nor the table limits the output
            try:
                bound = strict(row.request, context_window=window, max_output_tokens=row.output_tokens)
            except UnboundedEstimate:
                no_output[kind] -= 1  # neither is its input
                continue
        admitted[kind] += 1
        ratios[kind].append(bound.input_tokens / row.input_tokens)
        if row.input_tokens > bound.input_tokens or row.output_tokens > bound.output_tokens:
            above[kind] += 1
            exceeded.append((row, bound))
    print("\nStrict: the bound against the bill")
    print(
        f"{'class':<14}{'requests':>9}{'admitted':>9}{'refused':>9}{'no maximum':>12}{'exceeded':>10}{'bound/actual, median':>22}"
    )
    for kind in CLASSES:
        if seen[kind]:
            share = 1 - admitted[kind] / seen[kind]
            middle = f"{median(ratios[kind]):.2f}" if ratios[kind] else "-"
            print(
                f"{kind:<14}{seen[kind]:>9}{admitted[kind]:>9}{share:>9.1%}{no_output[kind]:>12}{above[kind]:>10}{middle:>22}"
            )
    print(
        "no maximum: among the admitted, those whose input is bounded, but whose output neither the request nor the price\n"
        "table (which does not know the model) limits: strict asks for a maximum"
    )
    for row, bound in exceeded:
        print(f"  exceeded: {row.id} {row.provider} {row.model}: {row.input_tokens}+{row.output_tokens}, {bound}")
    for identity, reason in EDITED.items():
        print(f"  left out: {identity}: {reason}")


def print_cold(rows: Sequence[Sample]) -> None:
    """The packaged priors, and priors fitted on one part of the source files and tested on the other."""
    text = [row for row in rows if row.request.kind == "text"]
    print("\nLearned, cold: from the priors alone, text requests (wanted: at most 2 % exceeded, median at most 1.5)")
    print(f"{'fitted on':<22}{'tested on':<22}{'answers':>9}{'exceeded':>10}{'by source':>11}{'median above 500':>18}")
    print_error("all", "all (packaged)", error(text, packaged()))
    total = Counter[str]()
    for split, tested, found in held_out(rows):
        print_error(f"half {1 - tested} of split {split}", f"half {tested}", found)
        total["answers"] += int(found["answers"])
        total["exceeded"] += round(found["exceeded"] * found["answers"])
    print(f"all splits: {total['exceeded'] / total['answers']:.2%} exceeded")


def print_error(fitted: str, tested: str, found: dict[str, float]) -> None:
    print(
        f"{fitted:<22}{tested:<22}{found['answers']:>9}{found['exceeded']:>10.2%}{found['exceeded_by_source']:>11.2%}{found['median_above_500']:>18.2f}"
    )


def print_runs(rows: Sequence[Sample], runs: Sequence[dict[str, Any]]) -> None:
    """From the second call of each linked run on, with priors fitted on the other part of the source files."""
    print("\nLearned, within linked runs, from the second call on (wanted: at most 0.5 % exceeded, median at most 1.3)")
    by_id = {row.id: row for row in rows}
    ratios: list[float] = []
    for split in range(2):
        for tested in (0, 1):
            priors = fit([row for row in rows if part(row.source, split) != tested])
            for run in runs:
                if run["linked"] == "chain" and part(run["source"].split("@")[0].split("#")[0], split) == tested:
                    ratios += follow(run, by_id, priors)
    print(
        f"{len(ratios)} estimates in 2 splits: {sum(r < 1 for r in ratios) / max(1, len(ratios)):.2%} exceeded, "
        f"median {median(ratios):.2f}"
    )


def follow(run: dict[str, Any], by_id: dict[str, Sample], priors: Priors) -> list[float]:
    """Estimate over actual for each call of a run but the first, the learner being told every settled call."""
    learner = Learner(priors)
    ratios: list[float] = []
    calls = [by_id[step["id"]] for step in run["steps"] if step["id"] in by_id and not step.get("aux")]
    for number, row in enumerate(calls):
        if number and row.request.kind == "text":
            bound = learner.estimate(row.request, run="run", max_output_tokens=1_000_000)
            ratios.append(bound.input_tokens / row.input_tokens)
        learner.observe(row.request, Usage(input_tokens=row.input_tokens, output_tokens=row.output_tokens), run="run")
    return ratios


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def print_speed() -> None:
    """What measuring a request and estimating it cost, in microseconds."""
    sentence = "The quick brown fox jumps over the lazy dog, and then some more words follow it.\n"
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"tool_{i}",
                "description": sentence * 2,
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
        for i in range(3)
    ]

    def body(messages: int, size: int) -> dict[str, Any]:
        text = (sentence * (size // len(sentence) + 1))[:size]
        return {
            "model": "gpt-4o",
            "messages": [{"role": "user", "content": text} for _ in range(messages)],
            "tools": tools,
            "max_tokens": 500,
        }

    print(f"\n{'speed':<44}{'us':>8}")
    for name, value in (
        ("measure 5 kB, 8 messages, 3 tools", body(8, 450)),
        ("measure 200 kB, 60 messages", body(60, 3_400)),
    ):
        print(f"{name:<44}{microseconds(lambda value=value: Request('openai', 'gpt-4o', body=value)):>8.1f}")
    request, learner = Request("openai", "gpt-4o", body=body(8, 450)), Learner()
    print(f"{'strict':<44}{microseconds(lambda: strict(request)):>8.1f}")
    print(f"{'learned, cold':<44}{microseconds(lambda: learner.estimate(request)):>8.1f}")
    for _ in range(64):
        learner.observe(request, Usage(input_tokens=1_100, output_tokens=90), run="r")
    print(f"{'learned, after 64 calls':<44}{microseconds(lambda: learner.estimate(request)):>8.1f}")
    print(f"{'learned, within a run':<44}{microseconds(lambda: learner.estimate(request, run='r')):>8.1f}")


def microseconds(call: Any) -> float:
    return min(timeit.repeat(call, number=50, repeat=9)) / 50 * 1e6


def main(folder: Path) -> None:
    """Print all tables."""
    file = folder / "responses.jsonl.gz"
    if file.exists():
        rows = read(file)
        print(f"{len(rows)} recorded answers with a request and a count, from {file}")
        print_strict(rows, PriceBook.packaged())
        print_cold(rows)
        if (folder / "runs.jsonl.gz").exists():
            with gzip.open(folder / "runs.jsonl.gz", "rt", encoding="utf-8") as lines:
                print_runs(rows, list(map(json.loads, lines)))
    else:
        print(
            f"No corpus at {folder}: the tables of estimates against bills are left out. Give its folder as argument."
        )
    print_speed()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "corpus")
