"""The ingress's side of a group: one streaming call to one replica, and the prompts whose streams it feeds."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field

from msgspec.structs import replace
from ray.serve.handle import DeploymentResponseGenerator

from engine.request import FinishReason
from serve_app.errors import OverloadedError, UnavailableError
from serve_app.failover import MAX_FRUITLESS, Loss
from serve_app.messages import Opening, Submission, SubmittedPrompt
from serve_app.token_stream import RequestStream


def _opening_to_come() -> asyncio.Future[Opening]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class PlacedPrompt:
    """A prompt ready for an engine, and the streams of its choices, in the order of `prompt.choices`.

    It outlives the groups that it is in: each is an attempt, and the next one begins where the streams have got to.
    Times are those of time.monotonic().
    """

    prompt: SubmittedPrompt
    streams: list[RequestStream]
    opened: asyncio.Future[Opening] = field(default_factory=_opening_to_come)  # when an engine takes it first
    attempt: int = 0
    lost_s: float | None = None  # since when it has had no replica, after it has lost one
    paused_s: float | None = None  # the same, until it has a token again
    full_replicas: set[str] = field(default_factory=set)  # that have refused it for that alone
    chain: list[bytes] = field(default_factory=list)  # of the prompt, see PrefixIndex; empty where that does not count
    num_held_tokens: int = 0  # that the replica which it was last sent to was thought to have
    num_moves: int = 0
    admitted_s: float = field(default_factory=time.monotonic)
    _num_fruitless: int = 0
    _num_before: int = 0  # tokens of all choices, when its last attempt was lost

    @property
    def is_live(self) -> bool:
        return not all(stream.finished for stream in self.streams)

    @property
    def fingerprint(self) -> str:
        """Of the engine whose answer is to go on; empty while there is no token of it."""
        return next((stream.fingerprints[-1] for stream in self.streams if stream.token_ids), "")

    @property
    def num_received(self) -> int:
        """Tokens of all choices."""
        return sum(len(stream.token_ids) for stream in self.streams)

    @property
    def has_advanced(self) -> bool:
        """Its current attempt has brought a token."""
        return self.num_received > self._num_before

    def submission(self) -> tuple[SubmittedPrompt, list[RequestStream]]:
        """What an engine is sent: the choices that have not ended, with their tokens so far; and their streams.

        An attempt has request ids of its own: the engine may still have those of the last one.
        """
        suffix = f"#{self.attempt}" if self.attempt else ""
        live = [
            (stream, (request_id + suffix, choice_index))
            for stream, (request_id, choice_index) in zip(self.streams, self.prompt.choices, strict=True)
            if not stream.finished
        ]
        has_begun = any(stream.token_ids for stream, _ in live)
        prompt = replace(
            self.prompt,
            choices=[choice for _, choice in live],
            outputs=[list(stream.token_ids) for stream, _ in live] if has_begun else [],
            waited_s=time.monotonic() - self.admitted_s,
        )
        return prompt, [stream for stream, _ in live]

    def lose(self, loss: Loss, last_heard_s: float, *, was_open: bool) -> None:
        """Its attempt is over. Ends it where it has been the death of enough replicas."""
        if self.lost_s is None:
            self.lost_s = last_heard_s
        if loss is Loss.REFUSED:
            return
        if self.paused_s is None:
            self.paused_s = last_heard_s
        self._begin_attempt()
        if self.has_advanced:
            self._num_fruitless = 0
        elif loss is Loss.FAILED or (loss is Loss.SILENT and was_open):
            self._num_fruitless += 1
        self._num_before = self.num_received
        if self._num_fruitless > MAX_FRUITLESS:
            self.end(UnavailableError(f"{self._num_fruitless} engine replicas were lost while serving this request"))

    def move(self) -> None:
        """Its attempt is over before it has begun, and the next one is elsewhere."""
        self.num_moves += 1
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        self.attempt += 1
        for stream in self.streams:
            stream.begin_attempt(self.attempt)

    def end(self, error: OverloadedError | UnavailableError) -> None:
        """Ends whatever has not ended."""
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # an aborted request asks for it no more
        for stream in self.streams:
            stream.end(FinishReason.ERROR, str(error))


@dataclass(eq=False)
class Group:
    """One streaming call to one replica, as its reader sees it: an attempt at some prompts."""

    group_id: str
    attempt: int  # of all its prompts
    fingerprint: str  # of the only engines that may take it; empty: any may
    prompts: list[PlacedPrompt]
    replica_id: str | None  # where it is sent; None: to whichever comes up first
    streams: list[RequestStream] = field(default_factory=list)  # by member index
    items: list[PlacedPrompt] = field(default_factory=list)  # the prompt of each
    message: Submission = field(init=False)
    is_open: bool = False
    is_over: bool = False  # nothing of it counts any more
    response: DeploymentResponseGenerator[bytes] | None = None
    sequence: int = 0  # of the last frame read
    acknowledged: int = 0
    last_frame_s: float = field(default_factory=time.monotonic)  # before the first one: when it was made
    silent_s: float = 0.0  # since the last frame, as the housekeeping counts it
    _released: set[int] = field(default_factory=set)  # members that have gone elsewhere, while others stay

    def __post_init__(self) -> None:
        submitted = []
        for item in self.prompts:
            prompt, streams = item.submission()
            submitted.append(prompt)
            self.streams += streams
            self.items += [item] * len(streams)
        self.message = Submission(self.group_id, self.attempt, submitted, self.fingerprint)

    @property
    def num_live_members(self) -> int:
        return sum(self.is_live(member) for member in range(len(self.streams)))

    def is_live(self, member: int) -> bool:
        return member not in self._released and not self.streams[member].finished

    def has_released(self, member: int) -> bool:
        return member in self._released

    def release(self, item: PlacedPrompt) -> list[int]:
        """The prompt goes elsewhere, and whatever comes for it here is void. Returns its live members."""
        self.prompts.remove(item)
        live = [member for member, of in enumerate(self.items) if of is item and self.is_live(member)]
        self._released.update(live)
        return live

    def open(self, opening: Opening) -> None:
        """A replica has taken it."""
        self.is_open = True
        for stream in self.streams:
            stream.open(opening.fingerprint)
        for item in self.prompts:
            item.lost_s = None
            item.full_replicas.clear()
            if not item.opened.done():
                item.opened.set_result(opening)

    def close(self) -> None:
        """Nothing of it counts any more; closing the call aborts in the engine whatever still runs."""
        self.is_over = True
        if self.response is not None:
            with suppress(Exception):  # Serve raises here what a call that got nowhere has failed with
                self.response.cancel()
