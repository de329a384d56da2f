"""The experts as teachers: what they say is what their own networks say, and is computed once."""

import logging
from collections import Counter
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import adamerge
from adamerge.backbones import Module
from adamerge.backbones.base import batch_size
from adamerge.data import UnlabeledTasks
from adamerge.learnables import state_of
from adamerge.recipe import Recipe, SpaceOptions
from adamerge.task_modules import Surgery
from adamerge.teachers import BLOCKS, FEATURES, LOGITS, Keeper, Teachers
from adamerge.transforms import ElectSign, Trim
from adamerge.types import InputError
from tests.tiny import CLASSES, TASKS, Net, NormNet, TiedNet, Tiny, write_pool

ALL = frozenset({LOGITS, FEATURES, BLOCKS})
SIZE = 40  # samples of a task
JOINED = 2 * 4  # samples of the two tasks whose batches the probe tries as one
SURGERY = {"class_path": "adamerge.task_modules.Surgery", "init_args": {"rank": 2}}
DISTILL = {"class_path": "adamerge.objectives.Distillation"}
FEATURE = {"class_path": "adamerge.objectives.FeatureDistillation"}
TIES = [{"class_path": f"adamerge.transforms.{name}"} for name in ("Trim", "ElectSign")]
COUNTED = {"class_path": "tests.test_teachers.Counted", "init_args": {"build": "tests.tiny.Net"}}


class Drawn(Tiny):
    """The same samples, of which nobody may know that they repeat."""

    repeatable = False


class Nameless(Tiny):
    """The same samples without a fingerprint."""

    def split(self, name):
        samples = super().split(name)
        return [samples[index] for index in range(len(samples))]


class Counted(Module):
    """Counts the samples that go through the network, by the weights that stand in it."""

    seen: ClassVar = Counter()

    def features(self, net, batch):
        learning = any(p.requires_grad for p in net.parameters())
        who = "probe" if learning else str(float(net.stem.weight.sum()))
        Counted.seen[who] += batch_size(batch)
        return super().features(net, batch)


class Doubled(Module):
    """Prepares its samples."""

    def prepare(self, sample):
        return {**sample, "input": 2 * sample["input"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    Counted.seen = Counter()
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def worth(request, monkeypatch):
    """A few steps are enough to keep what experts say, but in the test of when they are."""
    if "when_it_is_worth" not in request.node.name:
        monkeypatch.setattr(Keeper, "_worth", lambda *_: True)


@pytest.mark.parametrize(("steps", "kept"), [(10, 0), (11, 3)])
def test_samples_are_run_through_when_it_is_worth_it(taught, cache, steps, kept):
    """40 samples, 4 a step: the eleventh step is the first to take one a second time."""
    adamerge.train(taught(trainer={"max_steps": steps}))
    assert len(list((cache / "experts").glob("*/kept.safetensors"))) == kept
    adamerge.train(taught(trainer={"max_steps": 2}))  # what is there is used
    assert len(list((cache / "experts").glob("*/kept.safetensors"))) == kept


@pytest.fixture
def taught(config):
    """A function that makes a configuration with distillation from the experts."""

    def make(model=(), *, kind="Tiny", **sections):
        plain = config({"objectives": [DISTILL], **dict(model)}, **sections)
        for task in plain["data"]["tasks"].values():
            task["class_path"] = f"tests.{'tiny' if kind == 'Tiny' else 'test_teachers'}.{kind}"
        return plain

    return make


def surgery(**more):
    return {"task_modules": [SURGERY], "train": "task", "backbone": COUNTED, **more}


def unseen(**more):
    """A run whose samples nothing looks at but training."""
    return {"data": {"eval_split": None, **more}}


def opened_of(paths, net=Net, *, skip=r"^head\.", transforms=(), modules=(), dtype=torch.float32, **options):
    """Teachers in a merged model's network."""
    recipe = Recipe(
        *(str(paths["base"]), {task: str(paths[task]) for task in TASKS}, Module(net, **options)),
        space=SpaceOptions(skip=skip),
        transforms=transforms,
        task_modules=modules,
    )
    data = UnlabeledTasks({task: Tiny(task) for task in TASKS}, batch_size=4)
    opened = recipe.open(data.classes)
    opened.probe(data.stream()[0], torch.device("cpu"))
    model = opened.merged(opened.load_vectors()).eval().to(dtype)
    return opened, model, Teachers(opened, model), data


def directly(paths, task, inputs, net=Net):
    """What an expert's own network says, from its checkpoint alone."""
    state, alone = load_file(paths[task]), net().eval()
    alone.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("head.")})
    blocks = []
    for block in getattr(alone, "blocks", ()):
        block.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    with torch.no_grad():
        features = alone(inputs)
        return {
            FEATURES: features,
            LOGITS: features @ state["head.weight"].T + state["head.bias"],
            BLOCKS: blocks,
        }


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def assert_same(one, other, exact=True):
    one, other = state_of(one.learned), state_of(other.learned)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **({"rtol": 0, "atol": 0} if exact else {}))


def kept(cache, kind="experts"):
    return sorted(cache.glob(f"{kind}/*/kept.safetensors"))


# --- the truth


@pytest.mark.parametrize("net", [Net, NormNet, TiedNet])
@pytest.mark.parametrize("skip", [r"^head\.", r"^head\.|stem|first|norm", r"^head\.|blocks|inner|scale"])
@pytest.mark.parametrize("transforms", [(), (Trim(), ElectSign())], ids=["raw", "ties"])
def test_teachers_say_what_the_experts_own_networks_say(tmp_path, net, skip, transforms):
    paths = write_pool(tmp_path, net)
    opened, _, teachers, data = opened_of(paths, net, skip=skip, transforms=transforms)
    assert (len(opened.space.left_out) > 0) == (skip != r"^head\." or net is NormNet)
    for task, batch in data.stream()[0].items():
        with teachers.expert(task):
            found = teachers.outputs(task, batch, ALL)
        assert_close(found, directly(paths, task, batch["input"], net))
    wanted = frozenset({LOGITS, FEATURES})
    for task, batch in teachers.complete(data.stream()[1], wanted).items():
        expected = directly(paths, task, batch["input"], net)
        assert_close({name: batch[name] for name in wanted}, {name: expected[name] for name in wanted})


def test_what_an_expert_holds_under_another_name_is_found(tmp_path):
    """A tied tensor that is not merged, under its second name alone."""
    paths = write_pool(tmp_path, TiedNet)
    expected = {task: directly(paths, task, torch.ones(2, 5), TiedNet) for task in TASKS}
    for path in paths.values():
        state = load_file(path)
        state.pop("inner.weight")
        save_file(state, path)
    _, _, teachers, _ = opened_of(paths, TiedNet, skip=r"^head\.|inner")
    for task in TASKS:
        with teachers.expert(task):
            assert_close(teachers.outputs(task, {"input": torch.ones(2, 5)}, ALL), expected[task])


def test_the_network_comes_back_as_it_was(tmp_path):
    paths = write_pool(tmp_path, NormNet)
    _, model, teachers, data = opened_of(paths, NormNet, skip=r"^head\.|scale")
    batch, net = data.stream()[0]["a"], model.network
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    places = {name: id(tensor) for name, tensor in net.named_parameters()}
    logits = model(batch, task="a")

    def unchanged():
        after = net.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert places == {name: id(tensor) for name, tensor in net.named_parameters()}
        assert torch.equal(model(batch, task="a"), logits)

    with teachers.expert("b"):
        assert not torch.equal(net.norm.running_mean, before["norm.running_mean"])
        assert not torch.equal(net.scale, before["scale"])
    unchanged()
    with pytest.raises(KeyError), teachers.expert("b"):
        raise KeyError
    unchanged()
    with pytest.raises(RuntimeError):
        teachers.complete({"a": {"input": torch.zeros(2, 99)}}, ALL)
    unchanged()


def test_trained_heads_do_not_teach(tmp_path):
    paths = write_pool(tmp_path)
    opened, model, teachers, data = opened_of(paths, train_heads=True)
    for task in TASKS:
        model.chain(task)[-1].weight.data += 1
    for task, batch in teachers.complete(data.stream()[0], {LOGITS}).items():
        assert_close({LOGITS: batch[LOGITS]}, {LOGITS: directly(paths, task, batch["input"])[LOGITS]})
    del opened


def test_task_modules_do_not_teach(tmp_path):
    def deep(info):
        made = Surgery(info, rank=2, deep=True)
        for parameter in made.parameters():
            parameter.data += 1
        return made

    paths = write_pool(tmp_path)
    _, _, teachers, data = opened_of(paths, modules=[deep])
    for task, batch in teachers.complete(data.stream()[0], ALL).items():
        assert_close({name: batch[name] for name in ALL}, directly(paths, task, batch["input"]))


@pytest.mark.parametrize("wanted", [{LOGITS}, {FEATURES, BLOCKS}, ALL])
def test_what_is_kept_is_every_samples(tmp_path, wanted):
    paths = write_pool(tmp_path)
    _, _, teachers, data = opened_of(paths)
    found = Keeper(data, torch.device("cpu"), "run").experts(teachers, wanted)
    for task in TASKS:
        samples = Tiny(task).split("train")
        inputs = torch.stack([samples[index]["input"] for index in range(SIZE)])
        expected = directly(paths, task, inputs)
        assert_close(found[task], {name: expected[name] for name in wanted})


# --- kept or computed, the same is learned


@pytest.mark.slow_unless("model0", "model6")
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"transforms": TIES},
        {"objectives": [FEATURE, DISTILL]},
        {"objectives": [{**FEATURE, "init_args": {"on": "blocks"}}]},
        {"task_modules": [SURGERY], "train": "task", "objectives": [FEATURE]},
        {"task_modules": [SURGERY], "train": "task", "objectives": [{"class_path": "tests.tiny.Kept"}]},
        {"task_modules": [{**SURGERY, "init_args": {"rank": 2, "deep": True}}], "train": "task"},
        {"task_modules": [SURGERY], "train": "task", "apply_mode": "swap"},
        {"objectives": [{"class_path": "adamerge.objectives.Supervised"}, DISTILL]},
        {"loop": {"class_path": "adamerge.loops.Joint", "init_args": {"micro_batch": 3}}},
        {"loop": {"class_path": "adamerge.loops.PerTask"}},
    ],
)
def test_what_is_kept_teaches_as_what_is_computed(taught, cache, model):
    taught_by_none = model.get("objectives") == [{"class_path": "tests.tiny.Kept"}]
    once = adamerge.train(taught(model))
    assert len(kept(cache)) == (0 if taught_by_none else 3)
    every = adamerge.train(taught(model, kind="Drawn"))
    assert_same(once, every, exact=False)


def test_workers_hand_out_what_is_kept(taught):
    once = adamerge.train(taught(surgery()))
    assert_same(once, adamerge.train(taught(surgery(), data={"num_workers": 2})))


def test_a_mixture_of_data_that_repeat_and_that_do_not(taught):
    expected = adamerge.train(taught(surgery()))
    for mode in ("leaf", "swap"):
        plain = taught(surgery(apply_mode=mode))
        plain["data"]["tasks"]["b"]["class_path"] = "tests.test_teachers.Drawn"
        assert_same(adamerge.train(plain), expected, exact=False)


def test_phases_that_want_other_things(taught, cache):
    phases = [{"train": "rule", "objectives": [FEATURE]}, {"train": "task"}]
    model = {"task_modules": [SURGERY], "phases": phases}
    once = adamerge.train(taught(model))
    assert_same(once, adamerge.train(taught(model, kind="Drawn")), exact=False)
    assert len(kept(cache)) == 2 * len(TASKS)


# --- each sample once


def test_surgery_touches_each_sample_once_with_each_encoder(taught):
    adamerge.train(taught(surgery(), trainer={"max_steps": 35}, **unseen()))
    assert Counted.seen.pop("probe") == len(TASKS) * 4 + JOINED
    assert sorted(Counted.seen.values()) == [SIZE] * len(TASKS) + [len(TASKS) * SIZE]
    Counted.seen.clear()
    adamerge.train(taught(surgery(), trainer={"max_steps": 35}, **unseen()))
    Counted.seen.pop("probe")
    assert list(Counted.seen.values()) == [len(TASKS) * SIZE]  # the merge's; the experts' were found again


def test_a_merge_that_is_trained_touches_each_sample_once_with_each_expert(taught):
    adamerge.train(taught({"backbone": COUNTED}, trainer={"max_steps": 3}, **unseen()))
    assert Counted.seen.pop("probe") == len(TASKS) * 4 * (1 + 3) + JOINED  # with the steps' own
    assert list(Counted.seen.values()) == [SIZE] * len(TASKS)


def test_entropy_of_a_fixed_merge_needs_no_expert(taught):
    model = surgery(objectives=[{"class_path": "adamerge.objectives.Entropy"}])
    adamerge.train(taught(model, trainer={"max_steps": 35}, **unseen()))
    Counted.seen.pop("probe")
    assert list(Counted.seen.values()) == [len(TASKS) * SIZE]


# --- what is found again


def test_what_experts_said_is_found_by_what_it_depends_on(taught, cache, pool):
    def number(**change):
        plain = taught()
        for path, value in change.items():
            section, *keys, last = path.split("__")
            place = plain[section]
            for key in keys:
                place = place[key]
            place[last] = value
        adamerge.train(plain)
        return len(kept(cache))

    assert number() == 3
    assert number() == 3
    assert number(data__batch_size=3) == 3
    assert number(model__transforms=TIES) == 3
    assert number(data__tasks__b__init_args={"task": "b", "size": 39}) == 4
    assert (
        number(model__backbone={"class_path": "tests.test_teachers.Doubled", "init_args": {"build": "tests.tiny.Net"}})
        == 7
    )
    assert number(model__objectives=[FEATURE]) == 10
    state = load_file(pool["c"])
    save_file({name: tensor + (0.1 if "stem" in name else 0) for name, tensor in state.items()}, pool["c"])
    assert number() == 11


def test_what_an_expert_takes_from_the_base_belongs_to_it(taught, cache, pool):
    """A tensor that is left out of the merge, and of the experts' files: another base is another teacher."""
    for task in TASKS:
        save_file({n: t for n, t in load_file(pool[task]).items() if not n.startswith("stem")}, pool[task])
    model = {"space": {"skip": r"^head\.|^stem"}}
    adamerge.train(taught(model))
    state = load_file(pool["base"])
    save_file({name: tensor + (1.0 if "stem" in name else 0) for name, tensor in state.items()}, pool["base"])
    once = adamerge.train(taught(model))
    assert len(kept(cache)) == 2 * len(TASKS)
    assert_same(once, adamerge.train(taught(model, kind="Drawn")), exact=False)


def test_a_damaged_file_is_made_again(taught, cache, caplog):
    once = adamerge.train(taught())
    for path in kept(cache):
        path.write_bytes(path.read_bytes()[:-4])
    again = adamerge.train(taught())
    assert_same(once, again)
    assert "is not whole and is made again" in caplog.text
    for path in kept(cache):
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same(once, adamerge.train(taught()))


# --- nothing is left behind


@pytest.mark.parametrize("way", ["well", "exception", "while keeping"])
def test_nothing_is_left_of_what_nobody_finds_again(taught, cache, way, monkeypatch):
    plain = taught(surgery(), kind="Nameless")
    if way == "well":
        adamerge.train(plain)
    else:
        monkeypatch.setattr("adamerge.stages.fit" if way == "exception" else "adamerge.teachers.save_file", fail)
        with pytest.raises(ZeroDivisionError):
            adamerge.train(plain)
    assert [path for kind in ("experts", "merged") for path in cache.glob(f"{kind}/*")] == []


def fail(*_, **__):
    raise ZeroDivisionError


def test_nameless_samples_are_kept_for_the_run(taught):
    adamerge.train(taught(surgery(), kind="Nameless", trainer={"max_steps": 35}, **unseen()))
    Counted.seen.pop("probe")
    assert sorted(Counted.seen.values()) == [SIZE] * len(TASKS) + [len(TASKS) * SIZE]


# --- what does not fit


@pytest.mark.parametrize(("limit", "found"), [(0.0, 0), (4 * SIZE * 4 * 1e-9, 1), (1e-3, 3)])
def test_what_does_not_fit_is_computed_at_every_step(taught, cache, caplog, limit, found):
    with caplog.at_level(logging.INFO, "adamerge"):
        run = adamerge.train(taught(data={"cache_limit": limit}))
    assert len(kept(cache)) == found
    said = [r for r in caplog.messages if "does not fit into `data.cache_limit`" in r]
    assert len(said) == (found < 3)
    assert all(f"from {TASKS[found]} on: computed at every step" in each for each in said)
    assert_same(run, adamerge.train(taught()), exact=False)


def test_merged_features_that_do_not_fit_are_computed_at_every_step(taught, cache, caplog):
    classes = sum(CLASSES.values())
    with caplog.at_level(logging.INFO, "adamerge"):
        run = adamerge.train(taught(surgery(), data={"cache_limit": 4 * SIZE * classes * 1e-9}))
    assert "Merged features do not fit into `data.cache_limit`: computed at every step" in caplog.text
    assert len(kept(cache)) == 3
    assert_same(run, adamerge.train(taught(surgery())), exact=False)


# --- resume


def test_resume_on_other_samples_is_refused(taught):
    run = {"checkpoint_every": 1}
    part = adamerge.train(taught(run=run, trainer={"max_steps": 2}))
    rest = adamerge.train(taught(), ckpt_path=str(part.dir))
    assert_same(rest, adamerge.train(taught()))
    changed = taught()
    changed["data"]["tasks"]["b"]["init_args"]["size"] = 39
    message = r"`ckpt_path` was trained on what the experts said of other samples: .* preprocessing of b has changed"
    with pytest.raises(InputError, match=message):
        adamerge.train(changed, ckpt_path=str(part.dir))


@pytest.mark.parametrize("alike", [True, False])
def test_memory_is_measured_where_tasks_can_share_a_batch(pool, alike, monkeypatch):
    def refuse(self, batches):
        raise InputError("no")

    if not alike:
        monkeypatch.setattr(Module, "concatenate", refuse)
    opened, model, *_ = opened_of(pool)
    assert model.activations == opened.activations
    assert (model.activations > 4 * 4 * 5) == alike  # at the least, the inputs
    assert model.measured == (model.activations and 4 * 5)


def test_batches_that_are_answered_otherwise_together_stay_apart(pool, monkeypatch):
    features = Module.features
    monkeypatch.setattr(Module, "features", lambda self, net, batch: features(self, net, batch) * len(batch["input"]))
    opened, *_ = opened_of(pool)
    assert opened.activations == 0
