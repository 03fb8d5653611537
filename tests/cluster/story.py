"""What has to happen on the cluster, in this order: it grows under load, loses a node, and shrinks to its head."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.cluster import service
from tests.cluster.fake_nodes import lose_node
from tests.cluster.load import Load

POLL_S = 0.2
LIMIT_S = 100.0  # for any one thing to happen, on a machine that is busy with others
MIN_REQUESTS = 2  # in an engine whose node is to be lost


@dataclass
class Report:
    """How it went, by phase; one that is in neither was not reached."""

    passed: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Story:
    """On a cluster whose head runs and where the service is deployed."""

    def __init__(self, load: Load, note: Callable[[str], None]) -> None:
        """note: is told what happens, when it does."""
        self._load = load
        self._note = note
        self._seen: service.View | None = None

    def grow(self) -> None:
        """Requests from nothing: engines pend, for nodes that join, and answer."""
        assert self._look() == service.View(0, 0, frozenset())
        assert service.readiness() == "scaled_to_zero"
        self._note("requests are sent")
        self._load.start()
        asked = self._until(lambda view: view.num_engines > 0 or bool(view.gpu_nodes), "engine replicas are asked for")
        assert asked.num_engines, "a node was there before anything pended"
        self._until(lambda view: view.num_engines == service.NUM_ENGINES, "all engine replicas are asked for")
        self._until(lambda view: bool(view.gpu_nodes), "the first GPU node joins")
        self._until(lambda view: len(view.gpu_nodes) == service.NUM_ENGINES, "the others join")
        self._until(lambda view: view.num_running == service.NUM_ENGINES, "engines run on all of them")
        self._until(lambda _: self._load.all_answered_since(0.0), "every client has an answer")
        self._note(f"{self._load.num_answered} answers so far, all as they should be")

    def lose_a_node(self) -> None:
        """A node goes with its engine while streams run: each goes on elsewhere, and another node takes its place."""
        before = self._look().gpu_nodes
        victims: list[service.EngineReplica] = []

        def find_victim(_: service.View) -> bool:
            busy = [each for each in service.engines() if each.stats.num_requests_running >= MIN_REQUESTS]
            victims[:] = busy if len(busy) >= 2 else []  # one to be lost, and one that goes on
            return bool(victims)

        self._until(find_victim, "two engines have streams")
        victim = victims[0]
        num_streams = victim.stats.num_requests_running
        num_before = service.num_resumed()
        self._load.longest_pause_s = 0.0
        lost_s = time.monotonic()
        num_killed = lose_node(victim.node_id)
        self._note(f"node {victim.node_id[-2:]} is lost: {num_killed} processes killed, {num_streams} streams cut")
        self._until(lambda _: self._load.all_answered_since(lost_s), "every client has another answer")
        self._until(lambda _: service.num_resumed() > num_before, "the service says that streams were resumed")
        num_resumed = service.num_resumed() - num_before
        self._note(f"{num_resumed} streams were; the longest pause was {self._load.longest_pause_s:.1f} s")
        self._until(lambda view: victim.node_id not in view.gpu_nodes, "Ray knows that the node is dead")
        self._until(lambda view: bool(view.gpu_nodes - before), "a new node joins")
        whole = self._until(lambda view: view.num_running == service.NUM_ENGINES, "as many engines run as before")
        [new] = whole.gpu_nodes - before
        self._until(lambda _: new in {each.node_id for each in service.engines()}, "one of them on the new node")

    def shrink(self) -> None:
        """No more requests: the queue drains, engines go, nodes leave."""
        self._load.stop(LIMIT_S)
        self._check()
        self._note(f"the last of {self._load.num_answered} answers")
        self._until(lambda view: not (view.num_running or view.num_pending), "no engine is left")
        self._until(lambda view: not view.gpu_nodes, "no GPU node is left")
        assert service.readiness() == "scaled_to_zero"

    def _look(self) -> service.View:
        view = service.view()
        if view != self._seen:
            self._seen = view
            self._note(str(view))
        return view

    def _check(self) -> None:
        assert not self._load.faults, "\n".join(self._load.faults)

    def _until(self, condition: Callable[[service.View], bool], what: str) -> service.View:
        """Waits for it, while every answer is right."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            view = self._look()
            self._check()
            if condition(view):
                self._note(what)
                return view
            assert time.monotonic() < deadline_s, f"not so after {LIMIT_S:g} s: {what}"
            time.sleep(POLL_S)


def tell(load: Load, report: Report, note: Callable[[str], None]) -> None:
    """All phases, up to the first that fails."""
    story = Story(load, note)
    for phase in (story.grow, story.lose_a_node, story.shrink):
        try:
            phase()
        except Exception as error:
            report.failures[phase.__name__] = f"{type(error).__name__}: {error}"
            note(f"{phase.__name__} failed: {error}")
            return
        report.passed.append(phase.__name__)
