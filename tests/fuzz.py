"""Mutated input at every door where files of others come in: whatever comes, a value or one `InputError`.

    python -m tests.fuzz --examples 20000 [--door convert] [--seed 1]

A door takes an example, puts its files into an empty folder and goes through. It keeps its promise if it returns, or
raises an `InputError` of one paragraph; in seconds; without taking hundreds of megabytes; without a file elsewhere.
The command runs each door in a process of its own, so that one that hangs or dies is seen, and prints one table.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from adamerge.types import InputError

SECONDS = 30  # that one example may take; a picture of 80 million pixels takes one or two on a quiet machine
STUCK, START = 60, 600  # seconds after which a process that says nothing is ended; its imports may take longer
CHUNK = 1000  # examples that hypothesis draws from one seed; it remembers all of these


Say = Callable[[dict[str, bytes]], None]


class Door(NamedTuple):
    """One way in.

    Attributes:
        examples: Files to put into the folder, by name, their contents as bytes.
        enter: Goes through the door with the folder that holds them; what it writes goes beside it, into `out`.
        memory: Bytes that one example may take beyond what was taken before.
    """

    examples: SearchStrategy[dict[str, bytes]]
    enter: Callable[[Path, Path], Any]
    memory: int = 400 * 2**20


@dataclass
class Tally:
    """The result of a door's examples."""

    examples: int = 0
    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    smallest: dict[str, dict[str, bytes]] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    def fail(self, kind: str, files: dict[str, bytes], said: str = "") -> None:
        """Count a failure, and remember the smallest example of its kind and the words of the first."""
        self.said.setdefault(kind, said)
        self.failures[kind] += 1
        if kind not in self.smallest or _weight(files) < _weight(self.smallest[kind]):
            self.smallest[kind] = files


def _weight(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


class Hang(BaseException):
    """An example that takes too long; no door catches it."""


def run(door: Door, number: int, start: int, say: Say = lambda files: None) -> Tally:
    """Send examples through a door.

    Args:
        door: The way in.
        number: How many examples.
        start: Seed of the first ones.
        say: Called with each example's files before it runs, so that another process knows the one that killed this.
    """
    tally = Tally()

    def example(files: dict[str, bytes]) -> None:
        say(files)
        _send(door, files, tally)

    quiet = settings(
        max_examples=1, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    for part in range(0, number, CHUNK):
        drawn = settings(quiet, max_examples=min(CHUNK, number - part))
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            seed(start + part)(drawn(given(door.examples)(example)))()
    return tally


def _send(door: Door, files: dict[str, bytes], tally: Tally) -> None:
    """One example: its files in a folder of its own, which is all that is there afterwards but `out`."""
    tally.examples += 1
    with tempfile.TemporaryDirectory(prefix="adamerge-fuzz-") as name, _in_folder(Path(name, "here")):
        root = Path(name)
        for file, content in files.items():
            path = root / "in" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        before, before_peak, start = _below(root), _fresh_peak(), time.monotonic()
        try:
            with _limited():
                door.enter(root / "in", root / "out")
            tally.accepted += 1
        except InputError as error:
            tally.refused += 1
            if not str(error).strip() or "\n\n" in str(error) or _is_odd(str(error)):
                tally.fail("a message that is not one paragraph", files)
        except Hang:
            tally.fail(f"more than {SECONDS} s", files)
        except Exception as error:
            tally.fail(_kind(error), files, " ".join(str(error).split())[:80])
        tally.slowest = max(tally.slowest, time.monotonic() - start)
        if _peak() - before_peak > door.memory:
            tally.fail(f"more than {door.memory / 2**20:.0f} MiB", files)
        new = sorted(path for path in _below(root) - before if not path.startswith("out"))
        if new:
            tally.fail(f"wrote {new[0]}", files)


def _is_odd(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" or (letter < " " and letter not in "\n\t") for letter in text)


def _kind(error: BaseException) -> str:
    """The type of an exception and the last line of the package that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "adamerge" in Path(frame.filename).parts]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
    return f"{type(error).__name__} at {place}"


def _below(root: Path) -> set[str]:
    return {os.path.relpath(os.path.join(at, name), root) for at, _, names in os.walk(root) for name in names}


def _fresh_peak() -> int:
    """The memory that is taken now, from which the peak counts; where Linux does not say so, the peak until now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _limited() -> Iterator[None]:
    def ring(*args: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- the command


def _child(name: str, number: int, start: int, folder: Path, pipe: Any) -> None:
    from tests.fuzz_doors import DOORS

    logging.disable(logging.CRITICAL)
    os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT), 2)  # libraries in C complain there
    os.environ["ADAMERGE_CACHE"] = str(folder / "cache")
    door = DOORS[name]()
    last, memory = folder / "last", 2**32
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))  # the machine goes on whatever comes

    def say(files: dict[str, bytes]) -> None:
        last.write_text(json.dumps({file: content.hex() for file, content in files.items()}))

    pipe.send(run(door, number, start, say))


def watched(name: str, number: int, start: int) -> Tally:
    """A door's examples in a process of their own, which is ended when it says nothing for a minute."""
    with tempfile.TemporaryDirectory(prefix="adamerge-fuzz-") as folder:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_child, args=(name, number, start, Path(folder), there), daemon=True
        )
        process.start()
        there.close()
        last, said = Path(folder, "last"), time.time() + START
        while not here.poll(0.2) and process.is_alive() and time.time() - said < STUCK:
            said = last.stat().st_mtime if last.exists() else said
        if here.poll(0.5):
            try:
                return here.recv()
            except EOFError:
                pass
        process.kill()
        process.join()
        tally = Tally(examples=1)
        files = {}
        with suppress(OSError, ValueError):  # none, or half of one
            files = json.loads(last.read_text())
        errors = Path(folder, "errors")
        words = errors.read_text(errors="replace").strip().rpartition("\n")[2] if errors.exists() else ""
        files = {file: bytes.fromhex(content) for file, content in files.items()}
        tally.fail(f"the process ended or hung (status {process.exitcode})", files, words)
        return tally


def table(tallies: dict[str, Tally], kept: Path) -> str:
    """The table of all doors; the smallest failing examples are put into a folder."""
    lines = [f"{'door':10} {'examples':>9} {'refused':>9} {'accepted':>9} {'failures':>9} {'slowest':>9}"]
    for name, tally in tallies.items():
        failed = sum(tally.failures.values())
        lines.append(
            f"{name:10} {tally.examples:9,} {tally.refused:9,} {tally.accepted:9,} {failed:9,} {tally.slowest:7.2f} s"
        )
    for name, tally in tallies.items():
        for number, (kind, count) in enumerate(tally.failures.most_common()):
            folder = kept / f"{name}-{number}"
            for file, content in tally.smallest[kind].items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
            lines.append(f"{name}: {count} × {kind} {tally.said[kind]!a}; the smallest: {folder}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the doors and print their table; the status is 1 where a door broke its promise."""
    from tests.fuzz_doors import DOORS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Mutated input at every door.")
    parser.add_argument("--examples", type=int, default=20_000, help="of each door")
    parser.add_argument("--door", action="append", choices=sorted(DOORS), help="default: all")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="default: another one each time")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that fail")
    options = parser.parse_args(argv)
    sys.stdout.write(f"Seed {options.seed}\n")
    sys.stdout.flush()
    tallies = {name: watched(name, options.examples, options.seed) for name in options.door or DOORS}
    sys.stdout.write(table(tallies, options.keep) + "\n")
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
