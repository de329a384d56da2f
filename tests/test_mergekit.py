"""Configurations for mergekit, checked by a simulation of its task arithmetic that knows nothing of this package."""

import random

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adamerge
from adamerge.artifact import open_merge
from adamerge.mergekit import filters, mergekit, mergekit_config, resolved
from adamerge.types import InputError
from tests.tiny import TASKS

RULES = "adamerge.rules."


def value_of(setting, name):
    """A parameter of one tensor, by mergekit's documented rule: the first entry whose filter the name contains."""
    if not isinstance(setting, list):
        return setting
    for entry in setting:
        if entry.get("filter") in (None, "*") or entry["filter"] in name:
            return entry["value"]
    raise KeyError(name)


def task_arithmetic(config):
    """base + lambda * sum_i weight_i * (model_i - base), for every tensor of the base."""
    assert config["merge_method"] == "task_arithmetic"
    assert config["parameters"]["normalize"] is False
    merged = {}
    assert config["dtype"] == "float32"  # that everything is read in
    base, *experts = (
        {name: tensor.float() for name, tensor in load_file(path).items()}
        for path in (config["base_model"], *(entry["model"] for entry in config["models"]))
    )
    for name, tensor in base.items():
        total = torch.zeros_like(tensor)
        for entry, expert in zip(config["models"], experts, strict=True):
            total += value_of(entry["parameters"]["weight"], name) * (expert[name] - tensor)
        merged[name] = tensor + config["parameters"]["lambda"] * total
    return merged


def check(run, out, **options):
    said = mergekit(run.dir, out, trust=True, **options)
    assert f"Merge with: mergekit-yaml {out} FOLDER" in said
    config = yaml.safe_load(out.read_text())
    merged, live = task_arithmetic(config), run.merge.net.state_dict()
    assert set(merged) >= set(live)
    for name, tensor in live.items():
        torch.testing.assert_close(merged[name], tensor.float(), rtol=0, atol=1e-6)
    return config


@pytest.mark.parametrize("activation", ["none", "softmax", "tanh", "clamp_ste"])
@pytest.mark.parametrize(
    ("rule", "group"),
    [("TaskWise", "tensor"), ("LayerWise", "tensor"), ("LayerWise", "block"), ("LayerWise", r"(weight|bias)")],
)
def test_mergekit_would_make_the_same_weights(config, tmp_path, rule, group, activation):
    rule = {"class_path": f"{RULES}{rule}", "init_args": {"activation": activation}}
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}}
    run = adamerge.train(config({"rule": rule, "space": {"group": group, "skip": r"^head\."}, "optimizer": optimizer}))
    found = check(run, tmp_path / "merge.yaml")
    assert [entry["model"].rpartition("/")[2] for entry in found["models"]] == [f"{t}.safetensors" for t in TASKS]
    assert found["dtype"] == "float32"
    assert "out_dtype" not in found
    if rule["class_path"].endswith("LayerWise"):
        values = {e["value"] for e in found["models"][0]["parameters"]["weight"]}
        assert len(values) > 2


def test_fixed_task_arithmetic_is_one_number(config, tmp_path):
    fixed = {
        "class_path": f"{RULES}TaskWise",
        "init_args": {"init": {"a": 0.1, "b": 0.2, "c": 0.5}, "trainable": False},
    }
    heads = {"class_path": "tests.tiny.Shift"}
    run = adamerge.train(config({"rule": fixed, "task_modules": [heads]}))
    with pytest.raises(InputError, match=r"Shift \(a task module, which runs beside the weights\).*`adamerge export`"):
        mergekit(run.dir, tmp_path / "a.yaml", trust=True)
    run = adamerge.train(
        config({"rule": {**fixed, "init_args": {**fixed["init_args"], "trainable": True}}, "train": "r"})
    )
    weights = [entry["parameters"]["weight"] for entry in check(run, tmp_path / "a.yaml", dtype="bfloat16")["models"]]
    assert all(isinstance(each, list) for each in weights)  # the experts' heads are not merged
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["out_dtype"] == "bfloat16"


def test_what_is_not_merged_stays_the_bases(pool, config, tmp_path):
    run = adamerge.train(config({"space": {"group": "block", "skip": r"^head\.|blocks\.1\.1"}}))
    found = check(run, tmp_path / "merge.yaml")
    base = load_file(pool["base"])
    merged = task_arithmetic(found)
    for name in base:
        assert torch.equal(base[name], merged[name]) == name.startswith("blocks.1.1")
    weight = found["models"][0]["parameters"]["weight"]
    assert value_of(weight, "head.weight") == 0


def test_statistics_that_are_averaged(tmp_path, config):
    from tests.tiny import NormNet, config_of, write_pool

    (tmp_path / "norm").mkdir()
    paths = write_pool(tmp_path / "norm", NormNet)
    plain = config_of(paths, space={"skip": r"^head\.", "buffers": "mean"})
    plain["model"]["backbone"]["init_args"]["build"] = "tests.tiny.NormNet"
    plain["run"]["root"] = str(tmp_path / "runs")
    config = check(adamerge.train(plain), tmp_path / "merge.yaml")
    assert value_of(config["models"][0]["parameters"]["weight"], "norm.running_mean") == pytest.approx(1 / 3)
    assert value_of(config["models"][0]["parameters"]["weight"], "unused") == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rule": {"class_path": f"{RULES}Concrete"}}, r"Concrete \(a mask over the weights\)"),
        (
            {"transforms": [{"class_path": f"adamerge.transforms.{t}"} for t in ("Trim", "ElectSign")]},
            r"Trim \(mergekit's ties trims each tensor by itself, .*; ElectSign \(mergekit elects signs after",
        ),
    ],
)
def test_other_methods_are_refused(config, tmp_path, model, message):
    run = adamerge.train(config(model))
    with pytest.raises(InputError, match=f"mergekit cannot express the merge in .*{message}.*`adamerge export`"):
        mergekit(run.dir, tmp_path / "a.yaml", trust=True)
    assert not (tmp_path / "a.yaml").exists()


def test_names_within_names():
    """Every name gets its own weights, even where names and prefixes contain one another."""
    names = ["w", "a.w", "a.w.w", "b.a.w", "blocks.1.w", "blocks.11.w", "xblocks.1.w", "blocks.1", "1.w", "a.", "a"]
    draw = random.Random(0)
    for _ in range(300):
        wanted = {name: (float(draw.randrange(3)),) for name in draw.sample(names, draw.randint(1, len(names)))}
        rows = filters(wanted)
        assert rows[-1][0] is None
        assert {name: resolved(name, rows) for name in wanted} == wanted


def test_blocks_stand_as_one_filter_each():
    wanted = {f"model.layers.{n}.{part}.weight": (float(n),) for n in range(12) for part in ("q", "k", "mlp.up")}
    wanted |= {"model.embed.weight": (0.5,), "lm_head.weight": (0.5,)}
    rows = filters(wanted)
    assert len(rows) == 11 + 2 + 1  # one block is the rest
    assert ("model.layers.1.", (1.0,)) in rows
    assert {name: resolved(name, rows) for name in wanted} == wanted


def test_a_weight_that_is_more_than_a_sum_is_found(config, tmp_path, monkeypatch):
    from adamerge.rules import LayerWise

    run = adamerge.train(config())
    merge = LayerWise.merge
    monkeypatch.setattr(LayerWise, "merge", lambda *args: merge(*args) + 0.001)
    with pytest.raises(InputError, match=r"the tensor 'stem.weight', which is more than a weighted sum"):
        mergekit(run.dir, tmp_path / "a.yaml", trust=True)


def test_task_vectors_kept_in_16_bits_pass_the_check(config):
    run = adamerge.train(config({"vectors": {"dtype": "bfloat16"}}))
    assert mergekit_config(run.dir, trust=True)["merge_method"] == "task_arithmetic"


def test_coefficients_are_written_in_full(config, tmp_path):
    run = adamerge.train(config({"rule": {"class_path": f"{RULES}TaskWise"}}))
    mergekit(run.dir, tmp_path / "a.yaml", trust=True)
    read = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert read == mergekit_config(run.dir, trust=True)
    coef = open_merge(run.dir, trust=True).rule.coefficients()[:, 0]
    weights = [value_of(entry["parameters"]["weight"], "stem.weight") for entry in read["models"]]
    assert weights == coef.tolist()


def test_files_are_left_alone_and_types_known(config, tmp_path):
    run = adamerge.train(config())
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"a.yaml exists already and is not overwritten"):
        mergekit(run.dir, tmp_path / "a.yaml", trust=True)
    assert (tmp_path / "a.yaml").read_text() == "mine"
    with pytest.raises(InputError, match=r"`dtype` is 'int8'; it is one of float32"):
        mergekit_config(run.dir, dtype="int8", trust=True)
    with pytest.raises(InputError, match=r"is not part of adamerge; pass trust=True"):
        mergekit_config(run.dir)


def test_folders_of_hub_layout_go_by_their_path(pool, config, tmp_path, caplog):
    """Sources that mergekit can read are folders with a config.json; for others it says so."""
    paths = {}
    for name, path in pool.items():
        paths[name] = path.with_suffix("")
        paths[name].mkdir()
        (paths[name] / "config.json").write_text("{}")
        save_file(load_file(path), paths[name] / "model.safetensors")
    experts = {task: str(paths[task]) for task in TASKS}
    run = adamerge.train(config({"base": str(paths["base"]), "experts": experts}))
    caplog.clear()
    found = mergekit_config(run.dir, trust=True)
    assert found["base_model"] == str(paths["base"])
    assert [entry["model"] for entry in found["models"]] == list(experts.values())
    assert "mergekit reads" not in caplog.text
    mergekit_config(adamerge.train(config()).dir, trust=True)
    assert "which these are not: 4 (first: base, expert a, expert b)." in caplog.text
