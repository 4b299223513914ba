# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Events: replayed from the database, then followed as they are committed.

A follower holds nothing but its cursor. It takes what is new from a ring of the latest events that
all followers share, and from the database when it is further behind than that; so a slow one costs
nothing, and one that falls behind what the database keeps is told so.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Final

from api.errors import Invalid
from api.models.resources import Event

from .store import Store

RING_EVENTS: Final = 4096
PAGE_EVENTS: Final = 256


class EventHub:
    """Wakes followers when events have been committed.

    Threads: the event loop's.
    """

    def __init__(self) -> None:
        self._ring: collections.deque[Event] = collections.deque(maxlen=RING_EVENTS)
        self._news = asyncio.Event()

    def publish(self, events: Sequence[Event]) -> None:
        """Take in committed events, in order of id."""
        self._ring.extend(events)
        # A fresh Event each time: who waits on the old one is woken exactly once.
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, store: Store, after: int | None) -> AsyncIterator[Event]:
        """Yield every event above ``after``, then new ones for ever; None: new ones only.

        Raises:
            Invalid: events after the cursor are no longer kept.
            StoreFull: the database cannot be read.
        """
        cursor = store.last_event_id if after is None else after
        while True:
            news = self._news
            events = await self._read(store, cursor)
            for event in events:
                yield event
                cursor = event.id
            if not events:
                await news.wait()

    async def _read(self, store: Store, cursor: int) -> list[Event]:
        if cursor >= store.last_event_id:
            return []
        if self._ring and self._ring[0].id <= cursor + 1:
            # Gaps between ids, if there are any, only make this start a little early.
            start = max(0, len(self._ring) - (store.last_event_id - cursor))
            page = itertools.islice(self._ring, start, start + PAGE_EVENTS)
            return [event for event in page if event.id > cursor]
        return await replay(store, cursor, PAGE_EVENTS)


async def replay(store: Store, after: int, limit: int) -> list[Event]:
    """Return up to ``limit`` events above ``after`` from the database; 0 means from the oldest.

    Raises:
        Invalid: events after the cursor are no longer kept.
        StoreFull: the database cannot be read.
    """
    if after > 0:
        first = await store.first_event_id()
        if after < first - 1:
            raise Invalid(
                "cursor_expired",
                f"after={after}: events up to {first - 1} are no longer kept; read the objects"
                f" again, then follow from {store.last_event_id}",
                field="after",
            )
    return await store.events_after(after, limit)
