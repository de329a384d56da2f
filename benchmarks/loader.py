"""Claim: the loader delivers samples at least 1.5 times as fast as training steps of eight tasks consume them.

The loader is the one that a run has built, alone: timed when training starts, before the first step. What steps consume
is told by the time that Lightning spends in them, fetching aside, in a run without workers. Waiting is the share of
fetching in a run's time. In the first pass over the samples they are decoded and prepared, later they are remembered;
of the first pass, one batch was decoded before, when the run looked at its data.

    python benchmarks/loader.py
"""

import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from common import CONFIGS, company, quiet, show
from lightning.pytorch.profilers import SimpleProfiler
from PIL import Image
from safetensors.torch import save_file

import adamerge

TASKS, SAMPLES, AIM = 8, 16, 1.5
SIZE, PICTURES, CLASSES = 224, 128, ("cat", "dog")
CLIP = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "patch_size": 32, "width": 256, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class Pace(NamedTuple):
    """Samples per second of the loader alone, seconds in each step, seconds of waiting for each step's batch."""

    alone: list[float]
    steps: list[float]
    waits: list[float]


class TimeLoader(pl.Callback):
    """Goes through the run's own loader when training starts.

    Attributes:
        alone: Samples per second in the first pass and in the second.
    """

    def __init__(self, steps: int) -> None:
        self._steps, self.alone = steps, list[float]()

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        batches = iter(trainer.train_dataloader)
        for _ in range(2):
            start = time.perf_counter()
            number = sum(
                len(next(iter(each.values()))) for batch in islice(batches, self._steps) for each in batch.values()
            )
            self.alone.append(number / (time.perf_counter() - start))


def measure(config: Any, steps: int, workers: int) -> Pace:
    """Of a run that takes its samples twice, so many steps for each pass."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"run.root": folder, "run.baselines": False, "data.eval_split": None, "data.num_workers": workers}
        timer, profiler = TimeLoader(steps), SimpleProfiler()
        adamerge.train(config, **options, **{"trainer.max_steps": 1, "trainer.callbacks": [timer]})
        adamerge.train(config, **options, **{"trainer.max_steps": 2 * steps, "trainer.profiler": profiler})
    found = profiler.recorded_durations
    return Pace(timer.alone, found["run_training_batch"], found["[_TrainingEpochLoop].train_dataloader_next"])


def rows_of(name: str, config: Any, samples: int) -> Iterator[list[str]]:
    steps = samples // SAMPLES
    paces = {workers: measure(config, steps, workers) for workers in (0, 1)}
    need = TASKS * SAMPLES / median(paces[0].steps)
    for workers, pace in paces.items():
        for number, label in enumerate(("first", "later")):
            part = slice(number * steps, (number + 1) * steps)
            waited, worked = sum(pace.waits[part]), sum(pace.steps[part])
            ratio = pace.alone[number] / need
            yield [
                f"{name}, {label} pass, {workers} workers",
                *(f"{pace.alone[number]:.0f}", f"{need:.0f}", f"{ratio:.1f}", "yes" if ratio >= AIM else "no"),
                f"{waited / (waited + worked):.0%}",
            ]


def write(folder: Path) -> dict[str, Any]:
    """A small open_clip vision transformer, its experts, and folders of pictures; the configuration that names them."""
    from open_clip import CLIP as Clip

    torch.manual_seed(0)
    state, random = Clip(**CLIP).state_dict(), np.random.default_rng(0)
    settings = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    tasks = [f"task{t}" for t in range(TASKS)]
    for name in ("base", *tasks):
        (folder / name).mkdir()
        (folder / name / "open_clip_config.json").write_text(json.dumps(settings))
        noise = {key: p if name == "base" else p + 1e-3 * torch.randn_like(p) for key, p in state.items()}
        save_file({key: p.contiguous() for key, p in noise.items()}, folder / name / "open_clip_model.safetensors")
    for number in range(TASKS * PICTURES):
        place = folder / "pictures" / tasks[number % TASKS] / "train" / CLASSES[number // TASKS % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8))
        coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(place / f"{number}.jpg", quality=90)

    def data(task: str) -> dict[str, Any]:
        return {"class_path": "adamerge.data.ImageFolder", "init_args": {"root": str(folder / "pictures" / task)}}

    backbone = {"class_path": "adamerge.backbones.OpenCLIP", "init_args": {"model": f"local-dir:{folder / 'base'}"}}
    experts = {task: str(folder / task) for task in tasks}
    return {
        "model": {"base": str(folder / "base"), "experts": experts, "backbone": backbone},
        "data": {"tasks": {task: data(task) for task in tasks}, "batch_size": SAMPLES},
    }


def main() -> None:
    quiet()
    warnings.filterwarnings("ignore", message="[^a-z]*Unable to serialize")  # a callback and a profiler have no text
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *rows_of("zoo, 32 x 32, PNG", CONFIGS / "demo.yaml", 500),
            *rows_of(f"ImageFolder, {SIZE} x {SIZE}, JPEG", write(Path(folder)), PICTURES),
        ]
    vision = CLIP["vision_cfg"]
    show(
        "The loader alone against what training steps consume",
        f"{TASKS} tasks of {SAMPLES} samples; configs/demo.yaml, and a ViT/{vision['patch_size']} of width "
        f"{vision['width']} with {vision['layers']} layers under entropy{company()}",
        ["data", "loader samples/s", "steps samples/s", "ratio", f"at least {AIM}", "waiting"],
        rows,
    )


if __name__ == "__main__":
    main()
