"""Clients that leave: each knows beforehand when it will."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loadtest.raw_http import Head, RawConnection
from loadtest.traffic import draw_request

MAX_WAIT_S = 1.5  # of those that leave before they have an answer
STAYS_S = 120.0  # whoever wants a whole answer has it by then, or was turned away
LAST_EVENT = b"data: [DONE]"


class Moment(StrEnum):
    """When a client leaves."""

    CONNECTED = "having said nothing"
    SENDING = "within its request"
    WAITING = "before the answer"
    READING = "within the answer"
    ENDING = "at the last event"
    NEVER = "with all of the answer"


@dataclass(frozen=True)
class Plan:
    """Of one client."""

    endpoint: str
    body: dict[str, Any]
    moment: Moment
    starts_s: float
    amount: float  # how much of that which it leaves in: 0 to 1
    with_reset: bool  # it breaks the connection; else it closes it


def make_plans(num_clients: int, spread_s: float, max_tokens: int, seed: int) -> list[Plan]:
    """The same each time. Every moment comes as often as the others."""
    draw = random.Random(seed)
    plans = []
    for index in range(num_clients):
        endpoint, body = draw_request(draw, max_tokens, max_words=100)
        moment = list(Moment)[index % len(Moment)]
        if moment is Moment.ENDING:
            body["stream"] = True
        if draw.random() < 0.1:
            body["n"] = draw.randint(2, 8)
        starts_s = draw.uniform(0.0, spread_s)
        plans.append(Plan(endpoint, body, moment, starts_s, draw.random(), draw.random() < 0.5))
    return plans


class StormClients:
    """Carries plans out, all at once."""

    def __init__(self, url: str) -> None:
        self.by_outcome: Counter[str] = Counter()
        self.errors: list[str] = []
        self._url = url

    async def run(self, plans: list[Plan]) -> None:
        await asyncio.gather(*(self._one(plan) for plan in plans))

    async def _one(self, plan: Plan) -> None:
        await asyncio.sleep(plan.starts_s)
        try:
            async with asyncio.timeout(STAYS_S):
                connection = await RawConnection.open(f"{self._url}/{plan.endpoint}")
                try:
                    outcome = await self._follow(plan, connection)
                finally:
                    await connection.close(with_reset=plan.with_reset and plan.moment is not Moment.NEVER)
        except (OSError, TimeoutError, ValueError) as error:
            outcome = f"failed {plan.moment}"
            self.errors.append(f"{plan.moment}: {error!r}")
        self.by_outcome[outcome] += 1

    async def _follow(self, plan: Plan, connection: RawConnection) -> str:
        """Up to the moment at which it leaves."""
        left = f"left {plan.moment}"
        if plan.moment is Moment.CONNECTED:
            return left
        await connection.send(plan.body, plan.amount if plan.moment is Moment.SENDING else 1.0)
        if plan.moment is Moment.SENDING:
            return left
        if plan.moment is Moment.WAITING:
            await asyncio.sleep(plan.amount * MAX_WAIT_S)
            return left
        head = await connection.read_head()
        if head.status in (400, 429):
            return f"status {head.status}"
        if head.status != 200:
            raise ValueError(f"status {head.status}")
        if plan.moment is Moment.READING:
            await connection.reader.read(1 + int(plan.amount * 1000))
            return left
        if plan.moment is Moment.ENDING:
            await _read_to_last_event(connection)
            return left
        await _read_all(plan, connection, head)
        return left


async def _read_to_last_event(connection: RawConnection) -> None:
    """Raises:
    ValueError: the answer ends before that.
    """
    seen = b""
    while LAST_EVENT not in seen:
        content = await connection.reader.read(2**16)
        if not content:
            raise ValueError(f"an answer that ends with {seen[-100:]!r}")
        seen = seen[-len(LAST_EVENT) :] + content


async def _read_all(plan: Plan, connection: RawConnection, head: Head) -> None:
    content = await connection.read_rest()
    if plan.body["stream"]:
        whole = LAST_EVENT in content and b'data: {"error"' not in content
    else:
        whole = content.endswith((b"}", b"0\r\n\r\n"))
        whole = whole and head.content_length in (None, len(content))
    if not whole:
        raise ValueError(f"an answer that ends with {content[-100:]!r}")
