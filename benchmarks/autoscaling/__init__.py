"""A simulator of autoscaling: arrival traces against measured service curves. `python -m benchmarks.autoscaling`."""
