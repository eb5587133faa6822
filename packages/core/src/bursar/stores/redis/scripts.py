"""The scripts that run on the server, as they are sent to it."""

from __future__ import annotations

import hashlib
from importlib.resources import files


class Script:
    """A script's text, and the digest by which the server knows it."""

    def __init__(self, *names: str, head: str = "") -> None:
        folder = files(__package__)
        self.text = head + "\n".join(folder.joinpath(f"{name}.lua").read_text("utf-8") for name in names)
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


LAW = Script(
    "numbers", "accounts", "rows", "reserve", "ends", "law", head="local P, now, version = KEYS[1], nil, nil\n"
)
PUBLISH = Script("publish")
SHARE = Script("share")
CLAIM = Script("claim")
