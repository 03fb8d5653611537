"""The first process in the namespaces: python -m tests.cluster.driver DIRECTORY. Started by tests.cluster.launch."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import ray

from tests.cluster import service
from tests.cluster.fake_nodes import HeadError, start_head
from tests.cluster.isolation import bring_loopback_up, is_isolated
from tests.cluster.load import Load, known_answers
from tests.cluster.story import Report, tell
from tests.tiny_models import write_tiny_model

REPORT = "report.json"
NO_HEAD = 75  # this process's exit status when it is worth another try
LIMIT_S = 450.0
NUM_CLIENTS = 12  # more than all engines should have
VOCAB_SIZE = 4096  # of the tiny model: tokens of the default model's tokenizer
_NUM_LOG_LINES = 30
_NOISE = "Dropping the empty legacy field"


def main(directory: Path) -> None:
    started_s = time.monotonic()
    if not is_isolated():
        raise SystemExit("this would disturb every Ray on the machine: use python -m tests.cluster")
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    limit = threading.Timer(LIMIT_S, _give_up)
    limit.daemon = True
    limit.start()
    report = Report()

    def note(what: str) -> None:
        print(f"{time.monotonic() - started_s:6.1f} s  {what}", flush=True)

    bring_loopback_up()
    try:
        _run(directory, report, note)
    except HeadError as error:
        note(str(error))
        _end(NO_HEAD)
    (directory / REPORT).write_text(json.dumps(asdict(report)))
    if report.failures:
        print("\n".join(_logs(directory)), flush=True)
    _end(bool(report.failures))


def _run(directory: Path, report: Report, note: Callable[[str], None]) -> None:
    model = write_tiny_model(directory / "model", vocab_size=VOCAB_SIZE)
    known = known_answers(model, VOCAB_SIZE, NUM_CLIENTS)
    note(f"{len(known)} answers are known")
    start_head(directory)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(log_to_driver=False, logging_level="warning")
    note("the head is up")
    service.deploy(model)
    note("the service is deployed")
    tell(Load(f"{service.URL}/v1", known), report, note)


def _end_with_launcher() -> None:
    """However it ends, its end of the pipe is closed."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    _end(1)


def _give_up() -> None:
    print(f"gave up after {LIMIT_S:g} s")
    _end(1)


def _end(status: int) -> NoReturn:
    """Ends this process, and with the first one all others in the namespace."""
    sys.stdout.flush()
    os._exit(status)


def _logs(directory: Path) -> Iterator[str]:
    """The ends of what the autoscaler and Serve's controller have to say."""
    logs = directory / "session_latest" / "logs"
    for path in (logs / "monitor.log", logs / "monitor.err", *sorted((logs / "serve").glob("controller*.log"))):
        yield f"--- {path.name}"
        yield from [line for line in path.read_text().splitlines() if _NOISE not in line][-_NUM_LOG_LINES:]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
