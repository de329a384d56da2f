"""Nothing foreign runs without trust: options of records, code of the hub, data of a run's own file."""

import inspect
import re
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml

import adamerge
from adamerge import Recipe, UnlabeledTasks, backbones
from adamerge.artifact import read_record
from adamerge.config import data_of
from adamerge.data import TaskData
from adamerge.mergekit import mergekit
from adamerge.pushing import push_to_hub
from adamerge.recorded import Recorded, revive
from adamerge.rescore import rescore
from adamerge.runs import listing, redraw
from adamerge.trainers import read_checkpoint
from adamerge.types import InputError
from tests.canary import backbone, edit, quiet_canary, strange_folder, write_record  # noqa: F401
from tests.checkpoints_hf import CLASSES, Texts, write
from tests.contracts import _family
from tests.hub_server import served_hub  # noqa: F401

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 1}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts"), "bert", "AutoModelForSequenceClassification")


# --- options of a record

REMOTE = [cls for cls in _family(Recorded) if "remote_code" in inspect.signature(cls).parameters]
DOORS = {
    "load": lambda merge, out: adamerge.load(merge),
    "export": lambda merge, out: adamerge.export(merge, out),
    "mergekit": lambda merge, out: mergekit(merge, out),
    "report": lambda merge, out: redraw(merge),
    "runs": lambda merge, out: listing(merge.parent),
    "push": lambda merge, out: push_to_hub(merge, "org/merge"),
}


@pytest.mark.parametrize("cls", REMOTE, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("door", ["load", "export", "mergekit"])
def test_no_option_of_a_record_switches_on_code(canary, stranger, tmp_path, cls, door):
    asked = backbone(cls, model=f"local-dir:{stranger}", remote_code=True)
    merge = write_record(tmp_path / "merge", asked, dict.fromkeys(("base", "a", "b"), stranger))
    with pytest.raises(InputError, match=r"`remote_code: True`, which runs code .* trust=True \(in a command: --trust"):
        DOORS[door](merge, tmp_path / "out")
    assert canary.said is None


def hidden_in_build(folder):
    """A backbone as another one's network, whose code runs when its property is looked at."""
    inner = {"model": str(folder), "remote_code": True}
    build = "adamerge.backbones.classifiers.ImageClassifier"
    return backbone(backbones.Module, build=build, build_args=inner, features="config")


def hidden_in_a_class(folder):
    build = backbone(backbones.ImageClassifier, model=str(folder), remote_code=True)
    return backbone(backbones.Module, build=build, features="config")


def without_the_option(folder):
    build = backbone(backbones.ImageClassifier, model=str(folder))
    return backbone(backbones.Module, build=build, features="config")


WAYS = {  # in which a record says it
    "a word": lambda folder: backbone(backbones.CLIP, model=str(folder), remote_code="no"),
    "a number": lambda folder: backbone(backbones.CLIP, model=str(folder), remote_code=1),
    "by the base": lambda folder: backbone(backbones.TextClassifier, remote_code=True),
    "build_args": hidden_in_build,
    "build": hidden_in_a_class,
    "a backbone as a network": without_the_option,
    "handed through": lambda folder: backbone(
        backbones.Module, build="adamerge.demo.digits.DigitNet", build_args={"options": [{"trust_remote_code": True}]}
    ),
    "a kernel": lambda folder: backbone(backbones.TextClassifier, model=str(folder), attention="org/kernel@main:fast"),
    "kernels": lambda folder: backbone(backbones.TextClassifier, model=str(folder), attention={"": "org/kernel"}),
    "a function of ours": lambda folder: backbone(backbones.Module, build="adamerge.recorded.import_module"),
    "through ours": lambda folder: backbone(backbones.Module, build="adamerge.backbones.module.nn.Linear"),
    "a class of a library": lambda folder: backbone(backbones.Module, build="timm.create_model"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("door", DOORS)
def test_every_way_of_a_record_is_closed(canary, stranger, tmp_path, monkeypatch, way, door):
    merge = write_record(tmp_path / "merge", WAYS[way](stranger), dict.fromkeys(("base", "a", "b"), stranger))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = r"if you trust it\.|which wants a|cannot be imported"
    quiet = {"report": nullcontext(), "runs": nullcontext(), "push": pytest.raises(InputError)}  # do what they can
    with quiet.get(door) or pytest.raises(InputError, match=refused):
        DOORS[door](merge, tmp_path / "out")
    assert canary.said is None


def test_parts_beside_the_backbone_are_looked_at_too(canary, stranger, tmp_path):
    sources = dict.fromkeys(("base", "a", "b"), stranger)
    inner = backbone(backbones.ImageClassifier, model=str(stranger), remote_code=True)
    plain = backbone(backbones.ImageClassifier, model=str(stranger))
    surgery = {"class_path": "adamerge.task_modules.Surgery", "init_args": {"rank": inner}}
    parts = {"rule": inner, "transforms": [inner], "task_modules": [surgery]}
    for number, (part, value) in enumerate(parts.items()):
        merge = write_record(tmp_path / f"merge{number}", plain, sources, **{part: value})
        with pytest.raises(InputError, match=r"`remote_code: True`"):
            adamerge.load(merge)
    assert canary.said is None


@pytest.mark.parametrize("cls", _family(Recorded), ids=lambda cls: cls.__name__)
def test_options_that_sound_like_code_are_known_for_it(cls):
    """A new option called so is refused in a record by itself; one that is no switch says so in `foreign_code`."""
    for name in inspect.signature(cls.__init__).parameters:
        if re.search(r"remote|trust|code", name) and not re.search(r"encode|decode", name):
            assert cls.foreign_code({name: True}) == [f"{name}: True"]
            assert not cls.foreign_code({name: False})


def test_options_that_are_off_need_no_trust(stranger):
    for off in (False, None, 0):
        revive(backbone(backbones.TextClassifier, model=str(stranger), remote_code=off, attention="sdpa"), trust=False)
    revive({"columns": {"code": "text", "trust": "label"}}, trust=False)  # names of a user's own


# --- with trust, the pinned commit alone


def on_the_hub(hub, canary, texts, folder, reference="stranger.{}"):
    """The pool with an architecture of its own; the commits by name."""
    commits = {}
    for name, source in texts.items():
        shutil.copytree(source, folder / name)
        auto_map = {"AutoConfig": "Config", "AutoModelForSequenceClassification": "Net"}
        named = {auto: reference.format(cls, name=name) for auto, cls in auto_map.items()}
        edit(folder / name / "config.json", model_type="stranger", architectures=["Net"], auto_map=named)
        (folder / name / "stranger.py").write_text(canary.code("the commit that was merged"))
        commits[name] = hub.add(f"org/{name}", folder / name)
    return commits


def learned(root, **options):
    recipe = Recipe("org/base", {task: f"org/{task}" for task in CLASSES}, backbones.TextClassifier(**options))
    samples = UnlabeledTasks({task: Texts(task) for task in CLASSES}, batch_size=4, eval_split=None)
    return adamerge.train(recipe, samples, trainer=QUIET, run={"root": str(root), "baselines": False})


@pytest.mark.parametrize("reference", ["stranger.{}", "org/{{name}}--stranger.{}"], ids=["beside", "by its repository"])
def test_trusted_code_is_that_of_the_pinned_commit(hub, canary, texts, tmp_path, reference):
    reference = reference.replace("{{name}}", "{name}")
    commits = on_the_hub(hub, canary, texts, tmp_path / "made", reference)
    run = learned(tmp_path / "runs", remote_code=True)
    _, record = read_record(run.dir)
    assert record["sources"]["base"]["revision"] == commits["base"]
    for name in commits:
        hub.add(f"org/{name}", {"stranger.py": canary.code("another commit")})
    canary.mark.unlink()
    with pytest.raises(InputError, match="`remote_code: True`"):
        adamerge.load(run.dir)
    assert canary.said is None
    batch = Texts("a").split("test")[:3]
    loaded = adamerge.load(run.dir, trust=True)
    assert torch.equal(
        loaded(loaded.prepare(batch, task="a"), task="a"), run.merge(run.merge.prepare(batch, task="a"), task="a")
    )
    assert canary.said in (None, "the commit that was merged")
    shutil.rmtree(tmp_path / "modules")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]  # as in another process
    adamerge.load(run.dir, trust=True)
    assert canary.said == "the commit that was merged"


def test_trusted_code_in_no_commit_is_refused(hub, canary, texts, tmp_path):
    commits = on_the_hub(hub, canary, texts, tmp_path / "made")
    asked = backbone(backbones.TextClassifier, model="org/base", remote_code=True)
    entries = {name: {"source": f"org/{name}", "revision": commit} for name, commit in commits.items()}
    unpinned = {
        "a branch": {**entries, "base": {"source": "org/base", "revision": "main"}},
        "a branch behind @": {**entries, "base": {"source": "org/base@main"}},
        "nothing": {**entries, "a": {"source": "org/a"}},
        "half a commit": {**entries, "b": {"source": "org/b", "revision": commits["b"][:10]}},
    }
    for number, (what, sources) in enumerate(unpinned.items()):
        merge = write_record(tmp_path / f"merge{number}", asked, sources)
        with pytest.raises(InputError, match=r"brings code along and names no commit"):
            adamerge.load(merge, trust=True)
        assert canary.said is None, what
    other = {**asked, "init_args": {**asked["init_args"], "model": "org/words"}}
    with pytest.raises(InputError, match=r"The backbone's model of this merge, 'org/words', brings code along"):
        adamerge.load(write_record(tmp_path / "words", other, entries), trust=True)
    assert canary.said is None


def test_code_of_another_repository_is_refused_with_trust(hub, canary, texts, tmp_path):
    commits = on_the_hub(hub, canary, texts, tmp_path / "made", "org/elsewhere--stranger.{}")
    hub.add("org/elsewhere", {"stranger.py": canary.code("elsewhere")})
    asked = backbone(backbones.TextClassifier, model="org/base", remote_code=True)
    entries = {name: {"source": f"org/{name}", "revision": commit} for name, commit in commits.items()}
    with pytest.raises(InputError, match=r"takes code from 'org/elsewhere' \(stranger\.py\), in no commit"):
        adamerge.load(write_record(tmp_path / "merge", asked, entries), trust=True)
    assert canary.said is None
    assert not [each for each in hub.requests if "elsewhere" in each.path]


# --- data of a run's own file

FOREIGN = """
import pathlib
from adamerge.data import Digits
pathlib.Path({mark!r}).write_text("imported")

class Data(Digits):
    def __init__(self, task: str = "digit") -> None:
        super().__init__(task)
"""
OURS = {"class_path": "adamerge.data.Digits", "init_args": {"task": "digit"}}


@pytest.fixture
def configured(canary, tmp_path, monkeypatch):
    """A function that writes a run with such data in its config.yaml; `strange.Data` can be imported, and says so."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "strange.py").write_text(FOREIGN.format(mark=str(canary.mark)))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    monkeypatch.chdir(tmp_path)
    files = {
        "tasks": {"digit": "strange.Data"},
        "task": {"class_path": "strange.Data"},
        "args": {"task": "strange.Data"},
    }
    for name, content in {**files, "data": {"tasks": {"digit": "strange.Data"}}}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    module = backbone(backbones.Module, build="adamerge.demo.digits.DigitNet")
    write_record(tmp_path / "run" / "merge", module, dict.fromkeys(("base", "digit"), "nothing"))

    def run(section):
        text = section if isinstance(section, str) else yaml.safe_dump({"data": section})
        (tmp_path / "run" / "config.yaml").write_text(text)
        return tmp_path / "run"

    return run


def digit(data):
    return {"tasks": {"digit": data}}


TEXTS = {  # that a parser may take for a class
    "a short form": digit("strange.Data"),
    "a class": digit({"class_path": "strange.Data"}),
    "JSON": digit('{"class_path": "strange.Data"}'),
    "YAML": digit("class_path: strange.Data"),
    "a file": digit("task.yaml"),
    "a file in a class": digit({"class_path": "task.yaml"}),
    "a list": digit(["strange.Data"]),
    "a key": digit({"strange.Data": {}}),
    "dictionary of tasks as JSON": {"tasks": '{"digit": "strange.Data"}'},
    "a file of tasks": {"tasks": "tasks.yaml"},
    "a list of tasks": {"tasks": ["strange.Data"]},
    "a dotted key": {"tasks.digit": "strange.Data"},
    "dotted keys": {"tasks": {"digit": OURS}, "tasks.other.class_path": "strange.Data"},
    "a dotted key of a class": digit({"class_path": "adamerge.data.Digits", "init_args.task": "strange.Data"}),
    "keywords": digit({**OURS, "dict_kwargs": {"task": "strange.Data"}}),
    "another keyword": digit({**OURS, "class": "strange.Data"}),
    "arguments in a file": digit({"class_path": "adamerge.data.Digits", "init_args": "args.yaml"}),
    "an argument": digit({"class_path": "adamerge.data.Digits", "init_args": {"task": {"class_path": "strange.Data"}}}),
    "a path": digit({"class_path": "adamerge.data.HFDataset", "init_args": {"path": {"class_path": "strange.Data"}}}),
    "an option": {**digit(OURS), "seed": {"class_path": "strange.Data"}},
    "the section": {"class_path": "strange.Data", "init_args": {}},
    "a default": {**digit(OURS), "__default_config__": "data.yaml"},
    "a configuration": {**digit(OURS), "config": "data.yaml"},
    "a function of ours": digit({"class_path": "adamerge.recorded.import_module", "init_args": {"name": "strange"}}),
    "ours that imports": digit({"class_path": "adamerge.recorded.revive", "init_args": {"value": "x", "trust": True}}),
    "beside ours": digit({"class_path": "adamerge.data.strange.Data"}),
    "another class of ours": digit({"class_path": "adamerge.backbones.Module", "init_args": {"build": "strange.Data"}}),
    "no section": {},
    "a tag": "data: {tasks: {digit: !!python/name:strange.Data {}}}",
    "a tag that calls": "data: !!python/object/apply:importlib.import_module [strange]",
    "a file for the section": "data: data.yaml",
}


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_of_a_runs_configuration_is_imported(canary, configured, text):
    run = configured(TEXTS[text])
    with pytest.raises(InputError):
        rescore(run)
    assert canary.said is None
    assert "strange" not in sys.modules


def test_other_commands_take_nothing_from_a_runs_configuration(canary, configured, tmp_path):
    run = configured({"tasks": {"digit": "strange.Data"}})
    (run / "checkpoints").mkdir()
    canary.pickle(run / "checkpoints" / "last.ckpt")
    listing(tmp_path)
    redraw(run)
    for door in (
        adamerge.load,
        lambda run: adamerge.export(run, tmp_path / "out"),
        lambda run: read_checkpoint(str(run)),
    ):
        with pytest.raises(InputError):
            door(run)
    assert canary.said is None


def test_data_of_ours_need_no_trust_and_others_get_it(canary, configured):
    ours = {"tasks": {"digit": OURS, "v1.5": OURS}, "split": "strange.Data", "batch_size": 3, "cache_limit": 1}
    made = data_of(configured(ours) / "config.yaml")
    assert [type(each).__name__ for each in made.tasks.values()] == ["Digits", "Digits"]
    assert (made.split, made.batch_size) == ("strange.Data", 3)
    assert canary.said is None
    made = data_of(configured(TEXTS["a short form"]) / "config.yaml", trust=True)
    assert type(made.tasks["digit"]).__module__ == "strange"


@pytest.mark.parametrize("cls", _family(TaskData), ids=lambda cls: cls.__name__)
def test_data_of_ours_take_plain_arguments_alone(cls):
    """Else the parser would take a text for a class, where nobody was asked for trust."""
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert re.fullmatch(r"([\s|,\[\]]|str|int|float|bool|None|Mapping|Sequence)*", str(parameter.annotation)
                                .replace("collections.abc.", "").replace("<class '", "").replace("'>", ""))  # fmt: skip
