"""What a wrapped client adds to a call: against the plain client, in the same run, on SQLite that outlives the process."""

from __future__ import annotations

import tempfile
from typing import Any

import anthropic
import openai
from measure import at_most, in_turns, provider, table

from bursar import Budget, Bursar

LIMIT_US = 500.0
MESSAGES: Any = [{"role": "user", "content": "Say it in one word. " * 20}]


def chat(client: openai.OpenAI) -> None:
    client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_completion_tokens=100)


def streamed(client: openai.OpenAI) -> None:
    for _ in client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_completion_tokens=100, stream=True):
        continue


def message(client: anthropic.Anthropic) -> None:
    client.messages.create(model="claude-sonnet-4-6", messages=MESSAGES, max_tokens=100)


def main() -> None:
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        provider() as url,
        Bursar(f"sqlite:///{folder}/bench.db?durability=process", [Budget("ample", "1000 USD")]) as bursar,
    ):
        gpt = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        claude = anthropic.Anthropic(base_url=url, api_key="any")
        for name, work, plain in (
            ("OpenAI, chat", chat, gpt),
            ("OpenAI, chat, streamed (20 chunks)", streamed, gpt),
            ("Anthropic, message", message, claude),
        ):
            wrapped = bursar.wrap(plain)
            works = {"plain": lambda w=work, c=plain: w(c), "wrapped": lambda w=work, c=wrapped: w(c)}
            took_us = in_turns(works, 1, rounds=500)
            added_us = took_us["wrapped"] - took_us["plain"]
            rows.append(
                [
                    name,
                    f"{took_us['plain']:.0f}",
                    f"{took_us['wrapped']:.0f}",
                    f"{added_us:.0f}",
                    at_most(added_us, LIMIT_US, " us"),
                ]
            )
    table("What wrapping adds to a call, in microseconds", ["call", "plain", "wrapped", "added", "limit"], rows)


if __name__ == "__main__":
    main()
