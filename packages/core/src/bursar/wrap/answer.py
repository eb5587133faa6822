"""One answer on its way to the caller: its bytes pass by, its usage is read, and its end settles the reservation."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from bursar.answers import StreamReader
from bursar.answers.plain import parse
from bursar.ending import Ending, settled, unknown
from bursar.errors import UnreadableAnswer
from bursar.reservation import Reservation
from bursar.wrap.doors import Visit

MAX_HELD_BYTES = 64 * 2**20  # of one event, or of a body that is read piece by piece
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
# Pieces of text, which are most of a stream and tell nothing of its usage, are not parsed: those whose name says so, and
# OpenAI's chunks without any of what a chunk can tell.
_PIECE = re.compile(rb"event: ?(?:content_block_(?:start|delta|stop)|ping|[a-z_.]+\.delta)[\r\n]")
_TOOL = b'"server_tool_use"'  # of the blocks that begin, those alone are counted
_CHUNK = b'"chat.completion.chunk"'
_TELLING = re.compile(rb'"(?:usage"\s*:\s*\{|error"|x_groq"|executed_tools"|usage_breakdown")')
_NO_USAGE = b',"usage":null'  # what each chunk says before the one that tells it, where the usage was asked for
# The last event of a stream, after which nothing more is billed.
_LAST = frozenset(
    {
        "message_stop",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.cancelled",
        "speech.audio.done",
        "transcript.text.done",
        "image_generation.completed",
        "image_edit.completed",
    }
)

SILENT = unknown("the answer does not say what it costs")


class Answer:
    """Reads what passes by, and says how the call ends. This one reads nothing; see `answer_of` for those that do.

    `keep`, where given, takes the id of a response that goes on at the provider when nobody reads it any more.
    """

    def __init__(
        self, reservation: Reservation, visit: Visit, response: Any, keep: Callable[[str], None] | None = None
    ) -> None:
        self.reservation = reservation
        self.complete = False  # its last event is there
        self.is_reading = False  # its reader is at work, not waiting for the caller to ask for more
        self.has_ended = False  # how it ends has been asked
        self._headers = response.headers
        self._visit = visit
        self._keep = keep
        self._is_kept = self._is_read = self._is_lost = self._is_done = False
        self._reader = StreamReader(visit.provider)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; what of them the caller may see."""
        return data

    def finish(self) -> bytes:
        """The body is at its end: what of it was still held back."""
        self._is_read = True
        return b""

    def _hold(self, data: bytes) -> bytes:
        """Keep it until more is there; what was kept is given back where it is too much, and nothing more is read then."""
        self._held += data
        if len(self._held) <= MAX_HELD_BYTES:
            return b""
        left, self._held, self._is_lost = self._held, b"", True
        return left

    # -- the end -------------------------------------------------------------------------------------------------

    def ending(self) -> Ending | None:
        """How the reservation ends, asked once; None when it has ended already, or waits for another to read the answer."""
        if self.has_ended:
            return None
        self.has_ended = True
        try:
            usage = self._reader.usage()
            partial = self._reader.partial() if usage is None else None
        except UnreadableAnswer as error:
            return unknown(str(error))
        usage = usage or (partial if self._is_done else None) or self._visit.known
        if usage is not None:
            return settled(usage, headers=self._headers)
        if self._is_kept and not self.complete:
            return None
        if self._visit.is_silent:
            return SILENT
        stopped = self.reservation.stopped
        if self.complete or self._is_read:
            reason = "the answer says nothing of its usage"
        else:
            reason = f"stopped in mid-stream ({stopped.cause})" if stopped else "the answer was not read to its end"
        return unknown(reason, partial)

    def end_now(self) -> None:
        """End the reservation in this thread."""
        ending = self.ending()
        if ending is not None:
            ending.end(self.reservation)

    async def aend(self) -> None:
        """As `end_now`, for async callers."""
        ending = self.ending()
        if ending is not None:
            await ending.aend(self.reservation)


class _Whole(Answer):
    """A body that is no stream, read when all of it is there."""

    def feed(self, data: bytes) -> bytes:
        if not self._is_lost:
            self._hold(data)
        return data

    def finish(self) -> bytes:
        self._reader.feed(self._held)
        self._held = b""
        return super().finish()


class _Events(Answer):
    """Server-sent events. Source: WHATWG HTML, 9.2.6."""

    _chunk = b""  # the first that was passed over

    def finish(self) -> bytes:
        left, self._held = self._held, b""
        super().finish()
        return left if self._visit.hides_usage else b""

    def feed(self, data: bytes) -> bytes:
        if self._is_lost:
            return data
        if not self._held and 0 < data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:  # one, as most reads bring
            is_shown = self._event(data)
            if not self._visit.hides_usage:
                return data
            return data.replace(_NO_USAGE, b"") if is_shown else b""
        passed = self._hold(data)
        start = 0
        shown: list[bytes] = [passed]
        for end in _EVENT_END.finditer(self._held):
            event = self._held[start : end.end()]
            start = end.end()
            if self._event(event):
                shown.append(event)
        self._held = self._held[start:]
        return b"".join(shown).replace(_NO_USAGE, b"") if self._visit.hides_usage else data

    def _event(self, event: bytes) -> bool:
        """Read one event; False for the one that the caller did not ask for."""
        if _CHUNK in event:
            if not _TELLING.search(event):
                self._chunk = self._chunk or event
                return True
        elif self._reader.events and _PIECE.match(event) and _TOOL not in event:
            return True
        text = _data(event)
        if text == "[DONE]":  # whatever was told last is the bill
            self.complete = self._is_done = True
            return True
        if not text.startswith(("{", "[")):
            return True
        try:
            data = parse(text)
        except UnreadableAnswer:
            return True  # the client says so itself; the call then ends without its usage
        if self._chunk and not self._reader.events and not _repeats(event, self._chunk):
            self._reader.feed(_data(self._chunk))
        self._reader.feed(data)
        if not isinstance(data, dict):
            return True
        begun = data.get("response") if self._keep is not None and not self._is_kept else None
        if isinstance(begun, dict) and isinstance(begun.get("id"), str):
            assert self._keep is not None
            self._keep(begun["id"])
            self._is_kept = True
        self.complete = self.complete or data.get("type") in _LAST
        return not (self._visit.hides_usage and data.get("usage") and data.get("choices") == [])


class _Frames(Answer):
    """AWS event streams: lengths of frame and headers, a checksum, headers, payload, a checksum.

    Source: Amazon Transcribe developer guide, "Event stream encoding", which all AWS services share.
    """

    def feed(self, data: bytes) -> bytes:
        if self._is_lost:
            return data
        self._hold(data)
        while len(self._held) >= 12:
            size, headers = struct.unpack(">II", self._held[:8])
            if size < 16 or len(self._held) < size:
                break
            payload = self._held[12 + headers : size - 4]
            self._held = self._held[size:]
            text = payload.decode("utf-8", "replace")
            self._reader.feed(f'{{"chunk": {text}}}' if '"bytes"' in text else text)
        return data


def answer_of(
    reservation: Reservation, visit: Visit, response: Any, keep: Callable[[str], None] | None = None
) -> Answer:
    """The reader of this response, by what it says of its body."""
    kind = response.headers.get("content-type", "")
    reader = next((reader for name, reader in _READERS if name in kind), Answer)
    return reader(reservation, visit, response, keep)


_READERS = (("amazon.eventstream", _Frames), ("event-stream", _Events), ("json", _Whole))


def _repeats(event: bytes, chunk: bytes) -> bool:
    """Whether an event names all that a chunk which tells nothing may be read for: which model answered, in which tier."""
    return b'"model"' in event and (b'"service_tier"' in event or b'"service_tier"' not in chunk)


def _data(event: bytes) -> str:
    """The text of a server-sent event's data."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).decode("utf-8", "replace").strip()
