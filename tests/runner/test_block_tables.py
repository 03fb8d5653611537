"""Seats, and what is sent of the block tables: applied as the device does, the tables are those of the requests."""

import random

import numpy as np
import torch

from engine.batch import ScheduledChunk
from engine.request import Request, SamplingParams
from engine.runner.block_tables import BlockTables

MAX_BLOCKS = 12


def make_request(name: str, blocks: list[int]) -> Request:
    request = Request(name, [1] * 100, SamplingParams(seed=0))
    request.block_table = blocks
    return request


def send(tables: BlockTables, requests: list[Request], needed: list[int], limit: int = 16) -> tuple[list[int], int]:
    """One step. Returns the seats, and how many blocks travelled among its inputs."""
    chunks = [ScheduledChunk(request, 0, 1) for request in requests]
    seats = tables.seats(chunks)
    updates = np.full((2, limit), 77, np.int32)
    tables.write_updates(chunks, np.array(seats, np.int32), np.array(needed, np.int32), updates, 0)
    count = int((updates[0] >= 0).sum())
    assert (updates[0, :count] >= 0).all()
    assert (updates[0, count:] == -1).all()
    places, blocks = torch.from_numpy(updates[:, :count].copy()).long()
    tables.device_tables.view(-1)[places] = blocks.int()
    for request, seat, num_blocks in zip(requests, seats, needed, strict=True):
        assert tables.device_tables[seat, :num_blocks].tolist() == request.block_table[:num_blocks]
    return seats, count


def test_only_what_is_new_is_sent() -> None:
    tables = BlockTables(3, MAX_BLOCKS, torch.device("cpu"))
    first, second = make_request("a", [5, 6, 7]), make_request("b", [8])
    seats, count = send(tables, [first, second], [3, 1])
    assert count == 4
    assert len(set(seats)) == 2
    assert send(tables, [second, first], [1, 3]) == (seats[::-1], 0)
    second.block_table.append(9)
    assert send(tables, [second, first], [2, 3]) == (seats[::-1], 1)
    assert send(tables, [second], [1]) == ([seats[1]], 0)
    assert send(tables, [second], [2]) == ([seats[1]], 0)


def test_a_table_that_finds_no_room_is_copied() -> None:
    tables = BlockTables(3, MAX_BLOCKS, torch.device("cpu"))
    long, short = make_request("a", [*range(20, 31)]), make_request("b", [8, 9])
    assert send(tables, [long, short], [11, 2], limit=10)[1] == 2
    assert send(tables, [long, short], [11, 2])[1] == 0
    long.block_table.append(31)
    assert send(tables, [long, short], [12, 2])[1] == 1


def test_a_preempted_request_is_sent_again() -> None:
    tables = BlockTables(3, MAX_BLOCKS, torch.device("cpu"))
    request = make_request("a", [5, 6, 7])
    send(tables, [request], [3])
    request.block_table[:] = [7, 5, 4]
    request.num_preemptions += 1
    assert send(tables, [request], [2])[1] == 2
    assert send(tables, [request], [3])[1] == 1


def test_after_a_failure_all_is_sent_again() -> None:
    tables = BlockTables(2, MAX_BLOCKS, torch.device("cpu"))
    requests = [make_request("a", [5, 6, 7]), make_request("b", [8])]
    send(tables, requests, [3, 1])
    tables.device_tables.fill_(99)
    tables.forget()
    assert send(tables, requests, [3, 1])[1] == 4


def test_more_requests_than_seats() -> None:
    tables = BlockTables(4, MAX_BLOCKS, torch.device("cpu"))
    draw = random.Random(2)
    requests = [make_request(str(i), draw.sample(range(1, 500), MAX_BLOCKS)) for i in range(9)]
    for _ in range(200):
        step = draw.sample(requests, draw.randrange(1, 5))
        if draw.random() < 0.3:
            step[0].block_table[:] = draw.sample(range(1, 500), MAX_BLOCKS)
            step[0].num_preemptions += 1
        seats, _ = send(tables, step, [draw.randrange(1, MAX_BLOCKS + 1) for _ in step])
        assert len(set(seats)) == len(step)
