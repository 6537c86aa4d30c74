"""A proxy in front of an HTTP server that fails on purpose: what a network and a loaded store do to a client.

Requests pass unchanged, Host included, because AWS signatures cover it. Each connection carries one request.
"""

import asyncio
import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "status",  # read the request, answer `status` with the XML code `code`
    "hang",  # read the request, never answer
    "slow",  # wait `delay` seconds, then pass it on
    "cut",  # pass on half of the answer's body, then close
    "reset",  # reset the connection before an answer
    "reset_upload",  # pass on half of the request's body, then reset both sides
    "lose_answer",  # pass the request on, let the server do it, reset instead of answering
    "corrupt_upload",  # pass the request on with one bit of its body turned over
]


@dataclass
class Fault:
    """Strikes requests of `method` whose path matches `path`, `count` times or until `until` (time.monotonic)."""

    kind: Kind
    method: str = ""
    path: str = ""
    count: float = float("inf")
    until: float = float("inf")
    status: int = 503
    code: str = "SlowDown"
    delay: float = 0.0
    struck: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if self.struck >= self.count or time.monotonic() > self.until:
            return False
        if (self.method and method != self.method) or not re.search(self.path, path):
            return False
        self.struck += 1
        return True


@dataclass
class FaultyProxy:
    """Runs in a thread of its own.

    `requests` holds (method, path) of all that came, in order; `answers` (method, path, status) of those that the
    server answered in full.
    """

    upstream_port: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    answers: list[tuple[str, str, int]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, kind: Kind, **how: object) -> Fault:
        """From now on; `seconds=` is short for until now + seconds."""
        seconds = how.pop("seconds", None)
        fault = Fault(kind, **how)  # type: ignore[arg-type]
        if seconds is not None:
            fault.until = time.monotonic() + seconds
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        self.faults.clear()

    def count(self, method: str, path: str) -> int:
        return sum(1 for had_method, had_path in self.requests if had_method == method and re.search(path, had_path))

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Nobody listens on the port for the time of the block."""
        self._call(self._close())
        try:
            yield
        finally:
            self._call(self._listen())

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._listen())

    def stop(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, path = head.split(b" ", 2)[:2]
            self.requests.append((method.decode(), path.decode()))
            fault = next((one for one in self.faults if one.strikes(method.decode(), path.decode())), Fault("slow"))
            head = _one_request(head)
            length = int(_header(head, b"content-length") or 0)
            if fault.kind == "slow":
                await asyncio.sleep(fault.delay)
            if fault.kind in ("status", "reset_upload") and _header(head, b"expect"):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if fault.kind in ("status", "hang", "reset"):
                if fault.kind != "reset":
                    await reader.readexactly(length)
                if fault.kind == "status":
                    writer.write(_answer(fault, method))
                    await writer.drain()
                elif fault.kind == "hang":
                    await reader.read(1)  # until the client gives up
                else:
                    _reset(writer)
                return
            from_server, upstream = await asyncio.open_connection("127.0.0.1", self.upstream_port)
            upstream.write(head)
            sending = asyncio.ensure_future(_send_body(reader, upstream, length, fault))
            if fault.kind == "reset_upload":
                await sending
                _reset(upstream)
                _reset(writer)
                return
            status = await _send_answer(from_server, writer, method, fault)
            await sending
            self.answers.append((method.decode(), path.decode(), status))
        except (ConnectionError, asyncio.IncompleteReadError, OSError):
            pass  # one of the two sides went away: the other one learns it
        finally:
            for side in (writer, upstream):
                if side is not None:
                    side.close()


def _one_request(head: bytes) -> bytes:
    """The same request on a connection that ends with its answer."""
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n"


def _header(head: bytes, name: bytes) -> bytes:
    found = re.search(rb"\r\n" + name + rb":[ \t]*([^\r]*)\r\n", head, re.IGNORECASE)
    return found[1] if found else b""


def _answer(fault: Fault, method: bytes) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>on purpose</Message></Error>".encode()
    head = f"HTTP/1.1 {fault.status} On Purpose\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + (b"" if method == b"HEAD" else body)


async def _send_body(reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, length: int, fault: Fault) -> None:
    wanted = length // 2 if fault.kind == "reset_upload" else length
    flip = fault.kind == "corrupt_upload"
    while wanted > 0:
        data = await reader.read(min(wanted, 1 << 16))
        if not data:
            return
        if flip:
            data, flip = bytes([data[0] ^ 1]) + data[1:], False
        wanted -= len(data)
        upstream.write(data)
        await upstream.drain()


async def _send_answer(
    from_server: asyncio.StreamReader, writer: asyncio.StreamWriter, method: bytes, fault: Fault
) -> int:
    """The status of the answer, once it is passed on."""
    head = await from_server.readuntil(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        writer.write(head)
        head = await from_server.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if fault.kind == "lose_answer":
        await from_server.read()
        _reset(writer)
        return status
    writer.write(head)
    wanted = float("inf")
    if fault.kind == "cut" and method != b"HEAD":
        wanted = int(_header(head, b"content-length") or 0) // 2
    while wanted > 0 and (data := await from_server.read(int(min(wanted, 1 << 16)))):
        wanted -= len(data)
        writer.write(data)
        await writer.drain()
    return status


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def faulty_proxy(upstream_port: int) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(upstream_port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
