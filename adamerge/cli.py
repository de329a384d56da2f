"""How commands meet a terminal: messages, errors as one paragraph, exit status."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from adamerge.types import InputError

log = logging.getLogger("adamerge")

# What the commands need is imported when they run: help and a listing answer at once.


def fit() -> Any:
    """The training command, which takes its arguments from `sys.argv` as DDP's other processes do."""
    from adamerge.config import job_from_arguments
    from adamerge.training import execute

    return execute(job_from_arguments())


def _evaluate(options: Namespace) -> Any:
    from adamerge.rescore import rescore

    return rescore(
        options.run, split=options.split, batch_size=options.batch_size, device=options.device, trust=options.trust
    )


def _export(options: Namespace) -> Any:
    from adamerge.exporting import export

    return export(options.run, options.out, dtype=options.dtype, device=options.device, trust=options.trust)


def _runs(options: Namespace) -> Any:
    from adamerge.runs import listing

    return listing(options.root, sort=options.sort)


def _report(options: Namespace) -> Any:
    from adamerge.runs import redraw

    return redraw(options.run, trust=options.trust)


def _compare(options: Namespace) -> Any:
    from adamerge.comparing import compare

    where = {"root": options.root, "jobs": options.jobs}
    return compare(options.recipes, on=options.config, seeds=options.seeds, options=options.set, **where)


def _check(options: Namespace) -> Any:
    from adamerge.config import job_from_arguments
    from adamerge.preflight import check

    if not options.configs + options.config:
        raise InputError("`adamerge check` wants a configuration: adamerge check mine.yaml")
    arguments = [f"--config={name}" for name in options.configs + options.config]
    return check(job_from_arguments([*arguments, *(f"--{each}" for each in options.set)]), deep=options.deep)


def _convert(options: Namespace) -> Any:
    from adamerge.convert import convert

    return convert(options.source, options.out, modules=options.modules, key=options.key)


def _mergekit(options: Namespace) -> Any:
    from adamerge.mergekit import mergekit

    return mergekit(options.run, options.out, dtype=options.dtype, trust=options.trust)


def _push(options: Namespace) -> Any:
    from adamerge.pushing import push_to_hub

    where = push_to_hub(options.path, options.repo, private=not options.public, revision=options.revision)
    return f"Pushed to {where}"


_COMMANDS: dict[str, Callable[[Namespace], Any]] = {
    **{"check": _check, "compare": _compare, "evaluate": _evaluate, "export": _export, "mergekit": _mergekit},
    **{"push": _push, "convert": _convert, "runs": _runs, "report": _report},
}


def command_parser() -> ArgumentParser:
    """All commands but `fit`, whose arguments `config.make_parser` reads."""
    parser = ArgumentParser(
        prog="adamerge", description="Learn how to merge models, and use what was learned.", exit_on_error=False
    )
    commands = parser.add_subcommands(required=False, dest="command")

    def command(name: str, text: str) -> ArgumentParser:
        made = ArgumentParser(description=f"{text}.", exit_on_error=False)
        commands.add_subcommand(name, made, help=text)
        return made

    def add_run(to: ArgumentParser) -> None:
        to.add_argument("run", type=str, help="Directory of a run")

    def add_trust(to: ArgumentParser) -> None:
        to.add_argument("--trust", action="store_true", help="Build classes from outside adamerge that the run names")

    def add_device(to: ArgumentParser) -> None:
        to.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where the model runs")

    command("fit", "Learn a merge; the same as python -m adamerge.fit")
    check = command("check", "Look at a configuration before it runs: checkpoints, data, memory, disk, time")
    check.add_argument("configs", type=str, nargs="*", help="YAML files, yours or shipped ones; of several, later win")
    check.add_argument("--config", type=str, action="append", default=[], help="The same, as `fit` takes them")
    check.add_argument(
        "--deep", action="store_true", help="Read all values too, and fetch them where they are not here"
    )
    _add_set(check)
    _add_compare(command("compare", "Run recipes on the same sources and seeds, and write one table"))
    evaluate = command("evaluate", "Score a learned merge again, on the data of its run")
    add_run(evaluate)
    evaluate.add_argument("--split", type=str, help="Split to score on; by default the run's own")
    evaluate.add_argument("--batch_size", type=int, help="Samples per forward; by default the run's own")
    add_device(evaluate)
    add_trust(evaluate)
    export = command("export", "Write a learned merge as a folder that the model's own library loads")
    add_run(export)
    export.add_argument("out", type=str, help="Folder to write; it must not exist yet")
    export.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="Type of the weights"
    )
    add_device(export)
    add_trust(export)
    mergekit = command("mergekit", "Write a learned merge as a configuration of mergekit, where it can say it")
    add_run(mergekit)
    mergekit.add_argument("out", type=str, help="YAML file to write; it must not exist yet")
    mergekit.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="Type of its output"
    )
    add_trust(mergekit)
    push = command("push", "Upload a learned merge, or an export of it, to the hub")
    push.add_argument("path", type=str, help="Directory of a run, or a folder that `export` has written")
    push.add_argument("repo", type=str, help="ORG/NAME; created if it is not there")
    push.add_argument("--public", action="store_true", help="For everybody to see, if it is new")
    push.add_argument("--revision", type=str, help="Branch; by default the main one")
    convert = command("convert", "Turn a pickled checkpoint into safetensors; nothing in it is run")
    convert.add_argument("source", type=str, help="A .pt, .pth, .bin or .ckpt file, or a folder with such")
    convert.add_argument("out", type=str, help="A .safetensors file, or a folder for a folder; it must not exist yet")
    convert.add_argument("--modules", action="store_true", help="Also take the tensors out of pickled modules")
    convert.add_argument("--key", type=str, help="The entry that holds the tensors, where several do")
    runs = command("runs", "List all runs below a folder")
    runs.add_argument("root", type=str, nargs="?", default="runs", help="The folder")
    runs.add_argument("--sort", type=Literal["time", "score"], default="time", help="The newest or the best first")
    report = command("report", "Print the table of a run again and redraw its plots")
    add_run(report)
    add_trust(report)
    return parser


def _add_compare(to: ArgumentParser) -> None:
    to.add_argument("recipes", type=str, nargs="+", help="YAML files, yours or shipped ones: a row of the table each")
    to.add_argument(
        "--config", type=str, action="append", default=[], help="What all recipes stand on; of several, later ones win"
    )
    to.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="A run of each recipe for every seed")
    to.add_argument("--root", type=str, default="runs/compare", help="Folder of the runs and of compare.csv and .md")
    to.add_argument("--jobs", type=int, default=1, help="Runs at a time; they share the machine and its devices")
    _add_set(to)


def _add_set(to: ArgumentParser) -> None:
    to.add_argument(
        *("--set",),
        **{"type": str, "action": "append", "default": [], "metavar": "KEY=VALUE"},
        help="An option of fit, say --set trainer.max_steps=10; may be repeated",
    )


def run() -> Any:
    """The command that `sys.argv` names; without one, the help.

    Raises:
        InputError: What the parser or the command has to say.
    """
    if sys.argv[1:2] == ["fit"]:
        return fit()
    parser = command_parser()
    try:
        options = parser.parse_args()
    except ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())} (see adamerge --help)") from error
    if options.command is None:
        return parser.format_help().rstrip()
    return _COMMANDS[options.command](options[options.command])


def main(command: Callable[[], Any] = run) -> int:
    """Run a command with messages on the terminal and errors as one paragraph; returns the exit status."""
    with _messages():
        try:
            log.info("%s", command())
        except InputError as error:
            if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":  # all ranks fail with it; one says so
                sys.stderr.write(f"adamerge: {error}\n")
            return 2
        except KeyboardInterrupt:
            sys.stderr.write("adamerge: stopped by Ctrl-C.\n")
            return 130
    return 0


@contextmanager
def _messages() -> Iterator[None]:
    """The library's messages go to stdout for the length of the block."""
    handler, level, propagate = _ToStdout(), log.level, log.propagate
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # libraries may put handlers of their own on the root logger
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _ToStdout(logging.StreamHandler):
    """Writes to whatever is stdout at the time: a live display stands in for it, to keep messages above itself."""

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        """Chosen at each message, not once."""
