"""The recipes of published experts run to the letter, on tiny models and data sets of their layouts, and export."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import adamerge
from adamerge.config import parse
from adamerge.data.class_names import class_names
from adamerge.types import InputError
from tests.test_configs import CONFIGS, ROOT, moved, stack

SIZES = sorted(CONFIGS.glob("recipes/clip_[bl][0-9]*.yaml"))
SUITES = [CONFIGS / "recipes" / f"clip_{number}_tasks.yaml" for number in ("eight", "fourteen", "twenty")]
GLUE = CONFIGS / "recipes" / "glue_flan_t5_base.yaml"
CLASSES = {  # how many, as published
    **{"sun397": 397, "cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47},
    **{"flowers102": 102, "pcam": 2, "fer2013": 7, "pets": 37, "stl10": 10, "cifar100": 100},
    **{"cifar10": 10, "food101": 101, "fashion_mnist": 10, "emnist_letters": 26, "kmnist": 10, "rendered_sst2": 2},
}
TASKS = {"eight": 8, "fourteen": 14, "twenty": 20}
SHORT = {
    **{"trainer.max_steps": 2, "trainer.accelerator": "cpu", "run.baselines": False},
    **{"data.batch_size": 2, "data.num_workers": 0},
}


def read(path):
    """A recipe's files as one mapping of sections; no two of them give the same section twice."""
    whole = {"model": {}, "data": {}}
    for file in stack(path):
        for section, options in yaml.safe_load(file.read_text()).items():
            whole.setdefault(section, {}).update(options)
    return whole


def tuned(net):
    """A copy with other values in all of its parameters."""
    net = deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return net


# --- what the files say


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_a_clip_recipe_names_experts_prompts_and_classes_of_every_task(path):
    found = read(path)
    tasks = list(CLASSES)[: TASKS[path.stem.split("_")[2]]]
    assert stack(path)[:-1] == [CONFIGS / "recipes" / f"clip_{path.stem.split('_')[2]}_tasks.yaml"]
    assert list(found["model"]["experts"]) == list(found["data"]["tasks"]) == tasks
    assert list(found["model"]["backbone"]["init_args"]["templates"]) == tasks
    experts = list(found["model"]["experts"].values())
    assert len(set(experts)) == len(tasks)
    assert all(expert.startswith(found["model"]["base"].replace("openai/", "tanganke/") + "_") for expert in experts)


def test_suites_say_the_same_but_for_their_tasks():
    suites = [yaml.safe_load(path.read_text()) for path in SUITES]
    prompts = [suite["model"]["backbone"]["init_args"].pop("templates") for suite in suites]
    data = [suite["data"].pop("tasks") for suite in suites]
    for small, large in ((0, 1), (1, 2)):
        assert suites[small] == suites[large]
        assert prompts[small].items() <= prompts[large].items()
        assert all(data[large][task] == options for task, options in data[small].items())


def test_files_of_class_names_are_used_and_whole(monkeypatch):
    monkeypatch.chdir(ROOT)
    tasks = yaml.safe_load(SUITES[-1].read_text())["data"]["tasks"]
    names = {task: class_names(data["init_args"]["classes"]) for task, data in tasks.items()}
    assert {task: len(set(each)) for task, each in names.items()} == CLASSES
    assert all("_" not in name for each in names.values() for name in each)
    used = {data["init_args"]["classes"] for data in tasks.values()}
    assert used == {file.relative_to(ROOT).as_posix() for file in CONFIGS.rglob("*.txt")}


def test_glue_prompts_have_a_place_for_all_that_is_read():
    found = yaml.safe_load(parse(GLUE, {}).config)
    templates = found["model"]["backbone"]["init_args"]["templates"]
    assert list(templates) == list(found["data"]["tasks"]) == list(found["model"]["experts"])
    for task, data in found["data"]["tasks"].items():
        assert "  " not in templates[task]
        assert {entry for entry in ("text", "pair") if f"{{{entry}}}" in templates[task]} == {
            *data["init_args"]["columns"]
        }


# --- class names


def test_class_names_are_a_list_or_the_lines_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert class_names(("a b", "c")) == ["a b", "c"]
    Path("mine.txt").write_bytes("\ufeffAn owl \r\n\r\nを\r\n".encode())
    assert class_names("mine.txt") == class_names(str(tmp_path / "mine.txt")) == ["An owl", "を"]


def test_a_file_of_class_names_of_ones_own_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert class_names("configs/classes/digits.txt") == list("0123456789")
    Path("configs/classes").mkdir(parents=True)
    Path("configs/classes/digits.txt").write_text("zero\none\n")
    assert class_names("configs/classes/digits.txt") == ["zero", "one"]


@pytest.mark.parametrize("name", ["cat", "configs/classes/cats.txt", "configs/demo", "configs/classes", ""])
def test_a_file_of_class_names_that_is_not_there_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no file of class names '{name}' .*configs/classes/sun397.txt"):
        class_names(name)


@pytest.mark.parametrize(("content", "said"), [(b" \n\n", "holds no class names"), (b"caf\xe9\n", "as UTF-8")])
def test_a_file_without_class_names_is_said(content, said, tmp_path):
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"mine.txt .*{said}"):
        class_names(str(tmp_path / "mine.txt"))


# --- CLIP


def write_clip_tokenizer(folder):
    """CLIP's own tokenizer with bytes for a vocabulary; returns the numbers of its tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def write_clips(home):
    """A base at home/base, whole, and vision models of experts at home/TASK."""
    base = home / "base"
    base.mkdir()
    numbers = write_clip_tokenizer(base)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    start, end = numbers["<|startoftext|>"], numbers["<|endoftext|>"]
    text = {"num_hidden_layers": 1, "max_position_embeddings": 77, "vocab_size": len(numbers)}
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=8)).eval()
    clip.save_pretrained(base)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(base)
    for task in CLASSES:
        expert = CLIPVisionModel(clip.config.vision_config)
        theirs = clip.state_dict()
        names = {name: name if name in theirs else f"vision_model.{name}" for name in expert.state_dict()}
        expert.load_state_dict({name: theirs[whole] for name, whole in names.items()})
        tuned(expert).save_pretrained(home / task)


def write_pictures(folder, task, columns, splits):
    """A data set with the columns that the hub's has, six pictures in each split, gray ones every other time."""
    image, label = columns.get("image", "image"), columns.get("label", "label")
    kind = ClassLabel(num_classes=CLASSES[task])
    if task == "pcam":
        kind = Value("bool")
    features = {image: Image(), label: kind}
    rows = [
        {image: Picture.effect_noise((20, 24), 50).convert("RGB" if number % 2 else "L"), label: number % 2}
        for number in range(6)
    ]
    if task == "fer2013":
        features = {"__key__": Value("string"), image: Image(), label: Value("int64")}
        rows = [{"__key__": str(number), **row} for number, row in enumerate(rows)]
    split = Dataset.from_list(rows, features=Features(features))
    DatasetDict(dict.fromkeys(splits, split)).save_to_disk(str(folder))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder in which the checkpoints and data sets of the CLIP recipes lie under their ids, tiny."""
    home = tmp_path_factory.mktemp("clips")
    (home / "made").mkdir()
    write_clips(home / "made")
    for path in SIZES:
        for source, made in (
            (read(path)["model"]["base"], "base"),
            *((expert, task) for task, expert in read(path)["model"]["experts"].items()),
        ):
            (home / source).parent.mkdir(exist_ok=True)
            if not (home / source).exists():
                (home / source).symlink_to(home / "made" / made, target_is_directory=True)
    for task, data in read(SUITES[-1])["data"]["tasks"].items():
        options = data["init_args"]
        splits = ["train", options.get("splits", {}).get("test", "test")]
        write_pictures(home / options["path"], task, options.get("columns", {}), splits)
    return home


@pytest.fixture
def quick(tmp_path_factory, monkeypatch):
    """One cache for all recipes, in which the heads of a task are made once; and no plots."""
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "recipes-cache"))
    monkeypatch.setattr("adamerge.training.write_plots", lambda *_, **__: None)


@pytest.mark.slow_unless("clip_b32_eight_tasks", "clip_l14_twenty_tasks")
@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_a_clip_recipe_runs_on_tiny_files_of_its_layout(path, clips, quick, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(clips)
    done = adamerge.train(stack(path), **SHORT, **{"run.root": str(tmp_path)})
    tasks = list(CLASSES)[: TASKS[path.stem.split("_")[2]]]
    assert list(done.learned.tasks) == list(done.scores["this merge"]) == tasks
    assert moved(done)
    assert "transductive" in caplog.text
    heads = {task: chain[-1] for task, chain in zip(done.learned.tasks, done.learned.task_modules, strict=True)}
    assert {task: head.num_classes for task, head in heads.items()} == {task: CLASSES[task] for task in tasks}
    if path == SIZES[0]:
        folder = tmp_path / "merged"
        assert adamerge.export(done.dir, folder).difference <= 1e-5
        exported, base = (CLIPModel.from_pretrained(each).state_dict() for each in (folder, clips / "made" / "base"))
        changed = {name.partition(".")[0] for name, value in exported.items() if not torch.equal(value, base[name])}
        assert changed == {"vision_model"}
        AutoTokenizer.from_pretrained(folder)


# --- GLUE


WORDS = "the a cat owl sat flew on over mat hill . it was good bad".split()
COLUMNS = {
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
}
NAMES = {  # the data sets' own
    **{"cola": ["unacceptable", "acceptable"], "mnli": ["entailment", "neutral", "contradiction"]},
    **{"mrpc": ["not_equivalent", "equivalent"], "qnli": ["entailment", "not_entailment"]},
    **{"qqp": ["not_duplicate", "duplicate"], "rte": ["entailment", "not_entailment"]},
    "sst2": ["negative", "positive"],
}


def write_sentences(folder, task):
    """A task of GLUE with the hub's columns and splits; its test splits have no labels."""
    kinds = [f"{kind}_{genre}" for kind in ("validation", "test") for genre in ("matched", "mismatched")]
    splits = {}
    for split in ["train", *(kinds if task == "mnli" else ["validation", "test"])]:
        rows = []
        for number in range(6):
            texts = {column: " ".join(WORDS[number:][: 3 + 2 * k]) for k, column in enumerate(COLUMNS[task])}
            label = -1 if split.startswith("test") else number % len(NAMES[task])
            rows.append({**texts, "label": label, "idx": number})
        features = {column: Value("string") for column in COLUMNS[task]}
        features |= {"label": ClassLabel(names=NAMES[task]), "idx": Value("int32")}
        splits[split] = Dataset.from_list(rows, features=Features(features))
    DatasetDict(splits).save_to_disk(str(folder))


def tokenizer_of(texts):
    """A tokenizer of whole words, which ends every text as T5's does."""
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = split, decoders.Fuse()
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    kept = {"model_input_names": ["input_ids", "attention_mask"]}  # T5's
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **special, **kept)


def write_flan(folder, net):
    """A T5 whose output layer is no embedding, as Flan's on the hub; transformers 5 would not write it so."""
    net.save_pretrained(folder)
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    state = {name: value.contiguous() for name, value in net.state_dict().items() if name not in tied}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


@pytest.fixture(scope="module")
def flan(tmp_path_factory):
    """A folder in which the recipe's checkpoints lie under their ids, tiny, and its tasks at their `name`."""
    home = tmp_path_factory.mktemp("flan")
    found = read(GLUE)
    classes = [name for data in found["data"]["tasks"].values() for name in data["init_args"]["classes"]]
    tokenizer = tokenizer_of([*found["model"]["backbone"]["init_args"]["templates"].values(), *classes, *WORDS])
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0))
    base.lm_head.weight = torch.nn.Parameter(torch.randn(base.shared.weight.shape))
    write_flan(home / found["model"]["base"], base)
    for source in found["model"]["experts"].values():
        write_flan(home / source, tuned(base))
    for source in (found["model"]["base"], *found["model"]["experts"].values()):
        tokenizer.save_pretrained(home / source)
    for data in found["data"]["tasks"].values():
        write_sentences(home / data["init_args"]["name"], data["init_args"]["name"])
    return home


def test_the_glue_recipe_runs_on_tiny_files_of_its_layout(flan, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(flan)
    tasks = read(GLUE)["data"]["tasks"]
    for data in tasks.values():
        data["init_args"]["path"] = data["init_args"].pop("name")  # `datasets` writes no configurations to disk
    done = adamerge.train(stack(GLUE), **SHORT, **{"run.root": str(tmp_path), "data.tasks": tasks})
    assert list(done.learned.tasks) == list(done.scores["this merge"]) == list(tasks)
    assert moved(done)
    heads = {task: chain[-1] for task, chain in zip(done.learned.tasks, done.learned.task_modules, strict=True)}
    assert {task: head.num_classes for task, head in heads.items()} == {task: len(NAMES[task]) for task in tasks}
    assert adamerge.export(done.dir, tmp_path / "merged").difference <= 1e-5
    exported, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    state, base = exported.state_dict(), load_file("google/flan-t5-base/model.safetensors")
    assert not [name for name, value in base.items() if torch.equal(state[name], value)]  # all of it is merged
    assert not torch.equal(state["lm_head.weight"], state["shared.weight"])
    AutoTokenizer.from_pretrained(tmp_path / "merged")
