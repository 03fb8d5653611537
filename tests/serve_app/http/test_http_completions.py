"""`POST /v1/completions`."""

import pytest

from engine.request import FinishReason, RequestOutput
from tests.serve_app.http.fakes import MODEL, FakeAdmitter, error_of, events_of, fetch, says

PATH = "/v1/completions"


def ask(admitter: FakeAdmitter, prompt="ab", **fields):
    return fetch(admitter, PATH, {"prompt": prompt, **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ("text",)),
        ("", ("",)),  # what an empty text means is the tokenizer's business: some models add a first token
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompt_forms(prompt, prompts):
    admitter = FakeAdmitter()
    body = ask(admitter, prompt).json()
    assert admitter.calls[0].prompts == prompts
    assert admitter.calls[0].add_special_tokens
    assert [c["index"] for c in body["choices"]] == list(range(len(prompts)))


def test_whole_answer():
    body = ask(FakeAdmitter([says("hello")])).json()
    assert body.pop("id").startswith("cmpl-")
    assert (body["object"], body["model"], body["seed"]) == ("text_completion", MODEL, 77)
    assert body["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["completion_tokens"] == 6


def test_an_answer_of_two_kinds_of_engines_says_so():
    first, second = says("he", end=None), says("llo")
    script = ["fp_a", *first, "fp_b", *second]
    body = ask(FakeAdmitter([script])).json()
    assert (body["system_fingerprint"], body["system_fingerprints"]) == ("fp_b", ["fp_a", "fp_b"])
    chunks = events_of(ask(FakeAdmitter([script]), stream=True))
    told = [(c["choices"][0]["text"], c["system_fingerprint"], c.get("system_fingerprints")) for c in chunks]
    assert told[:2] == [("h", "fp_a", None), ("e", "fp_a", None)]
    assert told[2:] == [(text, "fp_b", ["fp_a", "fp_b"]) for text in ("l", "l", "o", "")]
    assert "system_fingerprints" not in ask(FakeAdmitter([["fp_a", *second]])).json()


def test_text_goes_on_from_the_prompts():
    admitter = FakeAdmitter()
    ask(admitter)
    assert admitter.tokenizer.continues_text


def test_default_limit_is_openais():
    admitter = FakeAdmitter()
    ask(admitter)
    ask(admitter, max_tokens=None)
    assert [call.max_tokens for call in admitter.calls] == [16, 16]


def test_choices_are_numbered_prompt_by_prompt_and_prompts_count_once():
    scripts = [says(t) for t in ("a0", "a1", "b0", "b1")]
    admitter = FakeAdmitter(scripts)
    body = ask(admitter, ["aaa", "bb"], n=2, best_of=2).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 6},  # 3 for each prompt's first choice
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }
    texts = [""] * 4
    for event in events_of(ask(FakeAdmitter(scripts), ["aaa", "bb"], n=2, stream=True)):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["a0", "a1", "b0", "b1"]


def test_cached_tokens_are_those_of_the_first_choice():
    """Its siblings also find what it has just computed, which saved the client's request nothing."""
    scripts = [[RequestOutput("r", (97,), (), FinishReason.LENGTH, num_cached_tokens=cached)] for cached in (2, 16)]
    body = ask(FakeAdmitter(scripts), n=2).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize("prompt", ["Q:é ", list("Q:é ".encode())])
def test_echo(prompt):
    body = ask(FakeAdmitter([says("yes")]), prompt, echo=True, n=2).json()
    assert [c["text"] for c in body["choices"]] == ["Q:é yes"] * 2
    assert body["usage"]["completion_tokens"] == 8
    events = events_of(ask(FakeAdmitter([says("yes")]), prompt, echo=True, stream=True))
    assert [e["choices"][0]["text"] for e in events] == ["Q:é y", "e", "s", ""]


def test_logprobs_have_offsets_into_the_text():
    admitter = FakeAdmitter([says("aéb", end=FinishReason.LENGTH, top=1)])
    logprobs = ask(admitter, logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", r"bytes:\xc3", r"bytes:\xa9", "b"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [
            {"A": -0.5, "a": -0.5},
            {"A": -0.5, r"bytes:\xc3": -0.5},
            {"A": -0.5, r"bytes:\xa9": -0.5},
            {"A": -0.5, "b": -0.5},
        ],
        "text_offset": [0, 1, 1, 2],
    }
    assert admitter.calls[0].sampling.logprobs == 1
    streamed = events_of(ask(FakeAdmitter([says("aéb", end=FinishReason.LENGTH, top=1)]), logprobs=1, stream=True))
    for name, values in logprobs.items():
        assert [x for e in streamed for x in e["choices"][0]["logprobs"][name]] == values


def test_stop_string_ends_one_prompt_of_several():
    admitter = FakeAdmitter([says("a\n\nb"), says("no end")])
    body = ask(admitter, ["x", "y"], stop="\n\n").json()
    assert [(c["text"], c["finish_reason"]) for c in body["choices"]] == [("a", "stop"), ("no end", "stop")]
    assert body["usage"]["completion_tokens"] == 3 + 7
    assert [s.num_aborts for s in admitter.streams] == [1, 0]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"prompt": []}, "prompt", None),
        ({"prompt": ["a", 1]}, "prompt", None),
        ({"prompt": [True]}, "prompt", None),
        ({"prompt": [-1]}, "prompt", None),
        ({"prompt": [2**31]}, "prompt", None),
        ({"prompt": [[1], []]}, "prompt[1]", None),
        ({"prompt": [[1], ["a"]]}, "prompt[1]", None),
        ({"prompt": {"a": 1}}, "prompt", None),
        ({"prompt": 3.5}, "prompt", None),
        ({"prompt": None}, "prompt", None),
        ({"prompt": ["a"] * 1025}, "prompt", None),
        ({"prompt": ["a"] * 9, "n": 128}, "n", None),
        ({"logprobs": 21}, "logprobs", None),
        ({"logprobs": True}, "logprobs", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"messages": []}, "messages", "unknown_parameter"),
    ],
)
def test_refused(fields, param, code):
    admitter = FakeAdmitter()
    error = error_of(fetch(admitter, PATH, {"prompt": "x", **fields}), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"].startswith(param)
    assert not admitter.calls
