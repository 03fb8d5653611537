"""Runs a program or the GPU tests as if there were a GPU, to compile what they launch.

On a GPU that is rented by the minute, compiling thousands of kernels takes longer than the tests themselves. Here they
are launched without one: tensors of device cuda have no memory, every kernel is written down when it is launched and
compiled in the end, and nothing is computed.
"""
