"""What is not billed by tokens of text: images, speech, sound and searches, as far as it is known before the call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from bursar.usage import Usage

# The most that an image of the gpt-image models takes: high quality, 1024 x 1536.
# Source: platform.openai.com, "Image generation", cost and latency.
_IMAGE_TOKENS = 6_240
_SPEECH_TOKENS = 4  # of sound, for a character: $0.015 a minute are 21 tokens a second, and slow speech is 5 characters
_LEAST_BYTES_PER_SECOND = 500  # Opus speech at 6 kbit/s is 750
_MOST_BYTES = 25 * 2**20  # what OpenAI takes
_SEARCHED = 100  # documents of one search; Cohere, and those who sell its models, bill by the search
_BY_SEARCH = frozenset({"cohere", "azure_ai", "bedrock", "vertex_ai"})


def read_media(kind: str, request: Mapping[str, Any], sound: Any) -> dict[str, Any]:
    """Further arguments of `Bursar.reserve` for such a call. `request`: those known so far; `sound`: the upload, if any."""
    model, body = str(request["model"]), request["body"]
    if kind.startswith("image_"):
        if model.startswith("dall-e"):
            count = body.get("n")
            return {"usage": Usage(images=count if isinstance(count, int) and count > 0 else 1)}
        return {"max_output_tokens": _IMAGE_TOKENS}
    if kind == "speech":
        characters = spoken_characters(kind, body)
        if model.startswith("tts"):
            return {"usage": Usage(input_characters=characters)}
        return {"max_output_tokens": _SPEECH_TOKENS * characters}
    if kind == "transcription" and "whisper" in model:
        return {"usage": Usage(input_audio_ms=_sound_ms(sound))}
    if kind == "rerank" and request["provider"] in _BY_SEARCH:
        documents = body.get("documents")
        count = len(documents) if isinstance(documents, (list, tuple)) else 1
        return {"usage": Usage(search_units=max(1, -(-count // _SEARCHED)))}
    return {}


def spoken_characters(kind: str, body: Mapping[str, Any]) -> int:
    """The length of the text of a call for speech."""
    text = body.get("input")
    return len(text) if kind == "speech" and isinstance(text, str) else 0


def _sound_ms(upload: Any) -> int:
    """The most milliseconds of sound that an upload can hold: exact for WAV, else by the lowest bit rate of speech."""
    content = upload[1] if isinstance(upload, tuple) else upload
    try:
        if isinstance(content, (str, os.PathLike)):
            with open(content, "rb") as file:
                head, size = file.read(44), os.fstat(file.fileno()).st_size
        elif isinstance(content, (bytes, bytearray)):
            head, size = bytes(content[:44]), len(content)
        else:
            start = content.tell()
            head = content.read(44)
            size = content.seek(0, 2) - start
            content.seek(start)
    except (AttributeError, OSError, ValueError):
        head, size = b"", _MOST_BYTES  # a pipe, or no file: it is sent all the same, and the provider limits it
    rate = _LEAST_BYTES_PER_SECOND
    if head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt ":
        rate = max(rate, int.from_bytes(head[28:32], "little"))
    return -(-size * 1_000 // rate)
