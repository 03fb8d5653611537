"""Tensors of device cuda that are nowhere."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
Tensor = torch.Tensor
_device_of = Tensor.device.__get__
_is_cuda_of = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_READS = {
    Tensor.cpu,
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__iter__,
    Tensor.__contains__,
    Tensor.__array__,
    Tensor.__repr__,
    Tensor.__format__,
}
_COMPARISONS = {torch.equal, torch.allclose, Tensor.equal, Tensor.allclose}


class CudaIsMeta(TorchFunctionMode):
    """Device cuda is torch's device meta, whose tensors have shapes and no memory. What is read of them is 0, and
    true; whatever they are compared with, they are equal."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == _device_of:
            real = func(*args)
            return CUDA if real.type == "meta" else real
        if func is torch.device:
            return func(*args, **kwargs)
        if func == _is_cuda_of:
            return is_nowhere(args[0])
        if func is Tensor.pin_memory:
            return args[0]
        if func in _COMPARISONS or (func is Tensor.__bool__ and is_nowhere(args[0])):
            return True
        if func is Tensor.cuda:
            return args[0].to("meta")
        if func is Tensor.copy_ and is_nowhere(args[1]) and not is_nowhere(args[0]):
            return args[0]
        if args and is_nowhere(args[0]) and _reads(func, args, kwargs):
            args = (torch.zeros(args[0].shape, dtype=args[0].dtype), *args[1:])
        kwargs.pop("pin_memory", None)
        args = tuple(map(_place, args))
        kwargs = {name: _place(value) for name, value in kwargs.items()}
        if str(kwargs.get("device")) == "meta":
            kwargs.pop("generator", None)
        return func(*args, **kwargs)


def is_nowhere(value: object) -> bool:
    return isinstance(value, Tensor) and _device_of(value).type == "meta"


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    return func in _READS or (func is Tensor.to and any(_is_cpu(value) for value in (*args[1:], *kwargs.values())))


def _is_cpu(value: object) -> bool:
    return value == "cpu" or (isinstance(value, torch.device) and value.type == "cpu")


def _place(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta") if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "meta"
    return value
