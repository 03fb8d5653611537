"""`POST /v1/chat/completions`: what the engine is asked for, and what the client gets to see."""

import pytest

from engine.request import FinishReason, RequestOutput
from tests.serve_app.http.fakes import (
    EOS,
    MODEL,
    ByteTokenizer,
    FakeAdmitter,
    app_over,
    error_of,
    events_of,
    fetch,
    says,
    with_drafts,
)

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def ask(admitter: FakeAdmitter, **fields):
    return fetch(admitter, PATH, {"messages": HI, **fields})


def test_whole_answer():
    body = ask(FakeAdmitter([says("hello")]), model=MODEL).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "seed": 77,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(b"<user>hi<assistant>"),
            "completion_tokens": 6,  # the end-of-sequence token counts
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        },
    }


def test_streamed_answer_has_the_role_first_and_no_usage_unasked():
    events = events_of(ask(FakeAdmitter([says("héllo")]), stream=True))
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({e["id"] for e in events}) == 1
    assert all("usage" not in e and e["seed"] == 77 for e in events)
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas == [
        {"role": "assistant", "content": "h"},
        {"content": "é"},  # its first byte alone told nothing
        {"content": "l"},
        {"content": "l"},
        {"content": "o"},
        {},
    ]
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 5 + ["stop"]


def test_role_is_sent_with_the_first_token_though_it_has_no_text_yet():
    events = events_of(ask(FakeAdmitter([says("é")]), stream=True))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_coalesced_outputs_make_one_chunk():
    events = events_of(ask(FakeAdmitter([says("hello", size=100)]), stream=True))
    assert [e["choices"][0]["delta"] for e in events] == [{"role": "assistant", "content": "hello"}]
    assert events[0]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("n", [1, 3])
def test_usage_comes_last_and_is_null_before(n):
    admitter = FakeAdmitter([says("hello")])
    events = events_of(ask(admitter, stream=True, stream_options={"include_usage": True}, n=n))
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 6 * n,
        "total_tokens": 19 + 6 * n,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }
    assert events[-1]["usage"] == ask(FakeAdmitter([says("hello")]), n=n).json()["usage"]


def test_usage_comes_with_every_chunk():
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(ask(FakeAdmitter([says("hello", size=2)]), stream=True, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert len(counts) >= 4
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[-1] == 6
    assert all(e["usage"]["total_tokens"] == 19 + count for e, count in zip(events, counts, strict=True))
    assert events[-1]["choices"] == []
    plain = events_of(ask(FakeAdmitter([says("hello", size=2)]), stream=True, stream_options={"include_usage": True}))
    assert [event["choices"] for event in events] == [event["choices"] for event in plain]


def test_choices_keep_their_own_text_and_end():
    scripts = [says("one"), says("two!", end=FinishReason.LENGTH), says("three", size=2)]
    whole = ask(FakeAdmitter(scripts), n=3).json()["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in whole] == [
        (0, "one", "stop"),
        (1, "two!", "length"),
        (2, "three", "stop"),
    ]
    texts, ends = ["", "", ""], {}
    for event in events_of(ask(FakeAdmitter(scripts), n=3, stream=True)):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == ["one", "two!", "three"]
    assert ends == {0: "stop", 1: "length", 2: "stop"}


def test_slow_choice_does_not_hold_up_a_fast_one():
    admitter = FakeAdmitter([[0.2, *says("slow")], says("fast")])
    order = [e["choices"][0]["index"] for e in events_of(ask(admitter, n=2, stream=True))]
    assert order == [1] * 5 + [0] * 5


def test_logprobs():
    admitter = FakeAdmitter([says("hé", top=2)])
    entries = ask(admitter, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [e["token"] for e in entries] == ["h", r"bytes:\xc3", r"bytes:\xa9", "<|end|>"]
    assert [e["bytes"] for e in entries] == [[104], [0xC3], [0xA9], list(b"<|end|>")]
    assert entries[0]["top_logprobs"] == [
        {"token": "A", "logprob": -0.5, "bytes": [65]},
        {"token": "B", "logprob": -1.5, "bytes": [66]},
    ]
    assert admitter.calls[0].sampling.logprobs == 2
    streamed = events_of(ask(FakeAdmitter([says("hé", top=2)]), logprobs=True, top_logprobs=2, stream=True))
    assert [entry for e in streamed for entry in e["choices"][0]["logprobs"]["content"]] == entries


def test_logprobs_without_top_ask_for_the_chosen_token_only():
    admitter = FakeAdmitter([says("h", top=0)])
    (entry, _) = ask(admitter, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []
    assert admitter.calls[0].sampling.logprobs == 0


def test_impossible_logprob_is_still_json():
    from engine.request import TokenLogprobs

    script = [RequestOutput("r", (65,), (TokenLogprobs(float("-inf")),), FinishReason.LENGTH)]
    (entry,) = ask(FakeAdmitter([script]), logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == -9999.0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_chunk_borders(size, stream):
    """Neither the stop string nor what follows is sent or counted; the engine's request is freed."""
    admitter = FakeAdmitter([says("one STOP two", size=size, top=0)])
    response = ask(admitter, stop=["nope", "STOP"], logprobs=True, stream=stream, **usage(stream))
    if stream:
        events = events_of(response)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
        ends = [e["choices"][0]["finish_reason"] for e in events[:-1]]
        entries = [x for e in events[:-1] for x in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
        body = events[-1]
    else:
        body = response.json()
        (choice,) = body["choices"]
        text, ends, entries = choice["message"]["content"], [choice["finish_reason"]], choice["logprobs"]["content"]
    assert text == "one "
    assert ends[-1] == "stop"
    assert not any(ends[:-1])
    assert "".join(entry["token"] for entry in entries) == "one STOP"
    assert body["usage"]["completion_tokens"] == len("one STOP")
    assert admitter.streams[0].freed
    assert admitter.streams[0].num_read <= -(-8 // size)


def test_drafts_past_a_stop_string_are_not_accepted():
    """A round of seven drafts, of which the first five are right; the stop string is the second."""
    script = with_drafts([*says("ab", end=None), *says("c.defg", end=None, size=6)], (0, 0), (2, 1), (9, 6))
    body = ask(FakeAdmitter([script]), stop=".").json()
    assert body["choices"][0]["message"]["content"] == "abc"
    assert body["usage"]["completion_tokens"] == 4
    details = body["usage"]["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 6}


def usage(stream: bool) -> dict:
    return {"stream_options": {"include_usage": True}} if stream else {}


def test_stop_string_of_one_choice_leaves_the_other_running():
    admitter = FakeAdmitter([says("a STOP and more"), says("no such thing in here")])
    choices = ask(admitter, n=2, stop="STOP").json()["choices"]
    assert [c["message"]["content"] for c in choices] == ["a ", "no such thing in here"]
    assert [s.num_aborts for s in admitter.streams] == [1, 0]


@pytest.mark.parametrize("size", [1, 100])
def test_stop_is_shown_where_the_client_wants_it(size):
    admitter = FakeAdmitter([says("one STOP two", size=size)])
    body = ask(admitter, stop="STOP", include_stop_str_in_output=True).json()
    assert body["choices"][0]["message"]["content"] == "one STOP"
    assert body["usage"]["completion_tokens"] == 8
    script = [RequestOutput("r", (104, 105), (), FinishReason.STOP, stop_token_id=105)]
    body = ask(FakeAdmitter([script]), stop_token_ids=[105], include_stop_str_in_output=True).json()
    assert body["choices"][0]["message"]["content"] == "hi"


def test_stop_string_that_only_the_end_completes():
    """Half a character at the end becomes U+FFFD, which the client may have asked to stop at."""
    script = [RequestOutput("r", (104, 0xC3), (), FinishReason.LENGTH)]
    body = ask(FakeAdmitter([script]), stop="\ufffd").json()
    assert body["choices"][0]["message"]["content"] == "h"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 2


def test_half_a_character_at_the_end_is_shown_as_such():
    script = [RequestOutput("r", (104, 0xC3), (), FinishReason.LENGTH)]
    assert ask(FakeAdmitter([script])).json()["choices"][0]["message"]["content"] == "h\ufffd"


def test_stop_string_is_text_within_min_tokens():
    admitter = FakeAdmitter([says("a.b.c")])
    assert ask(admitter, stop=".", min_tokens=2).json()["choices"][0]["message"]["content"] == "a.b"


def test_held_back_text_comes_out_at_the_end():
    admitter = FakeAdmitter([says("almost STO", end=FinishReason.LENGTH)])
    (choice,) = ask(admitter, stop="STOP").json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("almost STO", "length")


def test_stop_token_has_no_text_but_counts():
    script = [RequestOutput("r", (104, 105), (), FinishReason.STOP, stop_token_id=105)]
    body = ask(FakeAdmitter([script]), stop_token_ids=[105]).json()
    assert body["choices"][0]["message"]["content"] == "h"
    assert body["usage"]["completion_tokens"] == 2


def test_end_token_that_does_not_end_it_is_not_shown():
    script = [RequestOutput("r", (104, EOS, 105), (), FinishReason.LENGTH)]
    body = ask(FakeAdmitter([script]), ignore_eos=True).json()
    assert body["choices"][0]["message"]["content"] == "hi"
    assert body["choices"][0]["finish_reason"] == "length"
    body = ask(FakeAdmitter([script]), ignore_eos=True, skip_special_tokens=False).json()
    assert body["choices"][0]["message"]["content"] == "h<|end|>i"


def test_messages_reach_the_template():
    admitter = FakeAdmitter()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "eve"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": ""},
    ]
    assert fetch(admitter, PATH, {"messages": messages}).status_code == 200
    (call,) = admitter.calls
    assert call.prompts == ("<system>be brief<user:eve>a\nb<assistant>c<user><assistant>",)
    assert not call.add_special_tokens
    fetch(admitter, PATH, {"messages": HI, "add_generation_prompt": False, "chat_template_kwargs": {"mood": ":)"}})
    assert admitter.calls[1].prompts == (":)<user>hi",)
    assert not admitter.tokenizer.continues_text


def test_template_that_refuses_the_messages_is_the_clients_error():
    from engine.errors import InvalidRequest

    class Picky(ByteTokenizer):
        def render_chat(self, *_args, **_kwargs):
            raise InvalidRequest("the chat template refused the messages: roles must alternate", "messages")

    error = error_of(ask(FakeAdmitter(tokenizer=Picky())), 400)
    assert (error["param"], "alternate" in error["message"]) == ("messages", True)


def test_every_sampling_field_reaches_the_engine():
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "logit_bias": {"5": -100, "6": 1.5}, "seed": 9,
        "stop": ["x", "y"], "stop_token_ids": [3, 4], "ignore_eos": True, "max_tokens": 11,
    }  # fmt: skip
    admitter = FakeAdmitter()
    response = ask(admitter, **fields, priority=-3, n=2, user="u", safety_identifier="s", metadata={"a": "b"})
    assert response.status_code == 200
    (call,) = admitter.calls
    expected = fields | {"logit_bias": {5: -100.0, 6: 1.5}, "stop": ("x", "y"), "stop_token_ids": (3, 4)}
    assert {name: getattr(call.sampling, name) for name in fields} == expected
    assert (call.priority, call.n, call.max_tokens, call.sampling.logprobs) == (-3, 2, 11, None)
    assert response.json()["seed"] == 9


def test_without_a_limit_the_context_is_the_limit():
    admitter = FakeAdmitter()
    ask(admitter, min_tokens=100)
    assert admitter.calls[0].max_tokens is None
    assert admitter.calls[0].sampling.max_tokens == admitter.max_model_len


@pytest.mark.parametrize("fields", [{"max_tokens": 5}, {"max_completion_tokens": 5}])
def test_both_names_of_the_limit(fields):
    admitter = FakeAdmitter()
    ask(admitter, **fields)
    ask(admitter, max_tokens=5, max_completion_tokens=5)
    assert [call.max_tokens for call in admitter.calls] == [5, 5]
    assert error_of(ask(admitter, max_tokens=5, max_completion_tokens=6), 400)["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("seed", "used"), [(0, 0), (2**63 - 1, 2**63 - 1), (-1, 2**63 - 1), (-5, 2**63 - 5), (-(2**63), 0)]
)
def test_any_64_bit_seed_is_mapped_and_reported(seed, used):
    admitter = FakeAdmitter()
    assert ask(admitter, seed=seed).json()["seed"] == used
    assert admitter.calls[0].sampling.seed == used


def test_model_defaults_fill_what_the_client_left_out():
    from serve_app.http.service import NoDefaults

    admitter = FakeAdmitter()
    app = app_over(admitter, defaults=NoDefaults(temperature=0.2, top_k=40), system_fingerprint="fp_x")
    body = fetch(admitter, PATH, {"messages": HI, "top_k": 0}, app=app).json()
    fetch(admitter, PATH, {"messages": HI, "temperature": None, "top_p": 0.5}, app=app)
    first, second = (call.sampling for call in admitter.calls)
    assert (first.temperature, first.top_k, first.top_p) == (0.2, 0, 1.0)
    assert (second.temperature, second.top_k, second.top_p) == (0.2, 40, 0.5)
    assert body["system_fingerprint"] == "fp_x"


def test_null_is_absent_everywhere():
    nulls = dict.fromkeys(
        ("temperature", "n", "stop", "seed", "logit_bias", "stream", "stream_options", "tools", "response_format",
         "max_tokens", "logprobs", "metadata", "audio", "model", "no_such_field")
    )  # fmt: skip
    assert ask(FakeAdmitter(), **nulls).status_code == 200


def test_values_that_ask_for_what_happens_anyway_are_accepted():
    response = ask(
        FakeAdmitter(), response_format={"type": "text"}, modalities=["text"], service_tier="auto", store=False,
        tool_choice="none", skip_special_tokens=True, top_k=-1,
        stream=True, stream_options={"include_usage": False, "include_obfuscation": False},
    )  # fmt: skip
    assert response.status_code == 200
