"""Ollama's chat, generate and embed. A prompt that was cached whole is not counted by it."""

from __future__ import annotations

from bursar.answers.counts import Json, Keywords, count, word
from bursar.answers.tally import Tally


class Ollama(Tally):
    """The last line of a stream has the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.words: Keywords = {}

    @staticmethod
    def claims(data: Json) -> bool:
        return any(name in data for name in ("prompt_eval_count", "eval_count")) or (
            "done" in data and "created_at" in data
        )

    def feed(self, data: Json) -> None:
        self.note(model=word(data.get("model")))
        words = {"input_tokens": count(data.get("prompt_eval_count")), "output_tokens": count(data.get("eval_count"))}
        if any(words.values()):
            self.words, self.final = words, True

    def counts(self) -> Keywords | None:
        return self.facts | self.words if self.words else None
