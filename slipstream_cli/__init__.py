"""The `slipstream` command: what is done with a model besides serving it."""
