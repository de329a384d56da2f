"""What cannot work is one clear error before any long work; what fails on the way loses nothing; the rest loads."""

import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adamerge
from adamerge.artifact import open_merge
from adamerge.cli import fit, main
from adamerge.learnables import state_of
from adamerge.module import AdaMerge
from adamerge.objectives import Distillation
from adamerge.types import InputError
from tests.test_artifact import ROOT
from tests.tiny import TASKS, Tiny, batches_of, merged_of, write_pool


def part(path, **options):
    return {"class_path": path if "." in path else f"adamerge.{path}", "init_args": options}


def module(name, **options):
    return part(f"adamerge.task_modules.{name}", **options)


def objective(name, **options):
    return part(f"adamerge.objectives.{name}", **options)


def loop(name="Joint", **options):
    return part(f"adamerge.loops.{name}", **options)


class Bare(Tiny):
    """Samples to adapt on that have no label, not even one that says so."""

    def split(self, name):
        samples = super().split(name)
        return [{"input": samples[index]["input"]} for index in range(len(samples))]


SURGERY, DEEP = module("Surgery", rank=2), module("Surgery", rank=2, deep=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"task_modules": [module("Tint", layer="block.1")]}, "is 'block.1', .* the nearest are blocks.1"),
        ({"task_modules": [module("Tint", layer="blocks.0.2")]}, "a Tanh without parameters; name a layer"),
        ({"task_modules": [module("Surgery", rank=0)]}, "`rank` of Surgery is 0"),
        ({"objectives": [objective("Distillation", temperature=2.0, loss="mse")]}, "but only `Distillation.loss: kl`"),
        ({"objectives": [objective("Entropy", temprature=2.0)]}, "temprature"),
        ({"objectives": [objective("FeatureDistillation", on="layers")]}, "layers"),
        ({"objectives": [objective("Nothing")]}, "Nothing"),
        ({"objectives": []}, "There is no objective; name at least one under `model.objectives`"),
        (
            {"objectives": [objective("Entropy", task_weights={"d": 2.0})]},
            "`task_weights` of Entropy names d; the tasks are a, b, c",
        ),
        ({"loop": loop(order="concatenated", micro_batch=2)}, "`loop.micro_batch` splits .*`loop.order: per_task`"),
        ({"loop": loop(micro_batch=0)}, "`loop.micro_batch` is 0"),
        ({"task_modules": [DEEP], "loop": loop(order="concatenated")}, "Surgery works inside the network"),
        ({"task_modules": [DEEP], "apply_mode": "swap"}, "Surgery works inside the network, for one task at a time"),
        (
            {"objectives": [objective("FeatureDistillation", on="blocks")], "loop": loop(order="concatenated")},
            "Objectives on blocks look at one task at a time",
        ),
        (
            {"rule": part("adamerge.rules.LayerWise", trainable=False)},
            "There is nothing to learn: neither the rule nor a task module has a trainable parameter",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_clear_error_before_any_work(config, tmp_path, model, message):
    with pytest.raises(InputError, match=message) as error:
        adamerge.train(config(model, run={"baselines": True}))
    assert len(str(error.value)) < 800
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"task_modules": [DEEP]}, "`deep` of Surgery needs the network's blocks"),
        (
            {"objectives": [objective("FeatureDistillation", on="blocks")]},
            "An objective is on the network's blocks, but none are known; name them by `backbone.blocks`",
        ),
    ],
)
def test_a_network_without_a_list_of_blocks_and_the_advice_works(tmp_path, model, message):
    from tests.tiny import TiedNet, config_of

    plain = config_of(write_pool(tmp_path, TiedNet), **model)
    plain["run"]["root"] = str(tmp_path / "runs")
    backbone = {"build": "tests.tiny.TiedNet"}
    plain["model"]["backbone"]["init_args"] = backbone
    with pytest.raises(InputError, match=message):
        adamerge.train(plain)
    assert not (tmp_path / "runs").exists()
    plain = config_of(write_pool(tmp_path, TiedNet), **model)
    plain["run"]["root"] = str(tmp_path / "runs")
    plain["model"]["backbone"]["init_args"] = {**backbone, "blocks": "first|outer"}
    assert adamerge.train(plain).scores


def test_distillation_without_teachers():
    with pytest.raises(
        InputError, match=r"Distillation needs expert.logits, which nothing here provides; give AdaMerge"
    ):
        AdaMerge(merged_of(), objectives=[Distillation()])


@pytest.mark.parametrize("number", [-100, None])
def test_labels_that_are_missing(config, tmp_path, number):
    plain = config({"objectives": [objective("Supervised")]}, data={"eval_split": None})
    for task in plain["data"]["tasks"].values():
        if number is None:
            task["class_path"] = "tests.test_bad_input.Bare"
        else:
            task["init_args"]["shift"] = -200
    with pytest.raises(InputError, match=r"An objective needs labels, but the split 'train' of .*b.* has none; adapt"):
        adamerge.train(plain)
    assert not (tmp_path / "runs").exists()


def test_labels_are_there_where_an_objective_needs_them(config):
    run = adamerge.train(config({"objectives": [objective("Supervised")]}))
    assert not torch.equal(run.learned.rule.raw_TG, torch.full_like(run.learned.rule.raw_TG, 0.3))


# --- rates that are too high


FAST = {
    "surgery": {
        "task_modules": [SURGERY], "train": "task",
        "objectives": [objective("Distillation", loss="mse")],
        "optimizer": part("torch.optim.Adam", lr=1e25),
    },
    "concrete": {
        "rule": part("adamerge.rules.Concrete"),
        "optimizer": part("torch.optim.Adam", lr=1e25),
    },
}  # fmt: skip


@pytest.mark.parametrize("model", FAST.values(), ids=FAST)
def test_a_rate_that_is_too_high_names_task_and_step_and_keeps_the_last_good_merge(
    config, tmp_path, monkeypatch, capsys, model
):
    """The first step's loss is finite, and the values that it was computed with are kept."""
    good = adamerge.train(config(model, trainer={"max_steps": 0}, run={"name": "good"}))
    path = tmp_path / "fast.yaml"
    path.write_text(yaml.safe_dump(config(model, trainer={"max_steps": 20, "log_every_n_steps": 1})))
    monkeypatch.setattr(sys, "argv", ["adamerge.fit", "--config", str(path)])
    assert main(fit) == 2
    said = capsys.readouterr().err
    assert re.search(r"The loss of (a|b|c).* became NaN or Inf at step 1\.", said)
    assert "Lower the learning rate" in said
    assert "Traceback" not in said
    (folder,) = (tmp_path / "runs" / "fast").iterdir()
    saved, expected = state_of(open_merge(folder, trust=True)), state_of(good.learned)
    kept = [name for name in expected if ".logits." not in name]  # a mask is finite whatever its logits are
    assert all(torch.equal(saved[name], expected[name]) for name in kept)
    answers = [adamerge.load(folder, trust=True)(batch, task=task) for task, batch in batches_of().items()]
    assert all(bool(logits.isfinite().all()) for logits in answers)
    assert yaml.safe_load((folder / "merge" / "merge.yaml").read_text())["finished"] is False
    assert not (folder / "checkpoints" / "last.ckpt").exists()


# --- saved, loaded, asked


EVERYTHING = [DEEP, module("Tint", layer="blocks.1.1"), module("Tint")]


def test_everything_loads_in_a_fresh_process_with_equal_answers(config, tmp_path):
    run = adamerge.train(config({"task_modules": EVERYTHING}, trainer={"max_steps": 3}))
    moved = state_of(run.learned)
    assert all(bool(moved[name].any()) for name in ("task.a.0.up", "task.a.1.offset_weight", "task.a.2.offset_weight"))
    save_file({task: batch["input"] for task, batch in batches_of().items()}, tmp_path / "in.safetensors")
    code = f"""
from adamerge.artifact import open_merge
from safetensors.torch import load_file, save_file
merge = open_merge({str(run.dir)!r}, trust=True)
inputs = {{t: x.clone() for t, x in load_file({str(tmp_path / "in.safetensors")!r}).items()}}
for name, model in (("learned", merge), ("folded", merge.folded())):
    save_file({{t: model({{"input": x}}, task=t).detach() for t, x in inputs.items()}}, {str(tmp_path)!r} + "/" + name)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    learned, folded = load_file(tmp_path / "learned"), load_file(tmp_path / "folded")
    for task, batch in batches_of().items():
        assert torch.equal(learned[task], folded[task])
        assert torch.equal(folded[task], run.merge(batch, task=task))
        torch.testing.assert_close(folded[task], run.learned(batch, task=task).detach())


def test_a_loaded_merge_with_task_modules_asks_for_a_task_it_knows(config):
    run = adamerge.train(config({"task_modules": EVERYTHING}, trainer={"max_steps": 1}))
    loaded = adamerge.load(run.dir, trust=True)
    batch = batches_of()["a"]
    with pytest.raises(InputError, match=r"knows the tasks a, b, c; asked for 'd'; call model\(batch, task=…\)"):
        loaded(batch, task="d")
    with pytest.raises(InputError, match=r"knows the tasks a, b, c; asked for None"):
        loaded(batch)
    assert {task: loaded(batch, task=task).shape[1] for task in TASKS} == {"a": 4, "b": 3, "c": 5}
