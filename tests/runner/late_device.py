"""A device as late as it may be: it runs a step when somebody waits for it, and not before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.runner.graph_forward import GraphForward
from engine.runner.step_buckets import Bucket


class LateDevice:
    """Takes the place of CUDA for a GraphForward whose kernels are interpreted: its stream, graphs and events.

    num_behind: of launches, how many found a step ahead of them that was not done. launch_failures_due: the next
    launches that fail, and whether what they launch gets to the stream before they do.
    """

    def __init__(self, forward: GraphForward, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_behind = 0
        self.launch_failures_due: list[bool] = []
        self._failure_at: tuple[int, bool] | None = None
        self._run = forward._run
        self._launched: list[Bucket] = []
        self._num_launched = self._num_done = 0
        self._capturing: _Graph | None = None
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(self))
        monkeypatch.setattr(torch.cuda, "graph", self._capture)
        monkeypatch.setattr(torch.cuda, "synchronize", self.finish)
        forward._run = self._receive  # type: ignore[method-assign]
        forward._on_gpu = True
        forward._arrived = [_Event(self) for _ in forward._arrived]  # type: ignore[list-item]

    def fail_at(self, number: int, *, reaches_device: bool) -> None:
        """Let the launch of this number fail, counted from the beginning."""
        self._failure_at = number, reaches_device

    def launch(self, bucket: Bucket) -> None:
        if self._failure_at is not None and self._failure_at[0] == self._num_launched:
            self.launch_failures_due.append(self._failure_at[1])
            self._failure_at = None
        fails = bool(self.launch_failures_due)
        if not fails or self.launch_failures_due.pop():
            self.num_behind += bool(self._launched)
            self._launched.append(bucket)
            self._num_launched += 1
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def finish(self, count: int | None = None) -> None:
        """Run what has been launched: the first `count` steps since the beginning, or all."""
        while self._launched and (count is None or self._num_done < count):
            self._num_done += 1
            self._run(self._launched.pop(0))

    @property
    def num_launched(self) -> int:
        return self._num_launched

    @property
    def num_done(self) -> int:
        return self._num_done

    def _receive(self, bucket: Bucket) -> None:
        if self._capturing is not None:
            self._capturing.bucket = bucket
        else:
            self.launch(bucket)

    @contextmanager
    def _capture(self, graph: "_Graph", **_: Any) -> Iterator[None]:
        assert not self._launched, "captured beside steps under way"
        self._capturing = graph
        yield
        self._capturing = None


class _Graph:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self.bucket: Bucket | None = None

    def replay(self) -> None:
        assert self.bucket is not None
        self._device.launch(self.bucket)


class _Event:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._wait: Callable[[], None] = lambda: None

    def record(self) -> None:
        count = self._device.num_launched
        self._wait = lambda: self._device.finish(count)

    def synchronize(self) -> None:
        self._wait()
