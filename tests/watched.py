"""Servers as child processes that end with whoever started them, even where that was killed."""

from __future__ import annotations

import atexit
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

# Whoever waits for the pipe to close ends the server, even where this process was killed.
_WATCHED = 'exec 3<&0; how=$1; shift; "$@" & server=$!; (read -r closed <&3; kill -$how $server) & wait $server'


def start(command: Sequence[str], log: Path, *, how: str = "KILL", user: str | None = None) -> subprocess.Popen[bytes]:
    """Run the command, as that user; `communicate` of what is returned ends it by the signal `how`, and waits for its end."""
    with log.open("ab") as said:
        watch = ["sh", "-c", _WATCHED, "sh", how, *command]
        return subprocess.Popen(watch, stdin=subprocess.PIPE, stdout=said, stderr=said, user=user, group=user)


def free_port() -> int:
    """A port that is free, and whose neighbour 10,000 above, a Redis cluster's bus, may be."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55_000:
            return port


class Server:
    """A server in a folder of its own, which may be killed and started again; it ends with the tests at the latest."""

    folder: Path
    process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start it, with what it has on its disk, and wait until it answers."""
        raise NotImplementedError

    def kill(self) -> None:
        """As a crash ends it: nothing is written any more."""
        self.process.communicate()

    def stop(self) -> None:
        """End it for good."""
        atexit.unregister(self.stop)
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
