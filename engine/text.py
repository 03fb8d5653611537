"""The text of one request as it grows: detokenized, and cut at the first stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.tokenizer import IncrementalDetokenizer


class TextDelta(NamedTuple):
    """What one push adds. A named tuple, as one is made per request and step."""

    text: str  # to be sent
    num_tokens_used: int  # of the tokens pushed: up to the one that completed a stop string, else all
    stop: str | None = None  # the stop string that ended the text; nothing follows


class TextStream:
    """Turns the tokens of one request into text that can be sent as it comes.

    The text ends at the first stop string, which is the one that is complete after the fewest tokens; of several
    complete after the same token, the one that starts first, and of those the shortest. The text from its start on is
    dropped, except that `include_stop` keeps the stop string itself. Tokens count as they would one by one, however
    they are grouped in pushes.

    A stop string that is complete within the first `min_tokens` tokens is text like any other; one that only begins
    there counts.

    Text that may be the beginning of a stop string is held back until it cannot be. Without stop strings nothing is
    searched or held, and a push costs what detokenizing costs.
    """

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        assert all(stop), "an empty stop string would end every text at its beginning"
        self._detokenizer = detokenizer
        self._stop = stop
        self._first_characters = frozenset(text[0] for text in stop)
        self._max_held = max(map(len, stop), default=1) - 1
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._held = ""  # the longest end of the text so far that begins a stop string
        self._num_tokens = 0
        self._ended = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens. Nothing may be pushed after a stop string or `finish`."""
        assert not self._ended, "the text has ended"
        if not self._stop:
            self._num_tokens += len(token_ids)
            return TextDelta(self._detokenizer.push(token_ids), len(token_ids))
        sent: list[str] = []
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            new = self._detokenizer.push((token_id,))
            if not new:
                continue
            text, stop = self._advance(new)
            sent.append(text)
            if stop is not None:
                return TextDelta("".join(sent), index + 1, stop)
        return TextDelta("".join(sent), len(token_ids))

    def finish(self) -> TextDelta:
        """The rest of the text, when the tokens end without a stop string: unfinished characters and what was held
        back. The rest may itself complete a stop string, of the last token."""
        assert not self._ended, "the text has ended"
        self._ended = True
        rest = self._detokenizer.finish()
        if not self._stop:
            return TextDelta(rest, 0)
        text, stop = self._advance(rest) if rest else ("", None)
        if stop is not None:
            return TextDelta(text, 0, stop)
        return TextDelta(text + self._held, 0)

    def _advance(self, new: str) -> tuple[str, str | None]:
        """Add text of the newest token; return what may be sent, and the stop string if there is one."""
        if not self._held and self._first_characters.isdisjoint(new):
            return new, None
        text = self._held + new
        if self._num_tokens > self._min_tokens and (found := self._find_stop(text)) is not None:
            self._ended = True
            start, stop = found
            return text[: start + len(stop) if self._include_stop else start], stop
        border = self._held_from(text)
        self._held = text[border:]
        return text[:border], None

    def _find_stop(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string starts, and which. One that ends inside the text held back was complete before
        this token, and passed over because of `min_tokens`."""
        best: tuple[int, int] | None = None
        num_old = len(self._held)
        for stop in self._stop:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0 and (best is None or (start, len(stop)) < best):
                best = (start, len(stop))
        return None if best is None else (best[0], text[best[0] : best[0] + best[1]])

    def _held_from(self, text: str) -> int:
        """Where the longest end of `text` begins that is the beginning, and not the whole, of a stop string."""
        for start in range(max(0, len(text) - self._max_held), len(text)):
            if text[start] in self._first_characters:
                end = text[start:]
                if any(len(end) < len(stop) and stop.startswith(end) for stop in self._stop):
                    return start
        return len(text)
