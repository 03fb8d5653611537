"""What an observer hears of answers: each choice's first token, its later ones, and its end, once."""

import asyncio
import time
from collections import Counter

import pytest

from engine.request import FinishReason, RequestOutput
from serve_app.errors import Overload, TimeLimit
from tests.serve_app.http.fakes import FakeAdmitter, app_over, fetch, leave, says

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"


class Recorder:
    def __init__(self) -> None:
        self.first_s: list[float] = []
        self.later_s: list[float] = []
        self.ends: list[tuple[FinishReason, float]] = []
        self.rejected: list[tuple[Overload, int]] = []
        self.timed_out: list[tuple[TimeLimit, int]] = []

    def on_first_token(self, seconds: float) -> None:
        self.first_s.append(seconds)

    def on_later_tokens(self, seconds: float) -> None:
        self.later_s.append(seconds)

    def on_end(self, reason: FinishReason, seconds: float) -> None:
        self.ends.append((reason, seconds))

    def on_rejected(self, reason: Overload, num_choices: int) -> None:
        self.rejected.append((reason, num_choices))

    def on_timed_out(self, limit: TimeLimit, num_choices: int) -> None:
        self.timed_out.append((limit, num_choices))

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reason.value for reason, _ in self.ends)


def observe(admitter: FakeAdmitter, body: dict, path: str = PATH) -> Recorder:
    recorder = Recorder()
    fetch(admitter, path, body, app=app_over(admitter, observer=recorder))
    return recorder


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [PATH, CHAT])
def test_times_count_from_when_the_request_was_read(path, stream):
    body = {"prompt": "x"} if path == PATH else {"messages": [{"role": "user", "content": "x"}]}
    script = [0.02, *says("a", end=None), 0.03, *says("bc", size=2, end=FinishReason.LENGTH)]
    recorder = observe(FakeAdmitter([script], admit_delay_s=0.05), body | {"stream": stream}, path)
    [first_s], [later_s], [(reason, whole_s)] = recorder.first_s, recorder.later_s, recorder.ends
    assert first_s >= 0.07
    assert later_s >= 0.03
    assert first_s + later_s <= whole_s < 60
    assert reason is FinishReason.LENGTH


def test_the_template_counts(monkeypatch):
    admitter = FakeAdmitter()
    render = admitter.tokenizer.render_chat

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return render(*args, **kwargs)

    monkeypatch.setattr(admitter.tokenizer, "render_chat", slow)
    recorder = observe(admitter, {"messages": [{"role": "user", "content": "x"}]}, CHAT)
    assert recorder.first_s[0] >= 0.05


def test_each_choice_counts():
    scripts = [says("one"), says("two", end=FinishReason.LENGTH), says("3 STOP", end=None), says("a")]
    recorder = observe(FakeAdmitter(scripts), {"prompt": ["p", "q"], "n": 2, "stop": "STOP"})
    assert recorder.reasons == {"stop": 3, "length": 1}
    assert (len(recorder.first_s), len(recorder.later_s)) == (4, 3 + 2 + 5 + 1)


def test_an_output_without_tokens_is_no_token():
    script = [*says("a", end=None), RequestOutput("r", finish_reason=FinishReason.LENGTH)]
    recorder = observe(FakeAdmitter([script]), {"prompt": "x"})
    assert (len(recorder.first_s), recorder.later_s, recorder.reasons) == (1, [], {"length": 1})


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ([RequestOutput("r", finish_reason=FinishReason.ERROR, error="NaN")], "error"),
        ([RequestOutput("r", finish_reason=FinishReason.ABORT)], "abort"),
        ([], "error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_are_told_once_and_siblings_are_aborted(ending, reason, stream):
    admitter = FakeAdmitter([[*says("ab", end=None), *ending], [60.0]])
    recorder = observe(admitter, {"prompt": "x", "n": 3, "stream": stream})
    assert recorder.reasons == Counter([reason, "abort", "abort"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts(stream):
    recorder = Recorder()
    admitter = FakeAdmitter([[*says("a", end=None), 60.0]])
    app = app_over(admitter, observer=recorder)
    body = {"prompt": "x", "stream": stream}
    asyncio.run(leave(app, PATH, body, lambda _: bool(recorder.first_s if stream else admitter.streams)))
    assert recorder.reasons == {"abort": 1}


def test_what_was_never_admitted_is_not_told():
    recorder = observe(FakeAdmitter(error=RuntimeError("full")), {"prompt": "x"})
    assert not recorder.ends
