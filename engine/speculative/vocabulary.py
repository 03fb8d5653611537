"""Whether a draft model and its target count the same tokens."""


def vocabulary_mismatch(draft_name: str, draft_size: int, target_name: str, target_size: int) -> str | None:
    """One line about sizes that differ, else None."""
    if draft_size == target_size:
        return None
    return (
        f"draft model {draft_name} has a vocabulary of {draft_size} tokens and {target_name} one of {target_size}: "
        "a draft model must have the vocabulary of its target"
    )
