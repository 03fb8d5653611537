"""Says where a device's memory would go, before there is an engine, or the device: `slipstream plan`.

The engine's own code allocates what it needs, on tensors that have shapes and no memory, and shares out what is left.
"""
