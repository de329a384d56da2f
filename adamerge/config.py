"""The configuration's language: one parser for the command line, files, and `adamerge.train`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from adamerge.data import UnlabeledTasks
from adamerge.job import TRAINER_DEFAULTS, Job, RunOptions
from adamerge.recipe import Recipe
from adamerge.types import InputError


def make_parser() -> LightningArgumentParser:
    """Top keys: model (`Recipe`), data (`UnlabeledTasks`), trainer, run (`RunOptions`), seed_everything, ckpt_path."""
    parser = LightningArgumentParser(
        prog="python -m adamerge.fit", description="Learn how to merge models.", exit_on_error=False, default_env=False
    )
    parser.add_argument("-c", "--config", action="config", help="A YAML file; several are stacked, later ones win.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seeds everything that is random.")
    parser.add_argument("--ckpt_path", type=str, default=None, help="Resume: a checkpoint, or the directory of a run.")
    parser.add_class_arguments(Recipe, "model")
    parser.add_class_arguments(UnlabeledTasks, "data")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    parser.add_class_arguments(RunOptions, "run")
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
    parser.set_defaults({"trainer.enable_progress_bar": None})
    return parser


def parse(config: str | Path | Sequence[str | Path] | Mapping[str, Any], overrides: Mapping[str, Any]) -> Job:
    """A job from configuration files or a mapping, with overrides on top; never looks at `sys.argv`.

    Raises:
        InputError: What the parser has to say.
    """
    parser = make_parser()
    try:
        if isinstance(config, Mapping):
            parsed = parser.parse_object(dict(config))
        else:
            paths = [config] if isinstance(config, (str, Path)) else config
            parsed = parser.parse_args([f"--config={path}" for path in paths])
        if overrides:
            parsed = parser.parse_object(_nested(overrides), cfg_base=parsed)
        return job_of(parser, parsed)
    except InputError:
        raise
    except (ArgumentError, ValueError) as error:
        raise InputError(_short(error)) from error


def job_of(parser: LightningArgumentParser, parsed: Namespace) -> Job:
    """Build the objects that a parsed configuration names; opens no checkpoint and no data."""
    if parsed.get("config") and parsed.run.name == RunOptions.name:
        parsed.run.name = Path(str(parsed.config[-1])).stem
    text = parser.dump(parsed, skip_none=False)
    made = parser.instantiate(parsed)
    return Job(made.model, made.data, made.trainer.as_dict(), made.run, made.ckpt_path, made.seed_everything, text)


def job_from_arguments(argv: Sequence[str] | None = None) -> Job:
    """A job from a command line; by default `sys.argv`, so that DDP's processes find the same arguments.

    Raises:
        InputError: What the parser has to say.
    """
    parser = make_parser()
    try:
        return job_of(parser, parser.parse_args(argv))
    except InputError:
        raise
    except (ArgumentError, ValueError) as error:
        raise InputError(_short(error)) from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text + (" (name a configuration with --config FILE, or see --help)" if "required" in text else "")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return nested
