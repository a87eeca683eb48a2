"""
The other ends of a benchmark: a mail server that throws everything away, and a long line.

    python -m benchmarks.servers sink PORT
    python -m benchmarks.servers line PORT TARGET_PORT ROUND_TRIP_MS
"""

from __future__ import annotations

import asyncio
import os
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

HOST = '127.0.0.1'


class _Sink(asyncio.Protocol):
    """
    As little as a server can do that offers PIPELINING: it answers, and remembers nothing.

    :param on_message: called when a message is complete
    """

    def __init__(self, on_message: Callable[[], object] = lambda: None):
        self.on_message = on_message

    def connection_made(self, transport):
        self.transport = transport
        self.buffer = b''
        self.in_data = False
        transport.write(b'220 sink.example ESMTP\r\n')

    def data_received(self, data):
        self.buffer += data
        replies = []
        while True:
            if self.in_data:
                end = self.buffer.find(b'\r\n.\r\n')
                if end < 0:
                    # All but what may be the beginning of the end.
                    self.buffer = self.buffer[-4:]
                    break
                self.buffer = self.buffer[end + 5 :]
                self.in_data = False
                self.on_message()
                replies.append(b'250 2.0.0 Ok\r\n')
                continue
            line, found, rest = self.buffer.partition(b'\r\n')
            if not found:
                break
            self.buffer = rest
            replies.append(self.reply_to(line[:4].upper()))
        if replies:
            self.transport.write(b''.join(replies))

    def reply_to(self, verb):
        if verb == b'EHLO':
            return b'250-sink.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n'
        if verb == b'DATA':
            self.in_data = True
            return b'354 End data with <CR><LF>.<CR><LF>\r\n'
        return b'221 2.0.0 Bye\r\n' if verb == b'QUIT' else b'250 2.0.0 Ok\r\n'


async def _serve_sink(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Sink, HOST, port, backlog=200)
    await server.serve_forever()


async def _serve_line(port: int, target: int, round_trip: float) -> None:
    """Forward each piece after half a round trip; how many bytes are on the way is not limited."""

    async def carry(reader, writer):
        pieces: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def deliver():
            while (piece := await pieces.get())[1]:
                await asyncio.sleep(max(0, piece[0] - loop.time()))
                writer.write(piece[1])
            writer.close()

        delivery = asyncio.create_task(deliver())
        while data := await reader.read(65536):
            pieces.put_nowait((loop.time() + round_trip / 2, data))
        pieces.put_nowait((0, b''))
        await delivery

    async def connected(reader, writer):
        # A connection costs a round trip before its first byte.
        await asyncio.sleep(round_trip)
        up_reader, up_writer = await asyncio.open_connection(HOST, target)
        await asyncio.gather(carry(reader, up_writer), carry(up_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(connected, HOST, port, backlog=200)
    await server.serve_forever()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def _process(command: list[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection((HOST, port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _postfix_sink() -> str | None:
    # Where it is, who is not root need not have in the PATH.
    return shutil.which('smtp-sink', path=f'{os.environ.get("PATH", os.defpath)}:/usr/sbin:/usr/lib/postfix/sbin')


def sink_name() -> str:
    return "Postfix's smtp-sink" if _postfix_sink() else 'a sink in Python'


def sink():
    """A running sink; its port.  Postfix's smtp-sink where it is installed, else the one above."""
    port = free_port()
    postfix = _postfix_sink()
    if postfix:
        # Root has to say whom it is to become.
        user = ['-u', 'nobody'] if os.geteuid() == 0 else []
        return _process([postfix, *user, f'{HOST}:{port}', '200'], port)
    return _process([sys.executable, '-m', 'benchmarks.servers', 'sink', str(port)], port)


@contextmanager
def watched_sink() -> Iterator[tuple[int, list[float]]]:
    """A running sink in a thread of this process; its port, and when each message was complete (time.monotonic())."""
    arrivals: list[float] = []
    with _thread(partial(_Sink, lambda: arrivals.append(time.monotonic()))) as port:
        yield port, arrivals


@contextmanager
def _thread(protocol: Callable[[], asyncio.Protocol]) -> Iterator[int]:
    """Serve *protocol* in a thread of this process; the port."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(protocol, HOST, 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


def long_line(target: int, round_trip_ms: float = 20):
    """A running line to the port *target*; its own port."""
    port = free_port()
    command = [sys.executable, '-m', 'benchmarks.servers', 'line', str(port), str(target), str(round_trip_ms)]
    return _process(command, port)


class _Counter(asyncio.Protocol):
    """Answers each *size* octets by one."""

    def __init__(self, size: int):
        self.size = self.missing = size

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.missing -= len(data)
        if self.missing <= 0:
            self.missing += self.size
            self.transport.write(b'x')


def measured_round_trip(size: int, turns: int = 50, round_trip_ms: float = 20) -> float:
    """The seconds that *size* octets and one octet back take over a line as above, by bare sockets: the median."""

    def ask() -> float:
        start = time.perf_counter()
        near_end.sendall(b'x' * size)
        near_end.recv(1)
        return time.perf_counter() - start

    with (
        _thread(partial(_Counter, size)) as far_end,
        long_line(far_end, round_trip_ms) as port,
        socket.create_connection((HOST, port)) as near_end,
    ):
        near_end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return statistics.median(ask() for _ in range(turns))


def main() -> None:
    what, port, *rest = sys.argv[1:]
    if what == 'sink':
        asyncio.run(_serve_sink(int(port)))
    else:
        # epoll() waits in whole milliseconds, rounded up: each way would be too long by up to one.
        loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        loop.run_until_complete(_serve_line(int(port), int(rest[0]), float(rest[1]) / 1000))


if __name__ == '__main__':
    main()
