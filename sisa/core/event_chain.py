"""The hash chain of a ledger's events: each is linked to the one before it, under the partition key.

So nobody without the key can change, remove or insert an event unnoticed, but for the last ones; the
witness records the newest link.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from sisa.core.digest import Keyed, digest_of
from sisa.core.requests import Request, RequestEvent


@dataclass(frozen=True)
class EventChain:
    """Link of each event of a ledger to the one before it, under the partition key.

    An earlier version linked events without the key. A ledger that it began names its key differently
    (`key_name`); it may begin with unkeyed events, but has none after the first keyed one.
    """

    keyed: Keyed
    began_unkeyed: bool = False

    @classmethod
    def of(cls, keyed: Keyed, name: str | None) -> EventChain:
        """Return the chain of a ledger, given the name of its key."""
        return cls(keyed, name == keyed.name)

    def _link(self, unkeyed: str) -> str:
        return self.keyed.digest("event", unkeyed)

    def linked(self, before: str, events: Iterable[RequestEvent]) -> Iterator[RequestEvent]:
        """Yield events with their links."""
        for each in events:
            before = self._link(chained(before, each))
            yield replace(each, link=before)

    def holds(self, events: Iterable[RequestEvent], link: str = "") -> bool:
        """Return whether the links are those of events that follow the one with `link`."""
        unkeyed_too = self.began_unkeyed
        for each in events:
            plain = chained(link, each)
            link = each.link
            if link == self._link(plain):
                unkeyed_too = False
            elif link != plain or not unkeyed_too:
                return False
        return True


def key_name(keyed: Keyed) -> str:
    """Return how a ledger names its key if all its events are linked under it."""
    return keyed.digest("name", "events")


def key_names(keyed: Keyed) -> tuple[str, str]:
    """Return the names that a ledger may give its key: this version's, and an earlier one's."""
    return key_name(keyed), keyed.name


def contradicted(
    requests: Iterable[Request],
    events: Sequence[RequestEvent],
    chain: EventChain | None,
    link: str = "",
) -> bool:
    """Return whether events are not one `chain` (if given), or contradict a request.

    A request must have the state of its last event, and the time of its commit. With `link`, `events`
    are those after the event with that link, and only their requests are compared.
    """
    if chain is not None and not chain.holds(events, link):
        return True
    states = {each.request_id: each.state for each in events}
    committed = {each.request_id: each.at for each in events if each.state == "committed"}
    held = {each.request_id: each for each in requests if not link or each.request_id in states}
    if {key: each.state for key, each in held.items()} != states:
        return True
    dated = committed if link else held  # a commit may come before the events that are compared
    return any(held[key].committed_at != committed.get(key, "") for key in dated)


def chained(link: str, found: RequestEvent) -> str:
    """Return the unkeyed link of an event after the one with `link`."""
    return digest_of([link, asdict(replace(found, link=""))])
