"""HTTP by hand, for clients that do what no library would: leave in the middle of a request, or hardly read."""

import asyncio
import json
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Head:
    """Of an answer."""

    status: int
    content_length: int | None  # None: it comes in chunks


class RawConnection:
    """One connection, for one request. It asks the server to close it afterwards."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, path: str) -> None:
        self.reader = reader
        self._writer = writer
        self._host = host
        self._path = path

    @classmethod
    async def open(cls, url: str, receive_buffer_bytes: int | None = None) -> Self:
        """url: with the path. receive_buffer_bytes: of the socket, and about as much of the reader; None: as usual."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        plain = socket.socket()
        if receive_buffer_bytes is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)  # before it connects
        plain.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(plain, (parts.hostname, parts.port))
        except BaseException:
            plain.close()
            raise
        reader, writer = await asyncio.open_connection(sock=plain, limit=receive_buffer_bytes or 2**16)
        return cls(reader, writer, parts.netloc, parts.path)

    async def send(self, body: dict[str, Any], part: float = 1.0) -> None:
        """A POST of JSON, or only so much of it."""
        content = json.dumps(body).encode()
        fields = f"host: {self._host}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        message = f"POST {self._path} HTTP/1.1\r\n{fields}\r\nconnection: close\r\n\r\n".encode() + content
        self._writer.write(message[: max(1, int(len(message) * part))])
        await self._writer.drain()

    async def read_head(self) -> Head:
        """Raises:
        ConnectionError: there is none.
        """
        try:
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.IncompleteReadError:
            raise ConnectionError("closed without an answer") from None
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        length = fields.get("content-length")
        return Head(int(lines[0].split()[1]), None if length is None else int(length))

    async def read_rest(self) -> bytes:
        """Up to the end of the connection; a body in chunks with their heads between."""
        return await self.reader.read()

    def pause(self) -> None:
        """Read no more: what comes stays in the kernel's buffers, and then on the other side."""
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a socket's transport

    def resume(self) -> None:
        self._writer.transport.resume_reading()  # type: ignore[attr-defined]

    async def close(self, *, with_reset: bool = False) -> None:
        if with_reset:
            plain: socket.socket = self._writer.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()
