"""One import direction, heavy libraries only where they belong, a fast `import adamerge`."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import adamerge

PACKAGE = Path(adamerge.__file__).parent
# A file imports only from lower layers, or from its own folder.
LAYERS = [
    {"types", "freed"},
    {"reading"},
    {"files", "recorded", "modules", "seeding", "terminal", "hub", "ranks", "blocks", "step", "finite"},
    {"native"},
    {"deltas"},
    {"demo"},
    {"checkpoints"},
    {"convert"},
    {"space"},
    {"audit", "vocabulary"},
    {"task_vectors"},
    {"transforms", "rules", "task_modules", "objectives"},
    {"backbones"},
    {"multitask", "data"},
    {"merged"},
    {"learnables"},
    {"loops", "resume"},
    {"opened"},
    {"evaluation", "recipe"},
    {"teachers", "scores"},
    {"artifact"},
    {"module", "callbacks", "progress", "report"},
    {"job", "processes", "comparison"},
    {"config", "run_folder", "plan", "tracking", "card", "mergekit", "runs", "attempts", "trainers"},
    {"pushing", "preflight"},
    {"stages", "exporting"},
    {"training", "rescore", "comparing"},
    {"cli"},
    {"fit"},
]
HOMES = {
    "lightning": {
        "data",
        "module",
        "callbacks",
        "progress",
        "processes",
        "config",
        "tracking",
        "trainers",
        "stages",
        "training",
    },
    "jsonargparse": {"config", "artifact", "cli"},
    "transformers": {"backbones", "demo"},
    "open_clip": {"backbones", "demo"},
    "wandb": {"tracking"},
    "matplotlib": {"report", "demo"},
    "rich": {"terminal", "backbones", "demo", "report", "teachers", "trainers", "progress"}
    | {"exporting", "runs", "rescore", "comparison", "preflight"},
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Absolute names imported at run time, wherever in the file; those for type checkers only do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (
                (f"adamerge.{alias.name}" for alias in node.names) if node.module == "adamerge" else [node.module]
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    layer = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    here = room_of(path)
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "adamerge" and rest and rest[0] != here:
            assert layer[rest[0]] < layer[here], f"{here} imports {name}"
        elif top in HOMES:
            assert here in HOMES[top], f"{here} imports {name}"


def test_every_room_has_a_layer():
    assert {room_of(path) for path in FILES} == set().union(*LAYERS)


def test_import_is_instant():
    best = min(_seconds("import adamerge") - _seconds("pass") for _ in range(3))
    assert best < 1


def _seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_import_loads_no_torch():
    code = "import sys, adamerge; assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inference_loads_no_lightning():
    code = "import sys, adamerge; adamerge.load, adamerge.MergedModel; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_unknown_ones_say_so():
    for name in adamerge.__all__:
        assert getattr(adamerge, name).__doc__
    with pytest.raises(AttributeError, match=r"has no attribute 'marge'; it has AdaMerge"):
        adamerge.marge  # noqa: B018


def test_training_without_a_chosen_logger_imports_no_wandb():
    code = "import sys, adamerge.cli; print([name for name in ('wandb', 'open_clip') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "[]"
