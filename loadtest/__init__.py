"""Load and faults for a running service: over HTTP, and by Ray's own means. Imports neither engine nor service."""
