"""The device's sampler against the host's, from requests to tokens, over steps, seats and preemptions."""

import random
from typing import Any

import pytest
import torch

from engine.batch import SampledToken
from engine.kernels.choose_tokens import DraftRows
from engine.kernels.pdl import INTERPRETED
from engine.kernels.token_scores import BIAS_PLACES
from engine.request import Request, SamplingParams
from engine.sampling.device_sampler import DeviceSampler
from engine.sampling.greedy import greedy_choices
from engine.sampling.sampler import Sampler
from engine.sampling.verification import num_accepted
from tests.kernels.products import DEVICES

VOCAB = 1030
EOS = 4
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.3}


def make_request(prompt: list[int] | None = None, choice_index: int = 0, **sampling: Any) -> Request:
    parameters = SamplingParams(**{"seed": 1, "max_tokens": 100} | sampling)
    request = Request("r", prompt or [1, 2, 3], parameters, choice_index)
    request.stop_ids = Sampler([EOS]).stop_ids(parameters)
    return request


class Steps:
    """A device sampler, and the steps that a runner would make of it."""

    def __init__(self, device: str, vocab_size: int = VOCAB, max_seats: int = 8) -> None:
        self.device = torch.device(device)
        self.sampler = DeviceSampler(vocab_size, max_seats, max_seats, self.device)
        self.seats = list(range(max_seats))[::-1]  # of the places of a step
        self._choices = torch.zeros((max_seats, 2), dtype=torch.int64, device=self.device)

    def launch(self, logits: torch.Tensor, requests: list[Request]) -> torch.Tensor:
        """Returns the choices, on the device."""
        for seat, request in zip(self.seats, requests, strict=False):
            self.sampler.assign(seat, request)
        seats = torch.tensor(self.seats[: len(requests)], dtype=torch.int32, device=self.device)
        positions = torch.tensor([request.num_tokens - 1 for request in requests], device=self.device)
        choices = self._choices[: len(requests)]
        self.sampler.choose(logits.to(self.device), seats, positions, choices)
        return choices

    def run(self, logits: torch.Tensor, requests: list[Request]) -> list[int]:
        choices = self.launch(logits, requests)
        assert choices[:, 0].all()
        return choices[:, 1].tolist()


def rows(count: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    """Logits like a model's: bfloat16 values."""
    return (torch.randn((count, vocab_size), generator=torch.Generator().manual_seed(seed)) * 2.5).bfloat16().float()


def host_tokens(logits: torch.Tensor, requests: list[Request]) -> list[int]:
    return [token.token_id for token in Sampler([EOS]).sample(logits, requests)]


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.7, "top_p": 0.95},
    {"top_k": 40},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.0, **PENALTIES},
    {"temperature": 0.9, "top_p": 0.9, **PENALTIES},
    {"logit_bias": {7: 12.0, 9: 11.0, 500: -100.0}, "min_tokens": 9, "stop_token_ids": (7,)},
]


@pytest.mark.parametrize("device", DEVICES)
def test_answers_equal_the_host_s(device: str) -> None:
    """Whole answers, each token behind the last: counts on the device, positions of the noise, tokens not before time.

    On a GPU the logarithms of the noise may differ from the CPU's by the last bit, which seldom shows.
    """
    num_steps, num_seeds = (12, 1) if INTERPRETED else (40, 20)
    differing = 0
    for seed in range(num_seeds):
        steps = Steps(device)
        ours = [make_request(seed=(1 << 62) + seed, choice_index=seed % 3, **kind) for kind in KINDS]
        theirs = [make_request(seed=(1 << 62) + seed, choice_index=seed % 3, **kind) for kind in KINDS]
        for step in range(num_steps):
            logits = rows(len(KINDS), seed=100 * seed + step)
            expected = host_tokens(logits, theirs)
            chosen = steps.run(logits, ours)
            differing += sum(map(int.__ne__, chosen, expected))
            for request, other, token_id in zip(ours, theirs, chosen, strict=True):
                request.append_output(token_id)
                other.append_output(token_id)
    assert differing <= (0 if INTERPRETED else num_seeds * num_steps * len(KINDS) // 1000)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_ahead_counts_what_nobody_has_read(device: str) -> None:
    request, other = (make_request(temperature=0.0, repetition_penalty=9.0) for _ in range(2))
    logits, steps = rows(1, seed=3), Steps(device)
    first = steps.launch(logits, [request]).clone()
    request.expect_output()
    second = steps.launch(logits, [request]).clone()
    request.append_output(int(first[0, 1]))
    for choices in (first, second):
        assert host_tokens(logits, [other]) == [int(choices[0, 1])]
        other.append_output(int(choices[0, 1]))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_kept_of_drafts_is_counted(device: str) -> None:
    """Steps with drafts, of which some are kept, between steps without, one of them ahead of the host."""
    steps = Steps(device, max_seats=1)
    steps.sampler = DeviceSampler(VOCAB, 1, 8, steps.device)
    kind = {"temperature": 0.3, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    ours, theirs = make_request(**kind), make_request(**kind)
    draw = random.Random(2)
    for step in range(14):
        num_drafts = draw.choice((0, 0, 1, 4))
        logits = rows(1, seed=step // 7)  # the same tokens are likely for some steps
        steps.sampler.assign(0, ours)
        steps.sampler.follow_drafts(0, ours, num_drafts > 0)
        if not num_drafts:
            chosen = steps.run(logits, [ours])
            assert chosen == host_tokens(logits, [theirs])
            ours.expect_output()
            ahead = steps.launch(logits, [ours]).clone()
            ours.append_output(chosen[0])
            theirs.append_output(chosen[0])
            assert [int(ahead[0, 1])] == host_tokens(logits, [theirs])
            ours.append_output(int(ahead[0, 1]))
            theirs.append_output(int(ahead[0, 1]))
            continue
        drafts = [int(token) for token in logits[0].argsort(descending=True)[:num_drafts]]
        expected = Sampler([EOS]).verify(
            logits.expand(num_drafts + 1, -1), theirs, drafts, greedy_choices(logits.expand(num_drafts + 1, -1))
        )
        device_rows = DraftRows(
            torch.tensor([5, *drafts], device=device),
            torch.arange(num_drafts + 1, device=device),
            torch.arange(num_drafts + 1, device=device).int(),
        )
        choices = torch.zeros((num_drafts + 1, 2), dtype=torch.int64, device=device)
        positions = torch.arange(num_drafts + 1, device=device) + ours.num_tokens - 1
        seats = torch.zeros(num_drafts + 1, dtype=torch.int32, device=device)
        alike = logits.expand(num_drafts + 1, -1).contiguous().to(device)
        steps.sampler.choose(alike, seats, positions, choices, drafts=device_rows)
        tokens = [SampledToken(token_id) for token_id in choices[:, 1].tolist()]
        tokens = tokens[: 1 + num_accepted(tokens, drafts)]
        assert tokens == expected
        for token in tokens:
            ours.append_output(token.token_id)
            theirs.append_output(token.token_id)
    assert max(theirs.output_counts.values()) > 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_seat_forgets_its_last_request(device: str) -> None:
    """A void step, another request, and one that comes back: each has its own counts, bias and parameters."""
    steps, logits = Steps(device), rows(1, seed=5)
    penalised = make_request(temperature=0.0, prompt=[8, 9], repetition_penalty=9.0, frequency_penalty=0.3)
    plain, biased = make_request(temperature=0.0), make_request(temperature=0.0, logit_bias={3: 100.0})
    other = make_request(temperature=0.0, prompt=[5], presence_penalty=2.0)
    best = int(logits.argmax())
    assert steps.run(logits, [penalised]) == [best]
    penalised.append_output(best)
    steps.run(logits, [penalised])  # void: nobody appends its token
    assert steps.run(logits, [biased]) == [3]
    assert steps.run(logits, [plain]) == [best]
    assert steps.run(logits, [other]) == [best]
    penalised.num_preemptions += 1
    for _ in range(4):
        expected = host_tokens(logits, [penalised])
        assert steps.run(logits, [penalised]) == expected
        penalised.append_output(expected[0])
    expected_next = host_tokens(logits, [penalised])
    assert steps.run(logits, [penalised]) == expected_next
    assert steps.run(logits, [penalised]) != expected_next
    penalised.num_preemptions += 1  # with its seat still its own, and a token counted that it does not have
    assert steps.run(logits, [penalised]) == expected_next
    steps.sampler.forget()  # a step has failed behind its choice
    assert steps.run(logits, [penalised]) == expected_next


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_device_does_not_support_is_left_to_the_host(device: str) -> None:
    steps, logits = Steps(device), rows(2, seed=6)
    most = dict.fromkeys(range(BIAS_PLACES - 1), -100.0)
    supported = make_request(temperature=0.5, logit_bias=most)
    unsupported = make_request(temperature=0.5, logit_bias=most | {BIAS_PLACES: -100.0}, logprobs=3)
    assert steps.sampler.supports(supported)
    assert not steps.sampler.supports(unsupported)
    assert not steps.sampler.supports(make_request(max_tokens=1 << 20))
    assert steps.run(logits, [supported, unsupported]) == [
        *host_tokens(logits[:1], [supported]),
        int(logits[1].argmax()),  # as greedy_choices has it
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_details(device: str) -> None:
    steps, logits = Steps(device), rows(4, seed=7)
    logits[1, 700] = float("nan")
    requests = [
        make_request(temperature=0.0, logprobs=3, logit_bias={7: 100.0}),
        make_request(logprobs=2),
        make_request(),
        make_request(logprobs=0),
    ]
    choices = steps.launch(logits, requests)
    logprobs = steps.sampler.fetch_logprobs(len(requests), parity=1)
    if steps.device.type == "cuda":
        torch.cuda.synchronize()
    details = steps.sampler.details(requests, choices.cpu().numpy(), logprobs)
    expected = Sampler([EOS]).sample(logits, requests)
    assert sorted(details) == [0, 1, 3]
    assert details[1] == expected[1]
    for place, num_top in ((0, 3), (3, 0)):
        ours, theirs = details[place].logprobs, expected[place].logprobs
        assert ours is not None
        assert theirs is not None
        assert details[place].token_id == expected[place].token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-5)
        assert len(ours.top) == num_top
    assert steps.sampler.details(requests[2:3], choices[2:3].cpu().numpy(), None) == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}])
def test_draws_follow_the_distribution(device: str, filters: dict[str, Any]) -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.2, -3.0, 1.4])
    num_draws, at_once = (128, 64) if INTERPRETED else (1 << 14, 256)
    probabilities = torch.softmax(row / 0.8, -1)
    kept = {"top_k": [0, 7, 1, 4, 5], "top_p": [0, 7, 1]}.get(next(iter(filters), ""), list(range(8)))
    expected = torch.zeros(8)
    expected[kept] = probabilities[kept] / probabilities[kept].sum() * num_draws
    steps, counts = Steps(device, 8, at_once), torch.zeros(8)
    for start in range(0, num_draws, at_once):
        requests = [make_request(temperature=0.8, seed=start + place, **filters) for place in range(at_once)]
        chosen = steps.run(row.expand(at_once, -1).contiguous(), requests)
        counts += torch.bincount(torch.tensor(chosen), minlength=8)
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < {8: 24.3, 5: 18.5, 3: 13.8}[len(kept)]  # chi-square, p = 0.001; the seeds are fixed


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_a_graph_serves_whoever_comes_later() -> None:
    """Captured while all seats were plain, replayed two steps ahead of the host, with seats that change hands."""
    count, vocab_size = 16, 32000
    device = torch.device("cuda")
    sampler = DeviceSampler(vocab_size, count, count, device)
    logits, seats = torch.zeros((count, vocab_size), device=device), torch.arange(count, device=device).int()
    positions = torch.zeros(count, dtype=torch.int64, device=device)
    choices = torch.zeros((count, 2), dtype=torch.int64, device=device)
    sampler.choose(logits, seats, positions, choices)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.choose(logits, seats, positions, choices)
    results, expected = [], []
    for turn in range(6):
        requests = [
            make_request(seed=turn, prompt=[5, place + turn], choice_index=place, **KINDS[(place + turn) % len(KINDS)])
            for place in range(count)
        ]
        rows_of_turn = rows(count, turn, vocab_size)
        expected += host_tokens(rows_of_turn, requests)
        logits.copy_(rows_of_turn)
        positions.copy_(torch.tensor([request.num_tokens - 1 for request in requests]))
        for seat, request in enumerate(requests):
            sampler.assign(seat, request)
        graph.replay()
        results.append(choices.clone())
    assert torch.cat(results)[:, 1].tolist() == expected
