"""Planned runs as processes: started, watched, marked once they are done, none left behind."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from adamerge.artifact import read_record
from adamerge.comparison import Ran
from adamerge.files import atomic_file
from adamerge.reading import read_json
from adamerge.report import duration, mean, shown
from adamerge.terminal import progress_console
from adamerge.types import InputError

log = logging.getLogger("adamerge")

_PAUSE = 0.1  # seconds between two looks at the processes
_popen = subprocess.Popen  # tests stand in for it


@dataclass(frozen=True)
class Candidate:
    """A recipe with what it stands on.

    Attributes:
        name: Of its row in the table.
        given: As the user named it.
        options: Of `python -m adamerge.fit`: the stacked configurations, its own the last, and what is set on top.
        folder: Of its runs.
    """

    name: str
    given: str
    options: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Planned:
    """One run: a candidate with a seed."""

    candidate: Candidate
    seed: int

    def __str__(self) -> str:
        return f"{self.candidate.name}, seed {self.seed}"

    @property
    def marker(self) -> Path:
        """The file that is there once the run is finished."""
        return self.candidate.folder / f"seed-{self.seed}.done.json"

    def place(self) -> Path:
        """A directory that no attempt has used, nor the log beside it: a killed run keeps its own."""
        folder, number = self.candidate.folder / f"seed-{self.seed}", 1
        while folder.exists() or _log_of(folder).exists():
            number += 1
            folder = folder.with_name(f"seed-{self.seed}-{number}")
        return folder

    def command(self, folder: Path, baselines: bool) -> list[str]:
        """Return the command that starts the run; the comparison's own options come last, so that they win."""
        own = {"seed_everything": self.seed, "run.dir": folder, "run.baselines": str(baselines).lower()}
        own |= {"trainer.enable_progress_bar": "false"}
        options = (f"--{key}={value}" for key, value in own.items())
        return [sys.executable, "-m", "adamerge.fit", *self.candidate.options, *options]

    def done(self) -> Ran | None:
        """Return the content of the done-marker; None without one, or with a damaged one."""
        try:
            return Ran(**read_json(self.marker)) if self.marker.exists() else None
        except (OSError, ValueError, TypeError) as error:  # an InputError is a ValueError
            log.warning("%s is damaged (%s); its run is made again.", shown(self.marker), error)
            return None


@dataclass
class _Attempt:
    process: "subprocess.Popen[bytes]"
    folder: Path
    baselines: bool
    began: float


def finish(planned: Sequence[Planned], done: dict[Planned, Ran], jobs: int) -> dict[Planned, str]:
    """Run what is not done, and add it; returns why runs failed.

    The first run that is started scores the merges without training, unless a finished one has.
    """
    waiting, failed = [run for run in planned if run not in done], dict[Planned, str]()
    if not waiting and not _has_baselines(done):
        waiting = [planned[0]]  # the run that scored them is in another comparison
    running: dict[Planned, _Attempt] = {}
    with _stopped_with_us(running), progress_console().status("Starting …") as status:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    first = not (_has_baselines(done) or any(attempt.baselines for attempt in running.values()))
                    run = waiting.pop(0)
                    running[run] = _start(run, baselines=first)
                status.update(f"Running {' and '.join(map(str, running))}; {len(waiting)} more to go …")
                over = [run for run, attempt in running.items() if attempt.process.poll() is not None]
                for run in over:
                    _end(run, running.pop(run), done, failed)
                if not over:
                    time.sleep(_PAUSE)
        except (KeyboardInterrupt, SystemExit):
            left = len(waiting) + len(running)
            log.info("Stopped with %d of %d runs left; the same command goes on with them.", left, len(planned))
            raise
    return failed


def _has_baselines(done: Mapping[Planned, Ran]) -> bool:
    return any(ran.baselines is not None for ran in done.values())


def _start(run: Planned, *, baselines: bool) -> _Attempt:
    """A process of its own session: a Ctrl-C at the terminal reaches it through us, once."""
    folder = run.place()
    command = run.command(folder, baselines)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _log_of(folder).open("wb") as file:
        file.write(f"{shlex.join(command)}\n".encode())
        file.flush()
        process = _popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)
    return _Attempt(process, folder, baselines, time.monotonic())


def _end(run: Planned, attempt: _Attempt, done: dict[Planned, Ran], failed: dict[Planned, str]) -> None:
    """Mark a run as done, or say why it is not."""
    path, status = _log_of(attempt.folder), attempt.process.returncode
    try:
        if status != 0:
            raise InputError(f"{_last_line(path)} (Status {status}.)")
        ran = _told(attempt)
        with atomic_file(run.marker) as new:
            new.write_text(json.dumps(asdict(ran), indent=2, ensure_ascii=False), encoding="utf-8")
    except InputError as error:
        failed[run] = f"{error} Its log: {shown(path)}"
        log.info("%s: failed", run)
        return
    done[run] = ran
    log.info("%s: %.1f %%, after %s", run, 100 * mean(ran.scores), duration(time.monotonic() - attempt.began))


def _told(attempt: _Attempt) -> Ran:
    _, record = read_record(attempt.folder)
    scores, cost = dict(record.get("scores") or {}), record.get("cost") or {}
    if "this merge" not in scores:
        raise InputError("It was not scored.")
    return Ran(
        str(attempt.folder.resolve()),
        scores.pop("this merge"),
        scores if attempt.baselines else None,
        record.get("steps"),
        cost.get("seconds"),
        cost.get("peak_memory"),
        cost.get("learnables"),
        record.get("folds"),
        {who: str(entry["sha256"]) for who, entry in record["sources"].items()},
        dict(record.get("versions") or {}),
    )


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]]
    return next((line for line in reversed(lines) if line), "It said nothing").removeprefix("adamerge: ")


def _log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


@contextmanager
def _stopped_with_us(running: Mapping[Planned, _Attempt]) -> Iterator[None]:
    """No run outlives the block, whether it ends by Ctrl-C, SIGTERM, a closed terminal or an error."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()
    default = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    ours = default if here else []  # where nohup ignores a signal, it stays ignored
    for each in ours:
        signal.signal(each, leave)
    try:
        yield
    finally:
        processes = [attempt.process for attempt in running.values()]
        for process in processes:
            process.terminate()
        try:
            for process in processes:
                process.wait()
        except BaseException:  # asked twice: at once
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            for each in ours:
                signal.signal(each, signal.SIG_DFL)
