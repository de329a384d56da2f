"""Texts from files and folders, and samples of like length in one batch."""

import gzip
import json
import pickle

import datasets
import pytest
import torch
from torch.utils.data import Dataset

from adamerge.data import HFDataset, MissingSplit, StepStream, UnlabeledTasks
from adamerge.data.order import by_length
from adamerge.data.rows import first_blank, is_blank
from adamerge.types import InputError

ROWS = [
    {"text": f"text {'long ' * (number % 5)}{number}", "label": ("bad", "good")[number % 2]} for number in range(20)
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(path, rows):
    """Rows as jsonl, csv, tsv, json or parquet, by the file's name."""
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.name.split(".")[1]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        return str(path)
    with opener(path, "wt") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif kind == "json":
            json.dump(rows, file)
        else:
            between = "," if kind == "csv" else "\t"
            lines = [list(rows[0]), *(["" if v is None else str(v) for v in row.values()] for row in rows)]
            file.writelines(between.join(line) + "\n" for line in lines)
    return str(path)


def samples_of(split):
    return [split[index] for index in range(len(split))]


# --- files


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"])
def test_one_file_is_every_split_that_has_no_expression(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    data = HFDataset(path, classes=["bad", "good"], splits={"unlabeled": "train[50%:]"})
    assert data.classes == ["bad", "good"]
    assert samples_of(data.split("train"))[3] == {"text": "text long long long 3", "label": 1}
    assert samples_of(data.split("test")) == samples_of(data.split("train"))
    assert samples_of(data.split("unlabeled")) == samples_of(data.split("train"))[10:]
    assert len(pickle.loads(pickle.dumps(data)).split("test")) == 20


def test_a_path_is_found_again_from_another_folder(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert HFDataset("a.jsonl")._arguments["path"] == path
    assert HFDataset({"train": "a.jsonl"})._arguments["path"] == {"train": path}


def test_a_file_for_each_split(tmp_path):
    path = {"train": write(tmp_path / "a.jsonl", ROWS), "test": write(tmp_path / "b.csv", ROWS[:4])}
    data = HFDataset(path, classes=["bad", "good"], splits={"half": "train[:50%]"})
    assert [len(data.split(name)) for name in ("train", "test", "half")] == [20, 4, 10]
    with pytest.raises(MissingSplit, match="There is no split 'val'; `path` has a file for train, test"):
        data.split("val")
    with pytest.raises(InputError, match=r"`path` is empty; name a file for each split"):
        HFDataset({})


def test_a_folder_of_files_has_their_splits(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", ROWS)
    write(tmp_path / "data" / "test.jsonl", ROWS[:4])
    data = HFDataset(str(tmp_path / "data"), classes=["bad", "good"])
    assert [len(data.split(name)) for name in ("train", "test")] == [20, 4]
    with pytest.raises(MissingSplit, match='Unknown split "val"'):
        data.split("val")


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*none\.jsonl\."):
        HFDataset(str(tmp_path / "none.jsonl")).split("train")
    with pytest.raises(InputError, match=r"There is no file .*none\.csv\."):
        HFDataset({"train": str(tmp_path / "none.csv")}).split("train")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(
        InputError, match=r"a\.xlsx is of no known kind; it can be \.jsonl, \.json, \.csv, \.tsv, \.parq"
    ):
        HFDataset(str(tmp_path / "a.xlsx")).split("train")
    (tmp_path / "a.jsonl").write_text("{not json")
    with pytest.raises(InputError, match=r"The split 'train' of the data set .*a\.jsonl' cannot be opened"):
        HFDataset(str(tmp_path / "a.jsonl")).split("train")


# --- columns


def test_every_entry_is_read_under_its_name(tmp_path):
    rows = [{"text": "a", "pair": None, "other": 1, "label": None}, {"text": "b", "pair": "c", "other": 2, "label": 1}]
    data = HFDataset(write(tmp_path / "a.jsonl", rows))
    expected = [{"text": "a", "pair": "", "label": -100}, {"text": "b", "pair": "c", "label": 1}]
    assert samples_of(data.split("train")) == data.split("train").__getitems__([0, 1]) == expected
    pairs = HFDataset(write(tmp_path / "b.jsonl", [{"question": "q", "answer": "a"}]),
                      columns={"text": "question", "positive": "answer"})  # fmt: skip
    assert samples_of(pairs.split("train")) == [{"text": "q", "positive": "a"}]
    written = HFDataset(write(tmp_path / "c.jsonl", [{"text": "q", "target": "a"}, {"text": "r", "target": ""}]))
    assert samples_of(written.split("train")) == [{"text": "q", "target": "a"}, {"text": "r", "target": ""}]
    assert written.split("train").labelled
    assert samples_of(HFDataset(write(tmp_path / "d.jsonl", [{"text": "x"}])).split("train")) == [
        {"text": "x", "label": -100}
    ]


def test_words_are_labelled_one_by_one(tmp_path):
    feature = datasets.List(datasets.ClassLabel(names=["O", "PER"]))
    features = datasets.Features({"words": datasets.List(datasets.Value("string")), "tags": feature})
    rows = {"words": [["Ada", "sleeps"], ["no"]], "tags": [[1, 0], None]}
    held = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=held).save_to_disk(str(tmp_path / "data"))
    data = HFDataset(str(tmp_path / "data"), columns={"label": "tags"})
    assert data.classes == ["O", "PER"]
    assert samples_of(data.split("train")) == [
        {"words": ["Ada", "sleeps"], "label": [1, 0]},
        {"words": ["no"], "label": [-100]},
    ]
    assert data.split("train").lengths.tolist() == [2, 1]
    named = HFDataset(write(tmp_path / "a.jsonl", [{"words": ["a", "b"], "label": ["O", "PER"]}]), classes=["O", "PER"])
    assert named.split("train")[0]["label"] == [0, 1]
    few = HFDataset(write(tmp_path / "b.jsonl", [{"words": ["a", "b"], "label": [1]}]))
    with pytest.raises(
        InputError, match=r"Sample 0 of .* has 2 words, but is labelled \[1\]; it takes a label for each"
    ):
        few.split("train")[0]
    with pytest.raises(InputError, match=r"The column 'words' of .* holds no lists of words"):
        _ = HFDataset(write(tmp_path / "c.jsonl", [{"words": "a b"}])).split("train").lengths


def test_a_text_under_another_name_is_not_guessed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": 1, "sentence": "a"}])
    with pytest.raises(
        InputError, match=r"no column image, text or words; it has id, sentence\. .*: `columns: \{text: s"
    ):
        HFDataset(path).split("train")
    assert HFDataset(path, columns={"text": "sentence"}).split("train")[0]["text"] == "a"
    with pytest.raises(InputError, match=r"Sample 0 of .* has no text; leave it out"):
        HFDataset(write(tmp_path / "b.csv", [{"text": None, "label": 1}, {"text": "a", "label": 1}])).split("train")[0]


def test_captions_of_images_are_left_alone_unless_asked_for(tmp_path):
    from PIL import Image

    rows = {"image": [Image.new("RGB", (2, 2))], "text": ["a caption"], "label": [0]}
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(str(tmp_path / "data"))
    split = HFDataset(str(tmp_path / "data")).split("train")
    assert set(split[0]) == {"image", "label"}
    assert split.lengths is None
    assert set(HFDataset(str(tmp_path / "data"), columns={"text": "text"}).split("train")[0]) == {
        "image",
        "text",
        "label",
    }


def test_labels_in_words_need_their_order(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert HFDataset(path).classes == []
    with pytest.raises(InputError, match=r"labelled 'bad', but there are no numbers; list the labels in `classes`"):
        HFDataset(path).split("train")[0]
    with pytest.raises(InputError, match=r"labelled 'bad', which is not in `classes`: 2 \(ugly, good\); list"):
        HFDataset(path, classes=["ugly", "good"]).split("train")[0]
    one, other = (HFDataset(path, classes=names).split("train") for names in (["bad", "good"], ["good", "bad"]))
    assert (one[0]["label"], other[0]["label"]) == (0, 1)
    assert one.fingerprint != other.fingerprint
    with pytest.raises(InputError, match=r"labelled 0\.5; labels are whole numbers"):
        HFDataset(write(tmp_path / "b.jsonl", [{"text": "a", "label": 0.5}])).split("train")[0]


def test_names_may_stand_in_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("bad\ngood\n")
    data = HFDataset(write(tmp_path / "a.jsonl", ROWS), classes=str(tmp_path / "names.txt"))
    assert data.classes == data._arguments["classes"] == ["bad", "good"]
    assert data.split("train")[1]["label"] == 1


@pytest.mark.parametrize("entry", ["target", "positive"])
def test_a_null_is_nothing_to_learn_from(tmp_path, entry):
    none = HFDataset(write(tmp_path / "none.jsonl", 2 * [{"text": "q", entry: None}])).split("train")
    assert samples_of(none) == 2 * [{"text": "q", "label": -100}]
    assert not none.labelled
    some = write(tmp_path / "some.jsonl", [{"text": "q", entry: "a"}, {"text": "r", entry: None}])
    said = rf"Sample 1 of .* has no {entry}; leave such samples out, or fill it\."
    with pytest.raises(InputError, match=said):
        HFDataset(some).split("train")
    assert samples_of(HFDataset(some, splits={"train": "train[:1]"}).split("train")) == [{"text": "q", entry: "a"}]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.jsonl", "a.parquet"])
def test_whole_numbers_among_blanks_are_labels(tmp_path, name):
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": None}, {"text": "c", "label": 0.0}]
    split = HFDataset(write(tmp_path / name, rows), classes=["x", "y"]).split("train")
    assert [sample["label"] for sample in samples_of(split)] == [1, -100, 0]
    assert all(type(sample["label"]) is int for sample in samples_of(split))
    assert split.labelled
    blank = HFDataset(write(tmp_path / f"b{name[1:]}", [{"text": "a", "label": "x"}, {"text": "b", "label": ""}]),
                      classes=["x"])  # fmt: skip
    assert [sample["label"] for sample in samples_of(blank.split("train"))] == [0, -100]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("folder", [False, True])
def test_texts_that_read_as_nothing_stay_texts(tmp_path, name, folder):
    (tmp_path / "data").mkdir()
    texts = ["nan", "NA", "None", "null", "N/A"]
    rows = [{"text": text, "pair": pair, "label": 1} for text, pair in zip(texts, ["", *texts[1:]], strict=True)]
    file = write(tmp_path / "data" / name, rows)
    split = HFDataset(str(tmp_path / "data") if folder else file).split("train")
    assert [sample["text"] for sample in samples_of(split)] == texts
    assert [sample["pair"] for sample in samples_of(split)] == ["", *texts[1:]]


def test_what_cannot_be_drawn_is_said_at_once(tmp_path):
    def opened(name, rows, **options):
        return HFDataset(write(tmp_path / name, rows), **options).split("train")

    texts = [{"text": text, "label": 1} for text in ("a", "b", None, "d")]
    with pytest.raises(InputError, match=r"Sample 2 of .* has no text; leave it out"):
        opened("a.jsonl", texts)
    assert len(opened("a.jsonl", texts, splits={"train": "train[:2]+train[3:]"})) == 3
    with pytest.raises(InputError, match=r"Sample 1 of .* has no words; leave it out"):
        opened("b.jsonl", [{"words": ["a"]}, {"words": None}])
    names = {"classes": ["bad", "good"]}
    for file, wrong, said in [
        ("c.jsonl", ["bad", None, "odd"], r"Sample 2 of .* is labelled 'odd', which is not in `classes`"),
        ("d.jsonl", [1, -1, 2], r"Sample 2 of .* is labelled 2, but the 2 `classes` are numbered from 0 on: .*; list"),
        ("e.csv", [1.0, None, 2.0], r"Sample 2 of .* is labelled 2, but the 2 `classes`"),
        ("f.csv", [1.0, None, 0.5], r"Sample 2 of .* is labelled 0\.5; labels are whole numbers"),
    ]:
        rows = [{"text": "a", "label": label} for label in wrong]
        with pytest.raises(InputError, match=said):
            opened(file, rows, **names)
        assert len(opened(file, rows, splits={"train": "train[:2]"}, **names)) == 2
    words = [{"words": ["a"], "label": ["bad"]}, {"words": ["a", "b"], "label": ["good", "odd"]}]
    with pytest.raises(InputError, match=r"Sample 1 of .* is labelled 'odd', which is not in `classes`"):
        opened("g.jsonl", words, **names)


def test_rows_that_were_reordered_are_looked_at_in_their_order(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", None, "c"], "label": [0, 1, 2]})
    for name, order, said in [("one", [2, 0, 1], "Sample 2 of"), ("two", [2, 0], None), ("three", [0, 2], None)]:
        datasets.DatasetDict(train=rows.select(order)).save_to_disk(str(tmp_path / name))
        data = HFDataset(str(tmp_path / name))
        if said:
            with pytest.raises(InputError, match=rf"{said} .* has no text"):
                data.split("train")
        else:
            assert len(data.split("train")) == 2
    mapped = rows.select([2, 0, 1])
    assert mapped._indices is not None
    assert (first_blank(mapped, "text"), first_blank(rows, "text"), first_blank(mapped, "label")) == (2, 1, None)
    assert first_blank(rows.select([2, 0]), "text") is None
    assert is_blank(rows.select([1, 1]), "text")
    assert not is_blank(rows, "text")


@pytest.mark.parametrize("entry", ["label", "target"])
def test_a_column_that_no_split_has_is_an_error(tmp_path, entry):
    path = {"unlabeled": write(tmp_path / "a.jsonl", [{"text": "a"}]),
            "test": write(tmp_path / "b.jsonl", [{"text": "a", "said": "1"}])}  # fmt: skip
    with pytest.raises(InputError, match=r"has no column siad, which `columns` names; it has text"):
        HFDataset(path, columns={entry: "siad"}).split("unlabeled")
    data = HFDataset(path, columns={entry: "said"})
    assert samples_of(data.split("unlabeled")) == [{"text": "a", "label": -100}]
    assert data.split("test").labelled
    with pytest.raises(InputError, match=r"has no column siad"):
        HFDataset(path["test"], columns={entry: "siad"}).peek("test")


def test_nothing_there_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match=r"The file .*a\.jsonl is empty; write samples into it"):
        HFDataset("a.jsonl").split("train")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt"):
        pass
    with pytest.raises(InputError, match=r"cannot be opened: it is empty\. Check"):
        HFDataset("b.jsonl.gz").split("train")
    with pytest.raises(InputError, match=r"and the network\. There is no folder or file 'd/nope' here either\.$"):
        HFDataset("d/nope").split("train")


def test_what_is_labelled_is_known(tmp_path):
    for number, (labels, known) in enumerate([([None, None], False), ([-1, -1], False), ([None, 3], True)]):
        rows = [{"text": "a", "label": label} for label in labels]
        assert HFDataset(write(tmp_path / f"{number}.jsonl", rows)).split("train").labelled is known


# --- streams


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_stream_is_taken_once_and_repeats(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    one, other = (HFDataset(path, classes=["bad", "good"], stream=7).split("train") for _ in range(2))
    whole = HFDataset(path, classes=["bad", "good"]).split("train")
    assert samples_of(one) == samples_of(other) == samples_of(whole)[:7]
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != HFDataset(path, classes=["bad", "good"], stream=6).split("train").fingerprint
    assert one.lengths.tolist() == whole.lengths.tolist()[:7]
    assert len(HFDataset(path, stream=100).split("train")) == 20
    with pytest.raises(InputError, match=r"A stream cannot be cut as `splits` says, 'train\[:5\]'; name a whole split"):
        HFDataset(path, stream=7, splits={"train": "train[:5]"}).split("train")
    with pytest.raises(InputError, match="`stream` is 0; it is a number of samples, at least 1"):
        HFDataset(path, stream=0)


def test_a_stream_of_images_keeps_their_classes(tmp_path):
    from tests.test_images import rows

    (tmp_path / "data").mkdir()
    rows().to_parquet(str(tmp_path / "data" / "train.parquet"))
    data = HFDataset(str(tmp_path / "data"), stream=3)
    assert data.classes == ["red", "black"]
    assert [sample["label"] for sample in samples_of(data.split("train"))] == [0, 1, 0]
    assert data.split("train")[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(MissingSplit, match="Bad split: val"):
        data.split("val")
    datasets.DatasetDict(train=rows()).save_to_disk(str(tmp_path / "disk"))
    assert len(HFDataset(str(tmp_path / "disk"), stream=4).split("train")) == 4


# --- samples of like length in one batch


class Texts(Dataset):
    def __init__(self, size, *, seed=0):
        self.lengths = torch.randint(1, 500, (size,), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return {"input": torch.tensor(index), "length": self.lengths[index], "label": 0}


def stream(size=103, **options):
    return StepStream({"a": Texts(size)}, **{"batch_size": 4, "seed": 5, **options})


def seen(stream, positions):
    return [stream.index("a", position) for position in positions]


@pytest.mark.parametrize("size", [3, 4, 103, 1000])
def test_every_epoch_is_a_permutation(size):
    texts = stream(size)
    for epoch in range(5):
        assert sorted(seen(texts, range(epoch * size, (epoch + 1) * size))) == list(range(size))
    first, second = seen(texts, range(size)), seen(texts, range(size, 2 * size))
    assert first != second
    assert first != seen(stream(size, seed=6), range(size))
    assert first == seen(stream(size), range(size))


def test_samples_of_a_step_are_of_like_length():
    def spread(texts):
        lengths = [texts[k]["a"]["length"] for k in range(1000)]
        return torch.stack([each.max() - each.min() for each in lengths]).float().median()

    assert spread(stream(1000)) < 0.05 * spread(stream(1000, bucket_by_length=False))
    texts = stream(1000)
    order = [int(texts[k]["a"]["length"].max()) for k in range(64)]
    assert order != sorted(order)
    inside = [texts[k]["a"]["length"].tolist() for k in range(64)]
    assert any(each != sorted(each) for each in inside)  # a bilevel step's halves are alike


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_see_what_one_rank_sees(world_size):
    whole = stream(batch_size=8)
    shares = [stream(batch_size=8 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for k in range(40):  # several epochs of 103 samples
        together = torch.cat([share[k]["a"]["input"] for share in shares])
        assert sorted(together.tolist()) == sorted(whole[k]["a"]["input"].tolist())


def test_tables_are_of_the_same_samples():
    texts = stream(tables={"a": {"twice": 2 * torch.arange(103)}})
    for k in (0, 25, 26, 77):
        assert torch.equal(texts[k]["a"]["twice"], 2 * texts[k]["a"]["input"])
    later = pickle.loads(pickle.dumps(texts))
    assert torch.equal(later[77]["a"]["input"], texts[77]["a"]["input"])


def test_what_does_not_fill_a_batch_stays():
    order, generator = torch.randperm(10), torch.Generator().manual_seed(0)
    length = torch.arange(10)
    assert torch.equal(by_length(order, length, 11, start=0, generator=generator), order)
    assert torch.equal(by_length(order, length, 4, start=7, generator=generator), order)
    found = by_length(order, length, 4, start=1, generator=generator)
    assert torch.equal(found[[0, 9]], order[[0, 9]])
    assert sorted(found.tolist()) == list(range(10))


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_batches_are_of_like_length_and_whole(tmp_path, world_size):
    rows = [{"text": "x" * (1 + 37 * number % 101), "label": number % 2, "id": number} for number in range(101)]
    data = UnlabeledTasks({"a": HFDataset(write(tmp_path / "a.jsonl", rows))}, eval_batch_size=5)
    texts, spreads = [], []
    for rank in range(world_size):
        for batch in data.eval_loaders(rank, world_size)["a"]:
            sizes = [len(text) for text in batch["text"]]
            texts += batch["text"]
            spreads.append(max(sizes) - min(sizes))
    assert sorted(texts) == sorted(row["text"] for row in rows)
    assert sorted(spreads)[len(spreads) // 2] <= 5 * world_size
    plain = UnlabeledTasks({"a": data.tasks["a"]}, eval_batch_size=5, bucket_by_length=False)
    assert next(iter(plain.eval_loaders()["a"]))["text"] == [row["text"] for row in rows[:5]]


def test_a_demo_is_looked_up_once_for_all_splits(monkeypatch, tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    asked = []
    monkeypatch.setattr("adamerge.data.opening.locate", lambda source: asked.append(source) or tmp_path / "saved")
    data = HFDataset("demo:pool/texts", classes=["bad", "good"])
    for split in ("train", "test"):
        data.peek(split)
        assert len(data.split(split)) == len(ROWS)
    assert asked == ["demo:pool/texts"]
