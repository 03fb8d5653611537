from types import MappingProxyType

import pytest

from engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from serve_app import messages


def test_submission_round_trip() -> None:
    sampling = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias=MappingProxyType({7: -1.5}),
        seed=2**63 - 1,
        max_tokens=9,
        min_tokens=2,
        stop=("end", "\n"),
        stop_token_ids=(3, 4),
        ignore_eos=True,
        logprobs=3,
    )
    prompt = messages.SubmittedPrompt([1, 2, 49151], sampling, [("a", 0), ("b", 1)], priority=-2)
    submission = messages.Submission("group", 1, [prompt])
    decoded = messages.decode_submission(messages.encode(submission))
    assert decoded == submission
    assert hash(decoded.prompts[0].sampling.stop) == hash(sampling.stop)  # tuples stay tuples


@pytest.mark.parametrize(
    "output",
    [
        RequestOutput("r", (5,)),
        RequestOutput("r", (1, 2), finish_reason=FinishReason.STOP, stop_token_id=2, num_cached_tokens=16),
        RequestOutput("r", (1, 2), num_cached_tokens=3, num_drafted_tokens=900, num_accepted_tokens=70),
        RequestOutput("r", (1,), (TokenLogprobs(-0.25, ((1, -0.25), (9, -3.0))),)),
        RequestOutput("r", finish_reason=FinishReason.ERROR, error="broken"),
        RequestOutput("r", finish_reason=FinishReason.ABORT),
    ],
)
def test_output_round_trip(output: RequestOutput) -> None:
    frame = messages.TokenFrame(3, 8, 1, [messages.to_wire(2, output)])
    decoded = messages.decode_frame(messages.encode(frame))
    assert isinstance(decoded, messages.TokenFrame)
    assert (decoded.sequence, decoded.num_requests, decoded.outputs[0].member) == (3, 8, 2)
    assert messages.from_wire("r", decoded.outputs[0]) == output


@pytest.mark.parametrize(
    "frame",
    [messages.Opening("replica", 2, "fp", 9), messages.Refusal("full", "replica"), messages.Heartbeat(4, 1, 0)],
)
def test_frame_round_trip(frame: messages.Frame) -> None:
    assert messages.decode_frame(messages.encode(frame)) == frame


def test_control_round_trip() -> None:
    control = messages.Control({"group": 4}, {"other": [0, 3]})
    assert messages.decode_control(messages.encode(control)) == control


def test_one_token_costs_few_bytes() -> None:
    """64 streams at hundreds of steps a second: the message is the cost."""
    outputs = [messages.to_wire(member, RequestOutput("r", (1000,))) for member in range(64)]
    assert len(messages.encode(messages.TokenFrame(1, 64, 0, outputs))) < 64 * 16
