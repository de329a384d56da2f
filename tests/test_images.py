"""Images from folders and from data sets: read, prepared once, remembered; what is wrong is said."""

import pickle

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from adamerge.data import HFDataset, ImageFolder, StepStream, UnlabeledTasks
from adamerge.data.prepared import Prepared
from adamerge.types import InputError


def picture(value):
    return Image.new("RGB", (6, 5), (value, 0, 0))


@pytest.fixture
def folder(tmp_path):
    for split, number in (("train", 4), ("test", 2)):
        for kind, value in (("house_cat", 10), ("dog", 200)):
            (tmp_path / "pets" / split / kind).mkdir(parents=True)
            for index in range(number):
                picture(value + index).save(tmp_path / "pets" / split / kind / f"{index}.png")
    (tmp_path / "pets" / "train" / "dog" / ".hidden.png").write_text("")
    (tmp_path / "pets" / "train" / "dog" / "notes.txt").write_text("no image")
    return tmp_path / "pets"


def rows(number=6):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "black"])})
    images = [picture(255 * (index % 2 == 0)) for index in range(number)]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [index % 2 for index in range(number)]}, features=features
    )


# --- folders


def test_a_folder_is_read_by_class(folder):
    data = ImageFolder(str(folder))
    assert data.classes == ["dog", "house cat"]
    samples = data.split("train")
    assert [samples[index]["label"] for index in range(len(samples))] == [0] * 4 + [1] * 4
    assert samples[0]["image"].getpixel((0, 0)) == (200, 0, 0)
    assert len(data.split("test")) == 4
    assert len(ImageFolder(str(folder), splits={"unlabeled": "test"}).split("unlabeled")) == 4


def test_class_names_can_be_given(folder):
    assert ImageFolder(str(folder), classes=["a dog", "a cat"]).classes == ["a dog", "a cat"]
    named = ImageFolder(str(folder), classes={"house_cat": "a cat", "dog": "a dog"})
    assert named.classes == ["a dog", "a cat"]
    for wrong in (["a dog"], ["a", "b", "c"], {"dog": "a dog", "cat": "a cat"}):
        with pytest.raises(InputError, match=r"`classes` has .*; the class folders in .*pets are 2 \(dog, house_cat\)"):
            _ = ImageFolder(str(folder), classes=wrong).classes


def test_unreadable_files_are_listed_at_once(folder):
    (folder / "train" / "dog" / "1.png").write_bytes(b"nothing")
    (folder / "train" / "house_cat" / "2.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"no readable images: 2 \(.*dog/1\.png, .*house_cat/2\.png\)\. Remove or"):
        ImageFolder(str(folder)).split("train")


def test_a_file_cut_short_is_named_when_it_is_decoded(folder):
    file = folder / "test" / "dog" / "1.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    samples = ImageFolder(str(folder)).split("test")
    with pytest.raises(InputError, match=r"The image .*test/dog/1\.png cannot be decoded"):
        samples[1]


def test_missing_folders_and_splits(folder, tmp_path):
    with pytest.raises(InputError, match="There is no image folder at"):
        _ = ImageFolder(str(tmp_path / "none")).classes
    with pytest.raises(InputError, match=r"no folder 'val' for the split 'val'; it has \['test', 'train'\]"):
        ImageFolder(str(folder)).split("val")
    (tmp_path / "flat").mkdir()
    with pytest.raises(InputError, match="holds no folders of splits: SPLIT/CLASS"):
        _ = ImageFolder(str(tmp_path / "flat")).classes


def test_unlabeled_images_stand_right_in_the_split(folder):
    (folder / "unlabeled").mkdir()
    picture(3).save(folder / "unlabeled" / "0.png")
    data = ImageFolder(str(folder))
    assert data.classes == ["dog", "house cat"]
    assert [data.split("unlabeled")[0]["label"]] == [-100]


def test_images_are_turned_as_the_camera_says(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(3).save(folder / "test" / "dog" / "turned.jpg", exif=exif)
    samples = ImageFolder(str(folder)).split("test")
    assert {samples[index]["image"].size for index in range(3)} == {(6, 5), (5, 6)}


def test_a_file_cut_short_is_one_sentence_from_a_worker_too(folder):
    file = folder / "test" / "dog" / "1.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    data = UnlabeledTasks({"pets": ImageFolder(str(folder))}, num_workers=1, cache_limit=0)
    data.preparer = lambda task: lambda sample: {"image": torch.zeros(1), "label": sample["label"]}
    with pytest.raises(InputError) as caught:
        list(data.eval_loaders()["pets"])
    assert str(caught.value).startswith("The image ")
    assert "Traceback" not in str(caught.value)


def test_class_folders_of_splits_must_agree(folder):
    (folder / "test" / "bird").mkdir()
    picture(3).save(folder / "test" / "bird" / "0.png")
    data = ImageFolder(str(folder))
    assert data.classes == ["dog", "house cat"]  # those of train, whatever else lies about
    with pytest.raises(
        InputError, match=r"'test' in .* has class folders that 'train' lacks: 1 \(bird\)\. .* add these"
    ):
        data.split("test")
    (folder / "train" / "bird").mkdir()
    assert [sample["label"] for sample in data.split("test")] == [0, 1, 1, 2, 2]  # alphabetical: bird first
    (folder / "val" / "house_cat").mkdir(parents=True)  # fewer do no harm
    picture(3).save(folder / "val" / "house_cat" / "0.png")
    assert [sample["label"] for sample in data.split("val")] == [2]


def test_class_folders_are_those_of_the_split_called_train(folder):
    (folder / "all").mkdir()
    (folder / "train").rename(folder / "learning")
    (folder / "learning" / "horse").mkdir()
    assert ImageFolder(str(folder)).classes == ["dog", "horse", "house cat"]  # the first that has some
    (folder / "a").mkdir()
    (folder / "a" / "dog").mkdir()
    assert ImageFolder(str(folder)).classes == ["dog"]
    assert ImageFolder(str(folder), splits={"train": "test"}).classes == ["dog", "house cat"]


def test_a_folder_without_class_folders_may_name_its_classes(tmp_path):
    (tmp_path / "flat" / "train").mkdir(parents=True)
    picture(3).save(tmp_path / "flat" / "train" / "0.png")
    assert ImageFolder(str(tmp_path / "flat")).classes == []
    assert ImageFolder(str(tmp_path / "flat"), classes=["a", "b"]).classes == ["a", "b"]
    assert not ImageFolder(str(tmp_path / "flat")).split("train").labelled


# --- data sets


@pytest.mark.parametrize("layout", ["disk", "parquet"])
def test_a_data_set_is_read(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if layout == "disk":
        datasets.DatasetDict(train=rows(), test=rows(4)).save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        rows().to_parquet(str(tmp_path / "data" / "train.parquet"))
        rows(4).to_parquet(str(tmp_path / "data" / "test.parquet"))
    data = HFDataset(str(tmp_path / "data"))
    assert list(data.classes) == ["red", "black"]
    assert [data.split("train")[index]["label"] for index in range(6)] == [0, 1] * 3
    assert data.split("test")[0]["image"].convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert len(data.split("test")) == 4
    if layout == "parquet":
        assert len(HFDataset(str(tmp_path / "data"), splits={"unlabeled": "train[:50%]"}).split("unlabeled")) == 3
    with pytest.raises(InputError, match=r"has no split 'val'|The split 'val' of the data set .* cannot be opened"):
        data.split("val")
    again = pickle.loads(pickle.dumps(data))
    assert len(again.split("test")) == 4


def test_columns_and_classes_can_be_given(tmp_path):
    renamed = rows().rename_columns({"image": "img", "label": "fine_label"})
    datasets.DatasetDict(train=renamed).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"it has img, fine_label\. Say in `columns` .*: `columns: \{image: img\}`"):
        HFDataset(str(tmp_path / "data")).split("train")
    assert len(HFDataset(str(tmp_path / "data"), columns={"image": "img"}).split("train")) == 6
    with pytest.raises(InputError, match="has no column picture, which `columns` names; it has img, fine_label"):
        HFDataset(str(tmp_path / "data"), columns={"image": "picture"}).split("train")
    with pytest.raises(InputError, match=r"`columns` names 1 \(picture\); a sample's entries are image, text, words"):
        HFDataset(str(tmp_path / "data"), columns={"picture": "img"})
    columns = {"image": "img", "label": "fine_label"}
    data = HFDataset(str(tmp_path / "data"), columns=columns, classes=["a red one", "a black one"])
    assert data.classes == ["a red one", "a black one"]
    assert set(data.split("train")[0]) == {"image", "label"}
    with pytest.raises(InputError, match=r"`classes` has 3 .*; the labels of .* are 2 \(red, black\)"):
        _ = HFDataset(str(tmp_path / "data"), columns=columns, classes=["a", "b", "c"]).classes


def test_an_unlabeled_split_needs_no_labels(tmp_path):
    splits = datasets.DatasetDict(test=rows(4), unlabeled=rows().remove_columns("label"))
    splits.save_to_disk(str(tmp_path / "data"))
    data = HFDataset(str(tmp_path / "data"), splits={"unlabeled": "unlabeled[50%:]"})
    assert list(HFDataset(str(tmp_path / "data")).classes) == ["red", "black"]
    assert len(data.split("unlabeled")) == 3
    assert data.split("unlabeled")[0]["label"] == -100


def test_labels_mean_the_same_in_every_split(tmp_path):
    other = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["black", "red"])})
    test = datasets.Dataset.from_dict({"image": [picture(0)], "label": [0]}, features=other)
    datasets.DatasetDict(train=rows(), test=test).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"numbers its classes otherwise than the first one: 2 \(black, red\), not 2"):
        HFDataset(str(tmp_path / "data")).split("test")


def test_labels_in_words_are_refused(tmp_path):
    datasets.DatasetDict(train=rows().cast_column("label", datasets.Value("string"))).save_to_disk(
        str(tmp_path / "data")
    )
    data = HFDataset(str(tmp_path / "data"), classes=["red", "black"])
    with pytest.raises(InputError, match=r"is labelled '0', which is not in `classes`: 2 \(red, black\); list"):
        data.split("train")[0]


def test_a_data_set_that_is_not_there_says_so_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"The split 'train' of the data set 'nobody/nothing' cannot be opened: .*network"
    ):
        HFDataset("nobody/nothing").split("train")
    (tmp_path / "split").mkdir()
    rows().save_to_disk(str(tmp_path / "split"))
    with pytest.raises(InputError, match="is one split of a data set; name the folder above"):
        HFDataset(str(tmp_path / "split")).split("train")


# --- prepared once


class Counted(Dataset):
    """Samples that count how often they are asked for."""

    def __init__(self, number=5, size=3):
        self.asked, self.number, self.size = 0, number, size

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        self.asked += 1
        return {"image": torch.full((self.size,), index), "label": index}


def to_bytes(sample):
    return {**sample, "image": sample["image"].to(torch.uint8)}


def test_samples_are_prepared_once():
    raw = Counted()
    samples = Prepared(raw, to_bytes, limit=1000)
    asked = raw.asked
    for _ in range(3):
        for index in range(5):
            found = samples[index]
            assert found["image"].dtype == torch.uint8
            assert found["image"].tolist() == [index] * 3
            assert found["label"] == index
            assert type(found["label"]) is int
    assert raw.asked == asked + 5
    assert samples.size == 5 * (3 + 8)


@pytest.mark.parametrize("limit", [0, 10])
def test_what_does_not_fit_is_prepared_every_time(limit):
    raw = Counted()
    samples = Prepared(raw, to_bytes, limit=limit)
    asked = raw.asked
    for _ in range(2):
        assert samples[3]["image"].tolist() == [3] * 3
    assert raw.asked == asked + 2
    assert samples.size == 0


def test_a_sample_of_another_shape_is_not_remembered():
    class Odd(Counted):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample if index != 2 else {**sample, "image": torch.zeros(7)}

    raw = Odd()
    samples = Prepared(raw, to_bytes, limit=1000)
    assert samples[2]["image"].shape == (7,)
    assert samples[2]["image"].shape == (7,)
    assert samples[1]["image"].shape == (3,)


def test_a_step_reads_together_what_it_will_remember():
    class Together(Counted):
        def __getitems__(self, indices):
            batches.append(list(indices))
            return [self[index] for index in indices]

    batches, alone = [], Together()
    raw = Together()
    one = StepStream({"a": Prepared(alone, to_bytes)}, batch_size=2, seed=3, labels=True)
    many = StepStream({"a": Prepared(raw, to_bytes, limit=1000)}, batch_size=2, seed=3, labels=True)
    for k in range(5):  # two passes over five samples
        for name, value in one[k]["a"].items():
            assert torch.equal(many[k]["a"][name], value)
    assert sorted(index for batch in batches for index in batch) == list(range(5))
    assert batches[:2] == [many[k]["a"]["label"].tolist() for k in range(2)]
    assert "label" not in StepStream({"a": Prepared(raw, to_bytes, limit=1000)}, batch_size=2)[0]["a"]


def test_workers_share_what_is_remembered():
    raw = Counted(number=64)
    samples = Prepared(raw, to_bytes, limit=10_000)
    loader = DataLoader(samples, batch_size=8, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        assert torch.cat([batch["label"] for batch in loader]).tolist() == list(range(64))
    before = raw.asked
    assert [samples[index]["label"] for index in range(64)] == list(range(64))
    assert raw.asked == before  # the workers had decoded all of them, into memory that this process sees


def test_the_budget_is_one_for_all_tasks_and_only_for_repeatable_data(folder):
    def prepare(sample):
        return {"image": torch.zeros(100, dtype=torch.uint8), "label": sample["label"]}

    tasks = {name: ImageFolder(str(folder)) for name in ("a", "b")}
    data = UnlabeledTasks(tasks, split="train", cache_limit=1000e-9)
    data.preparer = lambda task: prepare
    sizes = [samples.size for samples in data.datasets("train").values()]
    assert sizes == [8 * 108, 0]  # the second would not fit beside the first
    assert UnlabeledTasks(tasks).datasets("train")["a"][0]["label"] == 0


def test_data_used_twice_are_prepared_for_each_run(folder):
    data = UnlabeledTasks({"pets": ImageFolder(str(folder))}, split="train")
    for value in (1, 2):
        own = data.prepared_by(
            lambda task, value=value: lambda sample: {"image": torch.tensor([value]), "label": sample["label"]}
        )
        assert own.datasets("train")["pets"][0]["image"].tolist() == [value]


def test_an_objective_with_labels_refuses_a_split_without(folder):
    (folder / "unlabeled").mkdir()
    picture(3).save(folder / "unlabeled" / "0.png")
    data = UnlabeledTasks({"pets": ImageFolder(str(folder))}, split="unlabeled", batch_size=1)
    data = data.prepared_by(lambda task: lambda sample: {"image": torch.zeros(1), "label": sample["label"]})
    data.labels = True
    with pytest.raises(InputError, match=r"An objective needs labels, but the split 'unlabeled' of pets has none"):
        data.check_labels()
