"""Reports and comparisons in a browser: nothing is fetched, nothing complains, all can be read on a phone, at night."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.compare import to_page
from loadtest.estimates import Estimate
from loadtest.report import to_html
from loadtest.summary import LATENCIES, PERCENTILES
from tests.loadtest.browser import Page, chromium, find_chromium
from tests.loadtest.test_compare import make_results

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

PHONE, DESK = 400, 1200
# Of the page's background and of its text, 0 is black and 255 white.
BRIGHTNESS = """['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name]
    .match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with chromium(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    before, after = make_results(1.0), make_results(2.0, goodput=1.0)
    digits = Estimate(0.0001234567, (0.00012, 0.000123, 0.000126))
    latencies = {f"{name}.{row}": digits for name in LATENCIES for row in ("mean", *(f"p{p}" for p in PERCENTILES))}
    full = replace(before, summary=replace(before.summary, values=before.summary.values | latencies))
    pages = {"report": to_html(full), "comparison": to_page({"1: before": before, "2: after": after})}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


def open_page(page: Page, file: Path, width: int = DESK, scheme: str = "light") -> None:
    """Every page has to keep to these."""
    page.open(file, width=width, scheme=scheme)
    assert page.requested == [file.resolve().as_uri()]
    assert page.complaints == []


@pytest.mark.parametrize(("name", "num_plots"), [("report", 5), ("comparison", 3)])
def test_plots_are_drawn(page: Page, files: dict[str, Path], name: str, num_plots: int) -> None:
    open_page(page, files[name])
    boxes = page.evaluate(
        "[...document.querySelectorAll('.plots svg')].map(plot => [plot.getAttribute('aria-label'),"
        " plot.getBoundingClientRect().height, plot.querySelectorAll('path').length])"
    )
    assert len(boxes) == num_plots
    assert len({label for label, _, _ in boxes}) == num_plots
    assert all(label and height > 200 and num_paths > 20 for label, height, num_paths in boxes)


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(page: Page, files: dict[str, Path], name: str, scheme: str) -> None:
    """Wide tables scroll in a box of their own."""
    open_page(page, files[name], PHONE, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE
    assert page.evaluate("Math.max(...[...document.querySelectorAll('.plots svg')].map(p => p.clientWidth))") < PHONE
    wide = "[...document.querySelectorAll('table')].filter(t => t.offsetWidth > t.parentElement.clientWidth)"
    assert page.evaluate(f"{wide}.length") == (1 if name == "report" else 0)


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_its_colours_follow_the_reader(page: Page, files: dict[str, Path], scheme: str, is_dark: bool) -> None:
    open_page(page, files["comparison"], scheme=scheme)
    background, text = page.evaluate(BRIGHTNESS)
    assert (background < 60 and text > 200) if is_dark else (background > 200 and text < 60)
    inverted = page.evaluate("getComputedStyle(document.querySelector('.plots svg')).filter")
    assert inverted.startswith("invert") == is_dark
    verdicts = page.evaluate(
        "[...document.querySelectorAll('.bad, .quiet')].map(cell => getComputedStyle(cell).color)",
    )
    assert len(set(verdicts)) == 2


def test_a_comparison_shows_ratios(page: Page, files: dict[str, Path]) -> None:
    open_page(page, files["comparison"])
    rows = page.evaluate(
        "[...document.querySelectorAll('tr')].map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    assert rows[0] == ["", "1: before", "2: after", "ratio", ""]
    cells = {row[0]: row[1:] for row in rows[1:]}
    assert cells["ttft_s.p50"][2].startswith("×2 (")
    assert cells["ttft_s.p50"][3] == "worse"
    assert cells["requests_per_s"][3] == "within noise"
    open_page(page, files["comparison"], PHONE)
    assert (
        page.evaluate("Math.max(...[...document.querySelectorAll('td')].map(c => c.getBoundingClientRect().right))")
        < PHONE
    )


def test_the_browser_would_see_what_is_wrong(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<img src='missing.png'><script>console.error('no'); undefined.x</script>")
    page.open(file, width=PHONE, scheme="light")
    assert len(page.requested) == 2
    assert len(page.complaints) >= 3
