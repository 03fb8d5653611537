"""Log-probabilities as the two endpoints write them. One entry for each token that `usage` counts."""

from typing import Any

from engine.request import TokenLogprobs
from engine.tokenizer import IncrementalDetokenizer, Tokenizer

# JSON has no infinity; OpenAI writes this for tokens that cannot occur.
_LOWEST = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion or of one of its chunks."""
    content = []
    for token_id, position in zip(token_ids, logprobs, strict=True):
        top = [_chat_token(tokenizer, other, logprob) for other, logprob in position.top]
        content.append({**_chat_token(tokenizer, token_id, position.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    token_bytes = tokenizer.token_bytes(token_id)
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, _LOWEST),
        "bytes": list(token_bytes),
    }


class CompletionLogprobs:
    """`choices[].logprobs` of one text completion, whose offsets count from the start of its text."""

    def __init__(self, tokenizer: Tokenizer, detokenizer: IncrementalDetokenizer) -> None:
        self._tokenizer = tokenizer
        # One of its own: stop strings do not apply here, since the tokens that make one up have offsets as well.
        self._detokenizer = detokenizer
        self._offset_chars = 0

    def body(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
        """The entries of the choice's next tokens."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset_chars)
            self._offset_chars += len(self._detokenizer.push([token_id]))
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in token_ids],
            "token_logprobs": [max(position.logprob, _LOWEST) for position in logprobs],
            "top_logprobs": [
                self._top(token_id, position) for token_id, position in zip(token_ids, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, position: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and always the chosen one. Of tokens with the same text the likelier stays."""
        top: dict[str, float] = {}
        for other, logprob in (*position.top, (token_id, position.logprob)):
            top.setdefault(self._tokenizer.token_text(other), max(logprob, _LOWEST))
        return top
