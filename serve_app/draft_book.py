"""What an engine has told a draft server of its requests, and what that has answered. No sockets."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.config import MAX_DRAFT_TOKENS
from engine.request import Request
from engine.speculative.proposer import DraftOrder
from serve_app.draft_messages import (
    MAX_ROUND_TOKENS,
    Acceptance,
    Drafts,
    MirrorDrafts,
    MirrorOpening,
    Round,
)

REFUSED_PAUSE_S = 1.0  # before a request is offered again to a server that had no room


@dataclass(eq=False, slots=True)
class _Entry:
    """One request."""

    key: str
    request_id: str
    num_told: int  # tokens
    ordered_round: int = 0  # the last round with an order
    answered_round: int = -1  # the last round that is known to have been carried out before an answer
    position: int = 0  # of the first draft
    drafts: list[int] = field(default_factory=list)
    refused_until_s: float = 0.0

    @property
    def has_answered(self) -> bool:
        return self.answered_round >= 0

    def usable(self, request: Request) -> list[int]:
        """Drafts behind the request's last token, if those before agree with what the target has chosen since."""
        num_known = request.num_tokens - self.position
        if not 0 <= num_known < len(self.drafts):
            return []
        if num_known and self.drafts[:num_known] != request.token_ids(self.position, request.num_tokens):
            return []
        return self.drafts[num_known:]


class MirrorBook:
    """The requests that one draft server drafts for. Times are seconds of any one clock."""

    def __init__(self, vocab_size: int) -> None:
        self.num_garbage = 0  # answers that cannot be meant
        self._vocab_size = vocab_size
        self._serial = itertools.count()
        self._entries: dict[str, _Entry] = {}  # by request id
        self._by_key: dict[str, _Entry] = {}
        self._dropped: list[str] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_dropped(self) -> int:
        """Requests that have ended without the draft's knowing."""
        return len(self._dropped)

    def clear(self) -> None:
        """The server has gone, and all that it was told."""
        self._entries.clear()
        self._by_key.clear()
        self._dropped.clear()

    def make_round(
        self, number: int, orders: Sequence[DraftOrder], now_s: float
    ) -> tuple[Round, dict[str, DraftOrder]]:
        """A message that tells what is new, and orders; it is taken to arrive.

        Also returns the orders that are worth waiting for, by key: not those of requests that are only just told of,
        nor those whose drafts are here already.
        """
        message = Round(number, [], [], [], self.take_dropped())
        awaited = {}
        room = MAX_ROUND_TOKENS
        for order in orders:
            request = order.request
            entry = self._entry_of(request, now_s)
            num_new = request.num_tokens if entry is None else request.num_tokens - entry.num_told
            if num_new > room or (entry is not None and now_s < entry.refused_until_s):
                continue  # in a later round; never, if it is longer than a round may be
            room -= num_new
            entry = self._tell(message, request, entry)
            entry.ordered_round = number
            message.orders.append((entry.key, min(order.num_draft_tokens, MAX_DRAFT_TOKENS)))
            if entry.has_answered and len(entry.usable(request)) < order.num_draft_tokens:
                awaited[entry.key] = order
        return message, awaited

    def take_answer(self, message: Drafts, now_s: float) -> None:
        for drafts in message.drafts:
            self._take_drafts(drafts, message.round_number)
        for key in message.refused:
            if entry := self._by_key.get(key):
                entry.refused_until_s = now_s + REFUSED_PAUSE_S
                entry.answered_round = message.round_number
        for key in message.unknown:
            if entry := self._by_key.get(key):
                self._forget(entry)  # it is opened anew with the next round

    def drafts_for(self, order: DraftOrder) -> list[int]:
        entry = self._entries.get(order.request.request_id)
        return [] if entry is None else entry.usable(order.request)[: order.num_draft_tokens]

    def is_answered(self, key: str, order: DraftOrder) -> bool:
        """Whether no more will come for an order of the last round."""
        entry = self._by_key.get(key)  # None: the server does not know it
        if entry is None or entry.answered_round >= entry.ordered_round:
            return True
        return len(entry.usable(order.request)) >= order.num_draft_tokens

    def may_draft(self, request: Request, may_wait: bool, now_s: float) -> bool:
        """Whether there are likely to be drafts for the token after the next. may_wait: for answers to come."""
        entry = self._entries.get(request.request_id)
        if entry is None:
            return may_wait and request.num_tokens <= MAX_ROUND_TOKENS
        if now_s < entry.refused_until_s or not entry.has_answered:
            return False  # no room, or the draft is still reading the prompt: the engine need not wait meanwhile
        return may_wait or entry.position + len(entry.drafts) > request.num_tokens + 1

    def drop(self, request: Request) -> bool:
        """The request has ended. False if the draft was not told of it."""
        entry = self._entries.get(request.request_id)
        if entry is None:
            return False
        self._forget(entry)
        self._dropped.append(entry.key)
        return True

    def take_dropped(self) -> list[str]:
        """Keys of requests that have ended, once."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _entry_of(self, request: Request, now_s: float) -> _Entry | None:
        entry = self._entries.get(request.request_id)
        if entry is not None and entry.refused_until_s and now_s >= entry.refused_until_s:
            self._forget(entry)
            return None
        return entry

    def _tell(self, message: Round, request: Request, entry: _Entry | None) -> _Entry:
        """Add what the draft lacks of a request: all of it, or what the target has chosen since."""
        if entry is None:
            entry = _Entry(str(next(self._serial)), request.request_id, request.num_tokens)
            self._entries[request.request_id] = self._by_key[entry.key] = entry
            sampling = replace(request.sampling, stop=(), logprobs=None)  # a draft has no use for these
            message.openings.append(
                MirrorOpening(
                    entry.key, request.prompt_token_ids, request.output_token_ids, sampling, request.choice_index
                )
            )
        elif entry.num_told < request.num_tokens:
            ids = request.token_ids(entry.num_told, request.num_tokens)
            message.acceptances.append(Acceptance(entry.key, entry.num_told, ids))
            entry.num_told = request.num_tokens
        return entry

    def _take_drafts(self, drafts: MirrorDrafts, round_number: int) -> None:
        entry = self._by_key.get(drafts.key)
        if entry is None:
            return  # the request has ended
        if drafts.position > entry.num_told or max(drafts.token_ids, default=0) >= self._vocab_size:
            self.num_garbage += 1
            return
        entry.answered_round = round_number
        entry.position, entry.drafts = drafts.position, drafts.token_ids

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.request_id]
        del self._by_key[entry.key]
