"""The engine's thread, and the thread-safe way to it."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from engine.errors import EngineDeadError, EngineFullError, InvalidRequest
from engine.request import FinishReason, Request, RequestOutput
from engine.stats import EngineStats

if TYPE_CHECKING:
    from engine.llm_engine import LLMEngine

logger = logging.getLogger(__name__)

OnOutputs = Callable[[list[RequestOutput]], None]

IDLE_CHECK_S = 1.0  # how long the engine is idle before it asserts that every block is accounted for
STALL_LIMIT_S = 60.0  # a step on a slow CPU with a full token budget takes seconds; a hung device never comes back


@dataclass(eq=False)
class _Group:
    """One submission: its requests, and who hears of them."""

    requests: Sequence[Request]
    on_outputs: OnOutputs
    outputs: list[RequestOutput] = field(default_factory=list)  # of the current step


@dataclass(frozen=True)
class _Abort:
    request_ids: Sequence[str]


class AsyncEngine:
    """Runs an LLMEngine in a thread of its own.

    `submit` and `abort` may be called from any thread and return at once; they take effect between steps. Every
    submitted request ends with exactly one output that has a `finish_reason`, whatever happens, short of a callback
    that raises. Where the engine itself ends or fails, that is FinishReason.ABORT: another may go on with the request.
    """

    def __init__(
        self, engine: "LLMEngine", stall_limit_s: float = STALL_LIMIT_S, max_requests: int | None = None
    ) -> None:
        """max_requests: waiting and running, from which on it accepts no more; None: any number."""
        self.engine = engine
        self._max_requests = max_requests
        self._num_posted = 0  # requests that the thread has not seen yet
        self._stall_limit_s = stall_limit_s
        self._commands: deque[_Group | _Abort] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._groups: dict[str, _Group] = {}
        self._stats = engine.stats()
        self._last_progress_s = monotonic()
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._last_progress_s = monotonic()
        self._thread.start()

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Stop after the current step; requests that have not ended get an output with FinishReason.ABORT.

        Raises:
            TimeoutError: the thread did not stop in time.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"the engine thread did not stop within {timeout_s:g} s")

    def submit(self, requests: Sequence[Request], on_outputs: OnOutputs, *, even_if_full: bool = False) -> None:
        """Queue requests. `on_outputs` is called in the engine thread after each step that concerns them, with the
        outputs of these requests only; it must return fast and not raise.

        A request that the engine refuses gets an output with FinishReason.ERROR; its siblings go on.

        Raises:
            EngineFullError: there are max_requests already, and not even_if_full. What is
                submitted together is taken together, so there may be more by that much.
            EngineDeadError: the thread has ended.
        """
        self._post(_Group(requests, on_outputs), even_if_full)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests and free their blocks before the next step. Those that have ended already are passed over."""
        with suppress(EngineDeadError):  # they have ended with the thread
            self._post(_Abort(list(request_ids)))

    def stats(self) -> EngineStats:
        """The engine's statistics as of its last step."""
        return self._stats

    def check_health(self) -> None:
        """Return if the engine makes progress or has nothing to do.

        Raises:
            EngineDeadError: the thread has ended, or no step has finished for `stall_limit_s` with work pending.
        """
        if not self._thread.is_alive():
            raise EngineDeadError(f"the engine thread has ended: {self._failure or 'it was shut down'}")
        stalled_s = monotonic() - self._last_progress_s
        if self._busy and stalled_s > self._stall_limit_s:
            raise EngineDeadError(f"the engine has made no step for {stalled_s:.0f} s with work pending")

    def _post(self, command: _Group | _Abort, even_if_full: bool = False) -> None:
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise EngineDeadError(f"the engine has stopped: {self._failure or 'it was shut down'}")
            if isinstance(command, _Group):
                num_requests = len(self._groups) + self._num_posted
                is_full = self._max_requests is not None and num_requests >= self._max_requests
                if is_full and not even_if_full:
                    raise EngineFullError(f"the engine has {num_requests} requests already; try again later")
                self._num_posted += len(command.requests)
            self._commands.append(command)
            if not self._busy:
                self._last_progress_s = monotonic()
                self._busy = True
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                while self._commands:
                    self._execute(self._next_command())
                outputs = self.engine.step() if self.engine.has_work else []
                self._stats = self.engine.stats()  # of this step too, for whoever hears of it
                self._last_progress_s = monotonic()
                self._deliver(outputs)
            self._end_all("the engine was shut down")
            self.engine.close()
        except BaseException as error:  # a broken invariant: nothing this thread could go on with
            logger.exception("the engine thread ends")
            self._failure = error
            self._end_all(f"the engine failed: {error!r}")

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False when it is time to stop.

        Until then, prepares what the engine has left for such a moment, a little at a time.
        """
        checked, prepared = False, False
        while True:
            with self._wake:
                if self._stopping:
                    return False
                if self._commands or self.engine.has_work:
                    return True
                self._busy = False
                signalled = self._wake.wait((None if checked else IDLE_CHECK_S) if prepared else 0.0)
            if signalled:
                continue
            if not prepared:
                prepared = not self.engine.prepare_next()
            else:
                self.engine.check_integrity()
                self._stats = self.engine.stats()
                checked = True

    def _next_command(self) -> _Group | _Abort:
        with self._wake:
            command = self._commands.popleft()
            if isinstance(command, _Group):
                self._num_posted -= len(command.requests)
                for request in command.requests:
                    assert request.request_id not in self._groups, f"two requests named {request.request_id}"
                    self._groups[request.request_id] = command
            return command

    def _execute(self, command: _Group | _Abort) -> None:
        if isinstance(command, _Abort):
            ended = [self.engine.abort(request_id) for request_id in command.request_ids]
            self._deliver([output for output in ended if output is not None])
            return
        for request in command.requests:
            try:
                self.engine.add(request)
            except InvalidRequest as error:
                self._deliver([RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=str(error))])

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Hand each group its outputs, and forget the requests that have ended."""
        concerned: dict[int, _Group] = {}
        for output in outputs:
            ended = output.finish_reason is not None
            group = self._groups.pop(output.request_id) if ended else self._groups[output.request_id]
            group.outputs.append(output)
            concerned[id(group)] = group
        for group in concerned.values():
            ready, group.outputs = group.outputs, []
            group.on_outputs(ready)

    def _end_all(self, why: str) -> None:
        with self._wake:
            self._stopping = True  # from here on `_post` refuses
        for command in self._commands:
            if isinstance(command, _Group):
                self._groups |= {request.request_id: command for request in command.requests}
        self._deliver([RequestOutput(key, finish_reason=FinishReason.ABORT, error=why) for key in list(self._groups)])
