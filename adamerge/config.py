"""The configuration's language: one parser for the command line, files, and `adamerge.train`."""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from adamerge.data import UnlabeledTasks
from adamerge.job import TRAINER_DEFAULTS, Job, RunOptions
from adamerge.reading import check_yaml, parse_yaml, read_text, read_yaml
from adamerge.recipe import Recipe
from adamerge.recorded import foreign, revive
from adamerge.types import InputError, raise_all, some

log = logging.getLogger("adamerge")

SHIPPED = Path(__file__).parent / "configs"


def find_config(name: str | Path) -> Path:
    """The configuration file of that name or, where none is, the one that comes with the package: `configs/demo.yaml`.

    Raises:
        InputError: Neither is there.
    """
    file = Path(name).expanduser()
    if file.exists() and not file.is_dir():
        return file
    if file.parts[:1] == (SHIPPED.name,) and (SHIPPED.parent / file).is_file():
        return SHIPPED.parent / file
    raise InputError(
        f"There is no configuration '{name}' (looked in {file.parent.resolve()}). Name a YAML file of yours, or one of "
        f"those that come with adamerge: {_grouped(shipped_configs())}."
    )


def _grouped(names: Sequence[str]) -> str:
    """Names of YAML files, those of one folder in braces: `configs/debug/{fast,overfit}.yaml`."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(Path(name).parent.as_posix(), []).append(Path(name).stem)
    return ", ".join(f"{folder}/{{{','.join(stems)}}}.yaml" for folder, stems in folders.items())


def shipped_configs() -> list[str]:
    """The names of the configurations that come with the package; what configures a sweep is none."""
    files = (file for file in SHIPPED.rglob("*.yaml") if "parameters" not in yaml.safe_load(file.read_text()))
    return sorted(file.relative_to(SHIPPED.parent).as_posix() for file in files)


class _ConfigFile(ActionConfigFile):
    """`--config`: a file that `find_config` finds, or a configuration written out as YAML."""

    def __call__(
        self, parser: LightningArgumentParser, cfg: Namespace, values: str, option_string: str | None = None
    ) -> None:
        if not _is_mapping(values):
            file = find_config(values)
            if file.is_file():  # a pipe can be read once
                check_yaml(read_text(file), str(file))
            values = str(file)
        super().__call__(parser, cfg, values, option_string)


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(parse_yaml(text, "`--config`"), dict)
    except InputError:
        if "\n" in text:  # no file's name
            raise
        return False


@rank_zero_only
def _say_which_are_shipped(files: Sequence[object]) -> None:
    for file in map(Path, map(str, files)):
        if file.is_relative_to(SHIPPED):
            log.info(
                "%s is not here; taking the one that comes with adamerge, %s", file.relative_to(SHIPPED.parent), file
            )


def make_parser(prog: str = "python -m adamerge.fit") -> LightningArgumentParser:
    """Top keys: model (`Recipe`), data (`UnlabeledTasks`), trainer, run (`RunOptions`), seed_everything, ckpt_path."""
    parser = LightningArgumentParser(
        prog=prog, description="Learn how to merge models.", exit_on_error=False, default_env=False
    )
    parser.add_argument(
        *("-c", "--config"), action=_ConfigFile, help="A YAML file, yours or a shipped one; of several, later ones win."
    )
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
            parsed = parser.parse_object(_copied(config))  # the parser writes into it
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
    _say_which_are_shipped([file for file in parsed.get("config") or () if file])
    _check_wandb(parsed.trainer.logger)
    text = parser.dump(parsed, skip_none=False)
    made = parser.instantiate(parsed)
    return Job(made.model, made.data, made.trainer.as_dict(), made.run, made.ckpt_path, made.seed_everything, text)


def _check_wandb(logger: Any) -> None:
    """Refuse what Lightning's `WandbLogger` would refuse, in words of the configuration."""
    for each in logger if isinstance(logger, list) else [logger]:
        options = each.get("init_args", {}) if isinstance(each, Namespace) else {}
        if options.get("offline") and options.get("log_model"):
            raise InputError(
                "`trainer.logger` has `offline` and `log_model`, which exclude each other: no model is sent to W&B "
                "offline. Leave `log_model` out; the learned merge is an artifact of the run anyway."
            )


def job_from_arguments(argv: Sequence[str] | None = None) -> Job:
    """A job from a command line; by default `sys.argv`, so that DDP's processes find the same arguments.

    Args:
        argv: The options; in `sys.argv` the word `fit` may stand before them.

    Raises:
        InputError: What the parser has to say.
    """
    named = argv is None and sys.argv[1:2] == ["fit"]
    parser = make_parser("adamerge fit") if named else make_parser()
    try:
        return job_of(parser, parser.parse_args(sys.argv[2:] if named else argv))
    except InputError:
        raise
    except (ArgumentError, ValueError) as error:
        raise InputError(_short(error)) from error


def data_of(config: Path, *, trust: bool = False) -> UnlabeledTasks:
    """The data that a run's configuration names; opens none of it.

    Args:
        config: RUN/config.yaml.
        trust: Also build classes from outside adamerge.

    Raises:
        InputError: No such file, no data in it, data that was made from Python objects, untrusted code, or what the
            parser has to say.
    """
    try:
        read = read_yaml(config)
    except InputError as error:
        raise InputError(f"The run's configuration, which says what its data are, cannot be read: {error}.") from error
    section = read.get("data") if isinstance(read, dict) else None
    if not isinstance(section, dict):
        raise InputError(
            f"The configuration {config} has no section `data`; it is not the one of a run, or was cut short."
        )
    objects = [text for _, text in _texts(section) if text.startswith("<") and text.endswith(">")]
    if objects:
        raise InputError(
            f"The data of {config} were made from Python objects, which have no text form: {some(objects)}. Make them "
            "in Python again, and take the merge from `adamerge.load`."
        )
    if not trust:
        _refuse_foreign(section)
    parser = LightningArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(UnlabeledTasks, "data")
    try:
        return parser.instantiate(parser.parse_object({"data": section})).data
    except InputError:
        raise
    except Exception as error:  # arguments of any type
        raise InputError(f"The data of {config} cannot be made again: {_short(error)}") from error


def _refuse_foreign(section: Mapping[str, Any]) -> None:
    """Refuse data that name anything from outside adamerge, or that are not spelled out.

    The parser takes many texts for classes, modules or files. Where each task's data are `class_path` and `init_args`,
    there is nothing left that it takes for one; `revive`, which imports nothing foreign, makes the same of them.

    Raises:
        InputError: Something foreign, a task that is not spelled out, or arguments that do not fit.
    """
    strange = [text for key, text in _texts(section) if key == "class_path" and not text.startswith("adamerge.")]
    raise_all(map(foreign, dict.fromkeys(strange)), "the run's configuration")
    tasks = section.get("tasks")
    if not isinstance(tasks, dict):
        raise InputError(f"`data.tasks` of the run's configuration is `{tasks}`, not the data of each task.")
    raise_all(
        (
            f"The data of task '{task}' in the run's configuration, `{data}`, are not spelled out as `class_path` "
            "and `init_args`: do so; or pass trust=True (in a command: --trust) if you trust what it names."
            for task, data in tasks.items()
            if not _is_spelled_out(data)
        ),
        "the run's configuration",
    )
    path = f"{UnlabeledTasks.__module__}.{UnlabeledTasks.__name__}"
    try:
        revive({"class_path": path, "init_args": section}, trust=False)
    except InputError:
        raise
    except Exception as error:  # arguments of any type
        raise InputError(f"The data of the run's configuration cannot be made again: {_short(error)}") from error


def _is_spelled_out(data: Any) -> bool:
    """Tell whether a task's data are spelled out as `class_path` and `init_args`, and nothing else."""
    if not isinstance(data, dict) or not set(data) <= {"class_path", "init_args"}:
        return False
    return isinstance(data.get("class_path"), str) and isinstance(data.get("init_args", {}), dict)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested plain data, with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    for inner, item in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield from _texts(item, str(inner))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    # of an optional value the parser says what it is not, and repeats all of it
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*", "", text)
    hint = (
        " (name a configuration with --config FILE, or see --help; one that begins with `Stack on OTHER` goes behind "
        "that: --config OTHER --config FILE)"
    )
    return text + (hint if "required" in text else "")


def _copied(value: Any) -> Any:
    """Mappings and lists of one's own around the same values."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return nested
