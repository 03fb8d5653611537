"""Text of about so many tokens, without a tokenizer: common words, most of them one token in the usual vocabularies."""

import random

_NOUNS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name team minute idea body information back parent face level office door
health person art war history party result change morning reason research girl guy moment air teacher force education
"""
_PREPOSITIONS = "the and of to in is for on with as at by from about into over after"
_VARIABLES = "total count value index limit offset result size width height start level score rate"
_WORDS, _LINKS, _NAMES = _NOUNS.split(), _PREPOSITIONS.split(), _VARIABLES.split()
_SENTENCE_WORDS = 12
_LINE_TOKENS = 8.4  # of the lines of code below, in the mean, by the default model's tokenizer


def prose(draw: random.Random, num_tokens: int) -> str:
    """Sentences without sense; a word is counted as a token, and so is the stop behind a sentence."""
    # All at once: a client that takes long over a long prompt is late with its other requests.
    nouns, links = draw.choices(_WORDS, k=num_tokens), draw.choices(_LINKS, k=num_tokens)
    sentences: list[str] = []
    place = 0
    while place < num_tokens:
        length = min(num_tokens - place - 1, _SENTENCE_WORDS) or 1
        words = [links[i] if (i - place) % 2 else nouns[i] for i in range(place, place + length)]
        words[0] = words[0].capitalize()
        sentences.append(" ".join(words) + ("." if place + length < num_tokens else ""))
        place += length + 1
    return " ".join(sentences)


def code(draw: random.Random, num_tokens: int) -> tuple[str, str]:
    """Python functions of about `num_tokens` together, and a name that occurs in them."""
    names = draw.sample(_NAMES, k=5)
    num_lines = max(2, round(num_tokens / _LINE_TOKENS))
    lines: list[str] = []
    while len(lines) < num_lines:
        if len(lines) % 9 == 0:
            lines.append(f"def {draw.choice(_WORDS)}_{len(lines)}({names[0]}, {names[1]}):")
            continue
        left, right, target = draw.choice(names), draw.choice(names), draw.choice(names)
        lines.append(
            draw.choice(
                [
                    f"    {target} = {left} + {right} * {draw.randint(1, 99)}",
                    f"    if {left} > {right}:  # {draw.choice(_WORDS)}",
                    f"        {target} = {left} - {draw.randint(1, 99)}",
                    f"    return {left} + {right}",
                ]
            )
        )
    return "\n".join(lines), names[0]
