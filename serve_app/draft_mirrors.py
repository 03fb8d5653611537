"""What a draft server knows of the engines' requests, and what it does next. No sockets, no threads."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.errors import SlipstreamError
from engine.speculative.drafter import Drafter
from serve_app.draft_messages import Drafts, MalformedError, MirrorDrafts, MirrorOpening, Round

MAX_MIRRORS = 1024
MIRROR_IDLE_S = 60.0  # a request that no round names for so long is given up; should it live on, it is opened anew
STEP_TIME_SMOOTHING = 0.1
NUM_BRANCHES = 3  # of each request: rows that a pass of the draft model has for nearly nothing

Peer = tuple[int, bytes]  # a connection: which of the server's sockets, and ZeroMQ's name for it there


@dataclass(eq=False, slots=True)
class _Mirror:
    """One request of one engine. `name` is its key for the drafter, where the keys of all engines meet."""

    key: str
    name: str
    engine: "_Engine"
    last_heard_s: float
    num_ordered: int = 0  # by the last order
    num_asked: int = 0  # of the drafter
    is_new: bool = True  # nothing has been answered yet


@dataclass(eq=False, slots=True)
class _Engine:
    """One connection, and what is to be said on it."""

    peer: Peer
    serial: int
    last_heard_s: float
    round_number: int = 0
    mirrors: dict[str, _Mirror] = field(default_factory=dict)
    ready: dict[str, _Mirror] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)
    refused: dict[str, None] = field(default_factory=dict)

    @property
    def has_news(self) -> bool:
        return bool(self.ready or self.unknown or self.refused)


class MirrorKeeper:
    """Carries out the rounds of all engines with one drafter.

    A new mirror is answered with its first draft, whatever was ordered: the prompt has been read, and from now on the
    engine may wait. (If it took all the drafts, a draft model hardly faster than its target would run after it for
    long, for each of the target's tokens takes one away.) After that, what is ordered comes first. When every order is
    answered, the drafter runs ahead: it takes its drafts for accepted and goes on, so that after full acceptance the
    next ones are there when they are ordered; then it drafts behind the likeliest corrections.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        max_mirrors: int = MAX_MIRRORS,
        mirror_idle_s: float = MIRROR_IDLE_S,
        runs_ahead: bool = True,
    ) -> None:
        """runs_ahead: not where drafter and target take turns on one device, and the one slows the other."""
        self.num_mirrors = 0
        self.step_time_s = 0.0  # moving average
        self._drafter = drafter
        self._max_mirrors = max_mirrors
        self._mirror_idle_s = mirror_idle_s
        self._runs_ahead = runs_ahead
        self._engines: dict[Peer, _Engine] = {}
        self._num_engines_seen = 0
        self._by_name: dict[str, _Mirror] = {}
        self._due: dict[str, _Mirror] = {}  # ordered and not answered, by name
        self._orders_changed = False

    @property
    def has_work(self) -> bool:
        return bool(self._due) or self._orders_changed or self._drafter.has_work

    @property
    def num_engines(self) -> int:
        """Connections that have mirrors, or had some of late."""
        return len(self._engines)

    def apply(self, peer: Peer, message: Round) -> None:
        """Carry out a round.

        Raises:
            MalformedError: it names unknown tokens. Nothing of it has been carried out.
        """
        self._check(message)
        now_s = time.monotonic()
        engine = self._engines.get(peer)
        if engine is None:
            self._num_engines_seen += 1
            engine = self._engines[peer] = _Engine(peer, self._num_engines_seen, now_s)
        engine.last_heard_s = now_s
        engine.round_number = message.number
        for key in message.dropped:
            self._drop(engine.mirrors.get(key))
        for opening in message.openings:
            self._open(engine, opening, now_s)
        for acceptance in message.acceptances:
            mirror = engine.mirrors.get(acceptance.key)
            if mirror is None:
                engine.unknown[acceptance.key] = None
            elif self._drafter.accept(mirror.name, acceptance.position, acceptance.token_ids):
                mirror.last_heard_s = now_s
            else:
                self._drop(mirror)
                engine.unknown[acceptance.key] = None
        for key, num_draft_tokens in message.orders:
            mirror = engine.mirrors.get(key)
            if mirror is not None:
                mirror.last_heard_s = now_s
                mirror.num_ordered = num_draft_tokens
                self._due[mirror.name] = mirror
                self._orders_changed = True
            elif key not in engine.refused:
                engine.unknown[key] = None

    def work(self) -> None:
        """At most one step of the drafter."""
        for mirror in list(self._due.values()):
            self._answer_if_ready(mirror)
        if self._orders_changed:
            self._direct()
        if self._drafter.has_work:
            started_s = time.perf_counter()
            grown = self._drafter.step()
            self.step_time_s += STEP_TIME_SMOOTHING * (time.perf_counter() - started_s - self.step_time_s)
            for name in grown:
                self._on_growth(self._by_name[name])
        if self._due and not self._drafter.has_work:
            for mirror in list(self._due.values()):  # no more will come: no room, or the end of the context
                self._answer(mirror)

    def check_integrity(self) -> None:
        """Assert that the drafter's books are right, and that it has our mirrors."""
        self._drafter.check_integrity()
        assert self.num_mirrors == len(self._by_name), f"{self.num_mirrors} mirrors, but {len(self._by_name)} names"

    def replies(self) -> list[tuple[Peer, Drafts]]:
        """What is new, one message for each engine that it concerns."""
        return [(engine.peer, self._reply(engine)) for engine in self._engines.values() if engine.has_news]

    def signs_of_life(self) -> list[tuple[Peer, Drafts]]:
        """For engines that have mirrors. One that cannot be reached any more is to be forgotten."""
        return [(engine.peer, self._reply(engine)) for engine in self._engines.values() if engine.mirrors]

    def forget(self, peer: Peer) -> None:
        """An engine has gone."""
        engine = self._engines.pop(peer, None)
        if engine is not None:
            self._drop_all(list(engine.mirrors.values()))

    def expire(self) -> None:
        """Drop what has been silent for too long."""
        limit_s = time.monotonic() - self._mirror_idle_s
        self._drop_all([mirror for mirror in self._by_name.values() if mirror.last_heard_s < limit_s])
        for engine in list(self._engines.values()):
            if not engine.mirrors and engine.last_heard_s < limit_s:
                del self._engines[engine.peer]

    def _check(self, message: Round) -> None:
        vocab_size = self._drafter.vocab_size

        def check(ids: Iterable[int]) -> None:
            if not all(0 <= token_id < vocab_size for token_id in (min(ids, default=0), max(ids, default=0))):
                raise MalformedError(f"token ids must be below {vocab_size}, the size of the vocabulary")

        for opening in message.openings:
            check(opening.prompt_token_ids)
            check(opening.output_token_ids)
            check(opening.sampling.logit_bias)
            if opening.sampling.seed is None or not opening.prompt_token_ids:
                raise MalformedError("a request is opened with a seed and a prompt")
        for acceptance in message.acceptances:
            check(acceptance.token_ids)

    def _open(self, engine: _Engine, opening: MirrorOpening, now_s: float) -> None:
        self._drop(engine.mirrors.get(opening.key))
        if self.num_mirrors >= self._max_mirrors:
            engine.refused[opening.key] = None
            return
        name = f"{engine.serial}.{opening.key}"
        try:
            self._drafter.open(
                name, opening.prompt_token_ids, opening.output_token_ids, opening.sampling, opening.choice_index
            )
        except SlipstreamError:  # such as a prompt past the draft model's context
            engine.refused[opening.key] = None
            return
        self._by_name[name] = engine.mirrors[opening.key] = _Mirror(opening.key, name, engine, now_s)
        self.num_mirrors += 1

    def _drop(self, mirror: _Mirror | None) -> None:
        if mirror is None:
            return
        self._drafter.drop(mirror.name)
        for named in (self._by_name, self._due):
            named.pop(mirror.name, None)
        for keyed in (mirror.engine.mirrors, mirror.engine.ready):
            keyed.pop(mirror.key, None)
        self.num_mirrors -= 1
        self._orders_changed = True

    def _drop_all(self, mirrors: list[_Mirror]) -> None:
        for mirror in mirrors:
            self._drop(mirror)

    def _direct(self) -> None:
        """Tell the drafter what to draft, now that other requests than before have unanswered orders."""
        self._orders_changed = False
        for mirror in self._by_name.values():
            if not self._due:
                wanted = self._target(mirror)
            else:
                wanted = mirror.num_ordered if mirror.name in self._due else 0
            if wanted != mirror.num_asked:
                mirror.num_asked = wanted
                self._drafter.order(mirror.name, wanted)

    def _target(self, mirror: _Mirror) -> int:
        """Of running ahead: what is ordered, the target's own token behind it, and as many again."""
        return 2 * mirror.num_ordered + 1 if self._runs_ahead and mirror.num_ordered else mirror.num_ordered

    def _answer_if_ready(self, mirror: _Mirror) -> None:
        if len(self._drafter.drafts(mirror.name)[1]) >= (1 if mirror.is_new else mirror.num_ordered):
            self._answer(mirror)

    def _on_growth(self, mirror: _Mirror) -> None:
        if mirror.name in self._due:
            self._answer_if_ready(mirror)
        elif len(self._drafter.drafts(mirror.name)[1]) >= self._target(mirror):
            mirror.engine.ready[mirror.key] = mirror
            if self._runs_ahead:
                self._drafter.branch(mirror.name, NUM_BRANCHES, mirror.num_ordered)

    def _answer(self, mirror: _Mirror) -> None:
        mirror.is_new = False
        mirror.engine.ready[mirror.key] = mirror
        del self._due[mirror.name]
        self._orders_changed = True

    def _reply(self, engine: _Engine) -> Drafts:
        drafts = [MirrorDrafts(mirror.key, *self._drafter.drafts(mirror.name)) for mirror in engine.ready.values()]
        message = Drafts(
            engine.round_number, drafts, [*engine.unknown], [*engine.refused], self.num_mirrors, self.step_time_s
        )
        for told in (engine.ready, engine.unknown, engine.refused):
            told.clear()
        return message
