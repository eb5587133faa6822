"""What the ladder's tests share, whatever they call through: models, each with a cheaper one, and what they cost."""

from __future__ import annotations

from typing import Any

from bursar.testing.provider import Rates

HI: Any = [{"role": "user", "content": "hi"}]
RATES = {
    "gpt-4o": Rates(input_nanos=2_500, output_nanos=10_000),
    "gpt-4o-mini": Rates(input_nanos=150, output_nanos=600),
    "claude-sonnet-4-5": Rates(input_nanos=3_000, output_nanos=15_000),
    "claude-sonnet-4-6": Rates(input_nanos=3_000, output_nanos=15_000),
    "claude-haiku-4-5": Rates(input_nanos=1_000, output_nanos=5_000),
    "text-embedding-3-large": Rates(input_nanos=130, output_nanos=0),
    "text-embedding-3-small": Rates(input_nanos=20, output_nanos=0),
}
CHEAPER = {
    "gpt-4o": "gpt-4o-mini",
    "claude-sonnet-4-5": "claude-haiku-4-5",
    "claude-sonnet-4-6": "claude-haiku-4-5",
    "text-embedding-3-large": "text-embedding-3-small",
}
