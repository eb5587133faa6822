"""The stores of a chaos run, each on a small disk that can be filled, and what can be done to their servers."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import redis_server

SIZE_MB = 3_000
_POSTGRES = {"max_connections": "200", "shared_buffers": "64MB", "max_wal_size": "256MB", "checkpoint_timeout": "30s"}


class Disk:
    """A small disk of its own in memory. Without the right to mount one it is a plain folder, which nobody fills."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="bursar-chaos-"))
        self.path.chmod(0o777)
        self.is_small = os.geteuid() == 0 and self._mount(f"size={SIZE_MB}m,mode=777").returncode == 0
        atexit.register(self.close)

    def _mount(self, options: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "chaos", str(self.path)], capture_output=True)

    def fill(self) -> None:
        """Make it as small as what it holds."""
        found = os.statvfs(self.path)
        used = max(1, found.f_blocks - found.f_bfree)  # a size of 0 would be no limit
        self._mount(f"remount,size={used * found.f_bsize}")

    def free(self) -> None:
        """Make it as large as it was."""
        if self.is_small:
            self._mount(f"remount,size={SIZE_MB}m").check_returncode()

    def close(self) -> None:
        atexit.unregister(self.close)
        if self.is_small:
            subprocess.run(["umount", str(self.path)], check=True)
        shutil.rmtree(self.path, ignore_errors=True)


class Server:
    """The server of one kind of store, on that disk; `sqlite` has none."""

    def __init__(self, kind: str, disk: Disk) -> None:
        from postgres_server import Running as Postgres

        self.kind = kind
        self._disk = disk
        self._running: Postgres | redis_server.Running | None = None
        if kind == "postgres":
            self._running = Postgres(disk.path, **_POSTGRES)
        elif kind == "redis":
            self._running = redis_server.Running(disk.path)

    @property
    def port(self) -> int:
        """0 where there is no server."""
        return 0 if self._running is None else self._running.port

    def url(self, port: int, *, leased: bool) -> str:
        """The store's URL, its server being reached through that port."""
        if self._running is None:
            return f"sqlite:///{self._disk.path}/budgets.db"
        url = self._running.url.replace(f":{self.port}", f":{port}")
        folder = self._disk.path / "journals"
        folder.mkdir(exist_ok=True)
        return f"{url}?leases={folder}&durability=process" if leased else url

    @property
    def journals(self) -> Path:
        return self._disk.path / "journals"

    def restart(self) -> None:
        """As after a crash, whether it was still running or not."""
        if self._running is not None:
            self._running.kill()
            self._running.start()

    def is_running(self) -> bool:
        return self._running is None or self._running.process.poll() is None

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()
