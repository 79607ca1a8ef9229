"""Ranks that are started again meet each other, not what their predecessors have left."""

import threading

import pytest
import torch.distributed as dist

from pretrain.engine.launch.rendezvous import store_of_this_start


def meet(stores: list[dist.Store], orders: list[int]) -> list[str]:
    """What each rank reads of what rank 0 writes, ranks coming in this order."""
    found: dict[int, str] = {}

    def come(rank: int) -> None:
        store = store_of_this_start(stores[rank], rank, len(stores), timeout_s=60)
        if rank == 0:
            store.set("address", f"new {orders}")
        found[rank] = store.get("address").decode()

    threads = [threading.Thread(target=come, args=(rank,)) for rank in orders]
    for thread in threads:
        thread.start()
        thread.join(0.2)  # the next one comes late
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(len(stores))]


def test_the_ranks_of_each_start_meet():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3)]
    for orders in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert meet(stores, orders) == [f"new {orders}"] * 3
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] have not come"):
        store_of_this_start(stores[0], 0, 3, timeout_s=0.2)
    with pytest.raises(TimeoutError, match="rank 0 has not come"):
        store_of_this_start(stores[1], 1, 3, timeout_s=0.2)
