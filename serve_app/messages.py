"""Messages between ingress and engine replicas: msgpack in the calls of a Serve handle, never pickle.

One streaming call carries one *group*: the prompts that one admission batch sends to one replica. A member is
one choice of one prompt; it is named by its index in the group.
"""

from typing import Any

import msgspec

from engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs

HEARTBEAT_S = 0.25  # a group that has nothing to say says so this often, also while it is queued
FRAME_WINDOW = 16  # past so many unacknowledged frames, the engine merges the outputs of HEARTBEAT_S into one


class SubmittedPrompt(msgspec.Struct, array_like=True):
    """One prompt and its choices, which stay together: they share the prompt's blocks."""

    token_ids: list[int]
    sampling: SamplingParams
    choices: list[tuple[str, int]]  # (request id, choice index)
    priority: int = 0
    tenant: str = ""
    outputs: list[list[int]] = []  # of each choice, the tokens that it has from earlier attempts; empty: none has any
    waited_s: float = 0.0  # since its admission, of which earlier attempts may have taken a part


class Submission(msgspec.Struct, array_like=True):
    """Opens a group. `attempt` counts from 0, of all members alike: how often they have been lost.

    `fingerprint`: of the only engines that may go on with them; empty: any may.
    """

    group_id: str
    attempt: int
    prompts: list[SubmittedPrompt]
    fingerprint: str = ""


class Opening(msgspec.Struct, tag="opening", array_like=True):
    """The first frame of an accepted group: who serves it, and how many blocks its KV cache has."""

    replica_id: str
    attempt: int
    fingerprint: str
    num_blocks: int


class Refusal(msgspec.Struct, tag="refusal", array_like=True):
    """The only frame of a group that was not accepted. None of its members has started: any other replica may.

    `fingerprint`: the replica's own, where it is not the one that was asked for. `is_full`: that is the only reason.
    """

    reason: str
    replica_id: str
    fingerprint: str = ""
    is_full: bool = False


class MemberOutput(msgspec.Struct, array_like=True):
    """New tokens of one member, merged over the steps since its last frame."""

    member: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    error: str | None = None
    logprobs: list[tuple[float, list[tuple[int, float]]]] = []


class TokenFrame(msgspec.Struct, tag="tokens", array_like=True):
    """Everything new of a group, in one message.

    `num_requests` is the replica's load, running and waiting; `num_waiting` those that its engine has not begun.
    """

    sequence: int
    num_requests: int
    num_waiting: int
    outputs: list[MemberOutput]


class Heartbeat(msgspec.Struct, tag="heartbeat", array_like=True):
    """The replica is alive, and its engine is healthy; nothing is new."""

    sequence: int
    num_requests: int
    num_waiting: int


Frame = Opening | Refusal | TokenFrame | Heartbeat


class Control(msgspec.Struct, array_like=True):
    """From an ingress to one replica, by id: credit for frames read, and members whose client has gone."""

    acknowledged: dict[str, int] = {}  # group id: sequence number of the last frame read
    aborted: dict[str, list[int]] = {}  # group id: members


class EngineStatus(msgspec.Struct, array_like=True):
    """Answer of a healthy replica to a readiness question."""

    replica_id: str
    fingerprint: str
    num_requests: int


def _encode_mapping(value: Any) -> dict[Any, Any]:
    """SamplingParams.logit_bias may be any mapping; msgpack knows dict."""
    return dict(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_mapping)
encode = _encoder.encode
decode_submission = msgspec.msgpack.Decoder(Submission).decode
decode_frame = msgspec.msgpack.Decoder(Frame).decode
decode_control = msgspec.msgpack.Decoder(Control).decode
decode_status = msgspec.msgpack.Decoder(EngineStatus).decode


def to_wire(member: int, output: RequestOutput) -> MemberOutput:
    return MemberOutput(
        member,
        list(output.token_ids),
        output.finish_reason,
        output.stop_token_id,
        output.num_cached_tokens,
        output.num_drafted_tokens,
        output.num_accepted_tokens,
        output.error,
        [(entry.logprob, list(entry.top)) for entry in output.logprobs],
    )


def from_wire(request_id: str, output: MemberOutput) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        token_ids=tuple(output.token_ids),
        logprobs=tuple(TokenLogprobs(logprob, tuple(top)) for logprob, top in output.logprobs),
        finish_reason=output.finish_reason,
        stop_token_id=output.stop_token_id,
        error=output.error,
        num_cached_tokens=output.num_cached_tokens,
        num_drafted_tokens=output.num_drafted_tokens,
        num_accepted_tokens=output.num_accepted_tokens,
    )
