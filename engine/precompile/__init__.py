"""Compiles an engine's kernels ahead of its start, on a machine without a GPU: `slipstream compile`.

The engine's own code launches every kernel that it may ever launch, on tensors that have shapes and no memory; what it
asks Triton to compile is written down instead of being run, and then compiled by several processes.
"""
