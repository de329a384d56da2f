import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from adamerge.data import Digits, StepSampler, StepStream, TensorTask, UnlabeledTasks
from adamerge.evaluation import confusion, evaluate, score
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
    def scored(said, true):
        metric = confusion(2)
        metric.update(torch.nn.functional.one_hot(torch.tensor(said), 2).float(), torch.tensor(true))
        return score("a", metric.compute())

    accuracy, collapse = scored([0] * 10, [0, 1] * 5)
    assert accuracy == 0.5
    assert collapse == ("a", 1.0, 0.5)
    assert scored([0, 1] * 5, [0, 1] * 5)[1] is None


def test_a_score_needs_two_numbers_per_class_and_counts_labels_alone():
    from torchmetrics.classification import MulticlassAccuracy

    from adamerge.types import UNLABELED

    metric, reference = confusion(32128), MulticlassAccuracy(32128, average="micro", ignore_index=UNLABELED)
    assert sum(state.numel() for state in metric._defaults.values()) == 2 * 32128 + 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        logits = torch.randn(7, 32128, generator=generator)
        label = torch.randint(32128, (7,), generator=generator)
        label[:2], label[2:4] = UNLABELED, logits[2:4].argmax(-1)
        metric.update(logits, label.to(torch.int32))
        reference.update(logits, label)
    counts = metric.compute()
    assert (int(counts.true_C.sum()), int(counts.predicted_C.sum()), counts.true_C.dtype) == (15, 15, torch.int64)
    assert score("a", counts)[0] == pytest.approx(float(reference.compute())) == 0.4


def test_labels_beyond_the_classes_are_said():
    model = merged_of()
    for label, odd in (([0, 9], 9), ([0, -3], -3)):
        batch = {"input": torch.randn(2, 5), "label": torch.tensor(label)}
        with pytest.raises(InputError, match=rf"Task 'a' has {CLASSES['a']} classes, but a sample is labelled {odd}"):
            evaluate(model, {"a": [batch]}, CLASSES, torch.device("cpu"))
    with pytest.raises(InputError, match="scored on samples without labels; set"):
        evaluate(model, {"a": [{**batch, "label": torch.full((2,), -100)}]}, CLASSES, torch.device("cpu"))


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
