"""An agent loop on the plain OpenAI client, stopped at its budget.

Run it offline against recorded answers, or with your own key: python examples/plain_openai.py [--live]
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

from openai import OpenAI

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider


def main(live: bool) -> None:
    bursar = Bursar("sqlite:///example.db", budgets=[Budget("per-run", limit="0.05 USD", per="run")])
    with nullcontext() if live else Provider(Answer(input_tokens=1_000, output_tokens=500)) as provider:
        client = OpenAI() if provider is None else OpenAI(base_url=f"{provider.url}/v1", api_key="replayed")
        messages = [{"role": "user", "content": "Write a haiku about money, then improve it for ever."}]
        with bursar, bursar.scope(agent="poet", run=f"poet-{bursar.store.now_us()}") as scope:
            try:
                while True:
                    with bursar.call("openai", "gpt-4o-mini", messages=messages, max_output_tokens=500) as call:
                        answer = client.chat.completions.create(
                            model=call.model, max_completion_tokens=call.max_output_tokens, messages=messages
                        )
                        record = call.settle(answer)
                    print(f"{record.cost_usd} USD")
                    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                    messages.append({"role": "user", "content": "Improve it."})
            except BudgetExceeded as refused:
                print(refused)
            for status in bursar.status(run=scope.tags["run"]):
                print(f"{status.name}: {status.spent} of {status.limit} {status.unit}")


if __name__ == "__main__":
    main("--live" in sys.argv[1:])
