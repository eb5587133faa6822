"""A Router whose dear model runs out of budget and whose cheap one goes on, until that is spent too.

Run it offline against scripted answers, or with your own key: python examples/litellm/litellm_fallback.py [--live]
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from litellm import Router

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider
from bursar_litellm import install


def main(live: bool) -> None:
    logging.disable()  # LiteLLM logs every error before it raises it
    with nullcontext() if live else Provider(Answer(input_tokens=1_000, output_tokens=500)) as provider:
        settings: dict[str, Any] = {}
        if provider is not None:
            settings = {"api_base": f"{provider.url}/v1", "api_key": "replayed"}
        models = [
            {"model_name": name, "litellm_params": {"model": f"openai/{model}", **settings}}
            for name, model in (("best", "gpt-4o"), ("small", "gpt-4o-mini"))
        ]
        router = Router(models, fallbacks=[{"best": ["small"]}])
        budgets = [
            Budget("all", limit="0.02 USD"),
            Budget("best", limit="0.01 USD", match={"model": "gpt-4o"}),
        ]
        with Bursar("sqlite:///example.db", budgets=budgets) as bursar:
            uninstall = install(bursar, agent="writer")
            ask = [{"role": "user", "content": "Write a sentence about budgets. " * 60}]
            try:
                for turn in range(100):
                    answer = router.completion("best", ask, max_tokens=500)
                    print(f"call {turn + 1}: {answer.model}")
            except BudgetExceeded as refused:
                print(refused)
            uninstall()
            for status in bursar.status():
                print(f"{status.name}: {status.spent} of {status.limit} {status.unit}")


if __name__ == "__main__":
    main("--live" in sys.argv[1:])
