"""Which records are of the same model call: a call may be recorded by the proxy and by several libraries.

Nothing here looks at a clock. Two records tell of the same call

1. if one span is inside the other, by the parents that they name, and what both say of the reply is the same; where
   one was put inside the other because of its times, or one library wrote both, also what they say of the request;
2. if the proxy wrote one, a library the other, and both say the same request and the same reply, or the same id and
   the same reply (or the library says nothing but the id). A record of the proxy stands for at most one record of each
   library, so that a call that was made twice stays two calls;
3. if libraries wrote both, with the same id, and the same request and reply;
4. if one library wrote both, with the same request, and one has no reply (Logfire makes two spans of a streamed call);
5. if the library wrote several choices as one text, and the proxy a call with the same request and several choices.

The same id alone says nothing: servers with constant ids, and caches, give one id to different replies. Two records of
the proxy are always two calls, because it writes one record for each.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from agentlightning.adapter.calls import ModelCall

Key: TypeAlias = Callable[["RecordedCall"], Hashable | None]
"""What records of the same call have in common; None: nothing can be said."""


@dataclass(eq=False)
class RecordedCall:
    """What one span tells of a model call."""

    call: ModelCall
    agent: str | None
    """The innermost agent around it that was asked for; None without one."""
    above: RecordedCall | None = None
    """The record whose span contains it most closely."""
    is_guessed: bool = False
    """Whether it is inside of ``above`` by its times only, not by the parents that spans name."""
    stands_for: list[RecordedCall] = field(default_factory=list["RecordedCall"])
    """Other records of the same call."""
    left_out: str | None = None
    """Why the caller may want to leave the call out; None: no reason."""

    @property
    def source(self) -> tuple[str, str]:
        """Who wrote it: no library writes a call twice under the same name."""
        return self.call.instrumentation, "" if self.call.is_proxied else self.call.span.name

    @property
    def span_ids(self) -> list[str]:
        """The ids of the spans that tell of the call."""
        return [self.call.span.span_id, *(span_id for each in self.stands_for for span_id in each.span_ids)]

    def absorb(self, other: RecordedCall) -> None:
        """Stand for another record, and learn from it in which agent the call was made."""
        self.stands_for.append(other)
        if self.agent is None:
            self.agent = other.agent
        if not self.call.agent_path and other.call.agent_path:
            self.call = replace(self.call, agent_path=other.call.agent_path)


def without_repeated(records: Sequence[RecordedCall]) -> list[RecordedCall]:
    """Return one record of each call that was recorded several times side by side; each names those it stands for.

    Args:
        records: of one attempt, in their order, none of them inside of another one of the same call.
    """
    proxied = [each for each in records if each.call.is_proxied]
    others = [each for each in records if not each.call.is_proxied]
    if len(others) > 1:
        others = _unfinished(others)
    for whose, of_whom, *keys in _PAIRINGS:
        if proxied and others:
            hosts = [each for each in proxied if whose(each.call)]
            guests = [each for each in others if of_whom(each.call)]
            absorbed = _absorbed(hosts, guests, (keys[0], keys[1]))
            others = [each for each in others if id(each) not in absorbed]
    if len(others) > 1:
        others = _absorbed_by_earlier(others, _id_and_content)
    known = set(map(id, [*proxied, *others]))
    return [each for each in records if id(each) in known]


# --- One inside the other --------------------------------------------------------------------------


def without_nested(records: Sequence[RecordedCall]) -> list[RecordedCall]:
    """Return one record of each call that was recorded several times, one inside the other.

    Args:
        records: of one attempt, those inside of others after these. Others that they are inside of may be missing.
    """
    groups: dict[int, list[RecordedCall]] = {}
    group_of: dict[int, list[RecordedCall]] = {}
    for record in records:
        above = record.above
        while above is not None and id(above) not in group_of:
            above = above.above
        if above is not None and _is_same_inside(record, above):
            group = group_of[id(above)]
        else:
            group = groups[id(record)] = []
        group.append(record)
        group_of[id(record)] = group
    chosen: set[int] = set()
    for group in groups.values():
        best = _best(group)
        stands = next((each for each in best if each.call.problem is None), best[0])
        for each in group:
            if all(each is not one for one in best):
                stands.absorb(each)
        chosen.update(map(id, best))
    return [each for each in records if id(each) in chosen]


def _is_same_inside(inner: RecordedCall, outer: RecordedCall) -> bool:
    mine, theirs = inner.call, outer.call
    if mine.is_merged or theirs.is_merged:
        return mine.request_key is not None and mine.request_key == theirs.request_key
    if _differ(mine.reply_key, theirs.reply_key):
        return False
    if inner.is_guessed or inner.source == outer.source:
        return not _differ(mine.request_key, theirs.request_key)
    return True


def _best(group: Sequence[RecordedCall]) -> list[RecordedCall]:
    """Return the records that can be trained on best: all of the proxy's, else those with token ids, the outermost
    alone if it has some, else the outermost of those without a problem."""
    proxied = [each for each in group if each.call.is_proxied]
    exact = [each for each in group if each.call.has_token_ids]
    if proxied:
        return proxied
    if exact:
        return exact[:1] if exact[0] is group[0] else exact
    return [next((each for each in group if each.call.problem is None), group[0])]


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other


# --- Side by side ----------------------------------------------------------------------------------


def _content(record: RecordedCall) -> Hashable | None:
    call = record.call
    return None if call.request_key is None or call.reply_key is None else (call.request_key, call.reply_key)


def _id_and_reply(record: RecordedCall) -> Hashable | None:
    call = record.call
    return None if call.response_id is None or call.reply_key is None else (call.response_id, call.reply_key)


def _id_and_content(record: RecordedCall) -> Hashable | None:
    content = _content(record)
    return None if record.call.response_id is None or content is None else (record.call.response_id, content)


def _failure(record: RecordedCall) -> Hashable | None:
    return record.call.request_key if record.call.failed and record.call.reply_key is None else None


def _request(record: RecordedCall) -> Hashable | None:
    return record.call.request_key


def _has_several(call: ModelCall) -> bool:
    return bool(call.further_choices)


def _is_merged(call: ModelCall) -> bool:
    return call.is_merged


def _anyone(call: ModelCall) -> bool:
    return True


def _is_nameless(call: ModelCall) -> bool:
    return call.response_id is None


def _id_alone(record: RecordedCall) -> Hashable | None:
    call = record.call
    return call.response_id if call.request_key is None and call.reply_key is None else None


def _id(record: RecordedCall) -> Hashable | None:
    return record.call.response_id


Some: TypeAlias = Callable[[ModelCall], bool]
_PAIRINGS: tuple[tuple[Some, Some, Key, Key], ...] = (
    (_anyone, _anyone, _id_and_content, _id_and_content),
    (_anyone, _anyone, _id_and_reply, _id_and_reply),
    (_anyone, _is_nameless, _content, _content),
    (_is_nameless, _anyone, _content, _content),
    (_anyone, _anyone, _id, _id_alone),
    (_anyone, _anyone, _failure, _failure),
    (_has_several, _is_merged, _request, _request),
)
"""Which records of the proxy stand for which of libraries, and what the two have in common; surest first."""


def _absorbed(proxied: Iterable[RecordedCall], others: Iterable[RecordedCall], keys: tuple[Key, Key]) -> set[int]:
    """Let records of the proxy stand for those of libraries with the same key; return which ones."""
    by_key: dict[Hashable, list[RecordedCall]] = defaultdict(list)
    for each in proxied:
        by_key[keys[0](each)].append(each)
    taken = {(id(each), one.source) for group in by_key.values() for each in group for one in each.stands_for}
    waiting: dict[Hashable, deque[RecordedCall]] = {}
    absorbed: set[int] = set()
    for other in others:
        common = keys[1](other)
        if common is None or common not in by_key:
            continue
        place = (common, other.source)
        if place not in waiting:
            waiting[place] = deque(each for each in by_key[common] if (id(each), other.source) not in taken)
        if waiting[place]:
            waiting[place].popleft().absorb(other)
            absorbed.add(id(other))
    return absorbed


def _absorbed_by_earlier(records: Sequence[RecordedCall], key: Key) -> list[RecordedCall]:
    """Let the first record with a key stand for the later ones."""
    earliest: dict[Hashable, RecordedCall] = {}
    left: list[RecordedCall] = []
    for record in records:
        common = key(record)
        if common is not None and common in earliest:
            earliest[common].absorb(record)
        else:
            left.append(record)
            if common is not None:
                earliest[common] = record
    return left


def _unfinished(records: Sequence[RecordedCall]) -> list[RecordedCall]:
    """Let records with a reply stand for those without one of the same library, with the same request."""
    finished: dict[Hashable, deque[RecordedCall]] = defaultdict(deque)
    for each in records:
        if each.call.request_key is not None and each.call.reply_key is not None:
            finished[each.call.instrumentation, each.call.request_key].append(each)
    left: list[RecordedCall] = []
    for each in records:
        free = finished.get((each.call.instrumentation, each.call.request_key))
        if each.call.reply_key is None and not each.call.failed and free:
            free.popleft().absorb(each)
        else:
            left.append(each)
    return left
