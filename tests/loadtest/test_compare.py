"""Verdicts of a comparison, from results made by hand."""

from dataclasses import replace
from pathlib import Path

from loadtest.compare import compare, differences, to_page
from loadtest.estimates import Estimate
from loadtest.report import write_report
from loadtest.request_record import RequestRecord
from loadtest.results import Results, read_results
from loadtest.summary import Summary


def make_results(scale: float, goodput: float = 2.0, **settings: object) -> Results:
    def spread(value: float) -> Estimate:
        return Estimate(value, (0.98 * value, value, 1.02 * value))

    values = {
        "ttft_s.p50": spread(0.1 * scale),
        "itl_s.p50": spread(0.02 * scale),
        "requests_per_s": spread(4.0),
        "goodput": spread(goodput),
        "output_tokens.mean": spread(10.0 * scale),
    }
    summary = Summary(100.0, 10.0, values, {"timeout": 1}, 4, 0, 1.0)
    records = [
        RequestRecord("short_chat", 101.0 + i, 101.0 + i, [0.1, 0.2], 0.3, 7, 2, True, None, "stop", 99)
        for i in range(3)
    ]
    machine = {"cpu_count": 2, "max_client_cpu_percent": 10.0}
    return Results(
        {"workload": "short_chat", "model": "m", "repeats": 3, "objectives": {}} | settings,
        summary,
        machine,
        records,
        [],
    )


def test_verdicts() -> None:
    rows = {row.name: row.cells for row in compare({"a": make_results(1.0), "b": make_results(2.0, goodput=1.0)})}
    assert rows["ttft_s.p50"][0].ratio == rows["ttft_s.p50"][0].verdict == ""
    assert rows["ttft_s.p50"][1].ratio.startswith("×2 (1.9")
    assert rows["ttft_s.p50"][1].verdict == "worse"
    assert rows["goodput"][1].verdict == "worse"
    assert rows["requests_per_s"][1].verdict == "within noise"
    assert rows["output_tokens.mean"][1].verdict == "differs"
    rows = {row.name: row.cells for row in compare({"b": make_results(2.0, goodput=1.0), "a": make_results(1.0)})}
    assert rows["itl_s.p50"][1].verdict == rows["goodput"][1].verdict == "better"


def test_without_repeats_the_noise_is_unknown() -> None:
    one = make_results(1.0)
    one = replace(one, summary=replace(one.summary, values={"goodput": Estimate(3.0, (3.0,))}))
    assert compare({"a": make_results(1.0), "b": one})[3].cells[1].verdict == "noise unknown"


def test_three_runs_on_one_page_that_say_how_they_differ() -> None:
    runs = {"a": make_results(1.0), "b": make_results(2.0), "c": make_results(0.5, workload="<mixed>")}
    assert differences(runs) == ["workload: short_chat (a), short_chat (b), <mixed> (c)"]
    page = to_page(runs)
    assert page.count("<svg") == 3
    assert "&lt;mixed&gt;" in page
    assert "<mixed>" not in page
    assert page.count("worse") >= 2


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    results = make_results(1.0)
    write_report(results, str(tmp_path / "new" / "run"))
    again = read_results(tmp_path / "new" / "run.json")
    assert again.summary == results.summary
    assert list(again.records) == list(results.records)
    assert (again.settings, again.violations) == (results.settings, [])
