"""Operators of the decoder. `reference` holds the plain-torch twin of each: the oracle, and the CPU path."""
