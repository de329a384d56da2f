"""FusionBench's own loops on the inputs of a folder; run by the interpreter of its environment (`common.peer_python`).

Its public algorithm classes do the work: their merge, forwards, backwards, optimisers and logging. Overridden is what
would fetch something: the source of the heads, and of the batches, where the start of each step is noted too.

    python benchmarks/fusion_bench_worker.py layer_wise|concrete|surgery FOLDER WARM STEPS
"""

import math
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from arms import Clock
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers.models.clip import modeling_clip
from vit import INIT, SCALE, SEED, Inputs

# The surgery adapters import this name for a type; transformers 5 has only the whole tower.
modeling_clip.CLIPVisionTransformer = getattr(modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel)

from fusion_bench.method.adamerging.clip_layer_wise_adamerging import CLIPLayerWiseAdaMergingAlgorithm  # noqa: E402
from fusion_bench.method.concrete_subspace.clip_concrete_adamerging import (  # noqa: E402
    ConcreteLayerWiseAdaMergingForCLIP,
)
from fusion_bench.method.surgery import CLIPLayerWiseAdaMergingSurgeryAlgorithm  # noqa: E402
from fusion_bench.method.surgery import clip_layer_wise_adamerging_surgery as surgery_module  # noqa: E402

# As its configuration files have them; `strict: false` is among them.
COMMON = {"optimizer": "adam", "lr": 1e-3, "clamp_weights": False, "tie_weights": True, "strict": False}


class Pool:
    """The models, each made when it is asked for."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self.model_names = inputs, inputs.tasks

    def load_model(self, name: str) -> nn.Module:
        return self._inputs.base() if name == "_pretrained_" else self._inputs.expert(name)


class Fed:
    """Heads and batches from the inputs; that a batch of the first task is asked for begins a step."""

    def feed(self, inputs: Inputs, clock: Clock) -> "Fed":
        self.fabric = L.Fabric(accelerator="cpu", devices=1)
        self.modelpool, self.inputs, self.clock = Pool(inputs), inputs, clock
        self.on_test_time_adaptation_start()
        return self

    def on_test_time_adaptation_start(self) -> None:
        self.visual_projection, self.zeroshot_weights = self.inputs.projection, self.inputs.heads
        self.logit_scale_exp = torch.tensor(SCALE)

    def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Tensor, None]]:
        if task == self.inputs.tasks[0]:
            self.clock.mark()
        return iter([self.batch(task)])

    def batch(self, task: str) -> tuple[Tensor, None]:
        return self.inputs.batches[task], None

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: there is no folder to write to."""

    def print_profile_summary(self, *_: Any) -> None:
        """Nothing: it is no part of a step."""


class LayerWise(Fed, CLIPLayerWiseAdaMergingAlgorithm):
    """Its AdaMerging."""


class Concrete(Fed, ConcreteLayerWiseAdaMergingForCLIP):
    """Its Concrete AdaMerging, where the drawing of a mask begins a step."""

    def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Tensor, None]]:
        return iter([self.batch(task)])


class Surgery(Fed, CLIPLayerWiseAdaMergingSurgeryAlgorithm):
    """Its Surgery, on coefficients that are given."""


def layer_wise(inputs: Inputs, clock: Clock) -> None:
    config = {**COMMON, "weights": None, "init_values": INIT, "max_steps": clock.steps}
    algorithm = LayerWise(OmegaConf.create(config)).feed(inputs, clock)
    module = algorithm.construct_layer_wise_merged_model(algorithm.modelpool)
    clock.first_gradient({"coefficients": module.merge_weight})
    clock.ready()
    algorithm.test_time_adaptation(module)


def concrete(inputs: Inputs, clock: Clock) -> None:
    config = {**COMMON, "base_lr": 0.1, "scaling_factor": INIT, "max_steps": clock.steps, "save_interval": math.inf}
    config |= {"initial_logits": 0, "temperature": 0.5, "merge_dtype": None}
    algorithm = Concrete(OmegaConf.create(config)).feed(inputs, clock)
    module, masks = algorithm.setup_models()
    clock.first_gradient(dict(masks.named_parameters()), reduced=True)
    draw = masks.sample_mask

    def drawn(**options: Any) -> dict[str, Tensor]:
        clock.mark()
        return draw(**options)

    masks.sample_mask = drawn
    torch.manual_seed(SEED)
    algorithm.train_mask(module, masks)


def surgery(inputs: Inputs, clock: Clock) -> None:
    weights = inputs.folder / "weights.pt"  # given, they are not adapted
    torch.save(torch.full((len(inputs.tasks), len(list(inputs.base().parameters()))), INIT), weights)
    config = {**COMMON, "weights": str(weights), "surgery_steps": clock.steps, "eval_iterations": math.inf}
    algorithm = Surgery(OmegaConf.create(config)).feed(inputs, clock)
    made = surgery_module.SurgeryModelWrapper

    def given(*arguments: Any, **options: Any) -> nn.Module:
        wrapper = made(*arguments, **options)
        factors = [factor for task in inputs.tasks for factor in inputs.adapter(task)]
        parameters = wrapper.collect_trainable_params()
        for parameter, factor in zip(parameters, factors, strict=True):
            parameter.data = factor
        names = [f"{task}.{factor}" for task in inputs.tasks for factor in ("down", "up")]
        clock.first_gradient(dict(zip(names, parameters, strict=True)))
        return wrapper

    with patch.object(surgery_module, "SurgeryModelWrapper", given):
        algorithm.run(algorithm.modelpool)


ARMS = {"layer_wise": layer_wise, "concrete": concrete, "surgery": surgery}

if __name__ == "__main__":
    Clock.run(ARMS, sys.argv[1:])
