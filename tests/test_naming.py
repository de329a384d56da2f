"""Names of tasks: which are refused where they enter, and what is made of those that are not."""

import ast
import json

import pytest
import yaml

import adamerge
from adamerge import InputError, Recipe, UnlabeledTasks, backbones
from adamerge.backbones import CLIP, OpenCLIP, Seq2Seq, TextClassifier
from adamerge.data import TensorTask
from adamerge.exporting import export
from adamerge.naming import check_task_names, folder_of, literal
from adamerge.report import score_table
from adamerge.terminal import progress_console
from tests.checkpoints_hf import Texts, write
from tests.tiny import Net

GOOD = [
    "sun397",
    "my task",
    "tâche",
    "sst-2",
    "a.b",
    "手書き",
    "-rf",
    "a:b",
    "con",
    "Q&A",
    "[red]",
    "{0}",
    'say "hi"',
    "😀",
]
WRONG = {
    "": "empty",
    " ": "empty",
    "a ": "blank",
    "../a": "is a path",
    "/tmp/a": "is a path",
    "a/b": "is a path",
    "a\\b": "is a path",
    "C:\\a": "is a path",
    ".": "is a path",
    "..": "is a path",
    "a\0": "control",
    "a\x1b[31m": "control",
    "a\nb": "control",
    "a\u202eb": "control",
    "a\u2028b": "control",
    "\ud800": "half a character",
    "x" * 101: "101 characters",
    2020: "quotes around",
    1.5: "quotes around",
    True: "truth values",
    None: "quotes around",
    b"a": "quotes around",
}


@pytest.mark.parametrize("name", GOOD)
def test_names_that_people_give_are_taken(name):
    check_task_names([name, "other"], "`data.tasks`")


@pytest.mark.parametrize(("name", "said"), WRONG.items(), ids=map(ascii, WRONG))
def test_names_that_are_no_names_are_refused_where_they_enter(name, said):
    with pytest.raises(InputError, match=said):
        UnlabeledTasks({"a": TensorTask(["x"]), name: TensorTask(["x"])})
    with pytest.raises(InputError, match=rf"`model.experts` names a task .*{said}"):
        Recipe("base", {"a": "a", name: "b"}, backbones.Module(Net))


@pytest.mark.parametrize("pair", [("a", "A"), ("é", "e\u0301"), ("ß", "SS"), ("ﬁ", "fi")])
def test_names_of_one_folder_on_some_disks_are_refused(pair):
    with pytest.raises(InputError, match="whose folders would be one"):
        check_task_names(pair, "`model.experts`")


@pytest.mark.parametrize("name", ["2020", "on"])
def test_a_name_that_yaml_reads_as_something_else_is_refused_by_the_parser_or_by_us(name, config, tmp_path):
    plain = config()
    plain["model"]["experts"]["NAME"] = plain["model"]["experts"].pop("a")
    plain["data"]["tasks"]["NAME"] = plain["data"]["tasks"].pop("a")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(plain).replace("NAME", name))
    with pytest.raises(InputError, match="uotes around the name"):
        adamerge.train(file)


def test_folders_are_safe_and_apart():
    names = [*GOOD, "CON", "nul.txt", ".hidden", "a.", "<b>", "a|b", "a?b", "é" * 100, "手" * 100]
    folders = [folder_of(name) for name in names]
    assert len({folder.casefold() for folder in folders}) == len(names)
    for name, folder in zip(names, folders, strict=True):
        assert len(folder.encode()) <= 120
        assert not set(folder) & set('<>:"/\\|?*\0{}')
        assert folder.strip(". ") == folder.rstrip(". ")
        assert folder.split(".")[0].lower() not in ("con", "nul")
        assert folder == name or not folder.startswith(name)
    assert [folder_of(name) for name in ("sun397", "my task", "tâche", "a.b")] == ["sun397", "my task", "tâche", "a.b"]


def test_a_name_that_looks_like_another_ones_folder_is_refused():
    with pytest.raises(InputError, match="whose folders would be one"):
        check_task_names(["a:b", folder_of("a:b")], "`model.experts`")


@pytest.mark.parametrize("backbone", [CLIP, OpenCLIP, Seq2Seq, TextClassifier, backbones.ImageClassifier])
@pytest.mark.parametrize("task", ['x"); import os; os.system("touch PWNED"); ("', "{0}", "{folder.x}", "a'b"])
def test_the_code_of_a_card_is_code_whatever_the_task_is_called(backbone, task):
    made = object.__new__(backbone)
    code = made.loading(task).format(folder="here")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    assert "system" not in {call.attr for call in calls}


def test_a_literal_is_the_text():
    for text in GOOD:
        assert ast.literal_eval(literal(text)) == text
        assert ast.literal_eval(literal(text, template=True).format(folder="x")) == text


def test_names_with_markup_are_shown_as_they_are(capsys):
    for name in ("[/x]", "[red]", ":smile:"):
        assert name in score_table({"this merge": {name: 0.5}})
        progress_console().print(name)
        assert name in capsys.readouterr().err


def _renamed(value, old, new):
    if isinstance(value, dict):
        names = {old: new, f"expert {old}": f"expert {new}"}
        return {names.get(key, key): _renamed(each, old, new) for key, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, old, new) for each in value]
    return new if value == old else value


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A merge of two text classifiers, of which one's task has a name that no folder has everywhere."""
    home = tmp_path_factory.mktemp("classifiers")
    paths = write(home / "pool", "bert", "AutoModelForSequenceClassification")
    recipe = Recipe(str(paths["base"]), {"a": str(paths["a"]), "b: ?": str(paths["b"])}, TextClassifier())
    data = UnlabeledTasks({"a": Texts("a"), "b: ?": Texts("b")}, batch_size=2)
    trainer = {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False}
    return adamerge.train(recipe, data, trainer=trainer, run={"root": str(home / "runs"), "baselines": False})


def test_a_task_is_exported_into_a_folder_of_a_safe_name(classifiers, tmp_path):
    out = tmp_path / "out"
    export(classifiers.dir, out)
    assert {path.name for path in (out / "tasks").iterdir()} == {"a", folder_of("b: ?")}
    tasks = json.loads((out / "tasks.json").read_text(encoding="utf-8"))
    assert tasks["b: ?"]["folder"] == f"tasks/{folder_of('b: ?')}"
    assert "folder" not in tasks["a"]


@pytest.mark.parametrize("evil", ["../../../escaped", "x/../../../../escaped", "a/b", "", "ABSOLUTE"])
def test_an_export_writes_nothing_outside_of_its_folder(classifiers, evil, tmp_path):
    evil = str(tmp_path / "absolute") if evil == "ABSOLUTE" else evil
    record = yaml.safe_load((classifiers.dir / "merge" / "merge.yaml").read_text())
    merge = tmp_path / "merge"
    merge.mkdir()
    for file in (classifiers.dir / "merge").iterdir():
        (merge / file.name).write_bytes(file.read_bytes())
    (merge / "merge.yaml").write_text(yaml.safe_dump(_renamed(record, "a", evil)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="names a task"):
        export(merge, tmp_path / "outs" / "deep" / "out")
    assert [path for path in tmp_path.rglob("*") if path not in before and path.is_file()] == []
