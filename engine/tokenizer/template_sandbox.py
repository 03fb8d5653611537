"""The server's end of the process that renders chat templates: starts it, asks it, replaces it when it dies."""

import contextlib
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from engine.errors import InvalidRequest
from engine.tokenizer import template_worker
from engine.tokenizer.template_worker import RENDERED, read_frame, write_frame

_WORKER_SCRIPT = Path(template_worker.__file__)


class TemplateSandbox:
    """Renders the given templates in a child process that is bounded in time and memory.

    The child starts with the first rendering (60 ms) and lives as long as this object. Safe to use from several
    threads; they take turns. A rendering blocks for at most `template_worker.CPU_LIMIT_S` and a start; on a machine
    that is too busy, for `template_worker.WALL_LIMIT_S`.
    """

    def __init__(self, templates: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, name: str, variables: Mapping[str, Any]) -> str:
        """Render template `name`.

        Raises:
            InvalidRequest: (param "messages") a variable cannot be written as JSON (lone surrogates, NaN), or the
                template is malformed, raises, or needs too much time or memory.
        """
        try:
            payload = orjson.dumps({"template": name, "variables": variables})
        except TypeError as error:
            problem = "holds a lone surrogate" if "surrogate" in str(error) else str(error)
            raise InvalidRequest(f"messages: cannot be rendered: {problem}", "messages") from None
        with self._lock:
            reply = self._ask(payload)
        text = reply[1:].decode("utf-8")
        if reply[:1] != RENDERED:
            raise InvalidRequest(f"the chat template failed on these messages: {text}", "messages")
        return text

    def _ask(self, payload: bytes) -> bytes:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write_frame(process.stdin, payload)
            reply = read_frame(process.stdout)
        except BrokenPipeError:
            reply = None
        except BaseException:  # interrupted: what is in the pipes belongs to nobody, so the next one gets new ones
            self._process = None
            raise
        if reply is None:
            self._process = None
            raise InvalidRequest(f"the chat template failed on these messages: {_why_dead(process)}", "messages")
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the script's folder must not shadow installed modules
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        weakref.finalize(self, _end, process)
        assert process.stdin is not None
        assert process.stdout is not None
        write_frame(process.stdin, orjson.dumps(self._templates))
        ready = read_frame(process.stdout)
        if ready is None:
            raise RuntimeError(f"the process for chat templates did not start: exit status {process.wait()}")
        self._process = process
        return process


def _why_dead(process: subprocess.Popen[bytes]) -> str:
    _end(process)
    if process.returncode in (-signal.SIGPROF, -signal.SIGALRM):
        return f"it takes longer than {template_worker.CPU_LIMIT_S} s"
    return "it needs too much memory"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, which ends an idle child, and reap it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # the rest of a frame that the child did not live to read
                pipe.close()
    try:
        process.wait(timeout=template_worker.WALL_LIMIT_S + 1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
