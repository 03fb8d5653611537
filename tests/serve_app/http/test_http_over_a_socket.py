"""The application behind a real server: what a socket adds is that clients close it, or send more than is read."""

import asyncio
import json
import socket

import httpx
import pytest
import uvicorn

from engine.request import FinishReason, RequestOutput
from loadtest.raw_http import RawConnection
from serve_app.admission import Admitted
from serve_app.output_buffer import OutputBuffer
from serve_app.token_stream import RequestStream
from tests.serve_app.http.fakes import LIMIT_S, FakeAdmitter, app_over, says

PATH = "/v1/completions"


def over_a_socket(admitter, work, send_buffer_bytes=None):
    async def main():
        server = uvicorn.Server(uvicorn.Config(app_over(admitter), host="127.0.0.1", port=0, log_level="error"))
        serving = asyncio.ensure_future(server.serve())
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            [listening] = server.servers[0].sockets
            port = listening.getsockname()[1]
            if send_buffer_bytes is not None:  # connections take it over; else the kernel gives them megabytes
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
                await work(client)
        finally:
            server.should_exit = True
            await serving

    asyncio.run(main())


async def freed(admitter):
    async with asyncio.timeout(LIMIT_S):
        while not all(stream.num_aborts for stream in admitter.streams):
            await asyncio.sleep(0.01)


def test_closed_stream_is_aborted():
    admitter = FakeAdmitter([[*says("abc", end=None), 60.0]])

    async def work(client):
        async with client.stream("POST", PATH, json={"prompt": "x", "n": 2, "stream": True}) as response:
            assert response.status_code == 200
            await anext(response.aiter_lines())
        await freed(admitter)

    over_a_socket(admitter, work)


def test_closed_request_is_aborted():
    admitter = FakeAdmitter([[*says("abc", end=None), 60.0]])

    async def work(client):
        asking = asyncio.ensure_future(client.post(PATH, json={"prompt": "x", "n": 2}))
        async with asyncio.timeout(LIMIT_S):
            while len(admitter.streams) < 2:
                await asyncio.sleep(0.01)
        asking.cancel()
        await freed(admitter)

    over_a_socket(admitter, work)


@pytest.mark.parametrize("declared", [True, False])
def test_client_that_sends_too_much_learns_why(declared):
    """It is still sending when the answer comes, so the connection must not be reset under it."""

    async def chunks():
        for _ in range(40):
            yield b" " * 2**20

    async def work(client):
        content = b" " * (2**25 + 1) if declared else chunks()
        response = await client.post(PATH, content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert (await client.get("/health")).status_code == 200

    over_a_socket(FakeAdmitter(), work)


class EndlessAdmitter(FakeAdmitter):
    """Its streams are those of the service, and always have more to say than was read."""

    async def admit(self, call):
        self.calls.append(call)
        stream = RequestStream("r", lambda: None)
        self.streams.append(stream)
        self.feeding = asyncio.ensure_future(self.feed(stream))
        return Admitted([[1]], [stream], 1)

    async def feed(self, stream):
        """As a demultiplexer does: it does not wait for the reader. The end comes when the test says so."""
        self.num_fed = 0
        self.may_end = asyncio.Event()
        while not self.may_end.is_set():
            stream.put(RequestOutput("r", (65 + self.num_fed % 26,) * 50))
            self.num_fed += 1
            await asyncio.sleep(0.0005)
        stream.put(RequestOutput("r", (), finish_reason=FinishReason.LENGTH))


def test_what_a_client_does_not_read_is_kept_as_ids_and_once():
    """The server takes no more than its buffers hold; the rest waits as ids, and comes as one event when it may."""
    admitter = EndlessAdmitter()
    taken = []
    take = OutputBuffer.take

    def counted(buffer):
        taken.append(1)
        return take(buffer)

    async def work(client):
        connection = await RawConnection.open(f"{client.base_url}{PATH}", receive_buffer_bytes=4096)
        try:
            await connection.send({"prompt": "x", "stream": True, "max_tokens": 10_000_000})
            assert (await connection.read_head()).status == 200
            await stall_and_read(connection)
        finally:
            admitter.may_end.set()
            await connection.close(with_reset=True)

    async def stall_and_read(connection):
        connection.pause()
        async with asyncio.timeout(LIMIT_S):
            seen = -1
            while len(taken) != seen:  # until the buffers on the way are full
                seen, fed = len(taken), admitter.num_fed
                while admitter.num_fed < fed + 200:
                    await asyncio.sleep(0.01)
        assert len(taken) < admitter.num_fed - 200
        admitter.may_end.set()
        await admitter.feeding
        connection.resume()
        content = await asyncio.wait_for(connection.read_rest(), LIMIT_S)
        events = [json.loads(line[6:]) for line in content.split(b"\n") if line.startswith(b"data: {")]
        assert len("".join(event["choices"][0]["text"] for event in events)) == 50 * admitter.num_fed
        assert len(events) <= len(taken) + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputBuffer, "take", counted)
        over_a_socket(admitter, work, send_buffer_bytes=8192)
