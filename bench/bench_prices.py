"""What it takes to price one usage: Bursar against genai-prices and a bare product of two integers, in the same run.

Run: `python bench/bench_prices.py`. genai-prices is the peer; without it, its row says so.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

from bursar.prices import PriceBook
from bursar.usage import Usage

AT = datetime(2026, 11, 22, 12, tzinfo=UTC)
AT_US = (AT - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
ROUNDS, CALLS = 15, 4000
CASES = {
    "text": ("openai", "gpt-4o", {"input_tokens": 1000, "output_tokens": 500}),
    "cached and reasoning": (
        "openai",
        "gpt-5",
        {"input_tokens": 9000, "output_tokens": 700, "cache_read_tokens": 8000, "reasoning_tokens": 500},
    ),
    "cache writes": (
        "anthropic",
        "claude-sonnet-4-6",
        {"input_tokens": 9000, "output_tokens": 700, "cache_read_tokens": 4000, "cache_write_5m_tokens": 4000},
    ),
    "context tier": ("google", "gemini-2.5-pro", {"input_tokens": 250_000, "output_tokens": 700}),
}


def medians_us(works: list[tuple[Callable[[], object], int]]) -> list[float]:
    """The medians over rounds of the time of one call, in microseconds; every round takes all works in turn."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for (work, calls), taken in zip(works, times, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                work()
            taken.append((time.perf_counter() - start) / calls * 1e6)
    return [statistics.median(taken) for taken in times]


def peer(provider: str, model: str, counts: dict[str, int]) -> Callable[[], object] | None:
    """The same calculation by genai-prices."""
    try:
        from genai_prices import calc_price
        from genai_prices import types as peer_types
    except ImportError:
        return None
    renamed = {
        name.replace("reasoning_tokens", "output_reasoning_tokens").replace("cache_write_5m", "cache_write"): count
        for name, count in counts.items()
    }
    usage = peer_types.Usage(**renamed)
    return lambda: calc_price(usage, model_ref=model, provider_id=provider, genai_request_timestamp=AT)


def main() -> None:
    """Print one row per case."""
    started = time.perf_counter()
    book = PriceBook.packaged()
    loaded_ms = (time.perf_counter() - started) * 1e3
    gc.disable()
    a, b, c, d = 1000, 2500, 500, 10_000
    [floor] = medians_us([(lambda: a * b + c * d, CALLS)])
    print(f"prices {book.version}: read in {loaded_ms:.1f} ms; floor (two products) {floor:.2f} us\n")
    print(
        f"{'one usage priced, median us':28} {'model.cost_nanos':>16} {'book.cost':>10} {'genai-prices':>13} {'times':>7}"
    )
    for name, (provider, model, counts) in CASES.items():
        usage = Usage(**counts)  # type: ignore[arg-type]  # counts are integers by name
        alone = partial(book.find(provider, model, AT_US).cost_nanos, usage)
        whole = partial(book.cost, provider, model, usage, at_us=AT_US)
        other = peer(provider, model, counts)
        ours, booked, *theirs = medians_us([(alone, CALLS), (whole, CALLS), *([(other, CALLS // 20)] if other else [])])
        compared = f"{theirs[0]:13.1f} {theirs[0] / booked:6.1f}x" if theirs else f"{'not installed':>13}"
        print(f"{name:28} {ours:16.2f} {booked:10.2f} {compared}")


if __name__ == "__main__":
    main()
