"""Text prompts to token ids: many in one call to the tokenizer, and off the event loop."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer

LONG_TEXT_CHARS = 32_768  # tokenized alone (some 10 ms), so that nobody waits for it in a batch
CHARS_PER_TOKEN = 16  # no text of a language is as dense as this; only such a text is tried by its beginning first
SLACK_TOKENS = 64  # the cut may end inside a word


@dataclass(frozen=True)
class TextPrompt:
    """A prompt as text. `add_special_tokens` is False where a chat template has written them."""

    text: str
    add_special_tokens: bool


class PromptEncoder:
    """Tokenizes prompts for one model. Every method may be called concurrently."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._alone = asyncio.Semaphore(1)  # long texts take turns: together they would take every core

    async def encode_long(self, prompt: TextPrompt) -> list[int] | None:
        """Ids of a prompt too long for a batch; None for the usual one, which belongs into a batch.

        Raises:
            InvalidRequest: far past the context length. The rest of such a text is not even tokenized.
        """
        if len(prompt.text) <= LONG_TEXT_CHARS:
            return None
        async with self._alone:
            head_chars = self._max_model_len * CHARS_PER_TOKEN
            if len(prompt.text) > head_chars:
                head = await asyncio.to_thread(self._encode, [TextPrompt(prompt.text[:head_chars], False)])
                assert not isinstance(head[0], InvalidRequest)
                if len(head[0]) > self._max_model_len + SLACK_TOKENS:
                    raise too_long(self._max_model_len, f"more than {len(head[0]) - SLACK_TOKENS}", prompt)
            [ids] = await asyncio.to_thread(self._encode, [prompt])
        if isinstance(ids, InvalidRequest):
            raise ids
        return ids

    async def encode(self, prompts: Sequence[TextPrompt]) -> list[list[int] | InvalidRequest]:
        """One list of ids for each prompt; an error takes the place of one that cannot be tokenized."""
        return await asyncio.to_thread(self._encode, prompts) if prompts else []

    def _encode(self, prompts: Sequence[TextPrompt]) -> list[list[int] | InvalidRequest]:
        results: list[list[int] | InvalidRequest] = [[] for _ in prompts]
        for special in (True, False):
            places = [place for place, prompt in enumerate(prompts) if prompt.add_special_tokens is special]
            encoded = self._encode_together([prompts[place].text for place in places], special)
            for place, ids in zip(places, encoded, strict=True):
                results[place] = ids
        return results

    def _encode_together(self, texts: list[str], special: bool) -> Sequence[list[int] | InvalidRequest]:
        if not texts:
            return []
        try:
            return self._tokenizer.encode_batch(texts, add_special_tokens=special)
        except Exception as error:  # some text among them, such as a lone surrogate: find out which
            if len(texts) == 1:
                if isinstance(error, InvalidRequest):
                    return [error]
                return [InvalidRequest(f"the prompt cannot be tokenized: {error}", "prompt")]
            return [self._encode_together([text], special)[0] for text in texts]


def too_long(max_model_len: int, count: int | str, prompt: TextPrompt | None) -> InvalidRequest:
    """The error for a prompt of `count` tokens; `prompt` None: it came as token ids."""
    from_chat = prompt is not None and not prompt.add_special_tokens
    return InvalidRequest(
        f"this model's maximum context length is {max_model_len} tokens, but the prompt has {count} tokens",
        "messages" if from_chat else "prompt",
    )
