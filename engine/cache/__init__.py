"""Which block holds which tokens: the block pool, prefix hashes and requests' block tables. No tensors here."""
