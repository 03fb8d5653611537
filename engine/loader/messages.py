"""Values out of a file, made fit to stand in a one-line error."""


def shown(value: object, limit: int = 80) -> str:
    """`repr(value)`, shortened: what a hostile file holds may be megabytes long or full of line ends."""
    text = repr(value if not isinstance(value, str) else value[: limit + 1])
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."
