"""Subjects take turns, round after round; each has the machine to itself while it is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.peers.agreement import Answers, ask
from benchmarks.peers.catalogue import Subject
from benchmarks.peers.model_files import ModelFiles
from benchmarks.peers.peer import AbsentError, Launch, Place
from benchmarks.peers.quiet import QUIET_PERCENT, Watch, wait_until_quiet
from benchmarks.peers.server import RunningServer, ServerError, running
from benchmarks.peers.workload import WARM_UP_ROUND, Client, Sample, Traffic
from serve_app.ports import free_port

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WARM_UP_TOKENS = 8


@dataclass
class Outcome:
    """Of a subject. Where `skipped` says why, there is no more to know; where `failed` does, what came before counts.

    samples: of each level, one a round. others_percent: what others used of all cores meanwhile.
    """

    subject: Subject
    number_format: str
    versions: str = ""
    skipped: str = ""
    failed: str = ""
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    answers: Answers | None = None
    start_s: list[float] = field(default_factory=list)
    others_percent: dict[int, list[float]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.subject.peer.name}:{self.number_format}"


@dataclass(frozen=True)
class Bench:
    """How all of them are run. place: of each; its port is replaced. show(line): what is being done."""

    files: ModelFiles
    place: Place
    traffic: Traffic
    start_timeout_s: float
    quiet_timeout_s: float
    attempts: int
    show: Callable[[str], None]

    def prepare(self, subject: Subject) -> Outcome:
        """Looks whether it is installed and has a model."""
        outcome = Outcome(subject, self.files.shown_format(subject.number_format))
        try:
            outcome.versions = subject.peer.versions()
            self.show(f"{outcome.title}: its model's files")
            self.files.path(subject.peer.reads, subject.number_format)
        except AbsentError as reason:
            outcome.skipped = str(reason)
        return outcome

    def run(self, outcomes: Sequence[Outcome], num_rounds: int) -> None:
        """Fills the outcomes. What fails once is not tried again."""
        for number in range(num_rounds):
            for outcome in outcomes:
                if outcome.skipped or outcome.failed:
                    continue
                prefix = f"round {number + 1} of {num_rounds}, {outcome.title}"
                try:
                    self._measure(outcome, number, lambda text, prefix=prefix: self.show(f"{prefix}: {text}"))
                except (ServerError, ValueError, OSError) as error:
                    outcome.failed = str(error) or type(error).__name__

    def _measure(self, outcome: Outcome, round_number: int, show: Callable[[str], None]) -> None:
        peer = outcome.subject.peer
        place = replace(self.place, port=free_port(self.place.host))
        model = self.files.path(peer.reads, outcome.subject.number_format)
        launch = peer.launch(model, outcome.subject.number_format, place)
        threads = dict.fromkeys(THREAD_VARIABLES, str(place.num_threads))
        launch = Launch(launch.command, threads | dict(launch.environment))
        client = Client(place.url, peer, peer.model_name(model))
        log = place.folder / f"{outcome.title.replace(':', '-')}.log"

        def waiting(past_s: float) -> None:
            show(f"starting, {past_s:.0f} s")

        show("waiting for the machine to be quiet")
        wait_until_quiet(self.quiet_timeout_s)
        show("starting")
        with running(launch, log, client.is_ready, self.start_timeout_s, waiting) as server:
            outcome.start_s.append(server.start_s)
            if outcome.answers is None:
                show("a few answers")
                outcome.answers = ask(client)
            wait_until_quiet(self.quiet_timeout_s)  # some are busy for a while after they have answered
            for level in range(len(self.traffic.streams)):
                self._measure_level(outcome, client, server, round_number, level, show)

    def _measure_level(
        self,
        outcome: Outcome,
        client: Client,
        server: RunningServer,
        round_number: int,
        level: int,
        show: Callable[[str], None],
    ) -> None:
        """Again while others use the machine, with other prompts; the time with the least of it counts."""
        streams = self.traffic.streams[level]
        warm_up = replace(self.traffic, output_tokens=WARM_UP_TOKENS)
        client.measure(warm_up.prompts(WARM_UP_ROUND + round_number, level), streams)
        found: list[tuple[float, Sample]] = []
        for attempt in range(self.attempts):
            if attempt:
                show(f"{streams} streams, others used {found[-1][0]:.0f} % of the cores: once more when it is quiet")
                wait_until_quiet(self.quiet_timeout_s)
            show(f"{streams} streams")
            prompts = self.traffic.prompts(round_number * self.attempts + attempt, level)
            watch = Watch(server.pid)
            sample = client.measure(prompts, streams)
            found.append((watch.others_percent(), sample))
            if found[-1][0] <= QUIET_PERCENT:
                break
        others_percent, sample = min(found, key=lambda each: each[0])
        outcome.samples.setdefault(streams, []).append(sample)
        outcome.others_percent.setdefault(streams, []).append(others_percent)


def own_folder(folder: Path, model: Path) -> Path:
    """For what is made of one model."""
    return folder / model.stem
