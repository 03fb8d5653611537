from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import FinishReason, RequestOutput, TokenLogprobs
from serve_app.output_buffer import OutputBuffer


def test_lone_output_passes_unchanged() -> None:
    buffer = OutputBuffer()
    output = RequestOutput("r", (1, 2), (TokenLogprobs(-1.0), TokenLogprobs(-2.0)), num_cached_tokens=4)
    buffer.add(output)
    assert buffer
    assert buffer.take() is output
    assert not buffer
    assert buffer.take() is None


def test_output_without_tokens_ends_what_waits() -> None:
    buffer = OutputBuffer()
    buffer.add(RequestOutput("r", (1,)))
    buffer.add(RequestOutput("r", finish_reason=FinishReason.ERROR, error="broken"))
    assert buffer.take() == RequestOutput("r", (1,), finish_reason=FinishReason.ERROR, error="broken")


def test_merged_output_has_the_latest_counts() -> None:
    buffer = OutputBuffer()
    for step in range(1, 4):
        buffer.add(
            RequestOutput("r", (step,), num_cached_tokens=4, num_drafted_tokens=3 * step, num_accepted_tokens=step)
        )
    expected = RequestOutput("r", (1, 2, 3), num_cached_tokens=4, num_drafted_tokens=9, num_accepted_tokens=3)
    assert buffer.take() == expected


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.booleans()), max_size=20))
def test_no_token_is_lost_or_doubled(steps: list[tuple[list[int], bool]]) -> None:
    """Outputs of any sizes, taken at any time."""
    buffer, taken, count = OutputBuffer(), [], 0
    for ids, take in steps:
        logprobs = tuple(TokenLogprobs(-float(count + place)) for place in range(len(ids)))
        buffer.add(RequestOutput("r", tuple(ids), logprobs))
        count += len(ids)
        if take:
            taken.append(buffer.take())
            assert not buffer
    taken.append(buffer.take())
    outputs = [output for output in taken if output is not None]
    assert [id_ for output in outputs for id_ in output.token_ids] == [id_ for ids, _ in steps for id_ in ids]
    assert [-entry.logprob for output in outputs for entry in output.logprobs] == list(range(count))
