"""A TCP proxy between trainer and server that can be told to misbehave."""

import asyncio
import threading


class Proxy:
    """Forwards to `port`. `mode` may change at any time: forward, cut, freeze (half-open: nothing passes, nothing is
    closed), slow, corrupt (one byte of each large chunk towards the server is flipped)."""

    def __init__(self, port: int):
        self.target, self.mode, self.corrupted = port, "forward", 0
        self.loop, self.ready = asyncio.new_event_loop(), threading.Event()
        self.writers: set[asyncio.StreamWriter] = set()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.ready.wait(10)
        self.address = f"127.0.0.1:{self.port}"

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._listen())
        self.loop.run_forever()

    async def _listen(self):
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.ready.set()

    async def _accept(self, reader, writer):
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return writer.close()
        self.writers |= {writer, there_writer}
        await asyncio.gather(
            self._pump(reader, there_writer, towards_server=True),
            self._pump(there_reader, writer, towards_server=False),
            return_exceptions=True,
        )
        self.writers -= {writer, there_writer}

    async def _pump(self, reader, writer, *, towards_server: bool):
        try:
            while data := await reader.read(65536):
                while self.mode == "freeze":
                    await asyncio.sleep(0.02)
                if self.mode == "slow":
                    await asyncio.sleep(0.2)
                if self.mode == "corrupt" and towards_server and len(data) > 2000:
                    data = data[:1500] + bytes([data[1500] ^ 0xFF]) + data[1501:]
                    self.corrupted += 1
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    def cut(self):
        """Closes every connection; new ones are served again."""
        self.loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in self.writers])

    def close(self):
        self.mode = "forward"
        self.cut()
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)

    async def _end(self):
        self.server.close()
        pumps = asyncio.all_tasks() - {asyncio.current_task()}
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
