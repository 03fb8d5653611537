"""Requests are functions of seed and number; lengths follow what is published."""

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine.tokenizer import load_tokenizer
from loadtest import lengths
from loadtest.lengths import LogNormal
from loadtest.workloads import NUM_PREFIXES, WORKLOAD_NAMES, WORKLOADS, LengthLimits, draw_prompt

DISTRIBUTIONS = {name: value for name, value in vars(lengths).items() if isinstance(value, LogNormal)}


@pytest.mark.parametrize("name", WORKLOAD_NAMES)
def test_a_request_depends_on_seed_and_number_alone(name: str) -> None:
    forwards = [draw_prompt(name, 3, index) for index in range(5)]
    backwards = [draw_prompt(name, 3, index) for index in reversed(range(5))]
    assert forwards == backwards[::-1]
    assert len({str(prompt.messages) for prompt in forwards}) == 5
    assert draw_prompt(name, 4, 0) != forwards[0]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_lengths_have_the_published_median_and_mean(name: str) -> None:
    lengths_drawn = DISTRIBUTIONS[name]
    draw = random.Random(0)
    values = np.array([lengths_drawn.draw(draw) for _ in range(20_000)])
    # Four standard errors of the logarithm's mean; half a token is what rounding may do.
    slack = 4 * lengths_drawn.sigma * math.sqrt(math.pi / 2) / math.sqrt(values.size) + 0.5 / lengths_drawn.median
    assert np.median(values) == pytest.approx(lengths_drawn.median, rel=slack)
    error = values.std() / math.sqrt(values.size)
    assert abs(values.mean() - lengths_drawn.mean) < 4 * error + 0.1


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_draws_from_its_distributions(name: str) -> None:
    workload = WORKLOADS[name]
    prompts = [draw_prompt(name, 0, index) for index in range(400)]
    logs = np.log([prompt.prompt_tokens - workload.fixed_tokens for prompt in prompts])
    assert logs.mean() == pytest.approx(math.log(workload.prompt.median), abs=4 * workload.prompt.sigma / 20)
    assert logs.std() == pytest.approx(workload.prompt.sigma, rel=0.15)
    if workload.output is None:
        assert all(prompt.max_tokens == prompt.prompt_tokens for prompt in prompts)
    else:
        assert np.median([p.max_tokens for p in prompts]) == pytest.approx(workload.output.median, rel=0.25)


def test_prompts_are_as_long_as_said(default_model_path: Path) -> None:
    tokenizer = load_tokenizer(default_model_path)
    for name in WORKLOADS:
        prompts = [draw_prompt(name, 0, index) for index in range(20)]
        texts = ["".join(message["content"] for message in prompt.messages) for prompt in prompts]
        counted = sum(len(tokenizer.encode(text)) for text in texts)
        # An edit has an instruction in front of the code; everything else is what was drawn.
        around = 22 * len(prompts) if name == "code_edit" else 0
        assert counted - around == pytest.approx(sum(prompt.prompt_tokens for prompt in prompts), rel=0.06), name


def test_limits_replace_and_cut() -> None:
    fixed = [draw_prompt("short_chat", 0, index, LengthLimits(prompt=30, output=9)) for index in range(20)]
    assert {(prompt.prompt_tokens, prompt.max_tokens) for prompt in fixed} == {(30, 9)}
    free = [draw_prompt("short_chat", 0, index) for index in range(50)]
    cut = [draw_prompt("short_chat", 0, index, LengthLimits(max_prompt=15, max_output=40)) for index in range(50)]
    assert [p.prompt_tokens for p in cut] == [min(p.prompt_tokens, 15) for p in free]
    assert [p.max_tokens for p in cut] == [min(p.max_tokens, 40) for p in free]


def test_prefixes_are_shared_and_questions_are_not() -> None:
    prompts = [draw_prompt("shared_prefix", 0, index) for index in range(60)]
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == NUM_PREFIXES
    assert len({prompt.messages[1]["content"] for prompt in prompts}) == 60


def test_the_mixture_has_its_shares() -> None:
    counts = Counter(draw_prompt("mixed", 0, index).workload for index in range(1000))
    assert set(counts) == set(WORKLOADS)
    assert 440 < counts["short_chat"] < 560
    assert 60 < counts["code_edit"] < 140


def test_an_edit_names_what_is_there() -> None:
    [message] = draw_prompt("code_edit", 0, 0).messages
    name = message["content"].split("`")[1]
    assert f"({name}," in message["content"]
