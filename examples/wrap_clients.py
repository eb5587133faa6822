"""One budget over the plain clients of OpenAI and Anthropic: nothing changes in the calls.

Run it offline against a local provider, or with your own keys: python examples/wrap_clients.py [--live]
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

from anthropic import Anthropic
from openai import OpenAI

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider


def main(live: bool) -> None:
    with (
        nullcontext() if live else Provider(Answer(input_tokens=1_000, output_tokens=500)) as provider,
        Bursar("sqlite:///example.db", budgets=[Budget("per-run", limit="0.05 USD", per="run")]) as bursar,
    ):
        url = None if provider is None else provider.url
        key = None if provider is None else "local"
        openai = bursar.wrap(OpenAI(base_url=url and f"{url}/v1", api_key=key))
        anthropic = bursar.wrap(Anthropic(base_url=url, api_key=key))
        with bursar.scope(agent="debate", run=f"debate-{bursar.store.now_us()}") as scope:
            words = "Is a haiku about money still a haiku?"
            try:
                while True:
                    answer = openai.chat.completions.create(
                        model="gpt-4o-mini", max_completion_tokens=500, messages=[{"role": "user", "content": words}]
                    )
                    words = answer.choices[0].message.content or ""
                    with anthropic.messages.stream(
                        model="claude-sonnet-4-6", max_tokens=500, messages=[{"role": "user", "content": words}]
                    ) as stream:
                        words = stream.get_final_text()
            except BudgetExceeded as refused:
                print(refused)
            for record in bursar.records(run=scope.tags["run"]):
                print(f"{record.tags['model']}: {record.cost_usd} USD, {record.outcome}")


if __name__ == "__main__":
    main("--live" in sys.argv[1:])
