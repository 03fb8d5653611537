"""Renders chat templates in a process of its own, under limits that hold whatever the template does.

A template comes with a model from somewhere else and is a program. minijinja keeps it away from Python, and its fuel
stops loops and most growth within milliseconds; but repeating, comparing and printing lists is not metered (measured:
`[1]*100000000 == [1]*100000000` takes 8 s, printing nested repeated lists 5 s and 300 MB), and nothing can interrupt
native code in a process that must live. So the operating system bounds this one: an alarm ends it when one rendering
takes too long, a limit on its address space when one grows too large. `engine.tokenizer.template_sandbox` is the other
end of its pipes and starts another.

Run as a script; the server takes only the limits and the frames from here. It imports nothing of `engine`, which keeps
its start short (60 ms).

Frames, both ways: a little-endian u32 of the payload's bytes, then the payload. In: JSON, first the templates by name,
then one object `{"template": name, "variables": {...}}` per rendering. Out: an empty frame once the templates are
taken, then per rendering one byte (`RENDERED` or `FAILED`) and the text in UTF-8.
"""

import json
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import IO, Any

import minijinja
import orjson

RENDERED, FAILED = b"=", b"!"
LENGTH = struct.Struct("<I")

CPU_LIMIT_S = 0.6  # of one rendering, so that it answers within a second; 32 MiB of messages take 0.3 s
WALL_LIMIT_S = 5.0  # ends what computes nothing and yet does not end; a busy machine alone must not reach it
MEMORY_LIMIT_BYTES = 768 * 1024**2  # address space of the whole process; 32 MiB of messages need 470 MB
MAX_RENDERED_BYTES = 64 * 1024**2
MAX_REASON_CHARS = 300  # a template may put a whole message into its error
# One unit is one instruction or some dozens of bytes copied; 200,000 of them take about 5 ms. Longer messages need
# more: about one unit per 8 bytes in common templates, so one per byte is ample.
BASE_FUEL = 2_000_000
FUEL_PER_BYTE = 1

# Transformers marks what the assistant wrote with this pair of tags, for training. Rendering passes over them; what is
# set between them stays there, as it does inside a `with`.
_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


class TemplateRaisedError(Exception):
    """The template called `raise_exception`."""


def raise_exception(message: object) -> None:
    raise TemplateRaisedError(str(message))


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` as Transformers has it: no HTML escapes, Python's spacing."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def is_sequence(value: Any) -> bool:
    """Jinja counts strings and mappings as sequences; minijinja alone does not count strings."""
    return isinstance(value, str | list | tuple | dict)


def make_environment(templates: Mapping[str, str]) -> minijinja.Environment:
    """The environment that Transformers gives chat templates.

    Each template is compiled by its first rendering, under that one's limits: compiling already computes constant
    expressions, unmetered.
    """
    sources = {name: _GENERATION_TAG.sub(_scope_tag, source) for name, source in templates.items()}
    return minijinja.Environment(
        loader=sources.get,
        filters={"tojson": to_json},
        tests={"sequence": is_sequence},
        globals={"raise_exception": raise_exception, "strftime_now": strftime_now},
        trim_blocks=True,
        lstrip_blocks=True,
        undefined_behavior="lenient",
        auto_escape_callback=lambda _name: False,
        debug=True,  # errors say which name is undefined
    )


def _scope_tag(match: re.Match[str]) -> str:
    return f"{match[1]}{match[2] or ''}with{match[3]}"


def describe(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, MemoryError):
        reason = "it needs too much memory"
    elif isinstance(error, TemplateRaisedError):
        reason = str(error)
    elif not isinstance(error, minijinja.TemplateError):
        reason = f"{type(error).__name__}: {error}"
    elif error.kind == "OutOfFuel":
        reason = "it takes too many steps"
    else:
        reason = (error.detail or error.message) + (f" (line {error.line})" if error.line else "")
    reason = " ".join(reason[: 4 * MAX_REASON_CHARS].split())
    return reason if len(reason) <= MAX_REASON_CHARS else reason[:MAX_REASON_CHARS] + "…"


def render(environment: minijinja.Environment, name: str, variables: dict[str, Any], fuel: int) -> tuple[bytes, str]:
    try:
        environment.fuel = fuel
        text: str = environment.render_template(name, **variables)
    except BaseException as error:  # a panic of the renderer, too, is an answer and not the end
        return FAILED, describe(error)
    return RENDERED, text


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next payload; None at the end of the stream, also when it ends inside a frame."""
    header = pipe.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (num_bytes,) = LENGTH.unpack(header)
    payload = pipe.read(num_bytes)
    return payload if len(payload) == num_bytes else None


def write_frame(pipe: IO[bytes], payload: bytes) -> None:
    pipe.write(LENGTH.pack(len(payload)))
    pipe.write(payload)
    pipe.flush()


def limit_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the closed pipe ends this process
    alarms = [signal.SIGPROF, signal.SIGALRM]
    for alarm in alarms:
        signal.signal(alarm, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, alarms)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    if sys.platform == "linux":  # elsewhere the kernel refuses or ignores this limit; fuel and the alarm remain
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # an abort on memory is reported by the parent, not by noise in its log


def set_alarms(cpu_s: float, wall_s: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def answer(environment: minijinja.Environment, payload: bytes) -> bytes:
    """Render what one frame asks for and return the reply's payload."""
    request = orjson.loads(payload)
    fuel = BASE_FUEL + FUEL_PER_BYTE * len(payload)
    status, text = render(environment, request["template"], request["variables"], fuel)
    encoded = text.encode("utf-8", "replace")
    if len(encoded) > MAX_RENDERED_BYTES:
        status, encoded = FAILED, f"it writes more than {MAX_RENDERED_BYTES} bytes".encode()
    return status + encoded


def main() -> None:
    limit_process()
    pipe_in, pipe_out = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(pipe_in)
    if first is None:
        return
    environment = make_environment(orjson.loads(first))
    write_frame(pipe_out, b"")
    while (payload := read_frame(pipe_in)) is not None:
        set_alarms(CPU_LIMIT_S, WALL_LIMIT_S)
        reply = answer(environment, payload)
        set_alarms(0, 0)
        write_frame(pipe_out, reply)


if __name__ == "__main__":
    main()
