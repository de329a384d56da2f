"""Runs that start from what another has learned."""

import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adamerge
from adamerge.learnables import state_of
from adamerge.types import InputError
from tests.test_artifact import ROOT
from tests.tiny import TASKS, batches_of

SURGERY = {"class_path": "adamerge.task_modules.Surgery", "init_args": {"rank": 2}}
SHIFT = {"class_path": "tests.tiny.Shift"}


def rule(name="LayerWise", **options):
    return {"rule": {"class_path": f"adamerge.rules.{name}", "init_args": options}}


@pytest.fixture
def first(config):
    return adamerge.train(config())


@pytest.fixture
def second(config, first):
    """A function that makes a configuration of a run that starts from the first and trains Surgery alone."""

    def make(model=(), **sections):
        start = {"init_from": str(first.dir), "task_modules": [SURGERY], "train": "task"}
        return config({**start, **dict(model)}, **sections)

    return make


def test_what_was_learned_arrives_stays_and_is_saved(first, second, tmp_path):
    run = adamerge.train(second())
    before, after = state_of(first.learned), state_of(run.learned)
    assert torch.equal(after["rule.raw_TG"], before["rule.raw_TG"])
    assert bool(after["task.a.0.up"].any())
    assert set(load_file(run.dir / "merge" / "merge.safetensors")) == set(after) > set(before)
    assert torch.equal(run.merge.net.stem.weight, first.merge.net.stem.weight)

    save_file({task: batch["input"] for task, batch in batches_of().items()}, tmp_path / "in.safetensors")
    code = f"""
import adamerge
from safetensors.torch import load_file, save_file
merge = adamerge.load({str(run.dir)!r}, trust=True)
inputs = {{t: x.clone() for t, x in load_file({str(tmp_path / "in.safetensors")!r}).items()}}
save_file({{t: merge({{"input": x}}, task=t) for t, x in inputs.items()}}, {str(tmp_path / "out.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for task, logits in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(logits, run.merge(batches_of()[task], task=task))
        assert not torch.equal(logits, first.merge(batches_of()[task], task=task))


def test_tasks_in_another_order_arrive_by_name(first, second):
    plain = second()
    plain["model"]["experts"] = dict(reversed(plain["model"]["experts"].items()))
    plain["data"]["tasks"] = dict(reversed(plain["data"]["tasks"].items()))
    run = adamerge.train(plain)
    assert run.learned.tasks == TASKS[::-1]
    assert torch.equal(run.learned.rule.raw_TG, first.learned.rule.raw_TG.flip(0))


def test_task_modules_go_on_and_further_ones_start_fresh(config):
    first = adamerge.train(config({"task_modules": [SHIFT]}))
    model = {"init_from": str(first.dir / "merge"), "task_modules": [SHIFT, SURGERY], "train": r"task\.\w+\.1"}
    run = adamerge.train(config(model))
    before, after = state_of(first.learned), state_of(run.learned)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert bool(after["task.b.1.up"].any())


def test_the_baselines_know_nothing_of_it(first, second, config):
    plain = second(run={"baselines": True})
    run = adamerge.train(plain)
    fresh = adamerge.train(config(run={"baselines": True}))
    assert {name: scores for name, scores in run.scores.items() if name != "this merge"} == {
        name: scores for name, scores in fresh.scores.items() if name != "this merge"
    }
    assert "task arithmetic" in run.scores


def test_a_resumed_run_keeps_what_it_had_learned_since(second):
    straight = adamerge.train(second(trainer={"max_steps": 4}))
    part = adamerge.train(second(trainer={"max_steps": 2}, run={"checkpoint_every": 1}))
    rest = adamerge.train(second(trainer={"max_steps": 4}), ckpt_path=str(part.dir))
    one, other = state_of(straight.learned), state_of(rest.learned)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    [{"init": 0.1}, {"penalties": {"l1": 0.5}}],
)
def test_where_a_rule_starts_and_what_pulls_it_may_differ(first, second, options):
    run = adamerge.train(second(rule(**options)))
    assert torch.equal(run.learned.rule.raw_TG, first.learned.rule.raw_TG)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"transforms": [{"class_path": "adamerge.transforms.Trim"}]}, r"was learned with other `transforms`: \[\];"),
        ({"space": {"skip": r"^head\.|stem"}}, "was learned with other `space`"),
        ({"space": {"skip": r"^head\.", "group": "block"}}, "was learned with other `space`"),
        (rule("TaskWise"), "was learned with another `rule`: .*LayerWise.*; this run has .*TaskWise"),
        (rule(activation="sigmoid"), "was learned with another `rule`: .*'none'.*; this run has .*'sigmoid'"),
        (rule("Concrete"), "was learned with another `rule`: .*LayerWise.*; this run has .*Concrete"),
        ({"init_from": "nowhere"}, r"`model.init_from`: 'nowhere' holds no saved merge: it needs merge.yaml"),
        (
            {"transforms": [{"class_path": "adamerge.transforms.Trim"}], **rule("TaskWise")},
            r"2 problems with `model.init_from`:\n  - .*transforms.*\n  - .*rule",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_error_before_any_work(second, tmp_path, first, model, message):
    there = set((tmp_path / "runs" / "merge").iterdir())
    with pytest.raises(InputError, match=message):
        adamerge.train(second(model))
    assert set((tmp_path / "runs" / "merge").iterdir()) == there


@pytest.mark.parametrize("which", ["base", "b"])
def test_other_sources_are_refused(second, pool, which):
    plain = second()
    tensors = load_file(pool[which])
    tensors["stem.bias"] += 1
    save_file(tensors, pool[which])
    who = "base" if which == "base" else "expert b"
    with pytest.raises(InputError, match=rf"was learned with another {who}: it had .*{which}.safetensors") as error:
        adamerge.train(plain)
    assert "of which" not in str(error.value)


def test_other_tasks_are_refused(config, second):
    fewer = second()
    fewer["model"]["experts"].pop("b")
    fewer["data"]["tasks"].pop("b")
    with pytest.raises(InputError, match=r"was learned for other tasks: it lacks 0 \(\) and has 1 \(b\)"):
        adamerge.train(fewer)
    pair = config()
    for section in (pair["model"]["experts"], pair["data"]["tasks"]):
        section.pop("b")
    two = adamerge.train(pair)
    with pytest.raises(InputError, match=r"was learned with another expert b: it had none"):
        adamerge.train(second({"init_from": str(two.dir)}))


def test_other_task_modules_are_refused_and_the_advice_works(config):
    first = adamerge.train(config({"task_modules": [SHIFT]}))
    start = {"init_from": str(first.dir)}
    for modules in ([], [SURGERY], [SURGERY, SHIFT], [{**SHIFT, "init_args": {"width": 7}}]):
        with pytest.raises(InputError, match=r"was learned with the `task_modules` .*Shift.* Name the same ones first"):
            adamerge.train(config({**start, "task_modules": modules}))
    adamerge.train(config({**start, "task_modules": [SHIFT, SURGERY]}))


def test_a_record_of_this_run_names_where_it_started(second, first):
    run = adamerge.train(second())
    assert yaml.safe_load((run.dir / "config.yaml").read_text())["model"]["init_from"] == str(first.dir)
