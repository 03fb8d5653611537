"""Which replica a prompt gets."""

import random
from collections import Counter

from serve_app.placement import Candidate, Choice, Placement, PlacementRule

BLOCK = 16
RULE = PlacementRule(BLOCK, tokens_per_request=100, home_requests=0)


def chain(name: str, blocks: int = 40) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(blocks)]


def choose(*candidates: Candidate, rule: PlacementRule = RULE, name: str = "p", seed: int = 0) -> Placement:
    return rule.choose(candidates, chain(name), random.Random(seed))


def test_a_prompt_goes_where_its_beginning_is() -> None:
    placed = choose(Candidate("a", 2, 320), Candidate("b", 0, 64), Candidate("c", 0))
    assert placed == Placement("a", Choice.PREFIX, 320)


def test_as_long_as_that_saves_more_than_waiting_costs() -> None:
    """256 tokens more than the other are worth two requests, and not three."""
    for num_requests, chosen in ((2, "a"), (3, "b")):
        for seed in range(5):
            placed = choose(Candidate("a", 10 + num_requests, 320), Candidate("b", 10, 64), seed=seed)
            assert placed.replica_id == chosen
    assert (placed.choice, placed.num_held_tokens) == (Choice.LOAD, 64)


def test_of_those_that_have_the_same_of_it_the_less_busy() -> None:
    assert choose(Candidate("a", 3, 320), Candidate("b", 2, 320), Candidate("c", 0)).replica_id == "b"


def test_what_nobody_knows_goes_to_the_less_busy_of_two_or_home() -> None:
    placed = choose(Candidate("a", 3), Candidate("b", 2))
    assert placed == Placement("b", Choice.NEW, 0)
    counts = Counter(
        RULE.choose([Candidate(str(i), i) for i in range(10)], [], random.Random(seed)).replica_id
        for seed in range(200)
    )
    assert counts["0"] > 50
    assert len(counts) > 3  # not all in one place, as ingresses with old news would
    assert counts["9"] == 0


def test_ingresses_that_know_nothing_find_the_same_home() -> None:
    rule = PlacementRule(BLOCK, tokens_per_request=100, home_requests=3)
    homes = Counter()
    for prompt in range(100):
        found = {
            choose(*(Candidate(f"r{i}", 0) for i in order), rule=rule, name=f"p{prompt}", seed=seed).replica_id
            for seed, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2]))
        }
        assert len(found) == 1
        homes.update(found)
    assert len(homes) == 4
    assert max(homes.values()) < 45
    # It may have three requests more than others, and no more.
    [home] = {choose(Candidate("a", 0), Candidate("b", 0), rule=rule).replica_id}
    other = "b" if home == "a" else "a"
    assert choose(Candidate(home, 2), Candidate(other, 0), rule=rule).replica_id == home
    assert choose(Candidate(home, 4), Candidate(other, 0), rule=rule).replica_id == other


def test_when_a_replica_leaves_only_what_was_its_own_moves() -> None:
    rule = PlacementRule(BLOCK, home_requests=3)
    everyone = [Candidate(f"r{i}", 0) for i in range(5)]
    for prompt in range(50):
        before = choose(*everyone, rule=rule, name=f"p{prompt}").replica_id
        after = choose(*everyone[:-1], rule=rule, name=f"p{prompt}").replica_id
        assert after == before or before == "r4"


def test_a_shared_beginning_does_not_make_one_home_for_all() -> None:
    """A system prompt that every replica has: what comes behind it decides."""
    homes = set()
    for prompt in range(20):
        blocks = chain("system", 4) + chain(f"p{prompt}", 4)
        candidates = [Candidate(f"r{i}", 0, 4 * BLOCK) for i in range(3)]
        homes.add(RULE.choose(candidates, blocks, random.Random(0)).replica_id)
    assert len(homes) == 3
