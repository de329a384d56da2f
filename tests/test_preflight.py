"""A check before a run: what it tells, what it reads, how long it takes, what it says of data."""

import struct
import sys
from collections import namedtuple
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import adamerge
from adamerge import preflight
from adamerge.audit import ValueAudit
from adamerge.checkpoints import Headers, Overlaid, Selected, open_state
from adamerge.cli import main
from adamerge.config import parse
from adamerge.data import HFDataset, ImageFolder, TensorTask
from adamerge.data.base import MissingSplit
from adamerge.deltas import DenseDeltas
from adamerge.preflight import check
from adamerge.types import InputError
from tests.checkpoints_hf import CLASSES, write
from tests.hub_server import served_hub  # noqa: F401
from tests.test_bad_checkpoints import config as of_pool
from tests.tiny import TASKS

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["adamerge", "check", *map(str, arguments)])
        return main(), *capsys.readouterr()

    return call


@pytest.fixture
def bert(tmp_path):
    return write(tmp_path / "pool", "bert", "AutoModelForSequenceClassification")


def written(plain, path):
    path.write_text(yaml.safe_dump(plain))
    return path


# --- what it tells


def test_what_a_check_tells(config):
    found = check(parse(config(), {}))
    rows = {name: (number, kinds, size) for name, _, number, kinds, size in found.sources}
    assert rows["base"] == (10, "float32", 4 * (36 + 2 * (12 + 42)))
    assert set(rows) == {"base", *TASKS}
    merged = 36 + 2 * (12 + 42)
    tau, base = 3 * 4 * merged, 4 * merged
    assert found.placements == {
        "device": (3 * base + tau, 0, 0),
        "cpu": (3 * base, tau, 0),
        "mmap": (3 * base, 0, tau + base),
    }
    assert "144 elements" in found.merging
    assert all(0 <= seconds < 10 for seconds in found.seconds.values())
    assert any("network itself" in note for note in found.notes)


def test_configurations_are_taken_as_fit_takes_them(config, command, tmp_path):
    path = written(config(), tmp_path / "mine.yaml")
    both = command(path), command("--config", path)
    assert both[0][0] == both[1][0] == 0
    assert "144 elements" in both[1][1]
    status, _, said = command("--deep")
    assert status == 2
    assert "wants a configuration: adamerge check mine.yaml" in said


def test_what_is_stored_narrow_takes_less(config):
    whole, half = (
        check(parse(config({"vectors": {"dtype": dtype}, "apply_mode": "swap"}), {})).placements
        for dtype in ("float32", "bfloat16")
    )
    assert half["cpu"][1] * 2 == whole["cpu"][1]


def test_the_command_says_it_in_tables(config, tmp_path, command):
    status, said, wrong = command(written(config(), tmp_path / "run.yaml"), "--deep", "--set", "data.eval_split=train")
    assert (status, wrong) == (0, "")
    for part in ("placement", "mmap", "about", "float32", "scores are transductive", "All values read: finite"):
        assert part in said
    assert said.rstrip().endswith("No problems found.")
    assert not (tmp_path / "runs").exists()


def test_tasks_without_data_are_named(config):
    plain = config()
    del plain["data"]["tasks"]["b"]
    assert "Merged without data of their own: b." in str(check(parse(plain, {})))


def test_all_problems_are_one_paragraph_and_status_two(config, tmp_path, command, pool):
    pool["b"].unlink()
    pool["c"].write_bytes(b"nonsense")
    plain = config(data={"split": "dev"})
    status, said, wrong = command(written(plain, tmp_path / "run.yaml"))
    assert (status, said) == (2, "")
    assert wrong.startswith("adamerge: 5 problems with the sources:\n")
    for part in ("no checkpoint at", "is not a whole safetensors file", "Task 'a': There is no split 'dev'"):
        assert part in wrong
    assert "Traceback" not in wrong


def test_stacked_configurations_and_bad_options(config, tmp_path, command):
    base = written(config(), tmp_path / "base.yaml")
    more = written({"data": {"batch_size": 7}}, tmp_path / "more.yaml")
    assert command(base, more)[0] == 0
    status, _, wrong = command(base, "--set", "data.batch_sise=7")
    assert status == 2
    assert "batch_sise" in wrong


@pytest.mark.parametrize("what", ["task vectors", "checkpoints of the hub"])
def test_a_full_disk_is_said_with_what_wants_how_much(what, config, monkeypatch, hub, bert, tmp_path):
    plain = config({"vectors": {"placement": "mmap"}})
    if what != "task vectors":
        for name, folder in bert.items():
            hub.add(f"org/{name}", folder)
        plain = of_pool({name: f"org/{name}" for name in bert}, tmp_path)
    monkeypatch.setattr(preflight, "shutil", SimpleNamespace(disk_usage=lambda _: Usage(100, 90, 10)))
    with pytest.raises(InputError, match=rf"has 10 B left, and {what} want .*set (ADAMERGE_CACHE|HF_HUB_CACHE) to"):
        check(parse(plain, {}))


# --- what it reads


def test_no_value_is_read_before_a_deep_check(bert, tmp_path, monkeypatch):
    """Files without their values: holes in their place, which are zero."""
    for folder in bert.values():
        hollow(folder / "model.safetensors")
    plain = of_pool(bert, tmp_path)
    for kind in (type(open_state({})), type(open_state(bert["base"])), Selected, Overlaid, Headers):
        monkeypatch.setattr(kind, "__getitem__", lambda *_: pytest.fail("a value was read"))
    check(parse(plain, {}))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"Expert 'a' equals the base in every merged tensor"):
        check(parse(plain, {}), deep=True)


def hollow(file):
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    file.write_bytes(raw[: 8 + size])
    with file.open("r+b") as opened:
        opened.truncate(len(raw))


def test_a_name_is_looked_for_without_its_value(bert, monkeypatch):
    state = open_state(bert["base"])
    monkeypatch.setattr(type(state), "__getitem__", lambda *_: pytest.fail("a value was read"))
    assert "classifier.weight" in state
    assert "nothing" not in state


def test_any_network_on_the_hub_is_checked_by_headers(hub, pool, config, tmp_path):
    for name, file in pool.items():
        hub.add(f"org/{name}", {"model.safetensors": file})
    plain = config({"base": "org/base", "experts": {task: f"org/{task}" for task in TASKS}})
    check(parse(plain, {}))
    assert not list((tmp_path / "huggingface").rglob("*.safetensors"))
    check(parse(plain, {}), deep=True)


def test_all_heads_of_any_network_are_looked_at(pool, config, tmp_path):
    for task in ("a", "c"):
        state = load_file(pool[task])
        save_file(
            {**state, "head.weight": state["head.weight"][1:]} if task == "a" else without_head(state), pool[task]
        )
    with pytest.raises(InputError) as found:
        check(parse(config(), {}))
    assert "Task 'a' has 4 classes, its head in" in str(found.value)
    assert "Task 'c' has no head 'head.weight'" in str(found.value)


def without_head(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("head")}


def test_the_network_is_made_without_memory(bert, tmp_path):
    survey = preflight.survey_of(parse(of_pool(bert, tmp_path), {}))
    assert all(parameter.is_meta for parameter in survey.net.parameters())


# --- data


def table(folder, name="a.csv", text="text,label\nan ant,0\na bee,1\n"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


NAMES = ["ant", "bee"]
LOCAL_DATA = {
    "no file": ({"path": "gone.csv"}, r"There is no file .*gone\.csv"),
    "no split": ({"path": {"dev": "a.csv"}}, r"There is no split 'train'; `path` has a file for dev"),
    "no text": (
        {"path": "b.csv"},
        r"has no column image, text or words; it has sentence, label.*`columns: \{text: sen",
    ),
    "no column": ({"path": "a.csv", "columns": {"text": "tekst"}}, r"has no column tekst, which `columns` names"),
    "labels in words": (
        {"path": "c.csv", "classes": None},
        r"is labelled 'good', but there are no numbers; list the la",
    ),
    "empty": ({"path": "d.csv"}, r"has no samples|is empty|cannot be opened"),
    "other kind": ({"path": "e.xml"}, r"The file .* is of no known kind"),
}


@pytest.fixture
def tables(tmp_path):
    table(tmp_path, "b.csv", "sentence,label\nan ant,0\n")
    table(tmp_path, "c.csv", "text,label\nan ant,good\n")
    table(tmp_path, "d.csv", "text,label\n")
    table(tmp_path, "e.xml")
    return table(tmp_path)


def hf(options):
    return {"class_path": "adamerge.data.HFDataset", "init_args": {"classes": NAMES, **options}}


@pytest.mark.parametrize("name", LOCAL_DATA)
def test_what_is_wrong_with_local_data_is_said(name, bert, tables, tmp_path, monkeypatch):
    options, message = LOCAL_DATA[name]
    monkeypatch.chdir(tmp_path)
    plain = of_pool(bert, tmp_path)
    plain["data"] |= {"tasks": {"a": hf(options), "b": plain["data"]["tasks"]["b"]}, "eval_split": None}
    for call in (lambda: check(parse(plain, {})), lambda: adamerge.train(plain)):
        with pytest.raises(InputError, match=rf"Task 'a': .*{message}"):
            call()
    assert not (tmp_path / "runs").exists()


def test_good_local_data_are_looked_at_and_not_converted(bert, tables, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    plain = of_pool(bert, tmp_path)
    plain["data"]["tasks"]["a"] = hf({"path": tables, "splits": {"train": "train[50%:]", "test": "train[:50%]"}})
    check(parse(plain, {}))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_missing_split_to_score_on_is_wrong_where_no_task_has_it(bert, tables, tmp_path):
    plain = of_pool(bert, tmp_path)
    plain["data"]["tasks"]["a"] = hf({"path": {"train": tables}})
    check(parse(plain, {}))
    for task in CLASSES:
        plain["data"]["tasks"][task] = hf({"path": {"train": tables}, "classes": CLASSES[task]})
    with pytest.raises(InputError, match=r"2 problems .*\n.*Task 'a': There is no split 'test'"):
        check(parse(plain, {}))
    plain["data"]["eval_split"] = None
    check(parse(plain, {}))


def test_class_names_of_saved_data(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(tmp_path / "a.parquet")
    assert HFDataset(str(tmp_path / "saved")).peek("test") == NAMES
    assert HFDataset(str(tmp_path / "a.parquet")).peek("train") == NAMES
    with pytest.raises(MissingSplit, match=r"no split 'dev'; it has train, test"):
        HFDataset(str(tmp_path / "saved")).peek("dev")
    with pytest.raises(InputError, match=r"`classes` has 3 .*are 2 \(ant, bee\)"):
        HFDataset(str(tmp_path / "saved"), classes=["a", "b", "c"]).peek("test")


def test_folders_of_images(tmp_path):
    for kind in NAMES:
        (tmp_path / "train" / kind).mkdir(parents=True)
    data = ImageFolder(str(tmp_path))
    with pytest.raises(InputError, match=r"holds no images for the split 'train'"):
        data.peek("train")
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "bee" / "0.png")
    assert data.peek("train") == NAMES
    with pytest.raises(MissingSplit, match=r"no folder 'test'"):
        data.peek("test")
    with pytest.raises(InputError, match=r"There is no image folder at"):
        ImageFolder(str(tmp_path / "gone")).peek("train")


def test_tensors_say_their_splits():
    task = TensorTask(NAMES, train=(torch.zeros(2, 3), torch.zeros(2)))
    assert task.peek("train") == tuple(NAMES)
    with pytest.raises(MissingSplit, match="There is no split 'test'; there are train"):
        task.peek("test")


CARD = """---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': ant
          '1': bee
  splits:
  - name: train
    num_bytes: 100
    num_examples: 2
  download_size: 100
  dataset_size: 100
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
---
"""


@pytest.fixture
def on_hub(hub, tmp_path):
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}).to_parquet(tmp_path / "t.parquet")
    hub.add("org/data", {"README.md": CARD, "train.parquet": tmp_path / "t.parquet"}, kind="dataset")
    return hub


def test_data_of_the_hub_are_known_by_their_card(on_hub):
    data = HFDataset("org/data")
    assert data.peek("train") == NAMES
    with pytest.raises(MissingSplit, match=r"'org/data' has no split 'test'; it has train"):
        data.peek("test")
    with pytest.raises(InputError, match=r"has no column tekst"):
        HFDataset("org/data", columns={"text": "tekst"}).peek("train")
    with pytest.raises(InputError, match=r"'org/none' cannot be opened"):
        HFDataset("org/none").peek("train")
    assert on_hub.sent(".parquet") == 0
    assert data.classes == NAMES
    assert on_hub.sent(".parquet") > 0


def test_data_of_the_hub_that_describe_nothing_say_nothing(hub, on_hub, tmp_path):
    hub.add("org/bare", {"train.parquet": tmp_path / "t.parquet"}, kind="dataset")
    assert HFDataset("org/bare", classes=NAMES).peek("train") == NAMES
    assert HFDataset("org/bare").peek("train") == []
    assert hub.sent(".parquet") == 0


def test_a_check_fetches_neither_weights_nor_data(on_hub, bert, tmp_path):
    for name, folder in bert.items():
        on_hub.add(f"org/{name}", folder)
    plain = of_pool({name: f"org/{name}" for name in bert}, tmp_path)
    plain["data"] |= {"tasks": {"a": hf({"path": "org/data", "classes": None})}, "eval_split": None}
    check(parse(plain, {}))
    kept = {file.suffix for file in (tmp_path / "huggingface").rglob("*") if file.is_file()}
    assert not kept & {".safetensors", ".parquet", ".arrow"}
    assert on_hub.sent(".parquet") == 0


# --- ancestry


def relatives(size, seed=0):
    torch.manual_seed(seed)
    base, other = torch.randn(2, size, 50)
    fine_tune = base + 0.1 * torch.randn_like(base)
    return base, torch.stack([fine_tune - base, other - base])


@pytest.mark.parametrize(("size", "flagged"), [(39, False), (60, True)])  # 50 weights each: enough from 2000 on
def test_a_stranger_is_told_where_there_are_weights_enough(size, flagged):
    base, deltas = relatives(size)
    audit = ValueAudit(("kin", "stranger"))
    audit("scale", torch.ones(100_000), DenseDeltas(torch.zeros(2, 100_000)))  # which tell nothing
    audit("weight", base, DenseDeltas(deltas))
    if not flagged:
        audit.finish()
        return
    with pytest.raises(InputError, match=r"Expert 'stranger' does not descend from this base: .* 1\.4 times"):
        audit.finish()


@pytest.mark.parametrize("pool", ["digits", "synthetic"])
def test_the_demos_own_experts_are_kin(pool):
    name = {"digits": "digits", "synthetic": "demo"}[pool]
    assert "all of them descend" in str(check(parse(f"configs/{name}.yaml", {}), deep=True))
