"""The attention's worklist covers every row and every split of its keys exactly once."""

from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch

from engine.kernels.attention_worklist import (
    LARGE_M,
    SMALL_M,
    SPLIT_TOKENS,
    AttentionWorkspace,
    attention_workspace,
    build_worklist,
)
from tests.kernels.attention_cases import DEVICES


@dataclass(frozen=True)
class Entry:
    """Fields in their order in memory."""

    row_start: int
    num_rows: int
    request: int
    first_position: int
    split_begin: int
    split_end: int
    partial: int
    first_partial: int
    num_splits: int
    step_position: int


def workspace_for(
    rows: int,
    device: str,
    kv_heads: int = 4,
    group: int = 8,
    window: int | None = None,
    processors: int = 132,
    **changes: int,
) -> AttentionWorkspace:
    made = attention_workspace(
        rows, kv_heads * group, kv_heads, 64, 8192, torch.bfloat16, torch.device(device), window, **changes
    )
    for tensor in (made.entries, made.num_entries, made.counters):
        tensor.fill_(123456789)
    return replace(made, num_processors=processors)


def worklist(
    workspace: AttentionWorkspace, runs: list[tuple[int, int, int]], device: str
) -> tuple[list[Entry], int, list[tuple[int, int]]]:
    """Entries, how many of them are large, and the rows (request, position). runs: request, first position, length."""
    rows = [(request, start + index) for request, start, count in runs for index in range(count)]
    requests, positions = (torch.tensor(column, device=device) for column in zip(*rows, strict=True))
    build_worklist(workspace, requests.int(), positions)
    num_entries, num_large = workspace.num_entries.tolist()
    entries = [Entry(*fields[:10]) for fields in workspace.entries[:num_entries].tolist()]
    return entries, num_large, rows


def first_split(workspace: AttentionWorkspace, position: int) -> int:
    """Of those that the row at a position sees."""
    window = workspace.sliding_window
    return 0 if window is None else max(0, position - window + 1) // SPLIT_TOKENS


def check(workspace: AttentionWorkspace, runs: list[tuple[int, int, int]], device: str) -> list[Entry]:
    """Everything that the attention kernel relies on."""
    entries, num_large, rows = worklist(workspace, runs, device)
    first_of_run, splits, places = {}, defaultdict(list), []
    row = 0
    for _, start, count in runs:
        first_of_run |= dict.fromkeys(range(row, row + count), start)
        row += count
    for index, entry in enumerate(entries):
        request, position = rows[entry.row_start]
        assert entry.request == max(request, -1)
        tile = rows[entry.row_start : entry.row_start + entry.num_rows]
        most = LARGE_M if index < num_large else SMALL_M
        assert 0 < entry.num_rows * workspace.group <= most
        splits[entry.row_start, entry.num_rows].append((entry.split_begin, entry.split_end))
        if request < 0:
            assert all(row[0] < 0 for row in tile)
            assert (entry.num_splits, entry.partial) == (0, -1)
            continue
        assert tile == [(request, position + offset) for offset in range(entry.num_rows)]
        assert (entry.first_position, entry.step_position) == (position, first_of_run[entry.row_start])
        if entry.partial >= 0:
            assert entry.split_end == entry.split_begin + 1
            earlier = entry.split_begin - first_split(workspace, position)
            assert entry.partial == entry.first_partial + earlier * entry.num_rows
            places += range(entry.partial, entry.partial + entry.num_rows)
            assert workspace.counters[entry.row_start].eq(0).all()
    assert len(places) == len(set(places))
    assert all(place < workspace.values.shape[0] for place in places)
    covered = sorted(row for start, count in splits for row in range(start, start + count))
    assert covered == list(range(len(rows)))
    for (start, count), pieces in splits.items():
        request, position = rows[start]
        end = 0 if request < 0 else (position + count - 1) // SPLIT_TOKENS + 1
        expected = list(range(first_split(workspace, position), end)) if request >= 0 else []
        assert [split for piece in sorted(pieces) for split in range(*piece)] == expected
    return entries


MIXED = [
    (0, 8191, 1),
    (1, 0, 1),
    (-1, 0, 3),
    (2, 250, 20),
    (3, 255, 3),
    (4, 500, 4),
    (5, 1000, 9),
    (-1, 0, 2),
    (6, 9, 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 1, 300, 256])
@pytest.mark.parametrize(("kv_heads", "group"), [(4, 8), (8, 4), (2, 1), (1, 3)])
def test_mixed_step(device: str, kv_heads: int, group: int, window: int | None) -> None:
    for processors in (4, 132, 1000):
        check(workspace_for(50, device, kv_heads, group, window, processors), MIXED, device)


@pytest.mark.parametrize("device", DEVICES)
def test_single_row(device: str) -> None:
    """A program for each split, unless there are only two."""
    workspace = workspace_for(1, device)
    for position in (0, 255, 256, 511, 512, 8191):
        entries = check(workspace, [(0, position, 1)], device)
        assert len(entries) == (position // SPLIT_TOKENS + 1 if position >= 512 else 1)


@pytest.mark.parametrize("device", DEVICES)
def test_what_fills_the_device_is_not_spread(device: str) -> None:
    """But for the one request that would outlast the others."""
    workspace = workspace_for(256, device)
    assert len(check(workspace, [(request, 1000, 1) for request in range(256)], device)) == 256
    runs = [(request, 1000 if request else 8000, 1) for request in range(256)]
    assert len(check(workspace, runs, device)) == 255 + 8000 // SPLIT_TOKENS + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [2047, 2048])
def test_large_steps(device: str, rows: int) -> None:
    """A step of the largest size: decoding rows, one long prefill, another request's chunk."""
    runs = [(request, 37 * request, 1) for request in range(200)] + [(200, 17, rows - 300), (201, 511, 100)]
    check(workspace_for(2048, device), runs, device)
    check(workspace_for(2048, device, max_partial_bytes=40 * 32 * 66 * 4), runs, device)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_do_not_follow_each_other(device: str) -> None:
    """Share no tile."""
    runs = [(0, 299, 1), (0, 298, 1), (0, 10, 1), (1, 11, 1), (0, 12, 1), (0, 12, 1), (0, 13, 1)]
    workspace = workspace_for(7, device)
    entries, _, rows = worklist(workspace, runs, device)
    for entry in entries:
        request, position = rows[entry.row_start]
        tile = rows[entry.row_start : entry.row_start + entry.num_rows]
        assert tile == [(request, position + offset) for offset in range(entry.num_rows)]
    assert sorted({entry.row_start for entry in entries}) == [0, 1, 2, 3, 4, 5]
