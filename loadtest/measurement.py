"""A run in Locust's terms: warm-up and steady state, events and statistics, the processes of a distributed run."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gevent
import locust.stats
from locust.env import Environment
from locust.runners import STATE_INIT, STATE_STOPPED, MasterRunner, WorkerRunner

from loadtest.report import write_report
from loadtest.request_record import UNFINISHED, RequestRecord
from loadtest.results import Results, describe, find_violations
from loadtest.settings import Settings
from loadtest.streaming_client import epoch_s
from loadtest.summary import summarise

METRIC = "METRIC"
_ROWS = "load_records"  # in what workers report to the master
_DRAIN, _DRAINED = "load_drain", "load_drained"  # messages between them
_CHECK_S = 0.02
_MESSAGE_S = 10.0  # that a worker's last message may take
_BATCH = 50  # events between two chances for other greenlets: their timestamps must not wait long
logger = logging.getLogger(__name__)


class RequestError(Exception):
    """A request's failure, by its kind: Locust counts equal texts together."""


class Measurement:
    """Of one process; the master's has the records of all."""

    def __init__(self, environment: Environment) -> None:
        self.results: Results | None = None
        self._environment = environment
        self._settings: Settings | None = None
        self._endpoint, self._model = "", ""
        self._records: list[RequestRecord] = []
        self._steady_s: float | None = None
        self._stopped_s = 0.0
        self._becoming_steady: gevent.Greenlet | None = None
        self._load_average_start = 0.0
        self._max_cpu_percent = 0.0
        self._drain: Callable[[], None] = lambda: None
        self._num_drained = 0
        _keep_metrics_out_of_the_total(environment)

    def start(self, settings: Settings, model: str) -> None:
        self.results = None
        self._settings, self._model = settings, model
        self._records = []
        self._steady_s = None
        self._becoming_steady = None
        self._load_average_start = os.getloadavg()[0]
        self._max_cpu_percent = 0.0

    def users_are_complete(self) -> None:
        """The warm-up begins. Later changes of the number of users do not repeat it."""
        if self._settings is not None and self._becoming_steady is None:
            self._becoming_steady = gevent.spawn_later(self._settings.warm_up_s, self._become_steady)

    def _become_steady(self) -> None:
        self._steady_s = epoch_s(time.perf_counter())
        if not isinstance(self._environment.runner, WorkerRunner):
            self._environment.stats.reset_all()
            logger.info("Warm-up is over: statistics are reset, the measurement begins")

    def finish_request(self, record: RequestRecord) -> None:
        """Keeps the record, and tells Locust's statistics."""
        self._records.append(record)
        if record.error == UNFINISHED:
            return
        assert self._settings is not None
        fire = self._environment.events.request.fire
        fire(
            request_type="POST",
            name=f"/v1/{self._settings.endpoint} {record.workload}",
            response_time=record.e2e_latency_s * 1e3,
            response_length=record.received_bytes,
            exception=RequestError(record.error) if record.error else None,
            context={},
        )
        if record.error:
            return
        metrics = {
            "ttft": record.ttft_s,
            "tpot": record.tpot_s,
            "queue_time": record.queue_time_s,
            "send_delay": record.send_delay_s if record.send_delay_s else None,
            # So its requests a second are the goodput.
            "goodput": record.e2e_latency_s if self._settings.objectives.are_met(record) else None,
        }
        gaps = [("itl", gap) for gap in record.itl_s]
        for number, (name, value) in enumerate([*metrics.items(), *gaps]):
            if value is not None:
                fire(
                    request_type=METRIC,
                    name=name,
                    response_time=value * 1e3,
                    response_length=0,
                    exception=None,
                    context={},
                )
            if number % _BATCH == _BATCH - 1:
                gevent.sleep(0)

    def note_cpu(self, cpu_percent: float) -> None:
        if self._steady_s is not None:
            self._max_cpu_percent = max(self._max_cpu_percent, cpu_percent)

    def join_processes(self, drain: Callable[[], None]) -> None:
        """`drain` ends the load of this process: it waits for the last answers.

        Locust's master does not wait for its workers' last reports, so they are told, and awaited, here.
        """
        self._drain = drain
        runner = self._environment.runner
        if isinstance(runner, WorkerRunner):
            runner.register_message(_DRAIN, self._drain_worker, concurrent=True)
        elif isinstance(runner, MasterRunner):
            runner.register_message(_DRAINED, self._worker_is_drained)

    def stop(self) -> None:
        """The measured time is over. Returns when all requests have ended, in all processes."""
        self._stopped_s = epoch_s(time.perf_counter())
        if self._becoming_steady is not None:
            self._becoming_steady.kill(block=False)
        runner = self._environment.runner
        if not isinstance(runner, MasterRunner):
            self._drain()
            return
        assert self._settings is not None
        self._num_drained = 0
        runner.send_message(_DRAIN)
        deadline_s = time.perf_counter() + self._settings.drain_s + _MESSAGE_S
        while self._num_drained < runner.worker_count:
            if time.perf_counter() > deadline_s:
                logger.error("%d workers have not sent their last records", runner.worker_count - self._num_drained)
                return
            gevent.sleep(_CHECK_S)

    def _drain_worker(self, **_: Any) -> None:
        self._drain()
        data: dict[str, Any] = {}
        self.add_to_report(data)
        assert self._environment.runner is not None
        self._environment.runner.send_message(_DRAINED, data)

    def _worker_is_drained(self, msg: Any, **_: Any) -> None:
        self.read_report(msg.data)
        self._num_drained += 1

    def add_to_report(self, data: dict[str, Any]) -> None:
        """A worker's."""
        data[_ROWS] = [asdict(record) for record in self._records]
        self._records = []

    def read_report(self, data: dict[str, Any]) -> None:
        """The master's."""
        self._records.extend(RequestRecord(**row) for row in data.get(_ROWS, ()))

    def finish(self, report: str) -> None:
        """All requests have ended: what came of it."""
        settings = self._settings
        if settings is None or isinstance(self._environment.runner, WorkerRunner):
            return
        if self._steady_s is None or self._stopped_s <= self._steady_s:
            logger.error("Nothing was measured: the run ended within its warm-up of %g s", settings.warm_up_s)
            return
        summary = summarise(self._records, self._steady_s, self._stopped_s, settings.repeats, settings.objectives)
        options = self._environment.parsed_options
        self.results = Results(
            settings=settings.row()
            | {
                "url": self._environment.host,
                "model": self._model,
                "users": getattr(options, "num_users", None),
                "processes": self._num_processes(),
            },
            summary=summary,
            machine={
                "cpu_count": os.cpu_count(),
                "load_average_start": self._load_average_start,
                "load_average_end": os.getloadavg()[0],
                "max_client_cpu_percent": self._max_cpu_percent,
            },
            records=self._records,
            violations=find_violations(summary, settings.assertions, settings.max_error_share),
        )
        print(describe(self.results))
        if report:
            write_report(self.results, report)
            logger.info("Written: %s.html, %s.json", report, report)

    def has_started(self) -> bool:
        return self._settings is not None

    def exit_code(self) -> int | None:
        """None: as Locust decides, where nothing was to be measured."""
        runner, options = self._environment.runner, self._environment.parsed_options
        if runner is None or isinstance(runner, WorkerRunner):
            return None
        if self._settings is None and not (options is not None and options.headless):
            return None
        return 1 if self.results is None or self.results.violations or runner.exceptions else 0

    def is_running(self) -> bool:
        runner = self._environment.runner
        return runner is not None and runner.state not in (STATE_INIT, STATE_STOPPED)

    def _num_processes(self) -> int:
        runner = self._environment.runner
        return runner.worker_count if isinstance(runner, MasterRunner) else 1


def _keep_metrics_out_of_the_total(environment: Environment) -> None:
    """Locust's "Aggregated" row is of requests: gaps between tokens are none, and there are many more of them."""
    stats = environment.stats
    log_request = stats.log_request

    def log(method: str, name: str, response_time: Any, content_length: int) -> None:
        if method == METRIC:
            stats.entries[(name, method)].log(response_time, content_length)
        else:
            log_request(method, name, response_time, content_length)

    stats.log_request = log  # type: ignore[method-assign]
    locust.stats.bucket_response_time = _three_digits  # type: ignore[assignment]


def _three_digits(response_time_ms: float) -> int:
    """As it is, Locust rounds to whole milliseconds, which is coarse for tokens. It says int; a float does as well."""
    return float(f"{response_time_ms:.3g}")  # type: ignore[return-value]
