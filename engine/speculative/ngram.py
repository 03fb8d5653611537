"""Drafts without a model: a request that repeats itself or its prompt is continued as it went on the last time."""

from collections.abc import Sequence

from engine.request import Request
from engine.speculative.proposer import DraftOrder

# Measured with the default model's tokens and up to 4 drafts, on 25 source files of this project that are rewritten to
# their next version, and on the model's own answers to requests for edits and to plain questions. Tokens a round for
# the source files: 3.12, 3.28 and 3.29 with matches of at most 5, 16 and 32 tokens; 3.16 and 3.29 with 8 and 64
# occurrences, 3.29 with all of them. A minimum of 3 loses 5 to 8 % of the tokens a round. One of 1 gains up to 7 %, but
# for questions it more than doubles the drafts and halves their acceptance.
MIN_MATCH = 2  # tokens; the index below is one of pairs
MAX_MATCH = 32
MAX_OCCURRENCES = 64  # that are compared, so that a text of few words costs no more than another


class TokenIndex:
    """Where each pair of tokens of one growing text occurred, as chains from an occurrence to the one before it.

    This is the hash chain of LZ77 compressors (RFC 1951, section 4). A token is added in constant time, and finding
    the longest match looks at up to MAX_OCCURRENCES places. It takes about 100 bytes a token.
    """

    __slots__ = ("_last_ends", "_previous_ends", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._last_ends: dict[int, int] = {}  # by pair: the position behind its last occurrence
        self._previous_ends = [0, 0]  # by position: where the pair that ends there ended before; 0 if nowhere

    def extend(self, token_ids: Sequence[int]) -> None:
        tokens, last_ends, previous_ends = self.tokens, self._last_ends, self._previous_ends
        start = max(len(tokens) - 1, 0)
        tokens += token_ids
        for end, (first, second) in enumerate(zip(tokens[start:], tokens[start + 1 :], strict=False), start + 2):
            pair = first << 32 | second
            previous_ends.append(last_ends.get(pair, 0))
            last_ends[pair] = end

    @property
    def has_match(self) -> bool:
        """Whether the last MIN_MATCH tokens occurred before."""
        return self._previous_ends[-1] > 0

    def match_end(self) -> int:
        """The position behind the earlier occurrence of the longest possible end of the text; 0 if there is none.

        Lengths count up to MAX_MATCH. Of occurrences that match equally far, it is the last one.
        """
        tokens, previous_ends = self.tokens, self._previous_ends
        last = len(tokens) - 1
        best_end, best_length = 0, MIN_MATCH - 1
        end = previous_ends[-1]
        for _ in range(MAX_OCCURRENCES):
            if not end:
                break
            # Only if it matches one token further than the best one is the rest worth comparing.
            if best_length < end and tokens[end - 1 - best_length] == tokens[last - best_length]:
                length, limit = MIN_MATCH, min(end, MAX_MATCH)
                while length < limit and tokens[end - 1 - length] == tokens[last - length]:
                    length += 1
                if length > best_length:
                    best_end, best_length = end, length
                    if length == MAX_MATCH:
                        break
            end = previous_ends[end]
        return best_end

    def continuation(self, num_tokens: int) -> list[int]:
        """What followed the match, `num_tokens` long, or nothing without a match.

        A match that ends fewer tokens ago is taken for a period, so that the text goes on repeating it.
        """
        end = self.match_end()
        if not end:
            return []
        draft = self.tokens[end : end + num_tokens]
        period = len(self.tokens) - end
        while len(draft) < num_tokens:
            draft.append(draft[-period])
        return draft


class NgramProposer:
    """A `Proposer` that looks into the request's own tokens (prompt lookup: Saxena 2023).

    It keeps an index for each request that it was asked about, until the request ends, and adds what is new when it is
    asked again. Nothing is recomputed for a request that was preempted, because tokens are only ever added.
    """

    def __init__(self) -> None:
        self._indexes: dict[Request, TokenIndex] = {}

    def may_propose(self, request: Request) -> bool:
        """Whether the last known tokens occurred before: then the next one probably goes on as it did there."""
        return self._index(request).has_match

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> list[list[int]]:  # noqa: ARG002  it never waits
        return [self._index(order.request).continuation(order.num_draft_tokens) for order in orders]

    def forget(self, request: Request) -> None:
        self._indexes.pop(request, None)

    def close(self) -> None:
        self._indexes.clear()

    def _index(self, request: Request) -> TokenIndex:
        """The request's index, with all tokens that are known now."""
        index = self._indexes.get(request)
        if index is None:
            index = self._indexes[request] = TokenIndex()
        num_known_tokens = request.num_tokens - request.num_pending_tokens
        num_indexed_tokens = len(index.tokens)
        if num_indexed_tokens < num_known_tokens:
            index.extend(request.token_ids(num_indexed_tokens, num_known_tokens))
        return index
