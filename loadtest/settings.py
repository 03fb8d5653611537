"""What a run does: options of Locust's command line and web page, checked."""

import argparse
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import orjson

from loadtest.arrivals import CLOSED, OPEN_LOOPS
from loadtest.slo import Assertion, Objectives, parse_assertions, parse_objectives
from loadtest.streaming_client import CHAT, COMPLETIONS
from loadtest.summary import NAMES
from loadtest.workloads import WORKLOAD_NAMES, LengthLimits

if TYPE_CHECKING:  # importing Locust patches the standard library for gevent, which only its own process wants
    from locust.argument_parser import LocustArgumentParser


@dataclass(frozen=True)
class Settings:
    """Checked options. Times are in seconds, rates in requests a second, lengths in tokens."""

    workload: str
    seed: int
    endpoint: str
    model: str  # empty: the first that the server lists
    limits: LengthLimits
    extra_body: dict[str, Any]
    wants_usage: bool
    arrivals: str
    rate: float
    burst_size: int
    burstiness: float
    think_time_s: float
    max_in_flight: int
    warm_up_s: float
    repeats: int
    drain_s: float
    silence_s: float
    objectives: Objectives
    assertions: tuple[Assertion, ...]
    max_error_share: float

    def row(self) -> dict[str, Any]:
        """For JSON."""
        row = asdict(self)
        row["objectives"] = dict(self.objectives.limits_s)
        row["assertions"] = [str(assertion) for assertion in self.assertions]
        return row


def add_options(parser: "LocustArgumentParser") -> None:
    """All are on the web page too. 0 and empty mean: not set."""
    add = parser.add_argument
    add("--workload", choices=WORKLOAD_NAMES, default="short_chat", help="what users ask")
    add("--seed", type=int, default=0, help="of requests and arrivals")
    add("--endpoint", choices=(CHAT, COMPLETIONS), default=CHAT, help="of the API")
    add("--model", default="", help="empty: the first that the server lists")
    add("--api-key", default="", env_var="OPENAI_API_KEY", is_secret=True, help="sent as a bearer token")
    add("--prompt-tokens", type=int, default=0, help="of each prompt, about; 0: as the workload draws them")
    add("--output-tokens", type=int, default=0, help="max_tokens of each request; 0: as the workload draws them")
    add("--max-prompt-tokens", type=int, default=0, help="longer prompts are cut to it; 0: no limit")
    add("--max-output-tokens", type=int, default=0, help="larger max_tokens are cut to it; 0: no limit")
    add("--extra-body", default="", help='JSON object, put into each request: {"ignore_eos": true}')
    add("--no-usage", action="store_true", help="do not ask for usage, which some servers refuse: count chunks")
    add("--arrivals", choices=(CLOSED, *OPEN_LOOPS), default=CLOSED, help="closed: each user waits for its answer")
    add("--rate", type=float, default=1.0, help="requests a second, of all users together (not for closed)")
    add("--burst-size", type=int, default=8, help="requests at one moment (bursts)")
    add("--burstiness", type=float, default=0.5, help="shape of the gaps: 1 is Poisson, less is burstier (gamma)")
    add("--think-time", type=float, default=0.0, help="seconds between a user's requests (closed)")
    add("--max-in-flight", type=int, default=1024, help="arrivals past it count as errors (not for closed)")
    add("--warm-up", type=float, default=5.0, help="seconds, once all users run, that are not measured")
    add("--repeats", type=int, default=3, help="parts that the measured time is cut into, for confidence")
    add("--drain", type=float, default=30.0, help="seconds that the last answers may take, in place of --stop-timeout")
    add("--silence", type=float, default=120.0, help="seconds without a byte after which a request has failed")
    add("--insecure", action="store_true", help="do not check the server's certificate")
    add("--slo", default="", help="of each request, for goodput: ttft_s=0.5,tpot_s=0.05,max_itl_s=1,e2e_latency_s=9")
    add("--assert", dest="assertions", default="", help="else exit code 1: ttft_s.p95<0.5,goodput>2,error_share<0.01")
    add("--max-error-share", type=float, default=0.0, help="errors ÷ requests that still give exit code 0")
    add("--report", default="", help="where to write: REPORT.html and REPORT.json")


def read_options(options: argparse.Namespace) -> Settings:
    """Raises ValueError, in one line."""
    settings = Settings(
        workload=options.workload,
        seed=options.seed,
        endpoint=options.endpoint,
        model=options.model,
        limits=LengthLimits(
            options.prompt_tokens or None,
            options.output_tokens or None,
            options.max_prompt_tokens or None,
            options.max_output_tokens or None,
        ),
        extra_body=_json_object(options.extra_body),
        wants_usage=not options.no_usage,
        arrivals=options.arrivals,
        rate=options.rate,
        burst_size=options.burst_size,
        burstiness=options.burstiness,
        think_time_s=options.think_time,
        max_in_flight=options.max_in_flight,
        warm_up_s=options.warm_up,
        repeats=options.repeats,
        drain_s=options.drain,
        silence_s=options.silence,
        objectives=parse_objectives(options.slo),
        assertions=parse_assertions(options.assertions),
        max_error_share=options.max_error_share,
    )
    for name in ("rate", "burst_size", "burstiness", "max_in_flight", "repeats", "silence_s"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be more than 0")
    for name in ("think_time_s", "warm_up_s", "drain_s", "max_error_share"):
        if not getattr(settings, name) >= 0:
            raise ValueError(f"{name} must not be negative")
    for assertion in settings.assertions:  # now, and not after the run
        if assertion.name not in NAMES:
            raise ValueError(f"--assert: nothing measured is called {assertion.name!r}; there are {', '.join(NAMES)}")
    if any(limit is not None and limit < 0 for limit in asdict(settings.limits).values()):
        raise ValueError("numbers of tokens must not be negative")
    return settings


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("--extra-body is not a JSON object")
    return value
