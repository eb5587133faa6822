"""Pictures, sound, films and documents in a request: what is known of each, and the most tokens it can be billed."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HEADER_BYTES = 262_144  # a JPEG's size stands behind its metadata, which seldom passes this
_MIN_AUDIO_BYTES_PER_SECOND = 500  # Opus speech at 6 kbit/s is 750
_AUDIO_TOKENS_PER_SECOND = (
    32  # Gemini's published rate, the highest of those that publish one (OpenAI 10, Mistral 12.5)
)


@dataclass(frozen=True, slots=True)
class Media:
    """One item. `kind`: image, audio, video or document; `size`: bytes, 0 for a link; pixels, 0 where unknown."""

    kind: str
    size: int = 0
    width: int = 0
    height: int = 0
    detail: str = ""


def read_media(node: Mapping[str, Any], kind: str) -> Media:
    """Describe the item in `node`, a content part of any wire format. Nothing is fetched: a link has size 0."""
    data, mime, detail = _payload(node, 0)
    kind = _kind(kind, mime)
    raw = data if isinstance(data, bytes) else b""
    size = len(raw)
    if isinstance(data, str) and data:
        size = len(data) * 3 // 4
        if kind == "image":
            raw = _decode(data[:_HEADER_BYTES])
    width, height = picture_size(raw) if kind == "image" and raw else (0, 0)
    return Media(kind, size, width, height, detail)


def _payload(node: Mapping[str, Any], depth: int) -> tuple[str | bytes, str, str]:
    """The bytes (base64 or raw) that the item carries, its MIME type and its detail; empty where it is a link."""
    data: str | bytes = ""
    mime = detail = ""
    for key, value in node.items():
        if isinstance(value, str):
            if value.startswith("data:"):
                head, _, data = value.partition(",")
                mime = mime or head[5:].partition(";")[0]
            elif key in ("mime_type", "mimeType", "media_type", "format", "filename"):
                mime = mime or value
            elif key == "detail":
                detail = value
            elif key in ("data", "base64", "bytes", "file_data") and "://" not in value[:16]:
                data = value
        elif isinstance(value, (bytes, bytearray)):
            data = bytes(value)
        elif isinstance(value, Mapping) and depth < 3:
            inner, inner_mime, inner_detail = _payload(value, depth + 1)
            data, mime, detail = data or inner, mime or inner_mime, detail or inner_detail
    return data, mime, detail


def _kind(name: str, mime: str) -> str:
    for kind in ("image", "audio", "video"):
        if mime.startswith(kind) or kind in name:
            return kind
    if mime in ("png", "jpeg", "jpg", "gif", "webp"):
        return "image"
    return "audio" if mime in ("wav", "mp3", "ogg", "flac", "pcm16") else "document"


def _decode(text: str) -> bytes:
    text = text[: len(text) // 4 * 4]
    try:
        return base64.b64decode(text, altchars=b"-_") if "-" in text or "_" in text else base64.b64decode(text)
    except (binascii.Error, ValueError):
        return b""  # not base64: the size stays unknown, and the published maximum counts


def picture_size(raw: bytes) -> tuple[int, int]:
    """Width and height in pixels from the header of a PNG, JPEG, GIF or WebP; (0, 0) where it cannot be told."""
    try:
        if raw[:8] == b"\x89PNG\r\n\x1a\n":
            return struct.unpack(">II", raw[16:24])
        if raw[:4] == b"GIF8":
            return struct.unpack("<HH", raw[6:10])
        if raw[:4] == b"RIFF" and raw[8:15] == b"WEBPVP8":
            return _webp_size(raw)
        if raw[:2] == b"\xff\xd8":
            return _jpeg_size(raw)
    except (struct.error, IndexError):
        return 0, 0  # cut off: as good as unknown
    return 0, 0


def _webp_size(raw: bytes) -> tuple[int, int]:
    if raw[15:16] == b"X":
        return int.from_bytes(raw[24:27], "little") + 1, int.from_bytes(raw[27:30], "little") + 1
    if raw[15:16] == b"L":
        bits = int.from_bytes(raw[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", raw[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _jpeg_size(raw: bytes) -> tuple[int, int]:
    at = 2
    while at + 9 < len(raw):
        marker = raw[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", raw[at + 5 : at + 9])
            return width, height
        at += 2 + int(struct.unpack(">H", raw[at + 2 : at + 4])[0])
    return 0, 0


def bound_tokens(item: Media, family: str, model: str) -> int | None:
    """The most tokens that one item can be billed, or None where only the context window bounds it (films, documents,
    links to sound).

    Sources: OpenAI, "Images and vision" (tiles of 512, patches of 32); Anthropic, "Vision" (width x height / 750,
    1,568 pixels on the long edge, 2,576 from Opus 4.7 on); Google, "Understand tokens" (258 a tile; Gemini 3: 2,240 at
    the highest resolution; 32 a second of sound); xAI, "Image understanding" (tiles of 256).
    """
    if item.kind == "image":
        return _image_bound(item, family, model)
    if item.kind == "audio" and item.size:
        return -(-item.size // _MIN_AUDIO_BYTES_PER_SECOND) * _AUDIO_TOKENS_PER_SECOND + 64
    return None


def _image_bound(item: Media, family: str, model: str) -> int:
    pixels = item.width * item.height
    if family == "claude":
        return min(math.ceil(pixels / 750) + 64, 4_864) if pixels else 4_864
    if family == "gemini":
        if "gemini-3" in model:
            return 2_304
        tiles = math.ceil(item.width / 256) * math.ceil(item.height / 256) + 1 if pixels else 36
        return 258 * max(2, min(tiles, 36)) if "embed" not in model else 258 * 36
    if family == "gpt":
        return _gpt_image_bound(item, model)
    if family == "grok":
        return 2_048
    if family == "mistral":
        return 4_352
    return 16_384  # Qwen-VL's maximum, the highest that an open model publishes


_GPT_NAMES = ("gpt-", "chatgpt-", "o1", "o3", "o4", "codex", "computer-use")


def _gpt_image_bound(item: Media, model: str) -> int:
    model = model.rsplit("/", 1)[-1].removeprefix("ft:")
    if "gpt-4o-mini" in model or not model.startswith(_GPT_NAMES):
        base, tile = 2_833, 5_667  # also of a deployment whose name does not say its model: the dearest of all
    elif "gpt-4.1-mini" in model or "gpt-4.1-nano" in model or "o4-mini" in model:
        return 3_840  # at most 1,536 patches, at most 2.46 tokens each
    elif model.startswith(("gpt-4", "chatgpt-4o", "o1", "o3")) or model in ("gpt-5", "gpt-5-chat-latest"):
        base, tile = 85, 170
    else:  # patch models; `original` detail allows 10,000 patches, smaller models pay up to 2.46 tokens each
        patches = math.ceil(item.width / 32) * math.ceil(item.height / 32) if item.width else 10_000
        return math.ceil(min(max(patches, 1), 10_000) * 2.46) + 320
    # 2,048 on the long edge, then 768 on the short one: at most 2 x 4 tiles.
    return base if item.detail == "low" else base + 8 * tile


def guess_tokens(item: Media, family: str, model: str) -> int:
    """What such an item usually costs: where no size is known, a middling one. The learner corrects it."""
    if item.kind == "image":
        bound = _image_bound(item, family, model)
        if "gpt-4o-mini" in model:
            return min(bound, 2_833 + 4 * 5_667)
        if family == "gemini":
            return 1_100 if "gemini-3" in model else min(bound, 1_806)
        if item.width:
            return min(bound, math.ceil(item.width * item.height / 750) + 100)
        return min(bound, 1_600)
    if item.kind == "audio":
        return -(-item.size // 4_000) * _AUDIO_TOKENS_PER_SECOND if item.size else 2_000
    if item.kind == "video":
        return 300 * max(1, item.size // 100_000) if item.size else 18_000
    return 3_000 * max(1, item.size // 30_000) if item.size else 6_000
