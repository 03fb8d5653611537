"""A small draft model for a target, distilled from what the target says: see docs/draft_training.md."""
