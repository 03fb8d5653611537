"""Whether a draft model speaks its target's language. Token ids are all that passes between the two."""

from engine.tokenizer import Tokenizer


def token_mismatch(draft_name: str, draft: Tokenizer, target_name: str, target: Tokenizer) -> str | None:
    """One line about the first token that means something else to the draft, else None.

    Special tokens are passed over: a chat model renames some of those that its base model left unused.
    """
    for token_id in range(max(draft.vocab_size, target.vocab_size)):
        if draft.is_special(token_id) or target.is_special(token_id):
            continue
        ours, theirs = draft.token_bytes(token_id), target.token_bytes(token_id)
        if ours != theirs:
            return (
                f"draft model {draft_name} has {ours!r} for token {token_id} and {target_name} has {theirs!r}: "
                "a draft model must have the vocabulary of its target"
            )
    return None
