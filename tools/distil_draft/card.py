"""The model card of an exported draft, and the table of what it was measured to be worth."""

from collections.abc import Iterable, Sequence
from typing import Any

COLUMNS = ("prompts", "choice", "drafts from", "acceptance", "accepted length", "tokens a pass", "tokens/s", "speed")


def table_row(cell: dict[str, Any]) -> tuple[str, ...]:
    """In the order of COLUMNS; exact mode has no drafts to speak of."""
    drafts = (
        (f"{cell['acceptance_rate']:.0%}", f"{cell['mean_acceptance_length']:.2f}") if cell["num_rounds"] else ("", "")
    )
    speeds = (f"{cell['tokens_per_pass']:.2f}", f"{cell['tokens_per_s']:,.0f}", f"{cell['speed_ratio']:.2f}×")
    method = "none" if cell["method"] == "off" else str(cell["method"])
    return (str(cell["tag"]), str(cell["sampling"]), method, *drafts, *speeds)


def markdown_table(cells: Iterable[dict[str, Any]]) -> str:
    rows: list[Sequence[str]] = [COLUMNS, ["---"] * len(COLUMNS), *map(table_row, cells)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def model_card(
    name: str, training: dict[str, Any], generation: dict[str, Any], evaluation: dict[str, Any] | None
) -> str:
    """Markdown with the metadata that model hubs read."""
    facts, last = training["facts"], training["validation"][-1]
    shape, options = facts["shape"], facts["options"]
    steps = training["curve"][-1] if training["curve"] else {"step": 0, "tokens": 0, "seconds": 0}
    return f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: text-generation
---

# {name}

A draft model for speculative decoding of `{facts["target"]}` (fingerprint `{facts["target_fingerprint"][:16]}`), made
by `tools/distil_draft` of Slipstream. It shares the target's vocabulary and has no tokenizer of its own. It is not
meant to be used alone: it is as small as it is because the target checks every token.

    serve run serve_app:app speculative=local draft_model={name}

{shape["num_layers"]} layers, hidden size {shape["hidden_size"]}, feed-forward {shape["intermediate_size"]}, \
{shape["num_heads"]} heads of {shape["head_dim"]} ({shape["num_kv_heads"]} for keys and values), tied embedding: \
{facts["num_parameters"] / 1e6:.1f} million parameters, bfloat16.

## Data

{facts["num_samples"]:,} answers of the target ({facts["num_output_tokens"]:,} tokens) to prompts that were composed
from the templates, subjects, texts and programs in `tools/distil_draft` (seed {generation["seed"]}; up to
{generation["max_tokens"]} tokens each). All of these were written for this purpose, and nobody's text was used besides.
A third of the answers is greedy, the others are sampled at temperatures of 0.7 to 1.0 with top-p 0.95.

## Training

First weights: {options["initial"]}. Loss: {1 - options["ce_weight"]:.2g} × KL divergence from the target's
distribution over the whole vocabulary, {options["ce_weight"]:.2g} × cross-entropy, on the tokens of the answers.
AdamW, learning rate {options["learning_rate"]:g} with a cosine, {options["tokens_per_step"]:,} tokens a step,
seed {options["seed"]}: {steps["step"]:,} steps, {steps["tokens"]:,} answer tokens in {steps["seconds"]:.0f} s on
{facts["device"]} with torch {facts["torch"]}.

On answers that were kept back, to prompts of the training's kind: divergence {last["kl"]:.3f} nats; the same likeliest
token at {last["greedy"]:.1%} of the positions, the same sampled one (temperature 0.8, common noise) at
{last["sampled"]:.1%}.

## Measured

{_measured(evaluation)}

## Licence

Apache-2.0, as its target, SmolLM2-135M-Instruct by Hugging Face.
"""


def _measured(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "Not measured yet."
    return f"""{evaluation["num_draft_tokens"]} draft tokens a round, {evaluation["per_tag"]} held-out prompts of each
kind (neither their templates nor their subjects occur in the training), {evaluation["max_tokens"]} tokens at most,
{evaluation["batch"]} at once, on {evaluation["hardware"]} in {evaluation["dtype"]}. "sampled" is temperature 0.8 with
top-p 0.95. Every output was equal to that without drafts. Tokens/s contain the prompts; speed is against no drafts.

{markdown_table(evaluation["cells"])}"""
