"""The results of a run: as JSON, as text, and what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from loadtest.estimates import Estimate
from loadtest.request_record import RequestRecord
from loadtest.slo import Assertion
from loadtest.summary import LATENCIES, PERCENTILES, RATES, Summary

FORMAT = "slipstream-load-test-1"
_LATE_S = 0.05  # the client: its own delays would then be seen in what it measures
_BUSY_PERCENT = 90.0
_MISSING = {"queue_time_s": "not reported by the server", "send_delay_s": "none in a closed loop"}


@dataclass(frozen=True)
class Results:
    """All of one run. `settings` and `machine` are what a reader needs to repeat it."""

    settings: dict[str, Any]
    summary: Summary
    machine: dict[str, Any]
    records: Sequence[RequestRecord]
    violations: list[str]

    def warnings(self) -> list[str]:
        """What makes the numbers doubtful."""
        found = []
        summary, values = self.summary, self.summary.plain()
        if summary.num_unfinished:
            found.append(
                f"{summary.num_unfinished} of {summary.num_requests} requests had not ended with the run: "
                "the longest latencies are missing (a longer --drain waits for them)"
            )
        if summary.share_with_usage < 1 and values.get("ttft_s.mean") is not None:
            found.append(
                f"{1 - summary.share_with_usage:.0%} of the answers came without usage: there, chunks were counted, "
                "of which each may have several tokens"
            )
        if values.get("send_delay_s.p99", 0.0) > _LATE_S:
            found.append(f"the client was late: 99 % of the requests within {values['send_delay_s.p99']:.3g} s")
        if self.machine["max_client_cpu_percent"] > _BUSY_PERCENT:
            found.append("the client was short of CPU: more processes (--processes) measure better")
        if len(summary.values["requests_per_s"].repeats) < 2:
            found.append("one repeat gives no confidence intervals")
        return found

    def to_json(self) -> bytes:
        summary = self.summary
        body = {
            "format": FORMAT,
            "settings": self.settings,
            "machine": self.machine,
            "started_s": summary.started_s,
            "duration_s": summary.duration_s,
            "values": {name: estimate.row() for name, estimate in summary.values.items()},
            "errors": summary.errors,
            "num_requests": summary.num_requests,
            "num_unfinished": summary.num_unfinished,
            "share_with_usage": summary.share_with_usage,
            "warnings": self.warnings(),
            "violations": self.violations,
            "requests": [record.row() for record in self.records],
        }
        return orjson.dumps(body, option=orjson.OPT_INDENT_2 if len(self.records) < 2 else 0)


def read_results(path: Path) -> Results:
    """From a file of to_json(). Raises ValueError where it is none."""
    body = orjson.loads(path.read_bytes())
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"{path}: not a load test's results")
    summary = Summary(
        started_s=body["started_s"],
        duration_s=body["duration_s"],
        values={name: Estimate.from_row(row) for name, row in body["values"].items()},
        errors=body["errors"],
        num_requests=body["num_requests"],
        num_unfinished=body["num_unfinished"],
        share_with_usage=body["share_with_usage"],
    )
    records = [RequestRecord(**row) for row in body["requests"]]
    return Results(body["settings"], summary, body["machine"], records, body["violations"])


def find_violations(summary: Summary, assertions: Sequence[Assertion], max_error_share: float) -> list[str]:
    """Why the run has failed, one line each."""
    values = summary.plain()
    found = [violation for assertion in assertions if (violation := assertion.violation(values))]
    num_errors = sum(summary.errors.values())
    share = num_errors / max(1, summary.num_requests)
    if share > max_error_share:
        found.append(f"{num_errors} of {summary.num_requests} requests failed: {share:.2%}")
    if not any(record_name.startswith("ttft_s") for record_name in values):
        found.append("no request was answered")
    return found


def with_confidence(estimate: Estimate | None) -> str:
    """Such as `0.0512 ± 0.0007`."""
    if estimate is None:
        return "–"
    half_width = estimate.half_width
    return f"{estimate.value:.4g}" + ("" if half_width is None else f" ± {half_width:.2g}")


def table_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Latencies: the heads of the columns, and the rows."""
    heads = ["", "mean", *(f"p{p}" for p in PERCENTILES)]
    rows = []
    for name in LATENCIES:
        if f"{name}.mean" not in summary.values:
            rows.append([name, _MISSING.get(name, "not measured"), *[""] * len(PERCENTILES)])
            continue
        rows.append([name, *(with_confidence(summary.values[f"{name}.{head}"]) for head in heads[1:])])
    return heads, rows


def describe(results: Results) -> str:
    """For a terminal."""
    summary = results.summary
    heads, rows = table_rows(summary)
    lines = [
        "",
        f"Measured for {summary.duration_s:.1f} s: {summary.num_requests} requests; ± is the 95 % confidence interval.",
        *("".join(f"{cell:<22}" for cell in row).rstrip() for row in [heads, *rows]),
        "",
        *(f"{name:<22}{with_confidence(summary.values.get(name))}" for name in (*RATES, "concurrency.mean")),
        *(
            f"{name:<22}{with_confidence(summary.values.get(name))}"
            for name in ("prompt_tokens.mean", "output_tokens.mean")
        ),
        *(f"error: {kind:<40}{number}" for kind, number in summary.errors.items()),
        *(f"warning: {warning}" for warning in results.warnings()),
        *(f"FAILED: {violation}" for violation in results.violations),
    ]
    return "\n".join(lines)
