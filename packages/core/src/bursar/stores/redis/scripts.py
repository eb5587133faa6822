"""The scripts that run on the server, as they are sent to it."""

from __future__ import annotations

import hashlib
from importlib.resources import files


class Script:
    """A script's text, and the digest by which the server knows it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _text(*names: str) -> str:
    folder = files(__package__)
    return "\n".join(folder.joinpath(f"{name}.lua").read_text("utf-8") for name in names)


_WHOLE = _text("numbers", "accounts", "rows", "reserve", "ends", "draw", "law")
LAW = Script(
    f"local P, now, now_text, version = KEYS[1], nil, nil, nil\n{_text('fast')}\n"
    f"local function whole()\n{_WHOLE}\nend\n{_text('main')}"
)
PUBLISH = Script(_text("publish"))
SHARE = Script(_text("share"))
CLAIM = Script(_text("claim"))
DRAINED = Script(_text("drained"))
RETIRE = Script(_text("retire"))
