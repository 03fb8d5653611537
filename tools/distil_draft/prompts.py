"""Prompts by the thousand: template, subject and words are drawn from a seed.

Templates, subjects, passages, programs and the parts of conversations are divided between the two splits, so that a
held-out prompt shares neither its wording nor its subject with any of the training's. Only words that fill gaps (names,
numbers, languages) and the system messages occur in both.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from string import Template
from typing import Any, TypeVar

from engine.errors import ConfigError
from tools.distil_draft.passages import PROGRAMS, SCENES
from tools.distil_draft.templates import FAMILIES, FOLLOW_UPS, REPLIES, STYLES, SYSTEMS, Family, Tag
from tools.distil_draft.topics import ERRANDS, FILLERS, HEROES, PROGRAMMING_TASKS, SENTENCES, SUBJECTS

HELD_OUT_EVERY = 4  # of each list: this many, and the last of them is held out
CONVERSATION_SHARE = 0.1
SYSTEM_SHARE = 0.25  # of chats that bring their own system message
SPLIT_LISTS = {"subject": SUBJECTS, "errand": ERRANDS, "task": PROGRAMMING_TASKS, "hero": HEROES, "sentence": SENTENCES}
MAX_ATTEMPTS = 50  # in a row that find no new prompt

T = TypeVar("T")


class Split(StrEnum):
    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Prompt:
    """`messages`: of a chat, as (role, content); a single ("text", …) is continued as it is.

    `family` and `template` say what it was made from; `parts` are the values that belong to one split only.
    """

    tag: Tag
    family: str
    template: str
    messages: tuple[tuple[str, str], ...]
    parts: frozenset[str]

    @property
    def is_chat(self) -> bool:
        return self.messages[0][0] != "text"


def of_split(items: Sequence[T], split: Split) -> list[T]:
    """Those items that belong to a split: the last of every HELD_OUT_EVERY is held out."""
    wanted = split is Split.HELD_OUT
    return [item for i, item in enumerate(items) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) is wanted]


def draw_prompts(split: Split, count: int, seed: int) -> list[Prompt]:
    """`count` different prompts; of two counts, the smaller's are the first of the larger's.

    Raises:
        ConfigError: there are not so many.
    """
    drawn: dict[tuple[tuple[str, str], ...], Prompt] = {}
    prompts = _stream(split, random.Random(f"{seed} {split}"))
    attempts = 0
    while len(drawn) < count:
        prompt = next(prompts)
        attempts = attempts + 1 if prompt.messages in drawn else 0
        drawn.setdefault(prompt.messages, prompt)
        if attempts > MAX_ATTEMPTS:
            raise ConfigError(f"the recipe has only about {len(drawn)} {split} prompts, and {count} are wanted")
    return list(drawn.values())


def digest(prompts: Sequence[Prompt]) -> str:
    """Equal for equal prompts: a change of the recipe shows in it."""
    return sha256(repr([prompt.messages for prompt in prompts]).encode()).hexdigest()[:16]


def _stream(split: Split, draw: random.Random) -> Iterator[Prompt]:
    weights = [family.weight for family in FAMILIES]
    while True:
        (family,) = draw.choices(FAMILIES, weights)
        yield _draw(family, split, draw)


def _draw(family: Family, split: Split, draw: random.Random) -> Prompt:
    template = draw.choice(of_split(family.templates, split))
    gaps = _Gaps(split, draw)
    text = Template(template).substitute(gaps)
    if not family.is_chat:
        return Prompt(family.tag, family.name, template, (("text", text),), frozenset(gaps.parts))
    if family.takes_style:
        text = f"{text} {draw.choice(STYLES)}".strip()
    messages = [("user", text)]
    if draw.random() < CONVERSATION_SHARE:
        follow_up = draw.choice(of_split(FOLLOW_UPS, split))
        reply = draw.choice(of_split(REPLIES, split))
        messages += [("assistant", reply), ("user", Template(follow_up).substitute(gaps))]
        gaps.parts |= {follow_up, reply}
    if draw.random() < SYSTEM_SHARE:
        messages.insert(0, ("system", draw.choice(SYSTEMS)))
    return Prompt(family.tag, family.name, template, tuple(messages), frozenset(gaps.parts))


class _Gaps(dict[str, Any]):
    """Values for a template's gaps, drawn when they are asked for. A gap has one value throughout a prompt, so that a
    template can speak of a name in its passage; "name2" is a second name. `parts`: values that belong to one split."""

    def __init__(self, split: Split, draw: random.Random) -> None:
        super().__init__()
        self._split, self._draw = split, draw
        self.parts: set[str] = set()

    def __missing__(self, name: str) -> str:
        kind = name.rstrip("2")
        if kind == "passage":
            value = self._passage()
        elif kind == "program":
            value = self._program()
        elif kind in SPLIT_LISTS:
            value = self._own(SPLIT_LISTS[kind])
        else:
            value = self._draw.choice(FILLERS[kind])
        self[name] = value
        return value

    def _own(self, items: Sequence[str]) -> str:
        value = self._draw.choice(of_split(items, self._split))
        self.parts.add(value)
        return value

    def _passage(self) -> str:
        scene = self._draw.choice(of_split(SCENES, self._split))
        self.parts.add(scene[0])
        sentences = list(scene)
        if self._draw.random() < 0.5:
            del sentences[self._draw.randrange(1, len(sentences) - 1)]
        return Template(" ".join(sentences)).substitute(self)

    def _program(self) -> str:
        language, program = self._draw.choice(of_split(PROGRAMS, self._split))
        self.parts.add(program)
        return f"```{language}\n{Template(program).substitute(self)}\n```"
