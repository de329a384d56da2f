"""The live display of training, drawn into a recorded terminal; and what a log without a terminal holds."""

import io
import re

import pytest
import torch
from rich.console import Console

import adamerge
from adamerge import progress, trainers
from adamerge.progress import Display, Progress
from tests.tiny import TASKS

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def terminal(width=100):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def drawn(display, width=100):
    console = terminal(width)
    console.print(display, end="")
    return ESCAPES.sub("", console.file.getvalue()).split("\n")


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    return pass_time


def test_step_speed_times_and_losses(clock):
    display = Display(0, 500)
    for step in range(1, 101):
        clock(0.5)
        display.advance(step, 64)
    display.losses = {"loss": 1.23456, "svhn": 0.5}
    display.accuracy = 0.78123
    first, second = drawn(display)
    assert first.startswith("Merging, step 100/500  0:00:50, 0:03:20 left  128 samples/s  validation 78.1 %")
    assert "━" in first
    assert second == "loss 1.235  svhn 0.500"


def test_going_on_starts_where_the_run_stood(clock):
    display = Display(400, 500)
    assert drawn(display)[0].startswith("Merging, step 400/500  0:00:00")
    clock(2)
    display.advance(420, 640)
    assert drawn(display)[0].startswith("Merging, step 420/500  0:00:02, 0:00:08 left  320 samples/s")


def test_validation_is_no_training_time(clock):
    display = Display(0, 10)
    clock(1)
    display.advance(1, 100)
    display.pause()
    clock(50)
    assert drawn(display)[0].startswith("Validating, step 1/10")
    display.resume()
    clock(1)
    display.advance(2, 100)
    assert "  100 samples/s" in drawn(display)[0]
    assert "0:00:52, 0:03:28 left" in drawn(display)[0]  # what is left holds validations too


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 250])
def test_twenty_tasks_never_break_a_line(clock, width):
    display = Display(0, 500)
    clock(3)
    display.advance(123, 1000)
    display.losses = {"loss": 12.5, **{f"a_rather_long_task_name_{n}": n / 7 for n in range(20)}}
    lines = drawn(display, width)
    assert len(lines) == 2
    assert all(len(line) < width for line in lines)
    if width >= 60:
        shown, more = lines[1].count("a_rather"), int(re.search(r"\+(\d+) more$", lines[1])[1])
        assert shown + more == 20


def test_without_a_last_step_there_is_no_bar_and_no_time_left(clock):
    display = Display(0, None)
    clock(1)
    display.advance(7, 10)
    assert drawn(display)[0] == "Merging, step 7  0:00:01  10 samples/s"


def test_names_are_short_where_they_can_be():
    one = {
        "train/a/entropy": torch.tensor(0.25),
        "train/b/entropy": torch.tensor(0.5),
        "train/loss": torch.tensor(0.75),
    }
    assert progress._losses({**one, "val/a/accuracy": torch.tensor(1.0)}) == {"loss": 0.75, "a": 0.25, "b": 0.5}
    two = {**one, "train/a/kept": torch.tensor(1.0), "train/penalty/size": torch.tensor(2.0)}
    expected = {"loss": 0.75, "a/entropy": 0.25, "b/entropy": 0.5, "a/kept": 1.0, "penalty/size": 2.0}
    assert progress._losses(two) == expected
    assert progress._losses({}) == {}


@pytest.fixture
def watched(monkeypatch):
    """Runs draw into a recorded terminal; returns it and the displays that were drawn."""
    console, made = terminal(), []

    class Recorded(Progress):
        def __init__(self):
            super().__init__(console=console)
            made.append(self)

    monkeypatch.setattr(trainers, "Progress", Recorded)
    return console, made


def test_a_run_is_shown_to_its_end(config, watched):
    console, made = watched
    options = {"max_steps": 6, "log_every_n_steps": 2, "enable_progress_bar": True, "val_check_interval": 3}
    adamerge.train(config(trainer=options))
    (bar,) = made
    assert (bar.display.first, bar.display.step, bar.display.last) == (0, 6, 6)
    assert set(bar.display.losses) == {"loss", *TASKS}
    assert 0 <= bar.display.accuracy <= 1
    assert bar.display._marks[-1][1] == 6 * 4 * len(TASKS)  # samples
    assert bar._live is None
    assert "Merging, step" in console.file.getvalue()
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is shown again


def test_a_resumed_run_is_shown_from_its_step(config, watched):
    _, made = watched
    first = adamerge.train(config(trainer={"max_steps": 3, "enable_progress_bar": True}))
    adamerge.train(config(trainer={"max_steps": 5, "enable_progress_bar": True}), ckpt_path=str(first.dir))
    assert (made[-1].display.first, made[-1].display.step, made[-1].display.last) == (3, 5, 5)


def test_accumulated_batches_count_as_samples_not_as_steps(config, watched):
    options = {"max_steps": 2, "accumulate_grad_batches": 3, "log_every_n_steps": 1, "enable_progress_bar": True}
    adamerge.train(config(trainer=options))
    display = watched[1][0].display
    assert display.step == 2
    assert display._marks[-1][1] == 2 * 3 * 4 * len(TASKS)


def test_only_logging_steps_read_values(config, watched, monkeypatch):
    """No step between two logging intervals reads a tensor, which would wait for the device."""
    steps = []
    monkeypatch.setattr(progress, "_losses", lambda logged: steps.append(watched[1][0].display.step) or {})
    reads = {"tolist": torch.Tensor.tolist, "item": torch.Tensor.item, "__float__": torch.Tensor.__float__}
    during = []

    def counted(name):
        def read(self, *arguments):
            during.append(name)
            return reads[name](self, *arguments)

        return read

    ends = Progress.on_train_batch_end

    def watched_end(self, *arguments):
        with monkeypatch.context() as patch:
            for name in reads:
                patch.setattr(torch.Tensor, name, counted(name))
            ends(self, *arguments)

    monkeypatch.setattr(Progress, "on_train_batch_end", watched_end)
    adamerge.train(config(trainer={"max_steps": 7, "log_every_n_steps": 3, "enable_progress_bar": True}))
    assert steps == [3, 6]
    assert during == []


def test_a_failing_run_gives_the_terminal_back(config, watched, monkeypatch):
    console, made = watched
    monkeypatch.setattr("adamerge.finite.FiniteWatch.raise_if_marked", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adamerge.train(config(trainer={"log_every_n_steps": 2, "enable_progress_bar": True}))
    assert made[0]._live is None
    assert console.file.getvalue().count("\x1b[?25h") == 1


def test_other_ranks_draw_nothing(config, watched):
    bar = trainers.Progress()
    bar.setup(type("Trainer", (), {"is_global_zero": False}), None, "fit")
    bar.on_train_start(None, None)
    bar.on_train_batch_end(None, None, None, {}, 0)
    assert watched[0].file.getvalue() == ""


def test_without_a_terminal_nothing_is_said_between_plan_and_end(config, capfd):
    adamerge.train(config(trainer={"max_steps": 30, "log_every_n_steps": 1}))
    out, err = capfd.readouterr()
    assert out + err == ""  # the library's messages go to its logger


def test_asked_for_without_a_terminal_it_is_a_line_per_interval(config, capfd):
    adamerge.train(config(trainer={"max_steps": 6, "log_every_n_steps": 2, "enable_progress_bar": True}))
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"Merging, step {k}/6" for k in (2, 4, 6)]
    assert all("loss " in line and "samples/s" in line for line in lines)
