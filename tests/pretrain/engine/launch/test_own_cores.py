"""Threads of a rank if nobody says how many; the other ranks of its node are stood in for."""

import os
import socket

import pytest
import torch.distributed as dist

from pretrain.engine.launch.distributed import own_cores

NODE = range(64)


def threads(monkeypatch, *affinities, hosts=None) -> list[int]:
    """What each rank finds, given the cores that it may use, and its node."""
    hosts = hosts or ["node1"] * len(affinities)
    ranks = list(zip(hosts, map(sorted, affinities), strict=True))

    def gather(everyone, mine):
        (host, pid), cores = mine
        assert (host, cores) in ranks and pid == os.getpid()
        everyone[:] = [((host, pid), cores) for host, cores in ranks]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    found = []
    for host, cores in ranks:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(cores))
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        own, places = own_cores(len(ranks))
        assert [place.host for place in places] == list(hosts)
        found.append(own)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 7, 64, 100])
def test_ranks_that_share_a_node_divide_it(monkeypatch, ranks):
    assert threads(monkeypatch, *[NODE] * ranks) == [max(1, 64 // ranks)] * ranks


def test_ranks_that_are_bound_to_their_own_cores_use_them(monkeypatch):
    bound = [range(8 * rank, 8 * rank + 8) for rank in range(8)]
    assert threads(monkeypatch, *bound) == [8] * 8
    halves = [range(32)] * 4 + [range(32, 64)] * 4  # by NUMA node
    assert threads(monkeypatch, *halves) == [8] * 8
    assert threads(monkeypatch, range(4), range(2)) == [3, 1]


def test_other_nodes_have_cores_of_their_own(monkeypatch):
    hosts = ["node1", "node1", "node2", "node2"]
    assert threads(monkeypatch, *[range(8)] * 4, hosts=hosts) == [4] * 4
