# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Events: replayed, followed, expired."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from api.errors import Invalid
from api.models.common import ObjectRef
from api.models.resources import Event
from daemon.supervisor import events as events_module
from daemon.supervisor.events import EventHub, replay
from daemon.supervisor.store import NewEvent, Store

VM = ObjectRef(kind="vm", id="1", name="a")


async def emit(store: Store, count: int) -> None:
    await store.commit(events=[NewEvent("t", VM) for _ in range(count)])


async def take(source: AsyncIterator[Event], count: int) -> list[int]:
    async with asyncio.timeout(20):
        return [(await anext(source)).id for _ in range(count)]


class Followed:
    """A store with a hub."""

    def __init__(self, path: Path, kept: int = 10_000) -> None:
        self.hub = EventHub()
        self.store = Store(path / "hostel.db", events_kept=kept, on_events=self.hub.publish)

    async def __aenter__(self) -> Followed:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()


def test_a_follower_gets_the_past_and_then_the_present(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Followed(tmp_path) as f:
            await emit(f.store, 300)
            source = f.hub.follow(f.store, 2)
            assert await take(source, 298) == list(range(3, 301))
            news = asyncio.create_task(take(source, 2))
            await emit(f.store, 2)
            assert await news == [301, 302]

    asyncio.run(scenario())


def test_a_follower_without_cursor_gets_only_news(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Followed(tmp_path) as f:
            await emit(f.store, 3)
            news = asyncio.create_task(take(f.hub.follow(f.store, None), 1))
            await asyncio.sleep(0)
            await emit(f.store, 1)
            assert await news == [4]

    asyncio.run(scenario())


def test_a_follower_that_is_further_behind_than_memory_reads_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "RING_EVENTS", 5)

    async def scenario() -> None:
        async with Followed(tmp_path) as f:
            await emit(f.store, 50)
            assert await take(f.hub.follow(f.store, 0), 50) == list(range(1, 51))

    asyncio.run(scenario())


def test_followers_survive_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Followed(tmp_path) as f:
            await emit(f.store, 3)
        async with Followed(tmp_path) as f:
            source = f.hub.follow(f.store, 1)
            assert await take(source, 2) == [2, 3]
            await emit(f.store, 1)
            assert await take(source, 1) == [4]

    asyncio.run(scenario())


def test_a_cursor_whose_events_are_gone_is_told_where_to_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Followed(tmp_path, kept=10) as f:
            await emit(f.store, 600)
            with pytest.raises(Invalid, match="events up to 590 are no longer kept"):
                await replay(f.store, 5, 10)
            assert (await replay(f.store, 590, 1))[0].id == 591
            assert (await replay(f.store, 0, 1))[0].id == 591

    asyncio.run(scenario())
