"""The simulator of routing: that it can tell good from bad, and that the shipped numbers are good."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.autoscaling.service import TINYLLAMA_H100
from benchmarks.routing import BLOCK_SIZE, TRAFFICS, Engine, Outcome, Simulation, Traffic, Turn, blocks, cli
from serve_app.placement import PlacementRule

LIVELY = Traffic(turns=10, pause_s=0.3, unrelated=0.1)


def simulate(traffic: Traffic, rule: PlacementRule | None, num_ingresses: int = 1, rate: float = 12.0) -> Outcome:
    return Simulation(TINYLLAMA_H100, traffic, 4, num_ingresses, rate, 5.0, rule).run()


def test_an_engine_computes_what_it_does_not_have_and_then_decodes() -> None:
    engine = Engine(TINYLLAMA_H100, cache_blocks=100)
    beginning = blocks(160, random.Random(0))
    for number, num_new in ((0, 160), (1, 0)):
        engine.waiting.append(Turn([*beginning], answer_tokens=8, turns_left=0))
        # The last token is always computed: its logits choose the next one.
        assert engine.step_s() == pytest.approx((num_new + 1) * TINYLLAMA_H100.prompt_token_s)
        assert engine.end_step(1.0) == []
        done: list[Turn] = []
        num_steps = 0
        while not done:
            assert engine.step_s() == pytest.approx(4 / 1_110)
            done, num_steps = engine.end_step(2.0), num_steps + 4
        assert num_steps == 8
        assert engine.cached_tokens == number * len(beginning) * BLOCK_SIZE


def test_the_rule_finds_more_in_the_caches_and_keeps_the_balance() -> None:
    coin, rule = simulate(LIVELY, None), simulate(LIVELY, PlacementRule(BLOCK_SIZE, home_requests=0))
    assert rule.hit_rate > coin.hit_rate + 0.1
    assert rule.imbalance < 1.3
    assert rule.finished_per_s > 0.9 * coin.finished_per_s


def test_without_a_bound_a_flood_goes_to_one_replica() -> None:
    flood, _ = TRAFFICS["flood"]
    unbounded = simulate(flood, PlacementRule(BLOCK_SIZE, tokens_per_request=1, home_requests=0), rate=40)
    assert unbounded.imbalance > 2
    assert simulate(flood, PlacementRule(BLOCK_SIZE, home_requests=0), rate=40).imbalance < 1.6


def test_a_home_helps_ingresses_that_know_nothing_of_each_other() -> None:
    without = simulate(LIVELY, PlacementRule(BLOCK_SIZE, home_requests=0), num_ingresses=4)
    assert simulate(LIVELY, PlacementRule(BLOCK_SIZE), num_ingresses=4).hit_rate > without.hit_rate + 0.03


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    arguments = ["--traffic", "flood", "--engines", "2", "--ingresses", "1", "--duration-s", "1", "--json", str(path)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "power of two" in result.output
    assert len(json.loads(path.read_text())["results"]) > 5
    assert CliRunner().invoke(cli, ["--traffic", "nothing"]).exit_code != 0
