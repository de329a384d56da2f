"""What strangers bring along, as tests see it: code that leaves a file where it ran."""

import builtins
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import dynamic_module_utils

from adamerge.artifact import RECORD, WEIGHTS
from adamerge.files import digest

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, PretrainedConfig, PreTrainedTokenizerFast
Path({mark!r}).write_text({says!r})

class Config(BertConfig):
    model_type = "stranger"

class Net(BertForSequenceClassification):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass

Processor = Data = Tokenizer
"""


class Canary:
    """A file that foreign code writes once it runs.

    Args:
        folder: Where.
    """

    def __init__(self, folder):
        self.mark = Path(folder) / "it_ran"

    @property
    def said(self):
        """What the code that ran last says; None where none ran."""
        return self.mark.read_text() if self.mark.exists() else None

    def code(self, says="it ran"):
        """A module for transformers' `auto_map`: `stranger.Config`, `.Net`, `.Tokenizer`, `.Processor`."""
        return CODE.format(mark=str(self.mark), says=says)

    def pickle(self, file):
        """A file that runs code where it is unpickled."""
        file.write_bytes(pickle.dumps(self))

    def __reduce__(self):
        return exec, (f"import pathlib; pathlib.Path({str(self.mark)!r}).write_text('unpickled')",)


def edit(file, **changes):
    """Change entries of a JSON file, which is made if need be; None removes one."""
    told = json.loads(file.read_text()) if file.exists() else {}
    told = {key: value for key, value in {**told, **changes}.items() if value is not None}
    file.write_text(json.dumps(told))


def write_record(folder, backbone, sources, **changes):
    """A merge of a stranger's: its backbone, and its sources as a path or entry for `base` and each task."""
    folder.mkdir(parents=True)
    tasks = [name for name in sources if name != "base"]
    save_file({"rule.raw_TG": torch.zeros(len(tasks), 1)}, folder / WEIGHTS)
    entries = {
        name if name == "base" else f"expert {name}": {"sha256": "0" * 64}
        | (source if isinstance(source, dict) else {"source": str(source)})
        for name, source in sources.items()
    }
    record = {
        **{"format": 2, "weights": digest(folder / WEIGHTS), "labels": {"task": tasks, "group": ["model"]}},
        **{"sources": entries, "backbone": backbone, "transforms": [], "task_modules": []},
        **{"rule": {"class_path": "adamerge.rules.TaskWise", "init_args": {}}, "space": {}, "vectors": {}},
        **{"left_out": {}, "classes": {task: ["x", "y"] for task in tasks}, "folds": True},
        **{"widths": {"features": 2, "blocks": {}}},
    }
    (folder / RECORD).write_text(yaml.safe_dump({**record, **changes}))
    return folder


def backbone(cls, **options):
    """The text form of a backbone."""
    return {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": options}


@pytest.fixture(name="canary")
def quiet_canary(tmp_path, monkeypatch):
    """Nobody may be asked at a terminal; modules of strangers lie in a folder of the test."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "no")
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))  # a head that was kept would hide how it is made
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield Canary(tmp_path)
    assert not asked


@pytest.fixture(name="stranger")
def strange_folder(canary, tmp_path):
    """A folder whose configuration wants code run."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "stranger.py").write_text(canary.code())
    edit(folder / "config.json", model_type="stranger", auto_map={"AutoConfig": "stranger.Config"})
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    return folder
