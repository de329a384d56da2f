"""Runs in phases: what moves when, where a phase ends, and how such a run goes on, stops and fails."""

import csv
import os
import signal
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch

import adamerge
from adamerge.artifact import open_merge
from adamerge.learnables import state_of
from adamerge.types import InputError, NonFiniteLoss
from tests.test_command import command, finish
from tests.tiny import TASKS

pytestmark = pytest.mark.filterwarnings("ignore:\\s*Unable to serialize instance")  # a callback of a test

SURGERY = {"class_path": "adamerge.task_modules.Surgery", "init_args": {"rank": 2}}
DISTILL = {"class_path": "adamerge.objectives.Distillation"}
FIRST, SECOND = {"train": "rule"}, {"train": "task", "objectives": [DISTILL]}


def sgd(lr):
    return {"class_path": "torch.optim.SGD", "init_args": {"lr": lr}}


@pytest.fixture
def phased(config, tmp_path, monkeypatch):
    """A function that makes a configuration of a run in phases, the rule and then Surgery by default."""
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))

    def make(phases=(FIRST, SECOND), model=(), trainer=(), **sections):
        model = {"task_modules": [SURGERY], "phases": list(phases), **dict(model)}
        trainer = {"max_steps": 6, "log_every_n_steps": 1, **dict(trainer)}
        return config(model, trainer=trainer, run={"checkpoint_every": 1}, **sections)

    return make


class Watch(pl.Callback):
    """The learnables after every step, and what trained them."""

    def __init__(self):
        self.states, self.modules, self.rates = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append(state_of(pl_module.model))
        self.modules.append(pl_module)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def watched(plain, **overrides):
    """A run, and what was seen of it."""
    watch = Watch()
    plain["trainer"]["callbacks"] = [watch]
    return adamerge.train(plain, **overrides), watch


def moving(states):
    """For each step after the first the parts of the merge that it moved."""
    return [
        {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])} for one, two in pairwise(states)
    ]


def rows(run):
    return list(csv.DictReader((run.dir / "metrics.csv").open()))


def assert_same(one, other):
    one, other = state_of(one.learned), state_of(other.learned)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- what moves when


def test_a_phase_moves_what_it_names_and_nothing_else(phased, caplog):
    with caplog.at_level("INFO", "adamerge"):
        run, watch = watched(phased([{**FIRST, "share": 2}, SECOND]))
    assert moving(watch.states) == [{"rule"}] * 3 + [{"task"}] * 2
    assert "Phases:   steps 0 to 4 train rule by Entropy; steps 4 to 6 train task by Distillation" in caplog.text
    assert "by LayerWise + Surgery" in caplog.text
    found = rows(run)
    assert [int(row["step"]) for row in found if row["train/loss"]] == list(range(6))
    assert [bool(row["train/a/entropy"]) for row in found if row["train/loss"]] == [True] * 4 + [False] * 2
    assert [bool(row["train/a/kl"]) for row in found if row["train/loss"]] == [False] * 4 + [True] * 2
    loaded = open_merge(run.dir, trust=True)
    assert all(torch.equal(tensor, state_of(loaded)[name]) for name, tensor in state_of(run.learned).items())


@pytest.mark.slow_unless("max_steps-shares1-7-ends1", "fast_dev_run-shares2-4-ends2", "max_steps-shares4-3-ends4")
@pytest.mark.parametrize(
    ("shares", "steps", "ends"),
    [
        ((1, 1), 2, [1, 2]),
        ((1, 1, 1), 7, [2, 5, 7]),
        ((9, 1), 4, [3, 4]),
        ((1, 0.01, 1), 4, [2, 3, 4]),
        ((0.25, 0.5), 3, [1, 3]),
    ],
)
@pytest.mark.parametrize("limit", ["max_steps", "fast_dev_run"])
def test_shares_divide_the_steps(phased, shares, steps, ends, limit):
    phases = [{**(FIRST, SECOND, FIRST)[place], "share": share} for place, share in enumerate(shares)]
    _, watch = watched(phased(phases, trainer={limit: steps}))
    numbers = [module._phase for module in watch.modules]
    assert numbers == [phase for phase, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) for _ in range(a, b)]


def test_every_phase_has_a_step(phased):
    with pytest.raises(InputError, match=r"give it a number, and no other limit; 1 steps are too few for them"):
        adamerge.train(phased(trainer={"max_steps": 1}))
    _, watch = watched(phased(trainer={"fast_dev_run": 1}))
    assert [module._phase for module in watch.modules] == [0, 1]
    for limit in ({"max_time": "00:00:01:00"}, {"max_epochs": 2, "limit_train_batches": 3}):
        with pytest.raises(InputError, match=rf"`trainer\.{next(iter(limit))}` would end one of them early"):
            adamerge.train(phased(trainer=limit))


def test_a_phase_that_is_ended_early_is_said(phased, caplog):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 2

    plain = phased()
    plain["trainer"]["callbacks"] = [Stop()]
    adamerge.train(plain)
    assert "Phase 1 has ended at step 2, before 3." in caplog.text


@pytest.mark.parametrize("change", [{"train": "rule.raw"}, {"train": "task"}], ids=["the same", "another"])
def test_a_resumed_phase_trains_what_it_trained(config, change):
    run = adamerge.train(config({"task_modules": [SURGERY], "train": "rule", "objectives": [DISTILL]}))
    again = config({"task_modules": [SURGERY], **change, "objectives": [DISTILL]}, trainer={"max_steps": 6})
    if change["train"] == "task":
        with pytest.raises(InputError, match=r"was training rule\.raw_TG where this run trains task\.a\.0\.down"):
            adamerge.train(again, ckpt_path=str(run.dir))
    else:
        adamerge.train(again, ckpt_path=str(run.dir))


def test_each_phase_has_its_own_settings(phased):
    first = {
        **FIRST,
        "optimizer": sgd(0.5),
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        "loop": {"class_path": "adamerge.loops.PerTask"},
    }
    second = {**SECOND, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}}
    _, watch = watched(phased([first, second]))
    assert watch.rates == [0.25, 0.125, 0.0625, 0.01, 0.01, 0.01]
    seen = [watch.modules[0], watch.modules[-1]]
    assert [type(module.loop).__name__ for module in seen] == ["PerTask", "Joint"]
    assert [type(module.objectives[0]).__name__ for module in seen] == ["Entropy", "Distillation"]


def test_what_a_phase_does_not_say_is_the_recipes(phased):
    model = {"optimizer": sgd(0.5), "objectives": [DISTILL]}
    _, watch = watched(phased([FIRST, {"train": "task", "optimizer": sgd(0.25)}], model))
    assert watch.rates == [0.5] * 3 + [0.25] * 3
    assert {type(module.objectives[0]).__name__ for module in watch.modules} == {"Distillation"}


def test_one_phase_is_the_plain_run_and_two_equal_ones_draw_other_batches(phased):
    whole = adamerge.train(phased([{"optimizer": sgd(0.1)}]))
    plain = adamerge.train(phased((), {"phases": None, "optimizer": sgd(0.1)}))
    assert_same(whole, plain)
    halves = adamerge.train(phased([{"optimizer": sgd(0.1)}, {"optimizer": sgd(0.1)}]))
    assert_same(halves, plain)  # an optimiser without memory does not notice the boundary


def test_validation_and_accumulation_go_on_over_the_boundary(phased):
    trainer = {"val_check_interval": 2, "accumulate_grad_batches": 2, "max_steps": 5, "enable_progress_bar": True}
    run, watch = watched(phased(trainer=trainer))
    assert len(watch.states) == 10
    found = rows(run)
    assert sum(bool(row["val/accuracy"]) for row in found) == 5
    last = [row for row in found if row["val/a/accuracy"]][-1]
    assert float(last["val/a/accuracy"]) == pytest.approx(run.scores["this merge"]["a"])


def test_a_recipe_has_phases_too(pool, tmp_path):
    from adamerge.backbones import Module
    from adamerge.recipe import Phase, Recipe, SpaceOptions
    from tests.tiny import Net, data_of

    recipe = Recipe(
        *(str(pool["base"]), {task: str(pool[task]) for task in TASKS}, Module(Net)),
        phases=[Phase("rule", share=3), Phase("rule.raw")],
        space=SpaceOptions(skip=r"^head\."),
    )
    run = adamerge.train(recipe, data_of(), trainer={"max_steps": 4}, run={"root": str(tmp_path / "runs")})
    assert "share: 3" in (run.dir / "config.yaml").read_text()


# --- going on


@pytest.mark.slow_unless("3")
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resume_is_the_straight_run_bit_for_bit(phased, stop):
    """From the first phase, exactly from the boundary at step 3, and from the second."""
    straight = adamerge.train(phased())
    with pytest.raises(KeyboardInterrupt):
        adamerge.train(phased(trainer={"callbacks": [Stop(stop)]}), **{"run.name": "part"})
    (part,) = (straight.dir.parent.parent / "part").iterdir()
    rest, watch = watched(phased(), ckpt_path=str(part))
    assert len(watch.states) == 6 - stop
    assert_same(straight, rest)
    assert straight.scores == rest.scores
    again, watch = watched(phased(), ckpt_path=str(rest.dir))
    assert watch.states == []
    assert_same(straight, again)


class Stop(pl.Callback):
    """Ends the run after so many steps, as the signal would."""

    def __init__(self, step, number=signal.SIGINT):
        self._step, self._number = step, number

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self._step:
            os.kill(os.getpid(), self._number)


def test_a_checkpoint_of_more_phases_is_refused_before_anything_is_scored(phased, monkeypatch):
    part = adamerge.train(phased())
    monkeypatch.setattr("adamerge.training.baselines", None)
    plain = phased([FIRST])
    plain["run"]["baselines"] = True
    with pytest.raises(InputError, match=r"`ckpt_path` was made in phase 2; this run has 1 in all\. Resume with the"):
        adamerge.train(plain, ckpt_path=str(part.dir))


# --- stopping


@pytest.mark.parametrize("way", ["SIGTERM", "exception", "between"])
def test_what_ends_the_second_phase_leaves_the_merge(phased, tmp_path, way, monkeypatch):
    straight = adamerge.train(phased(), **{"trainer.max_steps": 6, "run.name": "straight"})
    plain = phased(trainer={"callbacks": [Stop(5, signal.SIGTERM) if way == "SIGTERM" else Fail(5)]})
    if way == "between":
        plain = phased()
        monkeypatch.setattr("adamerge.stages.Keeper.experts", lambda *_: 1 / 0)
    errors = {"SIGTERM": SystemExit, "exception": ValueError, "between": ZeroDivisionError}
    with pytest.raises(errors[way]):
        adamerge.train(plain)
    (folder,) = (tmp_path / "runs" / "merge").iterdir()
    saved = state_of(open_merge(folder, trust=True))
    assert torch.equal(saved["rule.raw_TG"], state_of(straight.learned)["rule.raw_TG"])
    assert bool(saved["task.a.0.up"].any()) == (way != "between")


class Fail(pl.Callback):
    """An error of somebody's after so many steps."""

    def __init__(self, step):
        self._step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self._step:
            raise ValueError("no more")


def test_a_loss_that_is_not_finite_in_the_second_phase_leaves_the_last_good_merge(phased, tmp_path):
    good = adamerge.train(phased(), **{"run.name": "good"})
    squares = {**DISTILL, "init_args": {"loss": "mse"}}
    fast = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e25}}
    second = {"train": "task", "objectives": [squares], "optimizer": fast}
    with pytest.raises(NonFiniteLoss, match=r"The loss of .* became NaN or Inf at step 4\."):
        adamerge.train(phased([FIRST, second]))
    (folder,) = (tmp_path / "runs" / "merge").iterdir()
    saved = state_of(open_merge(folder, trust=True))
    assert torch.equal(saved["rule.raw_TG"], state_of(good.learned)["rule.raw_TG"])
    assert all(tensor.isfinite().all() for tensor in saved.values())


# --- what cannot be


@pytest.mark.parametrize(
    ("model", "trainer", "message"),
    [
        ({"train": "rule"}, {}, "`model.train` and `model.phases` exclude each other"),
        ({"phases": [{"share": 0}, {}]}, {}, "The `share` of a phase is 0"),
        ({"phases": [{}, {"share": -1}]}, {}, "The `share` of a phase is -1"),
        ({"phases": [{"share": float("nan")}]}, {}, "The `share` of a phase is nan"),
        ({"phases": [{}, {"share": float("inf")}]}, {}, "The `share` of a phase is inf"),
        ({"phases": [FIRST, {"train": "rules"}]}, {}, "`train` is 'rules', which matches no learnable; there are 7"),
        ({"phases": [FIRST, {"train": "("}]}, {}, r"`train` is no regular expression: '\('"),
        ({"phases": None, "train": "nothing"}, {}, "`train` is 'nothing', which matches no learnable"),
        ({}, {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 2}, "`model.phases` share `trainer.max_steps`"),
        ({"phases": [FIRST, {**SECOND, "trian": "task"}]}, {}, "trian"),
    ],
)
def test_what_cannot_be_is_one_clear_error_before_any_work(phased, tmp_path, model, trainer, message):
    with pytest.raises(InputError, match=message) as error:
        adamerge.train(phased(model=model, trainer=trainer))
    assert len(str(error.value)) < 600
    assert not (tmp_path / "runs").exists()


# --- two ranks


@pytest.mark.slow
def test_two_ranks_learn_in_phases_what_one_learns(phased, tmp_path):
    """What experts say is kept by one and read by both; half the batch on each."""
    import yaml

    long = {"max_steps": 24}  # the second phase takes samples twice, so that they are kept
    one = adamerge.train(phased(data={"batch_size": 4}, trainer=long), **{"run.name": "one"})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(phased(data={"batch_size": 2, "seed": 0}, trainer=long)))
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--run.name", "two"]
    environment = {"ADAMERGE_CACHE": str(tmp_path / "fresh")}
    out, _ = finish(command("--config", tmp_path / "two.yaml", *ddp, env=environment))
    assert out.count("Phases:") == 1
    (folder,) = (tmp_path / "runs" / "two").iterdir()
    found = state_of(open_merge(folder, trust=True))
    for name, tensor in state_of(one.learned).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    kept = sorted((tmp_path / "fresh" / "experts").glob("*/kept.safetensors"))
    assert len(kept) == len(TASKS)
    assert list((tmp_path / "fresh" / "merged").iterdir()) == []
