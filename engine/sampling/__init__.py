"""From logits to tokens: a pure function of one row, its request's parameters and its position."""
