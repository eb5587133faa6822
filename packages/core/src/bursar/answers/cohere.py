"""Cohere's chat, embed, rerank and classify, versions 1 and 2."""

from __future__ import annotations

from bursar.answers.counts import Json, Keywords, count, part, reported, tidy, word
from bursar.answers.tally import Tally


class Cohere(Tally):
    """Only `billed_units` are billed; `tokens` counts the template too, and stands in where no bill is told.

    `cached_tokens` is a part of `tokens`, and has no price of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.usage: Json = {}

    @staticmethod
    def claims(data: Json) -> bool:
        if data.get("type") in ("message-start", "message-end") or data.get("event_type") in (
            "stream-start",
            "stream-end",
        ):
            return True
        for name in ("usage", "meta"):
            value = data.get(name)
            if isinstance(value, dict) and ("billed_units" in value or isinstance(value.get("tokens"), dict)):
                return True
        return False

    def feed(self, data: Json) -> None:
        self.note(model=word(data.get("model")))
        for place in (data, part(data, "delta"), part(data, "response")):
            usage = part(place, "usage", "meta")
            billed = part(usage, "billed_units") or part(usage, "tokens")
            if reported(billed):
                self.usage, self.final = billed, True

    def counts(self) -> Keywords | None:
        if not reported(self.usage):
            return None
        seen = count(self.usage.get("image_tokens"))
        return self.facts | tidy(
            {
                "input_tokens": count(self.usage.get("input_tokens")) + seen,
                "output_tokens": count(self.usage.get("output_tokens")),
                "input_image_tokens": seen,
                "search_units": count(self.usage.get("search_units")),
                "images": count(self.usage.get("images")),
            }
        )
