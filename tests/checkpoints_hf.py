"""Tiny checkpoints of transformers, made and saved by the library itself; samples for them."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adamerge.data.base import TaskData
from adamerge.types import InputError

WORDS = "ant bee cat dog eel fox gnu hen ibis jay kite lion mole newt owl pig".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLASSES = {"a": ["ant", "bee"], "b": ["cat", "dog", "eel"]}
LENGTH = 16

_SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}
_TEXT: dict[str, Any] = {**_SMALL, "vocab_size": 21, "max_position_embeddings": LENGTH, "pad_token_id": 0}
_PICTURE: dict[str, Any] = {**_SMALL, "image_size": 16, "patch_size": 8}
_LAYERS = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 21}
_BART = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers",)} | {
    f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 16))
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTConfig(**_PICTURE),
    "dinov2": lambda: transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    ),
    "convnext": lambda: transformers.ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], image_size=32),
    "resnet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "clip": lambda: transformers.CLIPConfig(
        vision_config=_PICTURE, text_config={**_TEXT, "eos_token_id": 3, "bos_token_id": 2}, projection_dim=8
    ),
    "bert": lambda: transformers.BertConfig(**_TEXT),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=21, max_position_embeddings=LENGTH
    ),
    "roberta": lambda: transformers.RobertaConfig(
        **{**_TEXT, "max_position_embeddings": LENGTH + 1}, type_vocab_size=1
    ),
    "deberta": lambda: transformers.DebertaV2Config(**_TEXT),
    "qwen2": lambda: transformers.Qwen2Config(**_TEXT, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=21, n_positions=LENGTH),
    "bart": lambda: transformers.BartConfig(
        d_model=16, vocab_size=21, max_position_embeddings=LENGTH, **_BART, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
    ),
    "t5": lambda: transformers.T5Config(**_LAYERS, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3),
}  # fmt: skip


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a word, with [CLS] and [SEP] around."""
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=LENGTH, **{f"{k}_token": v for k, v in named.items()}, **options
    )


def processor(size: int = 16) -> Any:
    """Resizes to a square."""
    return transformers.ViTImageProcessor(
        size={"height": size, "width": size},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.25],
        do_convert_rgb=True,
    )


def write(
    folder: Path, kind: str, auto: str, *, base_auto: str | None = None, classes: Mapping[str, Sequence[str]] = CLASSES
) -> dict[str, Path]:
    """A base and an expert near it for each task, by `save_pretrained`; name -> folder.

    Args:
        folder: Where.
        kind: Key of `CONFIGS`.
        auto: The auto class of the experts.
        base_auto: That of the base, where it is another.
        classes: The class names of each task.
    """
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.num_labels = 3
    base = getattr(transformers, base_auto or auto).from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save(base, folder / "base")
    reference = base.state_dict()
    for task, names in classes.items():
        own = deepcopy(config)
        own.id2label, own.label2id = dict(enumerate(names)), {name: n for n, name in enumerate(names)}
        expert = getattr(transformers, auto).from_config(own)
        near(expert, reference)
        save(expert, folder / task)
    return {name: folder / name for name in ("base", *classes)}


def near(expert: Any, reference: Mapping[str, torch.Tensor], scale: float = 0.1) -> None:
    """Move a network's tensors near those of the same name, or the same name behind a prefix."""
    with torch.no_grad():
        for name, tensor in expert.state_dict().items():
            found = next((reference[key] for key in reference if _same(key, name)), None)
            if found is not None and found.shape == tensor.shape and tensor.is_floating_point():
                tensor.copy_(found + scale * torch.randn_like(found).abs())
            elif tensor.is_floating_point():
                tensor.add_(scale * torch.randn_like(tensor))


def _same(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}") or name.endswith(f".{key}")


def save(net: Any, folder: Path, **options: Any) -> None:
    """With tokenizer and processor."""
    net.save_pretrained(folder, **options)
    taken = ["input_ids", "token_type_ids", "attention_mask"]
    bert = net.config.model_type in ("bert", "deberta-v2")
    tokenizer(model_input_names=taken if bert else [taken[0], taken[2]]).save_pretrained(folder)
    processor(getattr(net.config, "image_size", 16)).save_pretrained(folder)


def shard(folder: Path, size: str = "6KB") -> None:
    """Make a folder's weights shards, as `save_pretrained` writes them."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state = load_file(folder / "model.safetensors")
    split = split_torch_state_dict_into_shards(state, max_shard_size=size)
    assert split.is_sharded
    (folder / "model.safetensors").unlink()
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rename(folder: Path, new: Callable[[str], str]) -> None:
    """Give a folder's tensors other names."""
    state = load_file(folder / "model.safetensors")
    save_file({new(name): tensor for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})


class Texts(TaskData):
    """Random sentences. The entries of a sample: text, and `pair`, `positive`, `words` or `target` if asked for."""

    repeatable = True

    def __init__(self, task: str, *, more: str | None = None, size: int = 24, labels: bool = True) -> None:
        self._task, self._more, self._size, self._labels = task, more, size, labels

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES[self._task] if self._labels and self._more != "target" else ()

    def split(self, name: str) -> list[dict[str, Any]]:
        if name not in ("train", "test"):
            raise InputError(f"There is no split '{name}'.")
        generator = torch.Generator().manual_seed(len(name) + len(self._task))
        return [self._sample(generator, number) for number in range(self._size)]

    def _sample(self, generator: torch.Generator, number: int) -> dict[str, Any]:
        def draw(most: int) -> list[str]:
            length = int(torch.randint(1, most, (), generator=generator))
            return [WORDS[int(n)] for n in torch.randint(len(WORDS), (length,), generator=generator)]

        words, c = draw(8), len(CLASSES[self._task])
        if self._more == "words":
            labels = {"label": [len(word) % c for word in words]} if self._labels else {}
            return {"words": words, **labels}
        sample: dict[str, Any] = {"text": " ".join(words)}
        if self._more is not None:
            sample[self._more] = " ".join(draw(5))
        return {**sample, **({"label": number % c} if self._labels else {})}


class Pictures(TaskData):
    """Random pictures of different sizes."""

    repeatable = True

    def __init__(self, task: str, *, size: int = 24) -> None:
        self._task, self._size = task, size

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES[self._task]

    def split(self, name: str) -> list[dict[str, Any]]:
        if name not in ("train", "test"):
            raise InputError(f"There is no split '{name}'.")
        draw = np.random.RandomState(len(name) + len(self._task))
        return [
            {"image": Image.fromarray(draw.randint(0, 256, (20 + n % 3, 24, 3)).astype(np.uint8)), "label": n % 2}
            for n in range(self._size)
        ]
