import itertools

import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader, Dataset

from distill.data.sampler import BatchSampler
from distill.types import DistillError


def training(n: int, batch: int, world: int = 1, epoch: int = 0, seed: int = 0, groups=None, drop_last: bool = True):
    ranks = []
    for rank in range(world):
        sampler = BatchSampler(groups or [0] * n, batch, True, seed, rank, world, drop_last)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


def evaluation(groups, batch: int, world: int):
    return [list(BatchSampler(groups, batch, False, rank=rank, world=world)) for rank in range(world)]


def flat(ranks) -> list[int]:
    return [index for rank in ranks for batch in rank for _, index in batch]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("n", "batch", "world"), itertools.product([2, 3, 7, 8, 33], [1, 2, 8], [1, 2, 3]))
def test_training_ranks_have_equally_many_batches_and_share_no_image(n, batch, world, drop_last):
    if n < world:
        return
    groups = [index % 3 == 0 for index in range(n)]
    ranks = training(n, batch, world, groups=groups, drop_last=drop_last)
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) > 0
    assert all(0 < len(keys) <= batch for rank in ranks for keys in rank)
    seen = flat(ranks)
    assert len(set(seen)) == len(seen)
    assert n - len(seen) < (batch * world if drop_last and n >= batch * world else world)


def test_training_without_drop_last_on_one_process_sees_everything():
    assert sorted(flat(training(33, 8, drop_last=False))) == list(range(33))


def test_an_incomplete_batch_is_kept_when_it_is_the_only_one():
    assert sorted(flat(training(3, 8))) == [0, 1, 2]


def test_two_processes_with_half_the_batch_see_what_one_sees():
    groups = [index % 5 < 2 for index in range(50)]
    alone = training(50, 8, 1, groups=groups)[0]
    pair = training(50, 4, 2, groups=groups)
    assert [set(keys) for keys in alone] == [set(a) | set(b) for a, b in zip(*pair, strict=True)]


def test_shuffling_depends_on_seed_and_epoch_alone():
    first = training(40, 4)
    torch.manual_seed(123)
    assert training(40, 4) == first
    assert flat(training(40, 4, epoch=1)) != flat(first)
    assert flat(training(40, 4, seed=1)) != flat(first)
    assert [key[0] for key in training(40, 4, epoch=7)[0][0]] == [7] * 4


def test_all_images_are_seen_as_often_over_many_epochs_although_some_are_dropped():
    counts = torch.zeros(11)
    for epoch in range(300):
        for index in flat(training(11, 4, epoch=epoch, groups=[i < 3 for i in range(11)])):
            counts[index] += 1
    expected = 300 * 8 / 11
    assert (counts - expected).abs().max() < 0.2 * expected


def test_a_group_stays_together_but_for_one_pool_of_leftovers():
    groups = ["tall" if index % 3 else "wide" for index in range(100)]
    batches = training(100, 8, groups=groups)[0]
    mixed = [keys for keys in batches if len({groups[index] for _, index in keys}) > 1]
    assert len(mixed) <= 2
    assert len(batches) == 12


def test_groups_do_not_come_one_after_the_other():
    groups = [index < 50 for index in range(100)]
    order = [groups[keys[0][1]] for keys in training(100, 5, groups=groups)[0]]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


@pytest.mark.parametrize(("n", "batch", "world"), itertools.product([3, 4, 7, 40], [1, 4, 16], [1, 2, 3]))
def test_evaluation_counts_every_image_once_and_gives_every_rank_work(n, batch, world):
    groups = [index % 3 for index in range(n)]
    ranks = evaluation(groups, batch, world)
    assert sorted(flat(ranks)) == list(range(n))
    assert all(rank for rank in ranks)
    assert all(len({groups[index] for _, index in keys}) == 1 for rank in ranks for keys in rank)


def test_evaluation_forms_the_same_batches_for_any_number_of_processes():
    groups = [index % 2 for index in range(41)]
    alone = sorted(evaluation(groups, 4, 1)[0])
    for world in (2, 3):
        assert sorted(keys for rank in evaluation(groups, 4, world) for keys in rank) == alone


def test_fewer_images_than_processes_is_refused_with_a_remedy():
    with pytest.raises(DistillError, match=r"2 images for 3 processes.*fewer devices"):
        BatchSampler([0, 0], 1, False, world=3)
    with pytest.raises(DistillError, match=r"batch_size"):
        BatchSampler([0, 0], 0, True)


class Echo(Dataset):
    def __getitem__(self, key):
        return key


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_can_set_the_epoch_on_a_real_loader_with_lasting_workers(workers):
    sampler = BatchSampler([0] * 10, 2, True)
    loader = DataLoader(
        Echo(), batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0, collate_fn=list
    )
    epochs = []
    for epoch in range(3):
        _set_sampler_epoch(loader, epoch)
        keys = [key for batch in loader for key in batch]
        assert keys == [key for batch in sampler for key in batch]
        epochs.append(keys)
    assert [keys[0][0] for keys in epochs] == [0, 1, 2]
    assert len(loader) == 5


def test_start_resumes_inside_an_epoch_once():
    sampler = BatchSampler([0] * 10, 2, True)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, start=2)
    sampler.set_epoch(3)  # as Lightning does again before the epoch
    assert list(sampler) == whole[2:]
    assert len(sampler) == 5
    sampler.set_epoch(4)
    assert len(list(sampler)) == 5
