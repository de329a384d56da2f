"""Write one small learned merge per family, its sources, and the answers that it gives.

Usage, from the repository's root: `python -m tests.golden.make_merges` writes `tests/golden/merges/VERSION`.

`merges/0.1.0` was written with the code of the first release, and is never written again: every later version must load
it and give the same answers. A later release that changes the record adds a folder of its own beside it, so this script
refuses to write into a folder that exists. The records are as `adamerge push` writes them: they name their sources
relative to the working directory, which for loading is the folder `sources`. Run it with the oldest transformers that
the package allows (4.57.6 then): an older one cannot read the tokenizer files of a newer one.
"""

import contextlib
import json
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor

import adamerge
from adamerge import Recipe, UnlabeledTasks
from adamerge.artifact import WEIGHTS, portable, read_record, write_record
from adamerge.backbones import Module, OpenCLIP, TextClassifier
from adamerge.data import TensorTask
from adamerge.data.base import TaskData
from adamerge.recipe import SpaceOptions, VectorOptions
from adamerge.rules import Concrete, LayerWise, TaskWise
from adamerge.task_modules import Surgery, Tint
from adamerge.transforms import ElectSign, Trim
from tests.checkpoints_hf import WORDS, tokenizer
from tests.golden.network import INPUT, WIDTH, Net

HERE = Path(__file__).parent
CLASSES = {"a": ["ant", "bee", "cat", "dog"], "b": ["cup", "pan", "Krüge"], "c": ["ash", "elm", "fir", "oak", "yew"]}
TWO = {task: CLASSES[task] for task in ("a", "b")}
PIXELS, LENGTH, SAMPLES = 16, 12, 6
FAST = partial(torch.optim.Adam, lr=0.05)  # so that a few steps go far
CLIP_CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": PIXELS, "patch_size": 8, "layers": 2, "width": 8, "head_width": 4},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1},
}
PREPROCESSING = {
    **{"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"},
}


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- sources


def moved(state: Mapping[str, Tensor], seed: int, scale: float) -> dict[str, Tensor]:
    """A fine-tune of a state, at random."""
    generator = drawn(seed)
    return {
        name: t + scale * torch.randn(t.shape, generator=generator).abs() if t.is_floating_point() else t.clone()
        for name, t in state.items()
    }


def write_net(folder: Path) -> None:
    """A base and three experts of `Net` with heads inside, and the heads in files of their own as well."""
    torch.manual_seed(0)
    base = Net().state_dict()
    save_file(base, folder / "net-base.safetensors")
    for seed, (task, names) in enumerate(CLASSES.items(), start=1):
        generator = drawn(100 + seed)
        head = {
            "weight": torch.randn(len(names), WIDTH, generator=generator),
            "bias": torch.randn(len(names), generator=generator),
        }
        expert = moved(base, seed, 0.3) | {f"head.{name}": tensor for name, tensor in head.items()}
        save_file(expert, folder / f"net-{task}.safetensors")
        save_file({name: -tensor for name, tensor in head.items()}, folder / f"head-{task}.safetensors")


def write_bert(folder: Path) -> None:
    """A base and two experts by `save_pretrained`, each with its tokenizer."""
    config = transformers.BertConfig(
        **{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
        **{"vocab_size": 5 + len(WORDS), "max_position_embeddings": 16, "pad_token_id": 0, "num_labels": 2},
        initializer_range=0.5,  # so that other texts get other answers
    )
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config)
    networks = {"base": base}
    for seed, (task, names) in enumerate(TWO.items(), start=1):
        own = deepcopy(config)
        own.id2label, own.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
        networks[task] = transformers.BertForSequenceClassification(own)
        mine = networks[task].state_dict()
        near = {name: t if mine[name].shape == t.shape else mine[name] for name, t in base.state_dict().items()}
        networks[task].load_state_dict(moved(near, seed, 0.2))
    for name, network in networks.items():
        network.save_pretrained(folder / f"bert-{name}")
        tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"]).save_pretrained(
            folder / f"bert-{name}"
        )


def write_clip(folder: Path) -> None:
    """A whole base, and two experts that are image towers alone: the text tower is what takes the space."""
    torch.manual_seed(0)
    base = CLIP(**CLIP_CONFIG).state_dict()
    image = {name: tensor for name, tensor in base.items() if name.startswith("visual.")}
    states = {"base": base, **{task: moved(image, seed, 0.1) for seed, task in enumerate(TWO, start=1)}}
    for name, state in states.items():
        home = folder / f"clip-{name}"
        home.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, home / "open_clip_model.safetensors")
        settings = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": PREPROCESSING}
        (home / "open_clip_config.json").write_text(json.dumps(settings))


# --- data


class Sentences(TaskData):
    """Random sentences with random labels."""

    repeatable = True

    def __init__(self, task: str) -> None:
        self._task = task

    @property
    def classes(self) -> list[str]:
        return TWO[self._task]

    def split(self, name: str) -> list[dict[str, Any]]:
        generator = drawn(len(name) + ord(self._task))

        def sentence() -> str:
            length = int(torch.randint(1, LENGTH - 3, (), generator=generator))
            return " ".join(WORDS[int(n)] for n in torch.randint(len(WORDS), (length,), generator=generator))

        return [{"text": sentence(), "label": number % len(self.classes)} for number in range(24)]


def vectors_task(task: str) -> TensorTask:
    generator = drawn(ord(task))
    labels = torch.randint(len(CLASSES[task]), (40,), generator=generator)
    inputs = torch.randn(40, INPUT, generator=generator)
    return TensorTask(CLASSES[task], train=(inputs, labels), test=(inputs[:SAMPLES] + 0.5, labels[:SAMPLES]))


class Pictures(TaskData):
    """Random pictures, uint8 [3, 16, 16], with random labels."""

    repeatable = True

    def __init__(self, task: str) -> None:
        self._task = task

    @property
    def classes(self) -> list[str]:
        return TWO[self._task]

    def split(self, name: str) -> list[dict[str, Any]]:
        pixels = torch.randint(
            256, (24, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=drawn(len(name) + ord(self._task))
        )
        return [{"image": picture, "label": n % len(self.classes)} for n, picture in enumerate(pixels)]


# --- families


def of_net(**options: Any) -> tuple[Recipe, UnlabeledTasks]:
    sources = {task: f"net-{task}.safetensors" for task in CLASSES}
    options = {"backbone": Module(Net), "space": SpaceOptions(skip=r"^head\."), "optimizer": FAST, **options}
    tasks = {task: vectors_task(task) for task in CLASSES}
    return Recipe("net-base.safetensors", sources, **options), UnlabeledTasks(tasks, batch_size=8)


def of_folders(kind: str, data: type[TaskData], **options: Any) -> tuple[Recipe, UnlabeledTasks]:
    recipe = Recipe(f"{kind}-base", {task: f"{kind}-{task}" for task in TWO}, optimizer=FAST, **options)
    return recipe, UnlabeledTasks({task: data(task) for task in TWO}, batch_size=8)


def families() -> dict[str, tuple[Recipe, UnlabeledTasks]]:
    """By name, in the working directory of the sources. Among them, most options that a record can hold."""
    heads = {task: f"head-{task}.safetensors" for task in CLASSES}
    return {
        "task_wise": of_net(
            rule=partial(TaskWise, init={"a": 0.2, "b": 0.3, "c": 0.4}, activation="sigmoid"),
            transforms=[Trim(keep=0.5), ElectSign()],
            space=SpaceOptions(skip=r"^head\.|^stem\.bias$", buffers="mean"),
            vectors=VectorOptions(dtype="bfloat16", seed=3),
        ),
        "layer_wise": of_net(
            rule=partial(LayerWise, activation="softmax", penalties={"l2": 0.1}),
            space=SpaceOptions(skip=r"^head\.", group="block"),
            vectors=VectorOptions(placement="mmap", ancestry="warn"),
        ),
        "concrete": of_net(
            rule=partial(
                Concrete, rule=partial(LayerWise, init=0.4), temperature=0.4, logit=0.5, density=0.1, seed=2,
                saved_as="bfloat16",
            ),
            vectors=VectorOptions(placement="cpu"),
        ),
        "surgery": of_net(
            rule=partial(LayerWise, trainable=False),
            task_modules=[partial(Surgery, rank=2, normalize=True)],
            backbone=Module(Net, heads=heads, build_args={}),
        ),
        "surgery_deep": of_net(
            task_modules=[partial(Surgery, rank=2, deep=True)],
            backbone=Module(Net, train_heads=True, blocks=r"blocks\.\d+"),
        ),
        "tint": of_net(
            rule=partial(TaskWise, activation="clamp_ste"),
            task_modules=[partial(Tint, layer="head"), partial(Tint, layer="blocks.1.1")],
        ),
        "text_classifier": of_folders(
            "bert", Sentences, backbone=TextClassifier(max_length=LENGTH), rule=partial(LayerWise, activation="tanh"),
            space=SpaceOptions(group=r"(embeddings|layer\.\d+)", vocabulary="base"),
        ),
        "open_clip": of_folders(
            "clip", Pictures,
            backbone=OpenCLIP("local-dir:clip-base", templates={"a": ["a {}.", "one {}."], "b": ["a {} of clay."]}),
            rule=partial(LayerWise, activation="clamp"),
        ),
    }  # fmt: skip


def make(version: str) -> Path:
    """Write everything of one version; what exists is not touched."""
    root = HERE / "merges" / version
    sources = root / "sources"
    sources.mkdir(parents=True)  # fails where it exists
    write_net(sources)
    write_bert(sources)
    write_clip(sources)
    with contextlib.chdir(sources), tempfile.TemporaryDirectory() as runs:
        for name, (recipe, data) in families().items():
            learn(recipe, data, root / name, Path(runs) / name)
    return root


def learn(recipe: Recipe, data: UnlabeledTasks, folder: Path, run_folder: Path) -> None:
    """Learn a merge for some steps, and write it with the answers that it gives once it is loaded."""
    run = adamerge.train(
        recipe,
        data,
        trainer={"max_steps": 12, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
        run={"dir": str(run_folder), "baselines": False},
        seed_everything=1,
    )
    merge, record = read_record(run.dir)
    folder.mkdir()
    (folder / WEIGHTS).write_bytes((merge / WEIGHTS).read_bytes())
    write_record(portable(record), folder)
    loaded, tensors, texts = adamerge.load(folder, trust=True), {}, {}
    for task, samples in data.tasks.items():
        plain = [{k: v for k, v in samples.split("test")[n].items() if k != "label"} for n in range(SAMPLES)]
        batch = loaded.prepare(plain, task=task)
        if "text" in plain[0]:
            texts[task] = plain
        tensors |= {f"input.{task}.{entry}": value for entry, value in batch.items()}
        with torch.inference_mode():
            tensors[f"logits.{task}"] = loaded(batch, task=task)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "answers.safetensors")
    if texts:
        (folder / "samples.json").write_text(json.dumps(texts, indent=1))


if __name__ == "__main__":
    version = tomllib.loads((HERE.parent.parent / "pyproject.toml").read_text())["project"]["version"]
    if (HERE / "merges" / version).exists():
        sys.exit(f"{HERE / 'merges' / version} exists; golden merges are never written again.")
    make(version)
