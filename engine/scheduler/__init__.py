"""Which tokens of which requests the next step computes. Policy only: no tensors, no threads, no clock."""
