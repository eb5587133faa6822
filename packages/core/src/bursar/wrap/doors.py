"""The doors of a provider's API: which paths are billed and guarded, which are free, and which nothing bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from bursar.answers.counts import OBJECT
from bursar.call import CallOptions
from bursar.errors import InvalidInput, UnboundedEstimate
from bursar.reservation import Reservation
from bursar.usage import Usage

# A guarded path -> the names under which its request may hold the maximum output, that of new models first.
_GUARDED: dict[str, tuple[str, ...]] = {
    "chat/completions": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "responses/compact": (),
    "messages": ("max_tokens",),
    "complete": ("max_tokens_to_sample",),
    "embeddings": (),
    "images/generations": (),
    "images/edits": (),
    "images/variations": (),
    "audio/speech": (),
    "audio/transcriptions": (),
    "audio/translations": (),
}
_FREE = re.compile(
    r"moderations|models(/.*)?|files(/.*)?|uploads(/.*)?|conversations(/.*)?|chat/completions/[^/]+"
    r"|messages/count_tokens|responses/input_tokens|responses/[^/]+/cancel|tokenize"
    r"|messages/batches/[^/]+/cancel|batches/[^/]+/cancel|fine_tuning/jobs/[^/]+/(cancel|pause)"
)
_ANSWER = re.compile(r"responses/([^/]+)(/cancel)?")
# The beginning of a path -> why nothing bounds what it will cost.
_UNBOUNDED = {
    "batches": "a batch is billed when it runs, up to a day after this call",
    "messages/batches": "a batch is billed when it runs, up to a day after this call",
    "fine_tuning": "a training is billed by the job, after this call",
    "realtime": "a session is billed for as long as it lasts, and each answer bills the whole conversation again",
    "live": "a session is billed for as long as it lasts, and each answer bills the whole conversation again",
    "threads": "a run calls the model as often as it likes",
    "agents": "an agent on the provider's side calls the model as often as it likes",
    "sessions": "an agent on the provider's side calls the model as often as it likes",
    "evals": "a run calls the model once for every row of its data",
    "videos": "a film is billed by the second, when it is made",
    "vector_stores": "storage is billed by the day, for as long as it is kept",
    "containers": "a container is billed for as long as it lives",
}
_PREFIX = re.compile(r"^(openai/)?(v\d+(beta|alpha)?(beta\d*)?/)?(deployments/[^/]+/)?")
# Whose streams tell their usage unasked, or whose API refuses the field that asks for it.
_USAGE_UNASKED = frozenset({"mistral", "perplexity"})
_NAMES_LATEST = frozenset({"openai", "azure"})  # the others took over max_tokens alone
# The most that an image of the gpt-image models takes (high quality, 1024 x 1536), and each partial image of a stream.
# Source: platform.openai.com, "Image generation", cost and latency.
_IMAGE_TOKENS, _PARTIAL_IMAGE_TOKENS = 6_240, 100
_LEAST_BYTES_PER_SECOND = 500  # Opus speech at 6 kbit/s is 750
_MOST_BYTES = 100 * 2**20  # OpenAI takes 25 MB, Groq 100 MB
_SPEECH_TOKENS = 4  # of sound, for a character: $0.015 a minute are 21 tokens a second, and slow speech is 5 characters


@dataclass(slots=True)
class Visit:
    """One billed request: what to reserve for it, and what to send.

    `body` is the request as it goes out, a copy; `limit` the name of its maximum output, "" where it has none;
    `hides_usage`: the stream's usage was switched on here, and the chunk that tells it is kept from the caller;
    `known`: what is billed where the answer does not say so; `is_silent`: nobody says what is billed;
    `is_background`: the response may go on after its answer.
    """

    provider: str
    model: str
    body: dict[str, Any]
    said: CallOptions
    limit: str = ""
    hides_usage: bool = False
    known: Usage | None = None
    is_silent: bool = False
    is_background: bool = False

    @classmethod
    def of_background(cls, provider: str) -> Visit:
        """The retrieval of a response that was reserved for when it was begun."""
        return cls(provider, "", {}, {}, is_background=True)

    def write(self, options: Any, reservation: Reservation) -> None:
        """Put the body into the SDK's options, with what the reservation covers."""
        if reservation.capped and self.limit:
            self.body[self.limit] = reservation.max_output_tokens
        if reservation.model != self.model:
            self.body["model"] = reservation.model
        options.json_data = self.body
        if getattr(options, "extra_json", None) is not None:
            options.extra_json = None  # it is in the body


@lru_cache(maxsize=1_024)
def path_of(url: str, base_url: str = "") -> str:
    """The path of a request without the base URL's own part, version, deployment and query: `chat/completions`."""
    if "://" in url:
        url = url.removeprefix(base_url)
    return _PREFIX.sub("", urlsplit(url).path.strip("/"))


def answer_id(path: str) -> str | None:
    """The id of the stored response that a path retrieves or cancels."""
    found = _ANSWER.fullmatch(path)
    return found[1] if found else None


def is_free(method: str, path: str) -> bool:
    """Whether no provider bills it: all that only reads or deletes, counts, files, moderation, cancelling."""
    return method in ("get", "delete", "head", "options") or _FREE.fullmatch(path) is not None


def visit(path: str, provider: str, body: Any, files: Any, retries: int) -> Visit:
    """What to reserve and send for a billed request. Raises UnboundedEstimate for a door that cannot be guarded."""
    if path not in _GUARDED:
        reason = next((why for start, why in _UNBOUNDED.items() if f"{path}/".startswith(f"{start}/")), None)
        raise _refused(path, provider, reason or "Bursar does not know what this endpoint bills")
    if not isinstance(body, OBJECT):
        raise _refused(path, provider, "its body is no JSON object that could be measured")
    model = body.get("model") or ("dall-e-2" if path.startswith("images/") else "")  # the default of the images API
    if not isinstance(model, str) or not model:
        raise InvalidInput(
            f"The request to {path} names no model, so its price is not known. Set `model`.", argument="model"
        )
    made = Visit(provider, model, dict(body), {"body": body, "retries": retries, "endpoint": path})
    names = _GUARDED[path]
    if names:
        latest = provider in _NAMES_LATEST or len(names) == 1
        made.limit = next((name for name in names if body.get(name) is not None), names[0] if latest else names[-1])
    else:
        made.said["resize"] = False  # nothing in the request could enforce a smaller answer
        # Another model's vectors could not be compared with those that are there.
        made.said["changeable"] = () if path == "embeddings" else ("model",)
    if path.startswith("images/"):
        _images(made)
    elif path == "audio/speech":
        _speech(made)
    elif path.startswith("audio/"):
        _transcription(made, path, files)
    made.is_background = path == "responses" and body.get("background") is True
    if body.get("stream") is True and path.endswith("completions") and provider not in _USAGE_UNASKED:
        options = body.get("stream_options")
        options = options if isinstance(options, Mapping) else {}
        if "include_usage" not in options:
            made.body["stream_options"] = {**options, "include_usage": True}
            made.hides_usage = True
    return made


def _images(made: Visit) -> None:
    """Priced by the image (dall-e), or by tokens of which the provider publishes the most."""
    n = made.body.get("n")
    count = n if isinstance(n, int) and n > 0 else 1
    if made.model.startswith("dall-e"):
        made.said["usage"] = Usage(images=count)
        return
    partial = made.body.get("partial_images")
    extra = _PARTIAL_IMAGE_TOKENS * partial if isinstance(partial, int) else 0
    made.said["max_output_tokens"] = _IMAGE_TOKENS + extra


def _speech(made: Visit) -> None:
    """Priced by the text's characters (tts), or by tokens of sound of which the answer says nothing."""
    text = made.body.get("input")
    characters = len(text) if isinstance(text, str) else 0
    if made.model.startswith("tts"):
        made.said["usage"] = made.known = Usage(input_characters=characters)
    else:
        made.said["max_output_tokens"] = _SPEECH_TOKENS * characters
        made.is_silent = made.body.get("stream_format") != "sse"


def _transcription(made: Visit, path: str, files: Any) -> None:
    """Whisper is priced by the second; the others by tokens. Both say what they bill in answers that are JSON."""
    form = made.body.get("response_format")
    if form in ("text", "srt", "vtt"):
        raise _refused(
            path,
            made.provider,
            f'an answer as "{form}" does not say how long the sound was',
            remedy='Use response_format="json" or "verbose_json".',
        )
    if "whisper" in made.model:
        made.said["usage"] = Usage(input_audio_ms=sound_ms(files))


def sound_ms(files: Any) -> int:
    """The most milliseconds of sound that an upload can hold: exact for WAV, else by the lowest bit rate of speech."""
    entries = list(files.values()) if isinstance(files, Mapping) else [entry[1] for entry in files or ()]
    most = 0
    for entry in entries:
        content = entry[1] if isinstance(entry, tuple) else entry
        size, head = _size(content)
        rate = _LEAST_BYTES_PER_SECOND
        if head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt ":
            rate = max(rate, int.from_bytes(head[28:32], "little"))
        most = max(most, -(-size * 1_000 // rate))
    return most


def _size(content: Any) -> tuple[int, bytes]:
    """The bytes of an upload, and its first ones; the largest that providers take where it cannot be told."""
    if isinstance(content, bytes | bytearray):
        return len(content), bytes(content[:44])
    try:
        start = content.tell()
        head = content.read(44)
        size = content.seek(0, 2) - start
        content.seek(start)
    except (AttributeError, OSError, ValueError):
        return _MOST_BYTES, b""  # a pipe, or no file: it is sent all the same, and the provider limits it
    return size, head


def _refused(path: str, provider: str, reason: str, *, remedy: str = "") -> UnboundedEstimate:
    remedy = remedy or (
        "Call it on the client that is not wrapped, and book what it cost with "
        'bursar.charge("0.25 USD", tags={"model": ...}).'
    )
    return UnboundedEstimate(
        f"{path} of {provider} is not guarded: {reason}. {remedy}",
        reason=reason,
        provider=provider,
        model="",
        path=path,
    )
