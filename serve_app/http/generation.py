"""From the token streams of one HTTP request to text: stop strings, counting, aborting what is not needed."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from starlette.types import Receive

from engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from engine.text import TextStream
from engine.tokenizer import IncrementalDetokenizer
from serve_app.admission import Admitted, Admitter, GenerateCall, TokenStream
from serve_app.errors import GenerationError, OverloadedError, TimedOutError
from serve_app.http.answer_observer import AnswerObserver, ChoiceTimer
from serve_app.http.call_timer import CallTimer
from serve_app.http.disconnect import until_disconnect


@dataclass(frozen=True)
class ChoiceDelta:
    """What came of one choice since its last delta (or, joined, all of it)."""

    index: int
    text: str  # what the client sees: by default neither a stop string nor a stop token
    token_ids: tuple[int, ...]  # all that count, up to and including the one that ended the choice
    logprobs: tuple[TokenLogprobs, ...]  # one for each of token_ids, or none at all
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class TextRules:
    """How tokens become text."""

    detokenizer: Callable[[], IncrementalDetokenizer]  # a new one for each choice
    include_stop: bool = False  # the stop string or stop token that ended a choice is shown


@dataclass(frozen=True)
class Usage:
    """Token counts of one HTTP request. A prompt counts once, however many choices continue it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache
    accepted_tokens: int  # of the completions, proposed as drafts
    rejected_tokens: int  # the other drafts

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted_tokens,
                "rejected_prediction_tokens": self.rejected_tokens,
            },
        }


class Generation:
    """One admitted call. Whoever holds it calls `abort` when it is done with it, whatever happened."""

    def __init__(
        self,
        admitted: Admitted,
        call: GenerateCall,
        rules: TextRules,
        observer: AnswerObserver,
        retry_after_s: Callable[[], float],
    ) -> None:
        assert len(admitted.streams) == len(admitted.prompt_token_ids) * call.n
        self.prompt_token_ids = admitted.prompt_token_ids
        self.seed = admitted.seed
        self._n = call.n
        self._streams = admitted.streams
        self._choices = [_Choice(index, call.sampling, rules) for index in range(len(admitted.streams))]
        self._timers = [ChoiceTimer(observer, call.arrival_s) for _ in admitted.streams]
        self._running = set(range(len(admitted.streams)))
        self._call = call
        self._observer = observer
        self._retry_after_s = retry_after_s
        self._timed_out: TimedOutError | None = None
        self._timer = CallTimer(call, self._on_timeout)

    @property
    def fingerprints(self) -> list[str]:
        """Of the engines that the answer comes from up to now, each once."""
        return list(dict.fromkeys(each for stream in self._streams for each in stream.fingerprints))

    @property
    def usage(self) -> Usage:
        """Up to now."""
        firsts = self._choices[:: self._n]  # a prompt's other choices also find what the first has just computed
        return Usage(
            prompt_tokens=sum(len(ids) for ids in self.prompt_token_ids),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in firsts),
            accepted_tokens=sum(choice.num_accepted_tokens for choice in self._choices),
            rejected_tokens=sum(choice.num_drafted_tokens - choice.num_accepted_tokens for choice in self._choices),
        )

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """The deltas of all choices in the order in which they arrive.

        Raises:
            GenerationError: a choice failed. Its siblings run until `abort`.
            TimedOutError: the call's time is over.
        """
        async with aclosing(_merged(self._streams)) as outputs:
            async for index, output in outputs:
                if self._timed_out is not None:
                    raise self._timed_out
                if index not in self._running:
                    continue  # what came after a stop string
                if output is None:
                    self._timers[index].on_end(FinishReason.ERROR)
                    raise GenerationError("the engine ended a stream before it was finished")
                yield self._delta(index, output)
                if not self._running:
                    return

    def abort(self) -> None:
        """Free every choice that has not ended. Returns at once, and may be called again."""
        self._timer.stop()
        while self._running:
            index = self._running.pop()
            self._timers[index].on_end(FinishReason.ABORT)
            self._streams[index].abort()

    def _on_timeout(self, has_begun: bool) -> None:
        """Free the call's choices, whether or not anybody is reading. Whoever reads gets the error."""
        self._timed_out = self._call.limits.error(has_begun, self._retry_after_s())
        self._observer.on_timed_out(self._timed_out.limit, len(self._running))
        for index in self._running:
            self._timers[index].on_end(FinishReason.ERROR)
            self._streams[index].abort()

    def _delta(self, index: int, output: RequestOutput) -> ChoiceDelta:
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self._timers[index].on_end(output.finish_reason)
            raise GenerationError(output.error or "the engine aborted the request")
        delta = self._choices[index].delta(output)
        if delta.token_ids:
            self._timers[index].on_tokens()
            self._timer.begin()
        if delta.finish_reason is not None:
            self._timers[index].on_end(delta.finish_reason)
            self._running.discard(index)
            if output.finish_reason is None:  # a stop string matched, of which the engine knows nothing
                self._streams[index].abort()
            if not self._running:
                self._timer.stop()
        return delta


class _Choice:
    """The text of one choice, and what it counts up to now."""

    def __init__(self, index: int, sampling: SamplingParams, rules: TextRules) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0
        self._index = index
        self._include_stop = rules.include_stop
        self._text = TextStream(rules.detokenizer(), sampling.stop, sampling.min_tokens, rules.include_stop)

    def delta(self, output: RequestOutput) -> ChoiceDelta:
        token_ids, finish_reason = output.token_ids, output.finish_reason
        # The token that ended the choice counts in any case.
        hides_last = output.stop_token_id is not None and not self._include_stop
        pushed = self._text.push(token_ids[:-1] if hides_last else token_ids)
        text, stop = pushed.text, pushed.stop
        if stop is not None:
            token_ids = token_ids[: pushed.num_tokens_used]
        elif finish_reason is not None:
            rest = self._text.finish()
            text, stop = text + rest.text, rest.stop
        if stop is not None:
            finish_reason = FinishReason.STOP
        self._count(output, len(token_ids))
        return ChoiceDelta(self._index, text, token_ids, output.logprobs[: len(token_ids)], finish_reason)

    def _count(self, output: RequestOutput, num_tokens: int) -> None:
        """num_tokens: of the output, those that count: a stop string cuts off the end of the last one.

        In a round, accepted drafts come before the token behind them, so what is left of a round is drafts first.
        Of an output that several rounds were merged into, that gives the most that there can be.
        """
        self.num_tokens += num_tokens
        self.num_cached_tokens = output.num_cached_tokens
        self.num_drafted_tokens = output.num_drafted_tokens
        self.num_accepted_tokens += min(output.num_accepted_tokens - self.num_accepted_tokens, num_tokens)


async def start(
    receive: Receive, admitter: Admitter, call: GenerateCall, rules: TextRules, observer: AnswerObserver
) -> Generation:
    """Admit `call`. When the client leaves meanwhile, whatever is admitted after that is aborted.

    Raises:
        InvalidRequest, OverloadedError, UnavailableError, TimedOutError: as `Admitter.admit`.
        starlette.requests.ClientDisconnect: the client left.
    """
    # An admission is shared with other requests: it is left alone, and what comes of it is given back.
    admission = asyncio.ensure_future(admitter.admit(call))
    try:
        admitted = await until_disconnect(receive, asyncio.shield(admission))
    except OverloadedError as error:
        observer.on_rejected(error.reason, call.num_choices)
        raise
    except TimedOutError as error:
        observer.on_timed_out(error.limit, call.num_choices)
        raise
    except BaseException:
        _orphans.add(admission)
        admission.add_done_callback(_abort_orphan)
        raise
    return Generation(admitted, call, rules, observer, admitter.retry_after_s)


_orphans: set[asyncio.Future[Admitted]] = set()  # the event loop itself keeps no strong reference


def _abort_orphan(admission: asyncio.Future[Admitted]) -> None:
    _orphans.discard(admission)
    if not admission.cancelled() and admission.exception() is None:
        for stream in admission.result().streams:
            stream.abort()


def joined(index: int, deltas: list[ChoiceDelta]) -> ChoiceDelta:
    """All of one choice as a single delta."""
    return ChoiceDelta(
        index,
        "".join(delta.text for delta in deltas),
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        tuple(logprobs for delta in deltas for logprobs in delta.logprobs),
        deltas[-1].finish_reason,
    )


async def _merged(streams: list[TokenStream]) -> AsyncGenerator[tuple[int, RequestOutput | None], None]:
    """The outputs of all streams with the stream's index, in the order in which they arrive; None: it has ended."""
    if len(streams) == 1:  # the usual case needs neither task nor queue
        async for output in streams[0]:
            yield 0, output
        yield 0, None
        return

    # Bounded, so that a stream whose reader is slow coalesces its outputs instead of queueing them here.
    queue: asyncio.Queue[tuple[int, RequestOutput | None] | Exception] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncIterator[RequestOutput]) -> None:
        try:
            async for output in stream:
                await queue.put((index, output))
            await queue.put((index, None))
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.ensure_future(pump(index, aiter(stream))) for index, stream in enumerate(streams)]
    try:
        while True:  # until the reader has had enough
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
