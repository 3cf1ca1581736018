"""Memory that is filled again, and never while anybody holds what is in it."""

import gc
import itertools
import multiprocessing
import os
import pickle
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from distill.data.buffers import BufferPool, WorkerBatch, wrap_images
from distill.data.transforms import BUFFER_POOL, Sample, collate
from distill.types import Batch, Target

SHAPE = (2, 4, 6, 3)
COUNT = 2 * 4 * 6 * 3
NUMBERS = itertools.count(1)


def lent(pool: BufferPool, shape: tuple[int, int, int, int] = SHAPE) -> torch.Tensor:
    return wrap_images(pool.acquire(torch.Size(shape).numel(), shared=False), shape)


def test_memory_comes_again_when_nobody_holds_it():
    pool = BufferPool()
    first = lent(pool)
    assert first.shape == (2, 3, 4, 6)
    assert first.is_contiguous(memory_format=torch.channels_last)
    address = first.data_ptr()
    del first
    second = lent(pool, (1, 4, 6, 3))
    assert second.data_ptr() == address
    assert lent(pool).data_ptr() != address


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x,
        lambda x: x[1],
        lambda x: x.detach().flatten(2)[0, 0, :1],
        lambda x: x.untyped_storage(),
        lambda x: x.numpy(),
        lambda x: memoryview(x[0, 0].numpy()),
        lambda x: torch.utils.dlpack.to_dlpack(x),
        lambda x: Batch(x, ((4, 6),), ((4, 6),), (), (1,)),
    ],
)
def test_memory_of_which_anything_is_held_is_not_filled(part):
    pool = BufferPool()
    images = lent(pool)
    address, held = images.data_ptr(), part(images)
    del images
    gc.collect()
    others = [lent(pool) for _ in range(3)]
    assert address not in [each.data_ptr() for each in others]
    del held
    gc.collect()
    assert lent(pool).data_ptr() == address


def test_a_piece_is_lent_once_and_of_many_few_are_kept():
    pool = BufferPool(most=3)
    held = [lent(pool).fill_(number) for number in range(8)]
    assert len({each.data_ptr() for each in held}) == 8
    assert all((each == number).all() for number, each in enumerate(held))
    del held
    assert len(pool._buffers) == 3
    again = [lent(pool) for _ in range(3)]
    assert len({each.data_ptr() for each in again}) == 3


def test_a_larger_batch_gets_larger_memory_and_smaller_buffers_go():
    pool = BufferPool()
    lent(pool)
    large = lent(pool, (9, 4, 6, 3)).fill_(1)
    assert [len(buffer) for buffer in pool._buffers] == [9 * 4 * 6 * 3 + 1]
    assert (large == 1).all()


def test_the_mark_of_a_piece_lies_behind_its_pixels():
    buffer = BufferPool().acquire(COUNT, shared=False)
    images = wrap_images(buffer, SHAPE).fill_(0)
    assert buffer[-1] == 1
    del images
    assert buffer[-1] == 0


def test_an_evaluations_batches_come_back_too():
    pool = BufferPool()
    with torch.inference_mode():
        images = lent(pool)
    address = images.data_ptr()
    del images
    assert lent(pool).data_ptr() == address


def test_a_fork_gives_nothing_back():
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    buffer = BufferPool().acquire(COUNT, shared=True)
    images = wrap_images(buffer, SHAPE)
    child = os.fork()
    if not child:
        del images
        os._exit(0)
    os.waitpid(child, 0)
    assert buffer[-1] == 1
    assert images.shape == (2, 3, 4, 6)


def test_a_worker_takes_no_memory_of_the_process_that_it_was_forked_from():
    pool = BufferPool()
    lent(pool)
    assert pool.acquire(COUNT, shared=True).is_shared()
    assert not pool.acquire(COUNT, shared=False).is_shared()


def test_a_posted_batch_arrives_as_a_batch():
    target = Target(torch.rand(1, 4), torch.ones(1, dtype=torch.int64))
    buffer = BufferPool().acquire(COUNT, shared=False)
    buffer[:-1] = torch.arange(COUNT).to(torch.uint8)
    images = buffer[:-1].view(SHAPE).permute(0, 3, 1, 2)
    posted = WorkerBatch(images, ((4, 6), (3, 5)), ((8, 12), (6, 10)), (target, target), (1, 2**40), buffer)
    batch = pickle.loads(pickle.dumps(posted))
    assert type(batch) is Batch
    assert torch.equal(batch.images, images)
    assert (batch.sizes, batch.original_sizes, batch.ids) == (posted.sizes, posted.original_sizes, posted.ids)
    assert torch.equal(batch.targets[1].boxes, target.boxes)


class Numbered:
    """Images of one grey level each, of sizes that differ."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Sample:
        size = (3, 40 + index % 7, 64 if index % 20 < 10 else 120)
        target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return Sample(torch.full(size, index, dtype=torch.uint8), target, size[1:], index)


def right(batch: Batch) -> bool:
    return all((x[:, :h, :w] == id).all() for x, (h, w), id in zip(batch.images, batch.sizes, batch.ids, strict=True))


def numbered(samples: list[Sample]) -> tuple[Batch, int]:
    """A batch, and how many pieces this worker has had."""
    batch = collate(samples, pad_to=8)
    for buffer in BUFFER_POOL._buffers:
        buffer.number = getattr(buffer, "number", None) or next(NUMBERS)
    return batch, max(buffer.number for buffer in BUFFER_POOL._buffers)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_fill_memory_again_but_none_that_is_held(start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {start}")
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": start}
    loader = DataLoader(Numbered(), 2, collate_fn=numbered, **options)
    had = []
    for batch, pieces in loader:
        assert type(batch) is Batch
        assert right(batch)
        had.append(pieces)
    assert len(had) == 30
    assert max(had) < 10
    held = [batch for batch, _ in loader]
    assert all(map(right, held))
    assert all(right(batch) for batch, _ in loader)
    part, id = held[7].images[1, 0, 3], held[7].ids[1]
    del held, batch
    for _ in range(2):
        assert all(right(batch) for batch, _ in loader)
    assert (part[:64] == id).all()


def test_the_main_processs_batches_are_right_while_others_are_held():
    loader = DataLoader(Numbered(), 2, collate_fn=partial(collate, pad_to=8))
    held = list(loader)
    assert all(map(right, held))
    addresses = set()
    for batch in loader:
        assert right(batch)
        addresses.add(batch.images.data_ptr())
    assert len(addresses) < 10
    assert all(map(right, held))
