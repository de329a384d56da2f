"""Whole runs through `adamerge.train`, in this process."""

import csv
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

import adamerge
from adamerge.artifact import open_merge
from adamerge.files import sha256
from adamerge.module import adam
from adamerge.types import InputError, NonFiniteLoss
from tests.tiny import TASKS, Net, write_pool

SUPERVISED = [{"class_path": "adamerge.objectives.Supervised"}]
SHIFT = [{"class_path": "tests.tiny.Shift"}]
KEPT = [{"class_path": "adamerge.objectives.Entropy"}, {"class_path": "tests.tiny.Kept"}]


def learned(run):
    return {name: parameter.detach().clone() for name, parameter in run.learned.learnables().items()}


def assert_equal(one, other, exact=True):
    assert one.keys() == other.keys()
    for name in one:
        assert (
            torch.equal(one[name], other[name])
            if exact
            else torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-7)
        ), name


def test_a_run_leaves_what_it_promises(config):
    run = adamerge.train(config(run={"baselines": True}, trainer={"val_check_interval": 2, "log_every_n_steps": 1}))
    assert {p.name for p in run.dir.iterdir()} == {"config.yaml", "merge", "metrics.csv", "checkpoints", "plots"}
    plots = {"accuracy.png", "coefficients.png", "cosine.png", "curves.png"}
    assert {p.name for p in (run.dir / "plots").iterdir()} == plots
    assert {p.name for p in (run.dir / "merge").iterdir()} == {"merge.safetensors", "merge.yaml"}
    assert list(run.scores)[:4] == ["base", "average", "task arithmetic", "TIES"]
    assert list(run.scores)[4:] == [f"expert {task}" for task in TASKS] + ["this merge"]
    assert set(run.scores["this merge"]) == set(TASKS)
    rows = list(csv.DictReader((run.dir / "metrics.csv").open()))
    assert {"train/loss", "train/a/entropy", "val/a/accuracy", "val/accuracy"} <= set(rows[0])
    assert sum(bool(row["train/loss"]) for row in rows) == 4
    losses = [sum(float(row[f"train/{task}/entropy"]) for task in TASKS) for row in rows if row["train/loss"]]
    assert losses == pytest.approx([float(row["train/loss"]) for row in rows if row["train/loss"]], rel=1e-5)
    assert "this merge" in str(run)
    last = [row for row in rows if row["val/a/accuracy"]][-1]
    assert float(last["val/a/accuracy"]) == pytest.approx(run.scores["this merge"]["a"])


def test_the_resolved_configuration_repeats_the_run(config):
    first = adamerge.train(config())
    second = adamerge.train(first.dir / "config.yaml")
    assert first.dir != second.dir
    assert_equal(learned(first), learned(second))


def test_stacked_files_and_overrides(config, tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(yaml.safe_dump(config()))
    two.write_text(yaml.safe_dump({"trainer": {"max_steps": 2}, "data": {"batch_size": 2}}))
    run = adamerge.train(
        [one, two], **{"data.batch_size": 3}, model={"rule": {"class_path": "adamerge.rules.TaskWise"}}
    )
    resolved = yaml.safe_load((run.dir / "config.yaml").read_text())
    assert resolved["trainer"]["max_steps"] == 2
    assert resolved["data"]["batch_size"] == 3
    assert resolved["model"]["rule"]["class_path"] == "adamerge.rules.TaskWise"
    assert run.learned.rule.raw_TG.shape == (3, 1)


def test_objects_do_as_well(pool, tmp_path, config):
    from functools import partial

    from adamerge.backbones import Module
    from adamerge.recipe import Recipe, SpaceOptions
    from adamerge.rules import LayerWise
    from tests.tiny import Net, data_of

    recipe = Recipe(
        str(pool["base"]),
        {task: str(pool[task]) for task in TASKS},
        Module(Net),
        rule=partial(LayerWise, init=0.3),
        space=SpaceOptions(skip=r"^head\."),
    )
    run = adamerge.train(
        recipe,
        data_of(),
        trainer={"max_steps": 4, "accelerator": "cpu"},
        run=adamerge.RunOptions(root=str(tmp_path / "runs")),
    )
    assert_equal(learned(run), learned(adamerge.train(config())))
    assert (run.dir / "config.yaml").stat().st_size > 100


ENTROPY, DISTILLATION = ([{"class_path": f"adamerge.objectives.{name}"}] for name in ("Entropy", "Distillation"))


@pytest.mark.parametrize(
    ("objectives", "rate"),
    [(ENTROPY, 1e-3), (DISTILLATION, 1e-2), (SUPERVISED, 1e-2), (DISTILLATION + ENTROPY, 1e-3)],
    ids=["entropy", "distillation", "labels", "both kinds"],
)
def test_the_default_rate_is_larger_where_something_guides(config, objectives, rate):
    run = adamerge.train(config({"objectives": objectives}, trainer={"max_steps": 1}))
    moved = (learned(run)["rule.raw_TG"] - 0.3).abs().max().item()  # Adam's first step is its rate
    assert moved == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize("guided", [ENTROPY, DISTILLATION])
def test_a_named_optimizer_is_taken_as_it_is(config, guided):
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.005}}
    run = adamerge.train(config({"objectives": guided, "optimizer": optimizer}, trainer={"max_steps": 1}))
    assert (learned(run)["rule.raw_TG"] - 0.3).abs().max().item() == pytest.approx(0.005, rel=1e-2)


# --- precision


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("way", ["leaf", "swap"])
def test_narrow_precision_moves_every_coefficient_and_keeps_it_fp32(config, precision, way):
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-4}}
    options = {"apply_mode": way, "optimizer": optimizer, "task_modules": SHIFT}
    run = adamerge.train(config(model=options, trainer={"precision": precision, "max_steps": 3}))
    raw = run.learned.rule.raw_TG
    assert raw.dtype == torch.float32
    assert bool((raw != 0.3).all())
    assert bool(((raw - 0.3).abs() < 1e-3).all())
    assert all(parameter.dtype == torch.float32 for parameter in run.learned.parameters())


def test_bf16_mixed_stays_close_to_fp32(config):
    """Rounding of activations to 8 bits of mantissa changes the path, not the direction; Adam's steps are 1e-3 each."""
    plain, mixed = (
        learned(adamerge.train(config(trainer={"precision": p})))["rule.raw_TG"] for p in ("32-true", "bf16-mixed")
    )
    assert (plain - mixed).abs().mean() < 0.3 * (plain - 0.3).abs().mean()


@pytest.mark.parametrize("precision", ["16-mixed"])
def test_16_mixed_is_refused(config, precision):
    with pytest.raises(InputError, match=r"`trainer.precision: 16-mixed` would not scale the losses"):
        adamerge.train(config(trainer={"precision": precision}))


# --- resume


def test_resume_draws_what_the_straight_run_draws(config):
    options = {"task_modules": [{"class_path": "tests.tiny.Dropped"}]}
    straight = adamerge.train(config(options, trainer={"max_steps": 6}))
    part = adamerge.train(config(options, trainer={"max_steps": 3}, run={"checkpoint_every": 1}))
    rest = adamerge.train(config(options, trainer={"max_steps": 6}), ckpt_path=str(part.dir))
    assert_equal(learned(straight), learned(rest))


@pytest.mark.slow_unless("4-2-0")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("steps", "accumulate"), [(5, 1), (4, 2)])
def test_resume_is_the_straight_run_bit_for_bit(config, workers, steps, accumulate):
    options = {"task_modules": SHIFT, "objectives": KEPT}
    options["lr_scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.StepLR",
        "init_args": {"step_size": 2, "gamma": 0.5},
    }
    trainer = {"accumulate_grad_batches": accumulate, "val_check_interval": 3}
    run = {"checkpoint_every": 1}
    data = {"num_workers": workers}
    straight = adamerge.train(config(options, data, {**trainer, "max_steps": 9}, run))
    part = adamerge.train(config(options, data, {**trainer, "max_steps": steps}, run))
    rest = adamerge.train(config(options, data, {**trainer, "max_steps": 9}, run), ckpt_path=str(part.dir))
    assert not torch.equal(learned(part)["rule.raw_TG"], learned(straight)["rule.raw_TG"])
    assert_equal(learned(straight), learned(rest))
    assert straight.scores == rest.scores


def test_resume_takes_the_new_learning_rate(config, caplog):
    def adam(lr):
        return {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": lr}}}

    part = adamerge.train(config(adam(1e-3), run={"checkpoint_every": 2}, trainer={"max_steps": 2}))
    with caplog.at_level("INFO", "adamerge"):
        rest = adamerge.train(config(adam(1e-2), trainer={"max_steps": 3}), ckpt_path=str(part.dir))
    moved = (learned(rest)["rule.raw_TG"] - learned(part)["rule.raw_TG"]).abs().max()
    assert 3e-3 < moved < 3e-2
    assert "Resuming with lr 0.01; the checkpoint was trained with 0.001." in caplog.text


def test_resume_with_other_tasks_or_sources_is_refused(config, pool, tmp_path):
    part = adamerge.train(config(run={"checkpoint_every": 1}))
    blocks = config({"space": {"skip": r"^head\.", "group": "block"}})
    with pytest.raises(InputError, match=r"`ckpt_path` was trained on the groups stem.weight"):
        adamerge.train(blocks, ckpt_path=str(part.dir))
    trimmed = config({"transforms": [{"class_path": "adamerge.transforms.Trim"}]})
    with pytest.raises(InputError, match=r"`ckpt_path` was trained on other task vectors"):
        adamerge.train(trimmed, ckpt_path=str(part.dir))
    sgd = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-3}}}
    with pytest.raises(InputError, match=r"`ckpt_path` was trained with Adam, this run has SGD"):
        adamerge.train(config(sgd), ckpt_path=str(part.dir))
    with pytest.raises(InputError, match="no checkpoint at"):
        adamerge.train(config(), ckpt_path=str(tmp_path / "gone"))


def test_a_checkpoint_holds_learnables_only(config):
    part = adamerge.train(config({"task_modules": SHIFT}, run={"checkpoint_every": 1}))
    checkpoint = torch.load(part.dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"] == {}
    assert set(checkpoint["adamerge"]["learnables"]) == {"rule.raw_TG", *(f"task.{task}.0.shift" for task in TASKS)}


# --- the numbers


def test_filters_and_micro_batches_agree_in_a_run(config):
    whole = adamerge.train(config({"objectives": KEPT, "task_modules": SHIFT}))
    loop = {"class_path": "adamerge.loops.Joint", "init_args": {"micro_batch": 3}}
    parts = adamerge.train(config({"objectives": KEPT, "task_modules": SHIFT, "loop": loop}))
    assert_equal(learned(whole), learned(parts), exact=False)


@pytest.mark.slow_unless("trimmed-mmap")
@pytest.mark.parametrize("placement", ["cpu", "mmap"])
@pytest.mark.parametrize("transforms", [[], [{"class_path": "adamerge.transforms.Trim"}]], ids=["raw", "trimmed"])
def test_where_the_vectors_are_kept_changes_no_bit(config, placement, transforms, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    plain = adamerge.train(config({"transforms": transforms}))
    kept = adamerge.train(config({"transforms": transforms, "vectors": {"placement": placement}}))
    assert_equal(learned(plain), learned(kept))
    again = adamerge.load(kept.dir, trust=True).net.stem.weight
    assert torch.equal(again, plain.merge.net.stem.weight)


def test_narrow_vectors_learn_nearly_the_same(config):
    plain = learned(adamerge.train(config()))["rule.raw_TG"]
    narrow = learned(adamerge.train(config({"vectors": {"dtype": "bfloat16"}})))["rule.raw_TG"]
    assert not torch.equal(plain, narrow)
    assert (plain - narrow).abs().max() < 1e-4  # vectors rounded to 8 bits; four Adam steps of 1e-3


def test_golden(config):
    """A seeded run against numbers kept in a file; a change of the mathematics shows here."""
    run = adamerge.train(config({"task_modules": SHIFT}, trainer={"max_steps": 10, "log_every_n_steps": 1}))
    rows = csv.DictReader((run.dir / "metrics.csv").open())
    found = [float(row["train/loss"]) for row in rows if row["train/loss"]] + learned(run)[
        "rule.raw_TG"
    ].flatten().tolist()
    golden = Path(__file__).parent / "golden" / "tiny.txt"
    expected = [float(line) for line in golden.read_text().splitlines()]
    # fp32 on other processors sums in another order
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_order_of_tasks_in_the_configuration_changes_nothing(config):
    assert list(config()["model"]["experts"]) == list(TASKS)
    run = adamerge.train(config())
    back = config()
    back["model"]["experts"] = dict(reversed(back["model"]["experts"].items()))
    back["data"]["tasks"] = dict(reversed(back["data"]["tasks"].items()))
    other = adamerge.train(back)
    assert torch.allclose(
        learned(run)["rule.raw_TG"], learned(other)["rule.raw_TG"].flip(0), rtol=1e-4
    )  # sums in another order


def test_the_runs_seed_seeds_the_data_unless_it_has_its_own(config):
    zero, one = (learned(adamerge.train(config(), seed_everything=seed)) for seed in (0, 1))
    assert not torch.equal(zero["rule.raw_TG"], one["rule.raw_TG"])
    assert_equal(zero, learned(adamerge.train(config(data={"seed": 0}), seed_everything=1)))


def test_tasks_without_labels_are_merged_and_not_scored(config):
    run = adamerge.train(config(data={"eval_split": None}, run={"baselines": True}))
    assert run.scores == {}
    assert (run.dir / "merge" / "merge.yaml").exists()
    assert "Run directory" in str(run)


def test_a_missing_evaluation_split_is_said_before_training(config):
    with pytest.raises(InputError, match="There is no split 'validation'"):
        adamerge.train(config(data={"eval_split": "validation"}))


def test_data_held_in_memory_does(pool, tmp_path):
    from adamerge.backbones import Module
    from adamerge.data import TensorTask, UnlabeledTasks
    from adamerge.recipe import SpaceOptions
    from tests.tiny import CLASSES, INPUT, Net

    def held(task):
        split = torch.randn(12, INPUT), torch.zeros(12, dtype=torch.int64)
        return TensorTask([str(c) for c in range(CLASSES[task])], train=split, test=split)

    experts = {task: str(pool[task]) for task in TASKS}
    recipe = adamerge.Recipe(str(pool["base"]), experts, Module(Net), space=SpaceOptions(skip=r"^head\."))
    data = UnlabeledTasks({task: held(task) for task in TASKS})
    trainer = {"max_steps": 2, "accelerator": "cpu", "callbacks": [pl.Callback()]}
    run = adamerge.train(recipe, data, trainer=trainer, run=adamerge.RunOptions(root=str(tmp_path / "runs")))
    described = yaml.safe_load((run.dir / "config.yaml").read_text())
    assert described["trainer"]["callbacks"] == ["<Callback>"]
    assert described["model"]["experts"]["b"] == str(pool["b"])
    assert adamerge.load(run.dir, trust=True).tasks == TASKS


# --- what goes wrong


def test_a_loss_that_is_not_finite_stops_with_the_last_good_merge(config):
    """The third step's loss is NaN: what is saved gave the second's, the last that was finite."""
    good = adamerge.train(config(trainer={"max_steps": 1}))
    options = {"objectives": [{"class_path": "tests.test_training.Breaks"}]}
    with pytest.raises(NonFiniteLoss, match=r"The loss of b became NaN or Inf at step 2\."):
        adamerge.train(config(options, trainer={"max_steps": 8, "log_every_n_steps": 2}, run={"name": "bad"}))
    (saved,) = (good.dir.parent.parent / "bad").iterdir()
    merge = open_merge(saved, trust=True)
    assert torch.equal(merge.rule.raw_TG, learned(good)["rule.raw_TG"])
    assert not (saved / "checkpoints" / "last.ckpt").exists()  # nothing broken to go on from


class Breaks(adamerge.Objective):
    """Entropy that turns to NaN for task b from the third step on."""

    calls = 0

    def forward(self, out, batch):
        from adamerge.objectives import Entropy

        term = Entropy()(out, batch)["entropy"]
        self.calls += out.task == "b"
        factor = math.nan if out.task == "b" and self.calls > 2 else 1.0
        return {"entropy": adamerge.types.Term(term.sum * factor, term.count)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["experts"].pop("b"), "`data.tasks` has b, which `model.experts` has not; it has a, c"),
        (
            lambda c: c["model"]["experts"].update(b="/nowhere/x.safetensors"),
            "There is no checkpoint at '/nowhere/x.safetensors'",
        ),
        (lambda c: c["model"].update(learning_rate=1), "learning_rate"),
        (lambda c: c["trainer"].update(max_steps=-1, max_epochs=1), "The training stream has no end"),
        (lambda c: c["trainer"].update(precision="64-true"), "64-true` is not supported"),
        (lambda c: c["trainer"].update(accelerator="gpu"), "`trainer` is not set up well"),
        (
            lambda c: c["model"]["backbone"]["init_args"].update(build="tests.test_training.Wide"),
            "width 5, its head takes 6",
        ),
        (
            lambda c: c["model"]["backbone"]["init_args"].update(build="tests.test_training.Pair"),
            "are a tuple; the backbone must",
        ),
        (lambda c: c["trainer"].update(max_steps="many"), "max_steps"),
        (lambda c: c["model"].update(rule={"class_path": "adamerge.rules.Nope"}), "Nope"),
        (lambda c: c["data"]["tasks"]["b"]["init_args"].update(size=0), "Task 'b' is empty"),
        (
            lambda c: c["model"].update(space={}),
            r"tensors the network does not have: 2 \(head.bias, head.weight\).*`model.space.skip`",
        ),
        (lambda c: c["trainer"].update(strategy="fsdp", accelerator="cpu"), "strategy"),
        (
            lambda c: c["data"]["tasks"]["b"]["init_args"].update(task="a"),
            "Task 'b' has 4 classes, its head in .*b.safetensors 3",
        ),
        (lambda c: c["model"]["backbone"]["init_args"].update(heads="classifier."), "has no head 'classifier.weight'"),
        (
            lambda c: c["model"]["backbone"]["init_args"].update(input="image"),
            "`backbone.input` is 'image', but a batch holds input",
        ),
        (lambda c: c["model"]["backbone"]["init_args"].update(features="embed"), "`backbone.features` is 'embed'"),
    ],
)
def test_bad_configuration_is_one_clear_error_before_any_run_directory(config, change, message):
    plain = config()
    change(plain)
    with pytest.raises(InputError, match=message):
        adamerge.train(plain)
    assert not Path(plain["run"]["root"]).exists()


class Wide(Net):
    """Features of another width than the heads'."""

    def forward(self, x):
        return super().forward(x)[:, :5]


class Pair(Net):
    """A tuple for features."""

    def forward(self, x):
        return super().forward(x), None


def test_an_objective_without_terms_ends_the_run(config):
    with pytest.raises(InputError, match="The objectives give no term for task 'a'"):
        adamerge.train(config({"objectives": [{"class_path": "tests.tiny.Nothing"}]}))


def test_a_junk_checkpoint_to_resume_from(config, tmp_path):
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name in ("junk", "foreign"):
        with pytest.raises(InputError, match=r"`ckpt_path` .* is damaged, or no training checkpoint of adamerge"):
            adamerge.train(config(), ckpt_path=str(tmp_path / f"{name}.ckpt"))


def test_resume_with_another_rule_is_refused(config):
    part = adamerge.train(config(run={"checkpoint_every": 1}))
    rule = {"class_path": "adamerge.rules.LayerWise", "init_args": {"activation": "sigmoid"}}
    with pytest.raises(InputError, match="`ckpt_path` was trained with the rule"):
        adamerge.train(config({"rule": rule}), ckpt_path=str(part.dir))


def test_a_read_only_cache_costs_no_run(config, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "file" / "below"))
    assert adamerge.train(config()).scores


def test_a_callback_of_the_users_may_be_a_checkpoint(config, tmp_path):
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path / "mine")},
    }
    saver["init_args"]["every_n_train_steps"] = 2
    adamerge.train(config(trainer={"callbacks": [saver]}))
    assert list((tmp_path / "mine").glob("*.ckpt"))


def test_labels_beyond_the_classes_are_said(config):
    plain = config(run={"baselines": True})
    plain["data"]["tasks"]["b"]["init_args"]["shift"] = 5
    with pytest.raises(InputError, match=r"Task 'b' has 3 classes, but a sample is labelled"):
        adamerge.train(plain)


def test_the_same_objects_train_anew_for_every_seed(pool, tmp_path):
    from adamerge.backbones import Module
    from adamerge.recipe import SpaceOptions
    from tests.tiny import data_of

    experts = {task: str(pool[task]) for task in TASKS}
    recipe = adamerge.Recipe(str(pool["base"]), experts, Module(Net), space=SpaceOptions(skip=r"^head\."))
    data, options = data_of(), {"trainer": {"max_steps": 2}, "run": adamerge.RunOptions(root=str(tmp_path / "runs"))}
    zero, one = (learned(adamerge.train(recipe, data, seed_everything=seed, **options)) for seed in (0, 1))
    assert not torch.equal(zero["rule.raw_TG"], one["rule.raw_TG"])
    assert data.seed is None
    with pytest.raises(InputError, match="not max_steps"):
        adamerge.train(recipe, data, max_steps=3)


def test_a_run_directory_that_exists_is_not_touched(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match=r"`run.dir` .* exists already"):
        adamerge.train(config(run={"dir": str(tmp_path / "mine")}))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    run = adamerge.train(config(run={"dir": str(tmp_path / "fresh")}))
    assert run.dir == tmp_path / "fresh"


def test_a_full_disk_is_noticed_before_training(config, monkeypatch, tmp_path):
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    monkeypatch.setattr("adamerge.run_folder.shutil.disk_usage", lambda folder: usage(1_000_000))
    with pytest.raises(InputError, match=r"has 1.0 MB left; the run's merge and checkpoints want 10.0 MB"):
        adamerge.train(config())
    assert not list((tmp_path / "runs" / "merge").iterdir())


def test_an_expert_far_from_the_base_is_warned_of(config, pool, caplog):
    from safetensors.torch import load_file, save_file

    state = load_file(pool["b"])
    save_file({name: 100 * tensor if "head" not in name else tensor for name, tensor in state.items()}, pool["b"])
    adamerge.train(config())
    assert "Task vectors of b are longer than the base itself" in caplog.text


def test_what_cannot_be_written_down_is_refused_before_training(pool, tmp_path):
    from adamerge.backbones import Module
    from adamerge.recipe import Recipe, SpaceOptions
    from tests.tiny import Net, data_of

    experts = {task: str(pool[task]) for task in TASKS}
    recipe = Recipe(str(pool["base"]), experts, Module(lambda: Net()), space=SpaceOptions(skip="head"))
    with pytest.raises(InputError, match="cannot be written down"):
        adamerge.train(recipe, data_of(), trainer={"max_steps": 1})


def test_adam_is_fused_where_nothing_is_clipped(config):
    def fused(clip):
        seen = []
        callback = pl.Callback()
        callback.on_train_end = lambda trainer, _: seen.append(trainer.optimizers[0].defaults["fused"])
        adamerge.train(config(trainer={"gradient_clip_val": clip, "max_steps": 1, "callbacks": [callback]}))
        return seen

    assert fused(None) == [True]
    assert fused(1e-6) == [None]
    assert adam([torch.nn.Parameter(torch.ones(1))], guided=True).defaults["fused"] is None


@pytest.mark.slow
def test_lightnings_own_switches_work(config):
    fast = adamerge.train(config(trainer={"fast_dev_run": 2}))
    assert set(fast.scores) == {"this merge"}
    over = adamerge.train(config(trainer={"overfit_batches": 1, "max_steps": 3}))
    assert over.scores
    limited = adamerge.train(config(trainer={"limit_train_batches": 3, "max_steps": 7}))
    assert_equal(learned(limited), learned(adamerge.train(config(trainer={"max_steps": 7}))))
    for precision in ("32", "bf16-mixed"):
        clipping = {"gradient_clip_val": 1e-6, "max_steps": 2, "precision": precision}
        assert adamerge.train(config(trainer=clipping)).scores


def test_unreachable_and_frozen_parts(tmp_path, caplog):
    from tests.tiny import NormNet, config_of

    plain = config_of(write_pool(tmp_path, NormNet))
    plain["model"]["backbone"]["init_args"]["build"] = "tests.tiny.NormNet"
    plain["run"]["root"] = str(tmp_path / "runs")
    for policy in ("base", "mean"):
        plain["model"]["space"] = {"skip": r"^head\.", "buffers": policy}
        with caplog.at_level("INFO", "adamerge"):
            run = adamerge.train(plain)
        assert "not reached by the loss: 1 (unused)" in caplog.text
        assert "unused" not in run.learned.rule.groups
        pool = {name: adamerge.open_state(tmp_path / f"{name}.safetensors") for name in ("base", *TASKS)}
        mean = torch.stack([pool[task]["norm.running_mean"] for task in TASKS]).mean(0)
        expected = pool["base"]["norm.running_mean"] if policy == "base" else mean
        torch.testing.assert_close(run.merge.net.norm.running_mean, expected)
        assert torch.equal(run.merge.net.unused, pool["base"]["unused"])
        assert torch.equal(adamerge.load(run.dir, trust=True).net.norm.running_mean, run.merge.net.norm.running_mean)


def test_experts_are_scored_with_their_own_statistics(tmp_path):
    from tests.tiny import NormNet, Tiny, config_of

    paths = write_pool(tmp_path, NormNet)
    plain = config_of(paths)
    plain["model"]["backbone"]["init_args"]["build"] = "tests.tiny.NormNet"
    plain["run"] = {"root": str(tmp_path / "runs")}
    run = adamerge.train(plain)
    for task in TASKS:
        state = adamerge.open_state(paths[task])
        net = NormNet().eval()
        net.load_state_dict({name: state[name] for name in net.state_dict()})
        samples = [Tiny(task).split("test")[i] for i in range(23)]
        features = net(torch.stack([sample["input"] for sample in samples]))
        predicted = (features @ state["head.weight"].T + state["head.bias"]).argmax(1)
        right = (predicted == torch.tensor([sample["label"] for sample in samples])).float().mean()
        assert run.scores[f"expert {task}"][task] == pytest.approx(float(right), abs=1e-6)


def test_digests_are_recorded(config, pool):
    run = adamerge.train(config())
    record = yaml.safe_load((run.dir / "merge" / "merge.yaml").read_text())
    assert record["sources"]["expert b"] == {"source": str(pool["b"]), "sha256": sha256(pool["b"])}
    assert record["scores"]["this merge"] == run.scores["this merge"]
    assert record["split"] == "train"
