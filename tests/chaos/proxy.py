"""A network that fails: a TCP proxy on the loopback whose connections are cut, stall, lose answers, or go on without a far end."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable

import watched


class Link:
    """One connection through the proxy, with its two sides."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near, self.far = near, far
        self.flows = asyncio.Event()
        self.flows.set()
        self.deaf: set[asyncio.StreamWriter] = set()  # what is on its way to these is lost

    def cut(self) -> None:
        self.near.transport.abort()
        self.far.transport.abort()


class Proxy:
    """Listens on `port`, and passes on to `target`. The faults may be called from any thread."""

    def __init__(self, target: int, seed: int) -> None:
        self.port = watched.free_port()
        self._target = target
        self._random = random.Random(seed)
        self._links: set[Link] = set()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(target=self._run, args=(started,), daemon=True, name="chaos-proxy").start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            await asyncio.start_server(self._pass, "127.0.0.1", self.port)
            started.set()

        self._loop.create_task(serve())
        self._loop.run_forever()

    async def _pass(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            near.transport.abort()
            return
        link = Link(near, far)
        self._links.add(link)
        try:
            await asyncio.wait(
                [
                    asyncio.create_task(self._pump(reader, far, link)),
                    asyncio.create_task(self._pump(far_reader, near, link)),
                ]
            )
        finally:
            self._links.discard(link)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, link: Link) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                await link.flows.wait()
                if sink not in link.deaf:
                    sink.write(data)
                    await sink.drain()
        if not link.deaf:
            await link.flows.wait()
            link.cut()

    def _some(self, fault: Callable[[Link], None]) -> None:
        """Do that to each connection with a chance of a half."""

        def do() -> None:
            for link in list(self._links):
                if self._random.random() < 0.5:
                    fault(link)

        self._loop.call_soon_threadsafe(do)

    def cut(self) -> None:
        """Reset connections."""
        self._some(Link.cut)

    def stall(self, seconds: float) -> None:
        """Nothing passes for so long, either way; then everything that waited does."""

        def fault(link: Link) -> None:
            link.flows.clear()
            self._loop.call_later(seconds, link.flows.set)

        self._some(fault)

    def lose_answers(self, seconds: float) -> None:
        """What is asked arrives, and no answer comes back; after that time the connection is reset."""

        def fault(link: Link) -> None:
            link.deaf.add(link.near)
            self._loop.call_later(seconds, link.cut)

        self._some(fault)

    def half_open(self, seconds: float) -> None:
        """The far end is gone, and the near end is not told before that time."""

        def fault(link: Link) -> None:
            link.deaf |= {link.near, link.far}
            link.far.transport.abort()
            self._loop.call_later(seconds, link.cut)

        self._some(fault)

    def heal(self) -> None:
        """Reset whatever is still disturbed."""

        def do() -> None:
            for link in list(self._links):
                if link.deaf or not link.flows.is_set():
                    link.flows.set()
                    link.cut()

        self._loop.call_soon_threadsafe(do)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
