import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from adamerge.data import Digits, StepSampler, StepStream, TensorTask, UnlabeledTasks
from adamerge.evaluation import evaluate
from adamerge.types import InputError
from tests.tiny import CLASSES, TASKS, data_of, merged_of


class Indices(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"input": torch.tensor(index), "noise": torch.rand(1) + np.random.rand() + random.random(), "label": 0}


def stream(**options):
    return StepStream({"a": Indices(10), "b": Indices(7)}, **{"batch_size": 4, "seed": 5, **options})


def seen(stream, task, steps):
    return torch.cat([stream[k][task]["input"] for k in range(steps)]).tolist()


def test_a_step_is_a_pure_function_of_seed_task_rank_and_number():
    one, other = stream(rank=1, world_size=3), stream(rank=1, world_size=3)
    later = one[7]
    for k in (3, 0, 7):
        assert torch.equal(one[k]["a"]["noise"], other[k]["a"]["noise"])
    assert torch.equal(other[7]["b"]["input"], later["b"]["input"])
    assert not torch.equal(stream(seed=6)[0]["a"]["input"], stream()[0]["a"]["input"])
    alone = StepStream({"b": Indices(7)}, batch_size=4, seed=5)
    assert torch.equal(alone[3]["b"]["noise"], stream()[3]["b"]["noise"])


def test_every_sample_comes_once_per_pass():
    assert sorted(seen(stream(batch_size=5), "a", 2)) == list(range(10))
    assert sorted(seen(stream(batch_size=7), "b", 1)) == list(range(7))
    assert seen(stream(batch_size=7), "b", 1) != seen(stream(batch_size=7), "b", 2)[7:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_global_batch(world_size):
    whole = stream(batch_size=8)
    shares = [stream(batch_size=8 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for k in range(6):
        positions = [set(share.positions(k)) for share in shares]
        assert sum(map(len, positions)) == len(set.union(*positions)) == 8
        assert set.union(*positions) == set(whole.positions(k))
        together = torch.cat([share[k]["a"]["noise"] for share in shares])
        torch.testing.assert_close(together.sort(0).values, whole[k]["a"]["noise"].sort(0).values)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    stream()[3]
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_labels_come_only_when_asked_for():
    assert "label" not in stream()[0]["a"]
    assert "label" in stream(labels=True)[0]["a"]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_a_late_start_change_nothing(workers):
    start = 5
    loader = DataLoader(stream(), batch_size=None, sampler=StepSampler(lambda: start), num_workers=workers)
    for k, batch in zip(range(5, 11), loader, strict=False):
        assert torch.equal(batch["a"]["noise"], stream()[k]["a"]["noise"])
    start = 2
    assert list(islice(StepSampler(lambda: start), 3)) == [2, 3, 4]
    assert list(islice(StepSampler(lambda: start, cycle=2), 3)) == [0, 1, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_each_sample_once(world_size):
    data = data_of(eval_batch_size=4)
    for task in TASKS:
        labels = [
            label
            for rank in range(world_size)
            for batch in data.eval_loaders(rank, world_size)[task]
            for label in batch["input"].sum(1).tolist()
        ]
        expected = [float(data.datasets("test")[task][i]["input"].sum()) for i in range(23)]
        torch.testing.assert_close(sorted(labels), sorted(expected))


def test_evaluation_is_the_accuracy():
    model, data = merged_of(), data_of(eval_batch_size=5)
    scores = evaluate(model, data.eval_loaders(), CLASSES, torch.device("cpu"))
    for task in TASKS:
        samples = [data.datasets("test")[task][i] for i in range(23)]
        batch = {"input": torch.stack([sample["input"] for sample in samples])}
        right = model(batch, task=task).argmax(1) == torch.tensor([sample["label"] for sample in samples])
        assert scores[task] == pytest.approx(float(right.float().mean()))


def test_a_task_that_collapses_is_said():
    from adamerge.evaluation import score

    table = torch.tensor([[5, 0], [5, 0]])
    accuracy, collapse = score("a", table)
    assert accuracy == 0.5
    assert collapse == ("a", 1.0, 0.5)
    assert score("a", torch.tensor([[5, 0], [0, 5]]))[1] is None


def test_fewer_samples_than_ranks_are_refused():
    with pytest.raises(InputError, match=r"The split 'test' of a, b, c has fewer samples than there are ranks \(24\)"):
        data_of().eval_loaders(0, 24)


def test_an_empty_task_is_named():
    empty = TensorTask(["x"], train=(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)))
    data = UnlabeledTasks({"a": data_of().tasks["a"], "sad": empty})
    with pytest.raises(InputError, match="Task 'sad' is empty: its split 'train' has no samples"):
        data.stream()


def test_an_unknown_split_is_named_for_every_task():
    with pytest.raises(InputError, match="3 problems with the data"):
        data_of(split="validation").stream()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"eval_batch_size": 0}])
def test_sizes_below_one(options):
    with pytest.raises(InputError, match="both are at least 1"):
        data_of(**options)


def test_no_tasks():
    with pytest.raises(InputError, match=r"`data.tasks` is empty"):
        UnlabeledTasks({})


def test_digits_are_real_and_their_splits_disjoint():
    images = {
        name: {bytes(sample["input"].numpy().tobytes()) for sample in Digits("digit").split(name)}
        for name in ("train", "unlabeled", "test")
    }
    assert sum(map(len, images.values())) == len(set.union(*images.values()))
    turned, upright = Digits("turned").split("test")[0]["input"], Digits("digit").split("test")[0]["input"]
    assert torch.equal(turned, upright.rot90(1, (1, 2)))
    assert Digits("parity").split("test")[3]["label"] == Digits("digit").split("test")[3]["label"] % 2
