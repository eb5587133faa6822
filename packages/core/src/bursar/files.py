"""Files: read with a bound, and looked at for what other users of the machine may do with them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_text(path: str | Path, max_bytes: int) -> str:
    """The text of a regular file. Raises OSError; ValueError for one that is larger, is not UTF-8, or cannot be a path."""
    # Whoever opens a pipe waits for its other end, and a device may have no end: neither may hold up a program.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        data = opened.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    return data.decode().replace("\r\n", "\n").replace("\r", "\n")


def open_to_all(path: str | Path) -> str:
    """What every user of this machine may do with a file: "", "read", "change", or "read and change"."""
    path = Path(path)
    try:
        mode, folder = path.stat().st_mode, path.absolute().parent.stat().st_mode
    except OSError:
        return ""
    if os.name != "posix":  # elsewhere the mode says nothing of it
        return ""
    # In a folder that all may write to, without the sticky bit, the file can be exchanged.
    change = bool(mode & stat.S_IWOTH or (folder & stat.S_IWOTH and not folder & stat.S_ISVTX))
    return " and ".join(word for word, may in (("read", mode & stat.S_IROTH), ("change", change)) if may)
