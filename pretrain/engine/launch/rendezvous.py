"""A store that only the ranks of one start share.

torchrun's agent keeps its key-value store over restarts of the ranks (torch 2.13: pytorch issue
135712), so that a rank finds the address that a peer of the start before has left there, waits for
it, and is waited for: a hang of half an hour. The count of restarts that the agent tells cannot
tell starts apart, since each node's agent counts its own. So the ranks shake hands.
"""

import json
import secrets
import time

import torch.distributed as dist

_KEY = "omnipretrain"
_POLL_S = 0.05


def store_of_this_start(
    store: dist.Store, rank: int, world: int, timeout_s: float = 1800.0
) -> dist.Store:
    """The part of `store` that ranks of this start alone know; every rank has to ask.

    Each rank says hello with a new word. Rank 0 repeats all words that it finds beside a new name
    of the start, until every rank has answered to that name. A word or an answer that an earlier
    start has left belongs to nobody who is here, and is overwritten in time.

    Raises:
        TimeoutError: some ranks have not come; they are named.
    """
    word = secrets.token_hex(8)
    store.set(f"{_KEY}/hello/{rank}", word)
    until = time.monotonic() + timeout_s
    if rank == 0:
        name = secrets.token_hex(8)
        absent = list(range(1, world))
        while absent:
            _check_time(until, f"ranks {absent[:16]} have not come")
            words = {r: _read(store, f"{_KEY}/hello/{r}") for r in range(world)}
            store.set(f"{_KEY}/start", json.dumps({"name": name, "words": words}))
            absent = [r for r in absent if _read(store, f"{_KEY}/answer/{r}") != name]
            if absent:
                time.sleep(_POLL_S)
    else:
        name = None
        while name is None:
            _check_time(until, "rank 0 has not come")
            start = json.loads(_read(store, f"{_KEY}/start") or '{"words": {}}')
            if start["words"].get(str(rank)) == word:
                name = start["name"]
                store.set(f"{_KEY}/answer/{rank}", name)
            else:
                time.sleep(_POLL_S)
    return dist.PrefixStore(f"{_KEY}/{name}", store)


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _check_time(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(f"the ranks have not met: {what}")
