"""The application behind a real server: what a socket adds is that clients close it, or send more than is read."""

import asyncio
import contextlib

import httpx
import pytest
import uvicorn

from tests.serve_app.http.fakes import FakeAdmitter, app_over, says

PATH = "/v1/completions"


def over_a_socket(admitter, work):
    async def main():
        server = uvicorn.Server(uvicorn.Config(app_over(admitter), host="127.0.0.1", port=0, log_level="error"))
        serving = asyncio.ensure_future(server.serve())
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                await work(client)
        finally:
            server.should_exit = True
            await serving

    asyncio.run(main())


async def freed(admitter):
    async with asyncio.timeout(5):
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
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post(PATH, json={"prompt": "x", "n": 2}, timeout=0.3)
        assert len(admitter.streams) == 2
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
