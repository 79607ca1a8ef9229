"""Slots of shared memory: taken, described, placed, freed with the last view."""

import gc
import os
import pickle
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch

import data_pipeline.loader.arena as arena_module
from data_pipeline.loader.arena import Arena

SHAPES = {"images": (2, 4, 4, 3), "masks": (2, 5)}


@pytest.fixture
def as_worker(monkeypatch):
    def become(number: int) -> None:
        info = SimpleNamespace(id=number)
        monkeypatch.setattr(arena_module, "get_worker_info", lambda: info)

    become(0)
    return become


def test_a_tensor_travels_by_its_description(as_worker):
    arena = Arena(workers=2, slots=2, slot_bytes=200)
    as_worker(1)
    taken = arena.take(SHAPES)
    taken["images"].copy_(torch.arange(96).reshape(2, 4, 4, 3))
    taken["masks"].fill_(7)
    sent = {"image": taken["images"].permute(0, 3, 1, 2)[1:], "mask": taken["masks"]}
    described = {name: arena.describe(tensor) for name, tensor in sent.items()}
    image, mask = arena.place(pickle.loads(pickle.dumps(described))).values()
    assert torch.equal(image, taken["images"].permute(0, 3, 1, 2)[1:])
    assert image.stride() == taken["images"].permute(0, 3, 1, 2)[1:].stride()
    assert (mask == 7).all() and mask.shape == (2, 5)


def test_foreign_tensors_are_not_described(as_worker):
    arena = Arena(1, 1, 200)
    assert arena.describe(torch.zeros(3, dtype=torch.uint8)) is None
    assert Arena(1, 1, 200).describe(arena.take(SHAPES)["masks"]) is None


def test_a_slot_is_free_again_when_the_last_view_dies(as_worker):
    arena = Arena(workers=1, slots=1, slot_bytes=200)
    described = {"images": arena.describe(arena.take(SHAPES)["images"])}
    assert arena.take(SHAPES) is None
    placed = arena.place(described)["images"]
    view = placed[1, 0].numpy()[:2]
    del placed
    gc.collect()
    assert arena.take(SHAPES) is None
    del view
    gc.collect()
    assert arena.take(SHAPES) is not None


@pytest.mark.parametrize("first", SHAPES)
def test_tensors_of_one_slot_keep_it_together(as_worker, first):
    """Whichever goes first: a batch in the slot must not lose it to the end of the one before."""
    arena = Arena(workers=1, slots=1, slot_bytes=200)
    taken = arena.take(SHAPES)
    placed = arena.place({name: arena.describe(tensor) for name, tensor in taken.items()})
    del placed[first], taken
    gc.collect()
    assert arena.take(SHAPES) is None
    placed.clear()
    gc.collect()
    assert arena.take(SHAPES) is not None
    assert arena.take(SHAPES) is None


def test_a_forked_process_does_not_free_what_the_trainer_holds(as_worker):
    arena = Arena(workers=1, slots=1, slot_bytes=200)
    placed = arena.place({"images": arena.describe(arena.take(SHAPES)["images"])})
    process = get_context("fork").Process(target=placed.clear)
    process.start()
    process.join()
    assert process.exitcode == 0 and arena.take(SHAPES) is None
    placed.clear()
    assert arena.take(SHAPES) is not None


def test_workers_have_slots_of_their_own(as_worker):
    arena = Arena(workers=2, slots=1, slot_bytes=200)
    first = arena.take(SHAPES)
    as_worker(1)
    second = arena.take(SHAPES)
    assert first["images"].data_ptr() != second["images"].data_ptr()
    assert arena.take(SHAPES) is None


def test_what_does_not_fit_gets_no_slot(as_worker, monkeypatch):
    arena = Arena(1, 1, 100)
    assert arena.take({"images": (100, 100)}) is None
    assert arena.take({}) is None
    monkeypatch.setattr(arena_module, "get_worker_info", lambda: None)
    assert arena.take(SHAPES) is None  # in the trainer itself


def _write(arena: Arena, value: int) -> None:
    arena._bytes[-1] = value


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_other_processes_see_the_same_memory(method):
    arena = Arena(1, 1, 100)
    process = get_context(method).Process(target=_write, args=(arena, 42))
    process.start()
    process.join()
    assert arena._bytes[-1] == 42


def test_the_file_is_closed_and_untouched_memory_is_not_used():
    before = set(os.listdir("/proc/self/fd"))
    arena = Arena(workers=64, slots=100, slot_bytes=1 << 24)  # 100 GiB, none of it written
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 2
    del arena
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before
