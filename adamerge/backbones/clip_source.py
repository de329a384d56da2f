"""Where an open_clip model comes from: its configuration, its tokenizer, its checkpoints."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adamerge.backbones.explained import explained
from adamerge.backbones.foreign_code import refuse_kernels
from adamerge.checkpoints import Selected, State, absolute, locate, open_state
from adamerge.types import InputError

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"  # of open_clip's hub layout
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")


def lasting(model: str) -> str:
    """The name of a model as it can be found again from any working directory."""
    if model.startswith("local-dir:") or not Path(model).expanduser().is_dir():
        return absolute(model) if model.startswith("local-dir:") else model
    return absolute(f"local-dir:{model}")


class ClipSource:
    """An open_clip model by its name.

    Args:
        model: `NAME`, `open_clip:NAME/TAG`, `hf-hub:ORG/NAME` with or without `@REVISION`,
            `local-dir:PATH`, or `demo:POOL/NAME`.
    """

    def __init__(self, model: str) -> None:
        self.model = model

    @property
    def folder(self) -> Path | None:
        """The local folder with the model's configuration and tokenizer; None for a name of open_clip's."""
        if self.model.startswith("hf-hub:"):
            return weights_of(self.model).parent
        return locate(self.model) if self.model.startswith(("local-dir:", "demo:")) else None

    @property
    def _name(self) -> str:
        """As open_clip's factory takes it."""
        if self.model.startswith("demo:"):
            return f"local-dir:{locate(self.model)}"
        if self.model.startswith("hf-hub:") and "@" in self.model:  # open_clip knows no revisions
            return f"local-dir:{locate(self.model, weights=False)}"
        return _name_and_tag(self.model)[0]

    def config(self) -> dict[str, Any]:
        """The model's configuration.

        Raises:
            InputError: No such model.
        """
        import open_clip

        with explained(f"The configuration of '{self.model}' cannot be had"):
            config = open_clip.get_model_config(self._name)
        if config is None:
            raise InputError(
                f"open_clip has no model '{self.model}'; see open_clip.list_models(), or name a folder with a {CONFIG}."
            )
        return config

    def create(self) -> Any:
        """The whole CLIP with any weights; the settings of its preprocessing are in `visual.preprocess_cfg`."""
        import open_clip
        from open_clip.transform import merge_preprocess_dict

        config, (name, tag) = self.config(), _name_and_tag(self.model)
        settings: dict[str, Any] = {}
        if tag is not None:
            settings = open_clip.get_pretrained_cfg(name, tag)
            if not settings:
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
                raise InputError(f"open_clip has no weights '{tag}' of {name}; it has {tags or 'none'}.")
            if bool(settings.get("quick_gelu")) != bool(config.get("quick_gelu")):
                kind = "QuickGELU" if settings.get("quick_gelu") else "plain GELU"
                raise InputError(f"The weights '{tag}' want {kind}, unlike {name}; see the names with `-quickgelu`.")
        with explained(f"open_clip cannot make '{self.model}'"), _silent():
            text_model = config["text_cfg"].get("hf_model_name")
            if text_model:
                refuse_kernels(locate(text_model, weights=False))
            clip = open_clip.create_model(self._name, load_weights=False, pretrained_text=False)
        clip.visual.preprocess_cfg = merge_preprocess_dict(clip.visual.preprocess_cfg, settings)
        return clip

    def loaded(self, weights: Sequence[Path]) -> Any:
        """The whole CLIP with a checkpoint's weights, one file or shards; one is converted if open_clip knows how."""
        from open_clip import load_checkpoint

        clip = self.create()
        with explained(f"{weights[0]} is no checkpoint of the whole CLIP '{self.model}'"):
            if len(weights) > 1:
                clip.load_state_dict({name: tensor for file in weights for name, tensor in open_state(file).items()})
            else:
                load_checkpoint(clip, str(weights[0]))
        return clip.eval()

    def exported(self) -> Any:
        """Load the whole CLIP from an exported folder, with its weights."""
        import open_clip

        with explained(f"open_clip cannot load '{self.model}'"):
            return open_clip.create_model(self._name, require_pretrained=True).eval()

    def tokenizer_files(self) -> list[Path]:
        """The files beside a model in a folder that its tokenizer is read from; open_clip's own has none."""
        home = self.folder
        if home is None:
            return []
        return sorted(file for pattern in _TOKENIZER for file in home.glob(pattern) if file.is_file())

    def tokenizer(self) -> Any:
        """From texts to tokens [N, L]."""
        import open_clip

        with explained(f"The tokenizer of '{self.model}' cannot be had"):
            return open_clip.get_tokenizer(self._name)

    def _compare(self, source: str) -> None:
        """Refuse a source whose own configuration is of another image tower than the model's."""
        if source == self.model or not _has_config(source):
            return
        other = ClipSource(lasting(source))
        ours, theirs = (_image_config(each.config()) for each in (self, other))
        wrong = [
            f"{key} is {theirs.get(key)}, the model's {ours.get(key)}"
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]
        if wrong:
            raise InputError(
                f"{source} is of another architecture or resolution than `backbone.model` '{self.model}': "
                f"{'; '.join(wrong)}. Merge fine-tunes of one model, and name it in `backbone.model`."
            )

    def image_state(self, source: str) -> State:
        """The image tower in a checkpoint, as `visual.*`; `files` are the checkpoint's.

        Args:
            source: A checkpoint file or folder with whatever else in it and any one prefix, or as `model`.

        Raises:
            InputError: Nothing there, no network, or no image tower in it.
        """
        self._compare(source)
        path = weights_of(source)
        state = open_state(path) if path.suffix != ".npz" else open_state({})
        state = Selected(state, _image_names(state), source, files=state.files)
        if state:
            return state
        state = open_state(self.loaded([path]).state_dict())  # another library's layout
        return Selected(state, _image_names(state), source, files=(path,))


def _image_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that describes the image tower itself."""
    vision = {key: value for key, value in config["vision_cfg"].items() if key != "timm_model_pretrained"}
    return {**vision, "quick_gelu": bool(config.get("quick_gelu")), "embed_dim": config["embed_dim"]}


def _has_config(source: str) -> bool:
    if source.startswith(("hf-hub:", "open_clip:")):
        return True
    path = locate(source)
    return path.is_dir() and (path / CONFIG).exists()


def weights_of(source: str) -> Path:
    """The file or sharded folder behind a source; downloaded by open_clip if need be.

    Raises:
        InputError: Nothing there, or no network.
    """
    if source.startswith(("hf-hub:", "open_clip:")):
        import open_clip

        with explained(f"The weights of '{source}' cannot be had"):
            if source.startswith("hf-hub:"):
                name, _, revision = source.removeprefix("hf-hub:").partition("@")
                return Path(open_clip.download_pretrained_from_hf(name, revision=revision or None))
            name, tag = _name_and_tag(source)
            if tag is None:
                raise InputError(f"'{source}' names no pretrained weights; write open_clip:{name}/TAG.")
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag)))
    path = locate(source)
    if path.is_dir() and not list(path.glob("*.safetensors.index.json")):
        from open_clip.factory import _find_checkpoint_in_dir

        found = _find_checkpoint_in_dir(path)
        if found is None:
            raise InputError(f"{path} holds no weights; open_clip looks for {WEIGHTS} and the like.")
        return Path(found)
    return path


def _image_names(state: State) -> dict[str, str]:
    """`visual.*` -> the name in the checkpoint, whatever one prefix it has (`module.`, `model.`)."""
    prefixes = {name[: name.index("visual.")] for name in state if name.startswith("visual.") or ".visual." in name}
    if len(prefixes) > 1:
        raise InputError(f"{state.source} holds several image towers, under {', '.join(map(repr, sorted(prefixes)))}.")
    return {name.removeprefix(p): name for p in prefixes for name in state if name.startswith(f"{p}visual.")}


def _name_and_tag(model: str) -> tuple[str, str | None]:
    if not model.startswith("open_clip:"):
        return model, None
    name, _, tag = model.removeprefix("open_clip:").partition("/")
    return name, tag or None


@contextmanager
def _silent() -> Iterator[None]:
    """open_clip warns on the root logger of random weights, which are replaced at once."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
