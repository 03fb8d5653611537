"""The decoder: shapes and weights in, hidden states and logits out."""
