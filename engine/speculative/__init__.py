"""Speculative decoding: tokens that are proposed cheaply, and kept only where the target model chooses the same.

A draft token is accepted if and only if it equals the token that the target itself selects at its position, greedy or
sampled, so that the output is that of decoding without drafts, whatever is proposed.
"""
