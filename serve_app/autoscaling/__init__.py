"""How many replicas there should be: policies that run in Serve's controller.

Serve pickles this package by value (see serve_app.replica_counts), so that a controller that cannot import it has it
all the same: nothing here imports the rest of Slipstream, Ray, or what a bare Python does not have.

`load` and `need` are about how much there is to do, `target` about how fast the number of replicas follows; these are
pure. `policies` is what Serve calls.
"""

from serve_app.autoscaling.policies import DraftPolicy, EnginePolicy, IngressPolicy

__all__ = ["DraftPolicy", "EnginePolicy", "IngressPolicy"]
