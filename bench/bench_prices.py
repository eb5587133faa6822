"""What it takes to price one usage: Bursar against genai-prices and a bare product of two integers, in the same run.

Run: `python bench/bench_prices.py`. genai-prices is the peer; without it, its row says so.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

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


def median_us(work: Callable[[], object], calls: int) -> float:
    """The median over rounds of the time of one call, in microseconds."""
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


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
    floor = median_us(lambda: a * b + c * d, CALLS)
    print(f"prices {book.version}: read in {loaded_ms:.1f} ms; floor (two products) {floor:.2f} us\n")
    print(
        f"{'one usage priced, median us':28} {'model.cost_nanos':>16} {'book.cost':>10} {'genai-prices':>13} {'times':>7}"
    )
    for name, (provider, model, counts) in CASES.items():
        usage = Usage(**counts)  # type: ignore[arg-type]  # counts are integers by name
        found = book.find(provider, model, AT_US)
        alone = median_us(lambda found=found, usage=usage: found.cost_nanos(usage), CALLS)  # type: ignore[misc]
        whole = median_us(
            lambda provider=provider, model=model, usage=usage: book.cost(provider, model, usage, at_us=AT_US),  # type: ignore[misc]
            CALLS,
        )
        other = peer(provider, model, counts)
        theirs = median_us(other, CALLS // 20) if other else None
        ratio = f"{theirs / whole:6.1f}x" if theirs else "-"
        print(f"{name:28} {alone:16.2f} {whole:10.2f} {theirs if theirs else 0:13.1f} {ratio:>7}")
    if other is None:
        print("\ngenai-prices is not installed: its column is empty.")


if __name__ == "__main__":
    main()
