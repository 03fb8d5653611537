"""Operators of the decoder: Triton kernels with their launchers, and in `reference` their twins in plain torch."""
