"""Users of an OpenAI-compatible service, who read streams.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 8 -t 60s --report run

What the options mean, and the numbers: docs/load_testing.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import gevent
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import WorkerRunner

# Locust has the locustfile's own directory on its path, and the current one only while it loads this.
sys.path.append(str(Path(__file__).parent.parent))

from loadtest.arrivals import CLOSED
from loadtest.load import Load
from loadtest.measurement import Measurement
from loadtest.report import to_html
from loadtest.settings import Settings, add_options, read_options
from loadtest.streaming_client import ServerError, StreamingClient

IDLE_S = 0.1
MAX_CONNECTIONS = 1_000_000  # a pool's limit would make requests wait in the client


class _Run:
    """What the listeners and users of this process share."""

    measurement: Measurement
    settings: Settings
    load: Load


RUN = _Run()


class StreamingUser(User):
    """In a closed loop, one request after another. In an open one, a part of the arrivals."""

    @task
    def ask(self) -> None:
        if RUN.load.stopping.is_set():
            gevent.sleep(IDLE_S)  # Locust ends the users when the last requests have ended
        elif RUN.settings.arrivals == CLOSED:
            RUN.load.send_one()
        else:
            total_users = _options(self.environment).total_users
            RUN.load.send_at_arrivals(RUN.settings.rate / max(1, total_users))

    def wait_time(self) -> float:
        return RUN.settings.think_time_s


def _options(environment: Environment) -> argparse.Namespace:
    options = environment.parsed_options
    assert isinstance(options, argparse.Namespace)
    return options


@events.init_command_line_parser.add_listener
def _(parser: LocustArgumentParser) -> None:
    add_options(parser)
    # Workers are told the values of a locustfile's own options, and not how many users there are in all.
    parser.add_argument("--total-users", type=int, default=0, help=argparse.SUPPRESS, include_in_web_ui=False)


@events.init.add_listener
def _(environment: Environment, web_ui: Any, **_: Any) -> None:
    # The event loop's clock has stood still since before the imports; Locust would count them as run time.
    gevent.get_hub().loop.update_now()
    RUN.measurement = Measurement(environment)
    try:
        read_options(_options(environment))
    except ValueError as error:
        print(f"locustfile: {error}", file=sys.stderr)
        sys.exit(2)
    RUN.measurement.join_processes(lambda: RUN.load.drain(RUN.settings.drain_s))
    if web_ui is not None:
        _add_report_page(web_ui)


def _add_report_page(web_ui: Any) -> None:
    @web_ui.app.route("/llm-report")
    @web_ui.auth_required_if_enabled
    def report_page() -> Any:
        results = RUN.measurement.results
        return to_html(results) if results is not None else ("No run has ended yet.", 404)


@events.test_start.add_listener
def _(environment: Environment, **_: Any) -> None:
    options, runner = _options(environment), environment.runner
    assert runner is not None
    try:
        settings = read_options(options)
        client = StreamingClient(
            environment.host or "", options.api_key, settings.silence_s, MAX_CONNECTIONS, options.insecure
        )
        model = settings.model or client.first_model()
    except (ValueError, ServerError) as error:
        environment.process_exit_code = 1
        raise StopTest(f"Nothing to measure: {error}") from None
    if not isinstance(runner, WorkerRunner):
        options.total_users = runner.target_user_count
    process_index = runner.worker_index if isinstance(runner, WorkerRunner) else 0
    RUN.settings = settings
    RUN.load = Load(settings, client, model, process_index, RUN.measurement.finish_request)
    RUN.measurement.start(settings, model)


@events.spawning_complete.add_listener
def _(**_: Any) -> None:
    RUN.measurement.users_are_complete()


@events.usage_monitor.add_listener
def _(cpu_usage: float, **_: Any) -> None:
    RUN.measurement.note_cpu(cpu_usage)


@events.report_to_master.add_listener
def _(data: dict[str, Any], **_: Any) -> None:
    RUN.measurement.add_to_report(data)


@events.worker_report.add_listener
def _(data: dict[str, Any], **_: Any) -> None:
    RUN.measurement.read_report(data)


@events.test_stopping.add_listener
def _(**_: Any) -> None:
    if RUN.measurement.has_started():
        RUN.measurement.stop()


@events.test_stop.add_listener
def _(environment: Environment, **_: Any) -> None:
    RUN.measurement.finish(_options(environment).report)


@events.quitting.add_listener
def _(environment: Environment, **_: Any) -> None:
    """Ctrl-C and SIGTERM come here first, with the run still going on."""
    if environment.runner is not None and RUN.measurement.is_running():
        environment.runner.stop()
    if environment.process_exit_code is None:
        environment.process_exit_code = RUN.measurement.exit_code()
