import io

import pytest

from engine.loader import progress
from engine.loader.progress import PlainProgress, TerminalProgress, progress_on


def test_a_log_gets_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    lines: list[str] = []
    with PlainProgress(lines.append, interval_s=10).task("Fetching", 50_000_000) as advance:
        for second in range(25):
            now_s = float(second)
            advance(second * 1_000_000, None)
    assert lines == [
        "Fetching (50.0 MB)",
        "Fetching: 10.0 MB of 50.0 MB",
        "Fetching: 20.0 MB of 50.0 MB",
        "Fetching: done in 24.0 s",
    ]


def test_a_failed_download_is_not_called_done() -> None:
    lines: list[str] = []
    with pytest.raises(RuntimeError), PlainProgress(lines.append).task("Fetching", None):
        raise RuntimeError
    assert lines == ["Fetching"]


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    shown = progress_on(stream)
    assert isinstance(shown, TerminalProgress)
    shown.note("[bold]as it is[/bold]")
    with shown.task("Fetching [x]", 2_000_000) as advance:
        advance(500_000, None)
        advance(4_000_000, 4_000_000)
    assert "[bold]as it is[/bold]" in stream.getvalue()
    assert "Fetching [x]" in stream.getvalue()
    assert "4.0/4.0 MB" in stream.getvalue()


def test_anything_else_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    progress_on(stream).note("hello")
    assert stream.getvalue() == "hello\n"
    assert capsys.readouterr().out == ""
