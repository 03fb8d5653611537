"""Outputs of one request on their way to a slower reader, merged while they wait."""

from engine.request import RequestOutput, TokenLogprobs


class OutputBuffer:
    """Holds at most one output: what has come since the last `take`, in order.

    Its memory is bounded by the request's `max_tokens`, whatever the reader does.
    """

    __slots__ = ("_latest", "_logprobs", "_token_ids")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._latest: RequestOutput | None = None

    def __bool__(self) -> bool:
        return self._latest is not None

    def add(self, output: RequestOutput) -> None:
        assert self._latest is None or self._latest.finish_reason is None, "an output after the last one"
        self._token_ids.extend(output.token_ids)
        self._logprobs.extend(output.logprobs)
        self._latest = output

    def take(self) -> RequestOutput | None:
        """Everything since the last call as one output, or None."""
        latest = self._latest
        if latest is None:
            return None
        self._latest = None
        if len(self._token_ids) == len(latest.token_ids):  # the common case: nothing was merged
            self._token_ids.clear()
            self._logprobs.clear()
            return latest
        merged = RequestOutput(
            request_id=latest.request_id,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            finish_reason=latest.finish_reason,
            stop_token_id=latest.stop_token_id,
            error=latest.error,
            num_cached_tokens=latest.num_cached_tokens,
            num_drafted_tokens=latest.num_drafted_tokens,
            num_accepted_tokens=latest.num_accepted_tokens,
        )
        self._token_ids.clear()
        self._logprobs.clear()
        return merged
