"""A Ray cluster of several nodes on one machine, whose autoscaler adds and removes pretended GPU nodes.

`python -m tests.cluster` runs it and prints what happens when; `pytest tests/cluster` checks it.
"""
