"""The recipe's prompts, and the samples that are kept of the answers to them."""

from pathlib import Path

import pytest

from engine.errors import ConfigError
from tools.distil_draft import prompts as prompts_module
from tools.distil_draft.evaluate import held_out_prompts
from tools.distil_draft.generate import sampling_of
from tools.distil_draft.prompts import Prompt, Split, digest, draw_prompts
from tools.distil_draft.samples import Sample, SampleStore, read_samples, read_settings
from tools.distil_draft.templates import FAMILIES, Tag


def test_prompts_come_from_the_seed_and_are_all_different() -> None:
    prompts = draw_prompts(Split.TRAIN, 3000, seed=1)
    assert prompts == draw_prompts(Split.TRAIN, 3000, seed=1)
    assert prompts[:500] == draw_prompts(Split.TRAIN, 500, seed=1)
    assert len({prompt.messages for prompt in prompts}) == 3000
    others = draw_prompts(Split.TRAIN, 50, seed=2)
    assert prompts[:50] != others
    assert digest(prompts[:50]) == digest(draw_prompts(Split.TRAIN, 50, seed=1)) != digest(others)
    assert not any("$" in content for prompt in prompts for _, content in prompt.messages), "a gap is open"
    longest = max(sum(len(content) for _, content in prompt.messages) for prompt in prompts)
    assert longest < 1200, "prompts are to fit into the context with their answers"


def test_the_held_out_half_shares_neither_templates_nor_subjects() -> None:
    training, held_out = draw_prompts(Split.TRAIN, 6000, seed=0), draw_prompts(Split.HELD_OUT, 1500, seed=0)

    def used(prompts: list[Prompt]) -> tuple[set[str], set[str]]:
        parts = frozenset[str]().union(*(prompt.parts for prompt in prompts))
        return {prompt.template for prompt in prompts}, set(parts)

    (templates, parts), (other_templates, other_parts) = used(training), used(held_out)
    assert len(templates) > 70
    assert len(parts) > 180
    assert len(other_templates) > 20
    assert not templates & other_templates
    assert not parts & other_parts
    texts = [content for prompt in held_out for _, content in prompt.messages]
    assert not [part for part in parts if len(part) > 25 and "$" not in part and any(part in text for text in texts)]
    for prompts in (training, held_out):
        shares = {tag: sum(prompt.tag is tag for prompt in prompts) / len(prompts) for tag in Tag}
        assert min(shares.values()) > 0.12, shares


def test_there_is_an_end_to_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = next(family for family in FAMILIES if family.name == "stories")
    monkeypatch.setattr(prompts_module, "FAMILIES", (stories,))
    monkeypatch.setattr(prompts_module, "CONVERSATION_SHARE", 0.0)
    with pytest.raises(ConfigError, match=r"only about \d+ held-out prompts, and 100000 are wanted"):
        draw_prompts(Split.HELD_OUT, 100_000, seed=0)


def test_as_many_held_out_prompts_of_each_tag() -> None:
    prompts = held_out_prompts(5, seed=0)
    assert {tag: len(some) for tag, some in prompts.items()} == dict.fromkeys(Tag, 5)


def test_a_third_of_the_answers_is_greedy_and_no_two_are_chosen_alike() -> None:
    params = [sampling_of(i, 60, max_tokens=8) for i in range(240)]
    assert sum(each.is_greedy for each in params[:60]) == 20
    greedy = [i % 60 for i, each in enumerate(params) if each.is_greedy]
    assert sorted(greedy) == list(range(60)), "each prompt has one greedy answer in its first three"
    assert len({each.seed for each in params}) == 240
    sampled = [each for each in params if not each.is_greedy]
    assert {each.temperature for each in sampled} == {0.7, 0.8, 0.9, 1.0}
    assert {each.top_p for each in sampled} == {0.95}


def test_shards_keep_samples_and_their_borders(tmp_path: Path) -> None:
    made = [Sample(i, tuple(range(i, 2 * i + 3)), 1 + i % 2) for i in range(10)]
    store = SampleStore(tmp_path, {"seed": 1}, shard_samples=4)
    for sample in reversed(made):
        store.add(sample)
    assert read_samples(tmp_path) == made[2:], "two shards are full"
    store.flush()
    assert read_samples(tmp_path) == made
    assert read_settings(tmp_path) == {"seed": 1}
    again = SampleStore(tmp_path, {"seed": 1})
    assert again.sample_ids == set(range(10))
    assert again.num_output_tokens == sum(sample.num_output_tokens for sample in made)
    with pytest.raises(ConfigError, match="holds samples with seed 1, not 2"):
        SampleStore(tmp_path, {"seed": 2})
