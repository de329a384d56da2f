"""The documentation is true: its examples run as they stand, its map of the package is complete."""

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

import adamerge
from adamerge.config import job_from_arguments
from adamerge.types import InputError
from tests import test_contracts
from tests.test_imports import FILES, PACKAGE, imports_of, room_of
from tests.tiny import TASKS, batches_of

ROOT = PACKAGE.parent
GUIDE, MAP = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"
MODULE = "# my_methods.py\n"
FAMILIES = {"rule": adamerge.MergeRule, "transform": adamerge.Transform, "objective": adamerge.Objective}
CONTRACTS = [
    pytest.param(family, contract, id=name)
    for family in FAMILIES
    for name, contract in vars(test_contracts).items()
    if name.startswith(f"test_{family}_")
]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def the_only(found):
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """The guide's module, imported from a folder of its own, as a user's would be."""
    (tmp_path / "mine").mkdir()
    written = [block for block in blocks(GUIDE, "python") if block.startswith(MODULE)]
    assert len(written) == len(FAMILIES)
    (tmp_path / "mine" / "my_methods.py").write_text("".join(written))
    monkeypatch.syspath_prepend(tmp_path / "mine")
    yield importlib.import_module("my_methods")
    del sys.modules["my_methods"]


def example(methods, family):
    classes = [value for value in vars(methods).values() if inspect.isclass(value)]
    return the_only([c for c in classes if issubclass(c, FAMILIES[family]) and c.__module__ == "my_methods"])


@pytest.fixture
def files(config, tmp_path):
    """A configuration of the tiny pool with the rule, space and objectives of digits.yaml, and the guide's on top."""
    digits = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())["model"]
    plain = config(
        {key: digits[key] for key in ("space", "rule", "objectives")}, trainer={"max_steps": 2, "log_every_n_steps": 1}
    )
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(plain))
    (tmp_path / "my_merge.yaml").write_text(the_only(blocks(GUIDE, "yaml")))
    return [tmp_path / "digits.yaml", tmp_path / "my_merge.yaml"]


# --- CONTRIBUTING.md


def test_the_examples_train_save_and_load(methods, files):
    run = adamerge.train(files)
    rule = run.learned.rule
    assert type(rule) is methods.Gated
    assert run.dir.parent.name == "my_merge"
    assert rule.groups == ("stem", "blocks.0", "blocks.1")
    assert bool((rule.strength_T != 0.6).all())
    assert bool((rule.gate_G != 0).all())
    dropped = [float((run.learned.vectors.deltas(n).dense() == 0).float().mean()) for n in rule._group_of]
    assert 0.2 < sum(dropped) / len(dropped) < 0.8
    logged = (run.dir / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "train/a/squared_confidence" in logged
    assert "train/a/entropy" not in logged  # the list of objectives was replaced

    with pytest.raises(InputError) as refused:
        adamerge.load(run.dir)
    for name in ("Gated", "DropAndRescale"):
        assert f"'my_methods.{name}', which is not part of adamerge; pass trust=True" in str(refused.value)

    code = the_only([block for block in blocks(GUIDE, "python") if "adamerge.load(" in block])
    space = {"run_directory": run.dir, "batch": batches_of()[TASKS[0]]}
    exec(code, space)  # the guide's own lines
    assert torch.equal(space["logits_BC"], run.merge(space["batch"], task=TASKS[0]))


def test_the_command_parses_with_the_shipped_configuration(methods, files, monkeypatch):
    command = the_only([block for block in blocks(GUIDE, "bash") if "adamerge.fit" in block])
    python, option, module, *arguments = shlex.split(command)
    assert (python, option, module) == ("python", "-m", "adamerge.fit")
    monkeypatch.chdir(ROOT)
    job = job_from_arguments([str(files[1]) if argument == "my_merge.yaml" else argument for argument in arguments])
    assert [type(objective) for objective in job.recipe.objectives] == [methods.SquaredConfidence]
    assert [type(transform) for transform in job.recipe.transforms] == [methods.DropAndRescale]
    assert job.recipe.space.skip
    resolved = yaml.safe_load(job.config)["model"]
    assert resolved["rule"] == {"class_path": "my_methods.Gated", "init_args": {"strength": 0.4}}
    assert resolved["base"] == "demo:digits/base"


def perturb(rule):
    """As `test_contracts.perturb`, for learnables of any shape that the rule's axes explain."""
    names = {"task": rule.tasks, "group": rule.groups}
    with torch.no_grad():
        for key, parameter in rule.named_parameters():
            for axis, kind in enumerate(rule.axes[key]):
                values = torch.tensor([float(sum(map(ord, name)) % 17) for name in names[kind]])
                shape = [-1 if place == axis else 1 for place in range(parameter.dim())]
                parameter.add_(0.1 * torch.sin(values).view(shape))


@pytest.mark.parametrize(("family", "contract"), CONTRACTS)
def test_the_examples_keep_the_contracts(methods, monkeypatch, family, contract):
    monkeypatch.setattr(test_contracts, "perturb", perturb)
    contract(example(methods, family))


def test_the_contracts_are_found():
    families = [parameters.values[0] for parameters in CONTRACTS]
    assert all(families.count(family) >= 3 for family in FAMILIES)


@pytest.mark.parametrize("drop", [-0.1, 1.0])
def test_the_example_refuses_a_bad_option(methods, drop):
    with pytest.raises(InputError, match=r"`DropAndRescale.drop` is .*\[0, 1\)"):
        methods.DropAndRescale(drop=drop)


def test_the_rewritten_golden_file_is_the_golden_file(tmp_path, monkeypatch):
    code = the_only(
        [block for block in blocks(GUIDE, "python") if block.startswith("# rewrites tests/golden/tiny.txt")]
    )
    (tmp_path / "tests" / "golden").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found, kept = (
        [float(line) for line in (root / "tests/golden/tiny.txt").read_text().splitlines()] for root in (tmp_path, ROOT)
    )
    assert found == pytest.approx(kept, rel=1e-4)  # fp32 on other processors sums in another order


# --- docs/architecture.md


def section(title):
    return the_only(re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", MAP.read_text(), re.DOTALL | re.MULTILINE))


def rooms():
    """Path in the package -> what its line says of it."""
    block = the_only(re.findall(r"^```text\nadamerge/\n(.*?)^```$", section("The rooms"), re.DOTALL | re.MULTILINE))
    lines = [re.fullmatch(r"  ([\w/.]+) +(\S.*)", line) for line in block.splitlines()]
    assert all(lines), block
    return {line[1]: line[2] for line in lines}


def test_every_file_has_its_room_and_every_room_its_file():
    named = set()
    for room, text in rooms().items():
        if room.endswith("/"):
            named |= {room + "__init__.py", *(room + file for file in re.findall(r"\w+\.py\b", text))}
        else:
            named.add(room)
    assert named == {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}


def test_the_import_direction_is_the_real_one():
    block = the_only(re.findall(r"^```text\n(.*?)^```$", section("The import direction"), re.DOTALL | re.MULTILINE))
    line_of = {room: number for number, line in enumerate(block.splitlines()) for room in line.split()}
    assert set(line_of) == {room_of(path) for path in FILES}
    for path in FILES:
        for name in imports_of(path):
            package, _, rest = name.partition(".")
            room = rest.split(".")[0]
            if package == "adamerge" and room and room != room_of(path):
                assert line_of[room] < line_of[room_of(path)], f"{path} imports {name}"


def test_every_contract_is_where_the_table_says():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w/]+\.py) \|$", section("The contracts"), re.MULTILINE)
    assert len(rows) >= 14
    for name, file in rows:
        assert f"class {name}" in (PACKAGE / file).read_text(), f"{name} is not in {file}"


@pytest.mark.parametrize("path", [GUIDE, MAP], ids=lambda path: path.name)
def test_what_is_named_exists(path):
    source = "\n".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", prose):
        called = re.match(r"(?:(\w+)\.)?(\w+)\(", code)
        if called and called[2] != "model":  # a variable
            assert re.search(rf"(def|class) {called[2]}\b", source), f"{code} is nowhere"
        elif re.fullmatch(r"(adamerge|configs|docs|tests|benchmarks)/[\w/.]*", code):
            assert (ROOT / code).exists(), f"{code} is nowhere"
    for target in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (path.parent / target).exists(), f"{target} is nowhere"


def test_the_drawing_is_whole_and_has_a_ground_of_its_own():
    from xml.etree import ElementTree

    drawing = ElementTree.parse(MAP.parent / "tensor.svg").getroot()
    ground = next(element for element in drawing if element.tag.endswith("rect"))
    assert (ground.get("width"), ground.get("height")) == (drawing.get("width"), drawing.get("height"))
    assert ground.get("fill") == "#fff"
    words = " ".join("".join(element.itertext()) for element in drawing.iter() if element.tag.endswith("text"))
    for stage in ("checkpoints", "TaskVectors", "transforms", "rule", "leaf", "network", "features", "task modules"):
        assert stage in words
    for stage in ("objective", "loss", "backward", "leaf.grad", "inner", "learnables"):
        assert stage in words


def test_the_path_of_this_file_is_in_the_guide():
    assert f"`tests/{Path(__file__).name}`" in GUIDE.read_text()


# --- docs/performance.md


def test_every_figure_has_a_script_and_every_script_is_run_by_make_bench():
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text()}
    page = (ROOT / "docs" / "performance.md").read_text()
    named = {
        script for block in blocks(ROOT / "docs" / "performance.md", "sh") for script in re.findall(r"\w+\.py", block)
    }
    assert named
    assert named <= scripts
    assert scripts == set(re.findall(r"benchmarks/(\w+\.py)", (ROOT / "Makefile").read_text()))
    for picture in re.findall(r"\]\((\w+\.png)\)", page):
        assert (ROOT / "docs" / picture).is_file()


def test_the_page_and_make_bench_name_options_that_the_scripts_have():
    page, rules = (ROOT / "docs" / "performance.md").read_text(), (ROOT / "Makefile").read_text()
    commands = re.findall(r"benchmarks/(\w+\.py)(.*)", page + rules)
    assert len(commands) > 20
    for script, rest in commands:
        source = (ROOT / "benchmarks" / script).read_text()
        for option in re.findall(r"(--[\w-]+)", rest):
            assert f'add_argument("{option}"' in source, f"{script} has no {option}"
