"""What a request keeps count of."""

from collections import Counter

from engine.request import Request, SamplingParams


def make_request() -> Request:
    return Request("r", [5, 6, 7], SamplingParams(seed=1))


def test_tokens_of_prompt_and_output() -> None:
    request = make_request()
    for token in (8, 9, 8):
        request.append_output(token)
    assert request.num_tokens == 6
    everything = [5, 6, 7, 8, 9, 8]
    for start in range(7):
        for stop in range(start, 7):
            assert request.token_ids(start, stop) == everything[start:stop]


def test_an_expected_token_counts_before_it_is_known() -> None:
    request = make_request()
    request.expect_output()
    assert (request.num_tokens, request.num_pending_tokens) == (4, 1)
    assert request.token_ids(2, 4) == [7]
    request.expect_output()
    assert (request.num_tokens, request.num_pending_tokens) == (5, 2)
    request.append_output(8)
    assert (request.num_tokens, request.num_pending_tokens) == (5, 1)
    assert request.token_ids(2, 5) == [7, 8]
    request.append_output(9)
    assert (request.num_tokens, request.num_pending_tokens) == (5, 0)
    request.append_output(9)
    assert request.num_tokens == 6
    request.drop_expected_output()
    assert request.num_tokens == 6
    request.expect_output()
    request.expect_output()
    request.drop_expected_output()
    assert (request.num_tokens, request.num_pending_tokens) == (6, 0)


def test_outputs_are_counted_whenever_they_are_asked_for() -> None:
    request = make_request()
    assert request.output_counts == Counter()
    for token in (8, 9, 8):
        request.append_output(token)
    assert request.output_counts == Counter({8: 2, 9: 1})
    request.append_output(9)
    assert request.output_counts == request.output_counts == Counter({8: 2, 9: 2})
