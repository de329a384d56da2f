"""Tiny CLIPs in open_clip's hub layout, made by open_clip's own classes."""

import json

import torch
from open_clip import CLIP, CustomTextCLIP
from safetensors.torch import save_file

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 2, "width": 16, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
CLASSES = {"a": ["cat", "dog"], "b": ["cup", "pan", "jug"]}


def write_clip(folder, model=MODEL, *, seed=0, near=None):
    """A CLIP in a folder; near another one's image tower and text tower if asked. Returns its state."""
    torch.manual_seed(seed)
    kind = CustomTextCLIP if model.get("custom_text") else CLIP
    state = kind(**{key: value for key, value in model.items() if key != "custom_text"}).state_dict()
    if near is not None:
        state = {name: near[name] + 0.3 * (state[name] - near[name]) for name in state}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": model, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return state


def write_clips(folder):
    """A base and an expert for each task, whose text tower and scale are others; name -> folder."""
    folder.mkdir(exist_ok=True)
    base = write_clip(folder / "base")
    for seed, task in enumerate(CLASSES, start=1):
        state = write_clip(folder / task, seed=seed, near=base)
        state["logit_scale"] += seed
        save_file({name: t.contiguous() for name, t in state.items()}, folder / task / "open_clip_model.safetensors")
    return {name: folder / name for name in ("base", *CLASSES)}
