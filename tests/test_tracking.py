"""Weights & Biases, with the real client: offline, into folders of the tests, read back from its own files."""

import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.launch.sweeps import utils as sweeps

import adamerge
from adamerge.config import make_parser
from adamerge.tracking.online import check_online
from adamerge.types import InputError
from tests.tiny import TASKS, Net, config_of, data_of, write_pool

ROOT = Path(__file__).parent.parent
LOGGER = {"class_path": "lightning.pytorch.loggers.WandbLogger"}


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No key, no W&B run and no settings of other tests, an empty working directory that stays empty."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name, value in elsewhere(tmp_path).items():
        monkeypatch.setenv(name, value)
    yield
    assert wandb.run is None
    assert not list((tmp_path / "cwd").iterdir())
    wandb.teardown()


def elsewhere(folder):
    """Environment variables that keep wandb's keys and staged files out of the home directory."""
    names = {"NETRC": "netrc", "WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache", "WANDB_CONFIG_DIR": "settings"}
    return {key: str(folder / "home" / name) for key, name in names.items()}


class Sent:
    """What a W&B run wrote, read from its transaction log: blocks of 32 KiB, records cut at their ends."""

    def __init__(self, run_folder):
        (self.folder,) = (each for each in (run_folder / "wandb").glob("*run-*") if not each.is_symlink())
        (log,) = self.folder.glob("*.wandb")
        deadline = time.monotonic() + 30  # a process of wandb's own writes the last records after `finish`
        self.records = []
        while not self.all("exit") and time.monotonic() < deadline:
            time.sleep(0.02)
            self.records = list(_records(log.read_bytes()))
        (self.run,) = self.all("run")
        self.config = {e.key: json.loads(e.value_json) for each in self.all("config") for e in each.update}
        self.history = [_named(each.item) for each in self.all("history")]
        self.summary = {key: value for each in self.all("summary") for key, value in _named(each.update).items()}
        (self.status,) = (each.exit_code for each in self.all("exit"))
        self.merges = [each for each in self.all("artifact") if each.type == "merge"]
        self.images = sorted((self.folder / "files" / "media" / "images" / "coefficients").glob("heatmap*.png"))

    def all(self, kind):
        return [getattr(each, kind) for each in self.records if each.WhichOneof("record_type") == kind]

    def table(self, name):
        (file,) = (self.folder / "files" / "media" / "table" / name).glob("*.json")
        content = json.loads(file.read_text())
        return content["columns"], content["data"]

    def steps_of(self, name):
        return [row["trainer/global_step"] for row in self.history if any(key.startswith(name) for key in row)]


def _records(data):
    place, whole = 7, b""  # after the file's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if place + 7 + size > len(data):  # still being written
            return
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(whole)
            whole = b""


def _named(items):
    return {"/".join([item.key, *item.nested_key]).lstrip("/"): json.loads(item.value_json) for item in items}


# --- one run, looked at from all sides


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    plain = config_of(write_pool(folder))
    plain["trainer"].update(max_steps=5, log_every_n_steps=1, val_check_interval=2, logger=LOGGER)
    plain["run"].update(root=str(folder / "runs"), baselines=True, plot_every=2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**elsewhere(folder), "WANDB_MODE": "offline"}.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        run = adamerge.train(plain)
    assert not (folder / "wandb").exists()
    assert not (folder / "lightning_logs").exists()
    return run, Sent(run.dir)


def test_a_finished_run_is_in_the_default_project(done):
    _, sent = done
    assert sent.run.project == "adamerge"
    assert sent.status == 0
    assert sent.folder.name.startswith("offline-run-")


def test_the_resolved_configuration_is_the_run_s(done):
    run, sent = done
    resolved = yaml.safe_load((run.dir / "config.yaml").read_text())
    assert resolved["model"]["rule"]["init_args"]["init"] == 0.3
    assert {key: sent.config[key] for key in resolved} == resolved


def test_losses_and_scores_are_logged_per_task(done):
    run, sent = done
    for task in TASKS:
        assert sent.steps_of(f"train/{task}/entropy") == [0, 1, 2, 3, 4]
        assert sent.steps_of(f"val/{task}/accuracy") == [1, 3]
        assert sent.summary[f"scores/this merge/{task}"] == run.scores["this merge"][task]
    mean = sum(run.scores["this merge"].values()) / len(TASKS)
    assert sent.summary["scores/this merge/mean"] == pytest.approx(mean)


def test_the_table_of_scores_has_the_baselines(done):
    run, sent = done
    columns, rows = sent.table("scores")
    assert columns == ["merge", *TASKS, "mean"]
    assert [row[0] for row in rows] == list(run.scores)
    assert rows[0][1:4] == [run.scores["base"][task] for task in TASKS]
    expert = next(row for row in rows if row[0] == "expert b")
    assert expert[1:] == [None, run.scores["expert b"]["b"], None, run.scores["expert b"]["b"]]


def test_coefficients_are_pictures_on_the_way_and_a_table_at_the_end(done):
    run, sent = done
    rule = run.learned.rule
    assert sent.steps_of("coefficients/heatmap") == [2, 4, 5]
    assert len(sent.images) == 3
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in sent.images)
    columns, rows = sent.table("coefficients")
    assert columns == ["task", "group", "coefficient"]
    assert [row[:2] for row in rows] == [[task, group] for task in rule.tasks for group in rule.groups]
    assert torch.allclose(torch.tensor([row[2] for row in rows]).view(3, -1), rule.coefficients())


def test_the_merge_is_an_artifact_that_lies_in_the_run(done):
    run, sent = done
    (artifact,) = sent.merges
    assert artifact.name == f"merge-{sent.run.run_id}"
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert files == {name: run.dir / "merge" / name for name in ("merge.yaml", "merge.safetensors")}


# --- from run to run


def test_resume_goes_on_with_the_same_w_and_b_run(config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    part = adamerge.train(config(trainer={"logger": LOGGER, "max_steps": 2}, run={"checkpoint_every": 2}))
    rest = adamerge.train(config(trainer={"logger": LOGGER, "max_steps": 3}), ckpt_path=str(part.dir))
    one, two = Sent(part.dir), Sent(rest.dir)
    assert one.run.run_id == two.run.run_id
    assert two.run.project == "mine"
    assert two.steps_of("coefficients/heatmap") == [3]

    named = {**LOGGER, "init_args": {"id": "my-own"}}
    other = adamerge.train(config(trainer={"logger": named, "max_steps": 3}), ckpt_path=str(part.dir))
    assert Sent(other.dir).run.run_id == "my-own"

    plain = adamerge.train(config(trainer={"max_steps": 2}, run={"checkpoint_every": 2}))  # and without one before
    fresh = adamerge.train(config(trainer={"logger": LOGGER, "max_steps": 3}), ckpt_path=str(plain.dir))
    assert Sent(fresh.dir).run.run_id != one.run.run_id


class Strength(adamerge.MergeRule):
    """A rule that has no coefficients per task and group."""

    axes = {"strength_T": ("task",)}  # noqa: RUF012

    def __init__(self, vectors):
        super().__init__(vectors)
        self.strength_T = nn.Parameter(torch.full((len(self.tasks),), 0.3))

    def merge(self, name, base, deltas, shared):
        return deltas.combine(self.strength_T, base)


def test_one_logger_serves_two_runs_and_a_rule_without_coefficients_shows_none(pool, tmp_path):
    from adamerge.backbones import Module
    from adamerge.recipe import SpaceOptions

    experts = {task: str(pool[task]) for task in TASKS}
    logger = WandbLogger(offline=True, name="twice")

    def train(**more):
        recipe = adamerge.Recipe(str(pool["base"]), experts, Module(Net), space=SpaceOptions(skip=r"^head\."), **more)
        options = adamerge.RunOptions(root=str(tmp_path / "runs"), baselines=False, plot_every=1)
        return adamerge.train(
            recipe, data_of(), trainer={"max_steps": 2, "accelerator": "cpu", "logger": logger}, run=options
        )

    first, second = Sent(train().dir), Sent(train(rule=Strength).dir)
    assert first.run.run_id != second.run.run_id
    assert first.run.display_name == second.run.display_name == "twice"
    assert first.steps_of("coefficients") == [1, 2, 2]
    assert second.steps_of("coefficients") == []
    assert second.merges
    assert "WANDB_MODE" not in os.environ  # nothing stays behind


def test_a_run_of_the_caller_s_own_is_used_and_left_open(config, tmp_path):
    with wandb.init(mode="offline", dir=tmp_path, project="theirs") as own:
        with pytest.warns(UserWarning, match="already in progress"):
            adamerge.train(config(trainer={"logger": LOGGER}))
        own.log({"afterwards": 1})
        assert own.summary.get("scores/this merge/mean") is not None


# --- ends


class Stops(adamerge.Objective):
    """Entropy; the fifth call presses Ctrl-C or fails."""

    def __init__(self, *, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, out, batch):
        from adamerge.objectives import Entropy

        self.calls += 1
        if self.calls == 5 and self.how == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        elif self.calls == 5:
            raise RuntimeError("broken")
        return Entropy()(out, batch)


@pytest.mark.parametrize(("how", "error", "status"), [("ctrl-c", KeyboardInterrupt, 255), ("failure", RuntimeError, 1)])
def test_a_run_that_ends_early_is_finished_as_such_with_its_merge(config, monkeypatch, how, error, status):
    monkeypatch.setenv("WANDB_MODE", "offline")
    objectives = [{"class_path": "tests.test_tracking.Stops", "init_args": {"how": how}}]
    plain = config({"objectives": objectives}, trainer={"logger": LOGGER, "max_steps": 9})
    with pytest.raises(error):
        adamerge.train(plain)
    (folder,) = (Path(plain["run"]["root"]) / "merge").iterdir()
    sent = Sent(folder)
    assert sent.status == status
    assert len(sent.merges) == 1
    assert sent.table("coefficients")


# --- online or not


def test_without_a_key_the_run_is_offline_and_says_how_to_send_it(config, caplog):
    run = adamerge.train(config(trainer={"logger": [LOGGER]}))
    sent = Sent(run.dir)
    warnings = [each.getMessage() for each in caplog.records if "W&B" in each.getMessage()]
    assert warnings == [
        f"W&B is offline: there is no API key (see `wandb login`). Send the run later: wandb sync {sent.folder}"
    ]


def test_disabled_leaves_nothing(config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    part = adamerge.train(config(trainer={"logger": LOGGER}, run={"checkpoint_every": 2}))
    assert not (part.dir / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    rest = adamerge.train(config(trainer={"logger": LOGGER, "max_steps": 5}), ckpt_path=str(part.dir))
    assert Sent(rest.dir).status == 0


@pytest.mark.parametrize("place", ["environment", "netrc", "logger"])
def test_with_a_key_it_asks_whether_the_server_answers(monkeypatch, tmp_path, place):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    init = {"settings": wandb.Settings(api_key="a" * 40)} if place == "logger" else {}
    if place == "netrc":
        Path(os.environ["NETRC"]).parent.mkdir()
        Path(os.environ["NETRC"]).write_text(f"machine 127.0.0.1:9\n  login user\n  password {'a' * 40}\n")
    elif place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    start = time.monotonic()
    with pytest.raises(wandb.Error, match=r"^127.0.0.1 does not answer$"):
        check_online(init)
    assert time.monotonic() - start < 5


def test_a_server_that_answers_is_used(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        check_online({"settings": {"base_url": address}})
        monkeypatch.setenv("http_proxy", address.removeprefix("http://"))  # behind which everything is reachable
        check_online({"settings": {"base_url": "http://wandb.invalid"}})


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("online", r"there is no API key \(see `wandb login`\)\. Mend"),
        ("offlin", "its mode is 'offlin', which is none of"),
    ],
)
def test_a_mode_that_was_asked_for_and_cannot_be_is_one_clear_error(config, monkeypatch, mode, message):
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(InputError, match=f"^W&B could not start: {message}"):
        adamerge.train(config(trainer={"logger": LOGGER}))


@pytest.mark.parametrize("key", ["short", "a" * 40])
def test_a_server_that_does_not_take_the_key_costs_no_run(config, monkeypatch, caplog, key):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", key)
        run = adamerge.train(config(trainer={"logger": LOGGER}))
        server.shutdown()
    (folder,) = (run.dir / "wandb").glob("offline-run-*")
    assert re.search(rf"W&B is offline: .+\. Send the run later: wandb sync {folder}", caplog.text)


class Refuses(BaseHTTPRequestHandler):
    """Answers that the key is wrong."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(401)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("models", [True, "all"])
def test_offline_and_log_model_exclude_each_other(config, models):
    logger = {**LOGGER, "init_args": {"offline": True, "log_model": models}}
    for given in (logger, [logger]):
        with pytest.raises(InputError, match=r"^`trainer.logger` has `offline` and `log_model`, which exclude"):
            adamerge.train(config(trainer={"logger": given}))


# --- as processes


@pytest.mark.slow
def test_training_with_csv_alone_does_not_import_wandb(config, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config()))
    code = "import sys, adamerge; adamerge.train(sys.argv[1]); assert 'wandb' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "config.yaml"], check=True, env=environment)


@pytest.mark.slow
def test_two_ranks_at_a_terminal_ask_nothing_and_only_the_first_writes(config, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(trainer={"devices": 2})))
    ours, theirs = pty.openpty()
    options = ["--config", tmp_path / "config.yaml", "--trainer.logger", LOGGER["class_path"]]
    process = subprocess.Popen(
        [sys.executable, "-m", "adamerge.fit", *options, "--trainer.enable_progress_bar=false"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 65536):
            said += piece
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait(60) == 0, said.decode()
    (folder,) = (tmp_path / "runs" / "config").iterdir()
    assert Sent(folder).status == 0
    assert len(re.findall(r"W&B is offline: there is no API key", re.sub(r"\s+", " ", said.decode()))) == 1


# --- the sweep


def test_the_sweep_s_command_is_what_the_parser_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = sweeps.load_sweep_config("configs/sweep.yaml")
    assert sweep["method"] in {"random", "grid", "bayes"}
    drawn = {}
    for name, space in sweep["parameters"].items():
        drawn[name] = {"value": space["values"][0] if "values" in space else space["min"]}
    made = sweeps.create_sweep_command_args({"args": drawn})
    filled = [made["args"] if word == "${args}" else [word] for word in sweeps.create_sweep_command(sweep["command"])]
    line = [word for words in filled for word in words]
    assert line[:4] == ["${env}", "python", "-m", "adamerge.fit"]
    parsed = make_parser().parse_args(line[4:])
    for name, value in drawn.items():
        assert parsed[name] == value["value"] != make_parser().parse_args(["--config=configs/digits.yaml"]).get(name)
    assert parsed.trainer.logger.class_path.endswith("WandbLogger")
    assert parsed.run.baselines is False
    assert sweep["metric"]["name"] in {"val/accuracy", "train/loss"}


def test_a_run_of_a_sweep_is_the_agent_s(config, monkeypatch, tmp_path):
    (tmp_path / "drawn.yaml").write_text(yaml.safe_dump({"wandb_version": 1, "data.batch_size": {"value": 4}}))
    given = {"MODE": "offline", "SWEEP_ID": "s1", "RUN_ID": "r1", "SWEEP_PARAM_PATH": str(tmp_path / "drawn.yaml")}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    sent = Sent(adamerge.train(config(trainer={"logger": LOGGER})).dir)
    assert (sent.run.run_id, sent.run.sweep_id) == ("r1", "s1")
    assert sent.config["data"]["batch_size"] == 4
