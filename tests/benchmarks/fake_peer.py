"""A peer that answers to a script, in a process of its own: `python -m tests.benchmarks.fake_peer PORT MANNER`.

Manners: `plain`; `no-usage`: streams say none; `no-done`: streams just end; `refuses`: every stream is an error;
`dies`: ends before it serves; `never`: serves, and is never ready; `offspring`: has a process in a session of its own.
"""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers.peer import FileKind, Launch, Peer, Place

ROOT = Path(__file__).parents[2]
GAP_S = 0.01
PROMPT_TOKENS = 9
ANSWER = "Gravity is a force of nature."


class Handler(BaseHTTPRequestHandler):
    manner = ""

    def do_GET(self) -> None:
        self._json(503 if self.manner == "never" else 200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not body.get("stream"):
            usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 6}
            self._json(200, {"choices": [{"message": {"content": ANSWER}}], "usage": usage})
        elif self.manner == "refuses":
            self._json(429, {"error": {"code": "overloaded"}})
        else:
            self._stream(body["max_tokens"])

    def log_message(self, *_: Any) -> None:
        """Nothing: its log is for what it says itself."""

    def _json(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, num_tokens: int) -> None:
        self.send_response(200)
        self.end_headers()
        for number in range(num_tokens):
            time.sleep(GAP_S)
            reason = "length" if number == num_tokens - 1 else None
            self._event({"choices": [{"delta": {"content": "word "}, "finish_reason": reason}]})
        if self.manner != "no-usage":
            usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": num_tokens}
            self._event({"choices": [], "usage": usage})
        if self.manner != "no-done":
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())


class FakePeer(Peer):
    """Its number format is its manner."""

    name: ClassVar[str] = "fake"
    packages: ClassVar[tuple[str, ...]] = ("pytest",)
    reads: ClassVar[FileKind] = FileKind.ANY
    formats: ClassVar[tuple[str, ...]] = ("plain", "no-usage", "no-done", "refuses", "dies", "never", "offspring")
    ready_path: ClassVar[str] = "/v1/models"

    @property
    def says_done(self) -> bool:  # type: ignore[override]
        return "lenient" not in self.name

    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        del model
        command = [self.program, "-m", "tests.benchmarks.fake_peer", str(place.port), number_format]
        return Launch(command, {"PYTHONPATH": str(ROOT)})


class FakeSlipstream(FakePeer):
    name: ClassVar[str] = "slipstream"


class LenientPeer(FakePeer):
    name: ClassVar[str] = "lenient"


def main(port: str, manner: str) -> None:
    if manner == "dies":
        print("loading the model\n\nboom: no such model", flush=True)
        sys.exit(3)
    if manner == "offspring":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
        print(child.pid, flush=True)
    Handler.manner = manner
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
