"""Models of the hub: what a source means, what is downloaded, what the cache still has, what is pushed."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from adamerge import hub as module
from adamerge.checkpoints import open_state
from adamerge.hub import HubId, card_data, commit_of, fetch, hub_id, push, remote_headers
from adamerge.types import InputError
from tests.hub_server import served_hub  # noqa: F401

CONFIG = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
CARD = "---\nlicense: mit\nbase_model: [org/base]\n---\n# A model\n---\n"
SMALL = {"config.json", "README.md", "tokenizer.json", "vocab.txt", "LICENSE"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny model in one file of about 1 MB, and in shards."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=3000, **CONFIG))
    home = tmp_path_factory.mktemp("bert")
    model.save_pretrained(home / "single")
    model.save_pretrained(home / "sharded", max_shard_size="300KB")
    return home


def folder(path, **more):
    files = {file.name: file for file in path.iterdir()}
    beside = {"README.md": CARD, "tokenizer.json": "{}", "vocab.txt": "a", "LICENSE": "MIT", "onnx/config.json": "{}"}
    never = {"flax_model.msgpack": b"f" * 5000, "tf_model.h5": b"h" * 5000, "pytorch_model.bin": b"p" * 5000}
    return {**files, **beside, **never, **more}


def names_in(path):
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("gpt2", "gpt2", None),
        ("org/name-1.5_b@v1", "org/name-1.5_b", "v1"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("hf-hub:org/name@main", "org/name", "main"),
        ("hf-hub:org/name.bin", "org/name.bin", None),
        ("org/here", "org/here", None),
        ("hf-hub:here", "here", None),
    ],
)
def test_what_names_a_model_on_the_hub(source, repo, revision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_id(source) == HubId(repo, revision)


@pytest.mark.parametrize(
    "source",
    [
        *["/org/name", "./name", "../name", ".name", "~/name", "~", "demo:synthetic/a", "open_clip:ViT-B-32/openai"],
        *["local-dir:here", "a/b/c", "org/", "/", "", "here", "here/file", "org/name@", "hf-hub:", "hf-hub:./name"],
        *["model.safetensors", "a/model.pt", "a.pth", "a.bin", "a.ckpt", "a.npz", "a.yaml", "a.json", "a.jsonl"],
        *["a.csv", "a/b.parquet", "model.pt@v1", "C:\\model", "org//name", "a b"],
    ],
)
def test_what_names_none(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    assert hub_id(source) is None


def test_a_model_of_one_file_is_fetched_once(hub, bert):
    hub.add("org/bert", folder(bert / "single", **{"other.safetensors": b"o"}))
    path = fetch("org/bert")
    assert names_in(path) == SMALL | {"model.safetensors"}
    whole = (bert / "single" / "model.safetensors").stat().st_size
    assert hub.sent(".safetensors") == whole
    assert fetch("org/bert") == path
    assert hub.sent(".safetensors") == whole
    assert set(open_state(path)) == set(open_state(bert / "single"))
    assert AutoModelForSequenceClassification.from_pretrained(path).config.hidden_size == CONFIG["hidden_size"]


def test_of_a_sharded_model_the_index_says_what_is_fetched(hub, bert):
    shards = {file.name for file in (bert / "sharded").glob("*.safetensors")}
    assert len(shards) > 2
    hub.add("org/bert", folder(bert / "sharded", **{"model.safetensors": b"of another commit" * 1000}))
    path = fetch("hf-hub:org/bert")
    assert names_in(path) == SMALL | shards | {"model.safetensors.index.json"}
    assert hub.sent("/model.safetensors") == 0
    expected = open_state(bert / "single")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in open_state(path).items())


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_without_weights_no_weights_are_sent(hub, bert, form):
    hub.add("bert", folder(bert / form))
    path = fetch("bert", weights=False)
    assert names_in(path) == SMALL
    assert not [each.path for each in hub.requests if each.path.endswith((".safetensors", ".bin", ".msgpack", ".h5"))]
    assert fetch("bert") == path
    assert set(open_state(path)) == set(open_state(bert / "single"))


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_headers_are_read_by_range(hub, bert, form):
    hub.add("org/bert", folder(bert / form))
    expected = {}
    with safe_open(bert / "single" / "model.safetensors", framework="pt") as file:
        for name in file.keys():
            expected[name] = (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype())
    assert remote_headers("org/bert") == expected
    asked = [each for each in hub.requests if each.path.endswith(".safetensors") and each.method == "GET"]
    assert all(each.range == "bytes=0-100000" and each.sent <= 100_001 for each in asked)
    assert hub.sent(".safetensors") < sum(file.stat().st_size for file in (bert / form).glob("*.safetensors")) / 2
    fetch("org/bert")
    hub.stop()
    assert remote_headers("org/bert") == expected


def test_a_long_header_takes_a_second_range(hub, tmp_path):
    tensors = {f"layer.{number}.{'x' * 100}": torch.zeros(100) for number in range(1000)}
    save_file(tensors, tmp_path / "model.safetensors")
    hub.add("org/long", {"model.safetensors": tmp_path / "model.safetensors"})
    assert set(remote_headers("org/long").values()) == {((100,), "F32")}
    assert hub.sent() < (tmp_path / "model.safetensors").stat().st_size


def test_branches_tags_and_commits(hub):
    first = hub.add("org/bert", {"config.json": '{"n": 1}'})
    hub.tag("org/bert", "v1")
    second = hub.add("org/bert", {"config.json": '{"n": 2}'})
    third = hub.add("org/bert", {"config.json": '{"n": 3}'}, revision="refs/pr/1")
    revisions = {"": second, "@main": second, "@v1": first, "@refs/pr/1": third, f"@{first}": first}
    for revision, commit in revisions.items():
        source = f"org/bert{revision}"
        assert commit_of(source) == commit
        path = fetch(source, weights=False)
        assert path.name == commit
        expected = {first: 1, second: 2, third: 3}[commit]
        assert json.loads((path / "config.json").read_text()) == {"n": expected}
    hub.stop()
    for revision, commit in revisions.items():
        assert commit_of(f"org/bert{revision}") == commit
        assert fetch(f"org/bert{revision}", weights=False).name == commit


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_without_network_the_cache_answers_at_once(hub, bert, form):
    hub.add("org/bert", folder(bert / form))
    path = fetch("org/bert")
    before = names_in(path)
    hub.stop()
    assert fetch("org/bert") == path
    assert fetch("org/bert", weights=False) == path
    assert card_data("org/bert")["license"] == "mit"
    assert names_in(path) == before
    for read in (fetch, commit_of, remote_headers, card_data):
        with pytest.raises(InputError, match=r"'org/other' is not, or not wholly, in the cache .* does not answer"):
            read("org/other")


def test_what_the_cache_has_in_part_is_said(hub, bert):
    hub.add("org/bert", folder(bert / "sharded"))
    path = fetch("org/bert", weights=False)
    hub.stop()
    assert fetch("org/bert", weights=False) == path
    for read in (fetch, remote_headers):
        with pytest.raises(InputError, match=r"'org/bert' is not, or not wholly, in the cache"):
            read("org/bert")
    if hasattr(huggingface_hub, "get_cached_repo_tree"):  # else nothing says what there should be
        (path / "vocab.txt").unlink()
        with pytest.raises(InputError, match=r"not wholly"):
            fetch("org/bert", weights=False)


def test_what_other_tools_downloaded_is_enough(hub, bert):
    hub.add("org/bert", {file.name: file for file in (bert / "sharded").iterdir()})
    AutoModelForSequenceClassification.from_pretrained("org/bert", cache_dir=constants.HF_HUB_CACHE)
    hub.add("org/other", folder(bert / "single"))
    snapshot_download("org/other", allow_patterns=["*.json", "*.txt", "model.safetensors"])
    hub.stop()
    for source in ("org/bert", "org/other"):
        assert set(open_state(fetch(source))) == set(open_state(bert / "single"))
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        with pytest.raises(InputError, match=r"not wholly, in the cache"):
            card_data("org/other")


def test_a_known_commit_alone_is_no_snapshot(hub):
    commit = hub.add("org/bert", {"config.json": "{}"})
    assert commit_of("org/bert") == commit
    hub.stop()
    assert commit_of("org/bert") == commit
    for read in (fetch, lambda source: fetch(source, weights=False), remote_headers):
        with pytest.raises(InputError, match=r"not wholly, in the cache"):
            read("org/bert")


def test_offline_by_choice_asks_nothing(hub, bert, monkeypatch):
    hub.add("org/bert", folder(bert / "single"))
    path = fetch("org/bert")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("org/bert") == path
    assert not hub.requests


def test_a_hub_that_fails_leaves_the_cache(hub, bert):
    hub.add("org/bert", folder(bert / "single"))
    path = fetch("org/bert")
    hub.failing = 500
    assert fetch("org/bert") == path
    with pytest.raises(InputError, match=r"cannot serve 'org/other' now \(500: .*try again later"):
        fetch("org/other")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_not_fetched(hub, name):
    hub.add("org/old", {"config.json": "{}", name: b"p" * 1000, "training_args.bin": b"t" * 1000})
    message = rf"only as 1 pickles \(first: {name}\).*hf download org/old --local-dir FOLDER.*`adamerge convert`"
    for read in (fetch, remote_headers):
        with pytest.raises(InputError, match=message):
            read("org/old")
    assert hub.sent(name) == 0
    assert names_in(fetch("org/old", weights=False)) == {"config.json"}


def test_weights_of_unclear_choice_or_none(hub):
    hub.add("org/none", {"config.json": "{}", "training_args.bin": b"t"})
    with pytest.raises(InputError, match=r"'org/none' holds no weights in safetensors"):
        fetch("org/none")
    hub.add("org/two", {"a.safetensors": b"a", "b.safetensors": b"b"})
    with pytest.raises(InputError, match=r"holds 2 files \*\.safetensors, none of which is called model\.safetensors"):
        fetch("org/two")
    hub.add("org/index", {"model.safetensors.index.json": "[]"})
    with pytest.raises(InputError, match=r"is no index of shards"):
        fetch("org/index")
    hub.add("org/lost", {"model.safetensors.index.json": '{"weight_map": {"w": "lost.safetensors"}}'})
    with pytest.raises(InputError, match=r"names 1 shards that are not there \(first: lost\.safetensors\)"):
        fetch("org/lost")
    hub.add("org/damaged", {"model.safetensors": b"x" * 1000})
    with pytest.raises(InputError, match=r"A file of 'org/damaged' is no safetensors file"):
        remote_headers("org/damaged")
    damaged = fetch("org/damaged") / "model.safetensors"
    with pytest.raises(InputError, match=rf"{damaged} is no safetensors file .*remove it"):
        remote_headers("org/damaged")
    hub.add("org/open", {"open_clip_model.safetensors": b"a", "open_clip_config.json": "{}"})
    assert names_in(fetch("org/open")) == {"open_clip_model.safetensors", "open_clip_config.json"}


@pytest.mark.parametrize("read", [fetch, commit_of, remote_headers, card_data])
def test_names_that_are_not_there(hub, read, monkeypatch):
    hub.add("org/bert", {"config.json": "{}"})
    with pytest.raises(InputError, match=r"There is no 'org/wrong' on http.*no file or folder .*hf auth login"):
        read("org/wrong")
    with pytest.raises(InputError, match=r"'org/bert' has no revision 'v9': name a branch, tag or commit of http"):
        read("org/bert@v9")
    with pytest.raises(InputError, match=r"'org/a--b' is no name on the hub"):
        read("org/a--b")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"There is no 'org/wrong' on http"):
        read("org/wrong")
    if read is not card_data:
        with pytest.raises(InputError, match=r"'\./x' is no model on the hub; write org/name"):
            read("./x")


def test_a_commit_that_is_not_there(hub):
    hub.add("org/bert", {"config.json": "{}"})
    with pytest.raises(InputError, match=r"has no revision '0{40}'"):
        fetch("org/bert@" + "0" * 40)


def test_private_and_gated_models(hub, monkeypatch):
    hub.add("org/private", {"config.json": "{}"}, private=True)
    hub.add("org/gated", {"config.json": "{}"}, gated=True)
    assert fetch("org/private", weights=False)
    with pytest.raises(InputError, match=r"'org/gated' is gated: accept its terms at http.*/org/gated, then log in"):
        fetch("org/gated", weights=False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"refuses your token \(401: .*hf auth login"):
        commit_of("org/private")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"There is no 'org/private' on .*if it is private, log in"):
        commit_of("org/private")


def test_card_data_of_the_hub_and_of_folders(hub, tmp_path, caplog):
    hub.add("org/bert", {"README.md": CARD, "model.safetensors": b"x"})
    assert card_data("org/bert") == {"license": "mit", "base_model": ["org/base"]}
    hub.add("org/bare", {"config.json": "{}"})
    assert card_data("org/bare") == {}
    assert card_data(str(tmp_path)) == card_data("demo:synthetic/a") == {}
    for text, expected in {
        CARD: {"license": "mit", "base_model": ["org/base"]},
        CARD.replace("\n", "\r\n"): {"license": "mit", "base_model": ["org/base"]},
        "# No metadata\n---\na: b\n---\n": {},
        "---\n---\n": {},
        "---\n- a\n---\n": {},
        "---\na: [\n---\n": {},
        "": {},
    }.items():
        (tmp_path / "README.md").write_bytes(text.encode())
        assert card_data(str(tmp_path)) == card_data(f"local-dir:{tmp_path}") == expected
    assert "is no YAML and is not read" in caplog.text


def test_a_read_only_cache_still_serves(hub, bert, monkeypatch):
    hub.add("org/bert", folder(bert / "single"))
    path = fetch("org/bert")
    monkeypatch.setattr(module.os, "replace", lambda *args: (_ for _ in ()).throw(PermissionError(13, "read-only")))
    assert fetch("org/bert") == path


def test_a_cache_that_cannot_be_written_is_said(hub, tmp_path, monkeypatch):
    hub.add("org/bert", {"config.json": "{}"})
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(InputError, match=r"The cache .*file/hub cannot be written .*set HF_HUB_CACHE"):
        fetch("org/bert", weights=False)


def test_push_makes_a_private_model_and_replaces_it(hub, bert, tmp_path):
    address = push(bert / "sharded", "org/merged", message="first")
    files = hub.files("org/merged")
    assert address == f"{hub.url}/org/merged/commit/{commit_of('org/merged')}"
    assert hub.is_private("org/merged")
    assert files.keys() - {".gitattributes"} == names_in(bert / "sharded")
    assert set(open_state(fetch("org/merged"))) == set(open_state(bert / "single"))
    assert hub.repos["model", "org/merged"].messages[commit_of("org/merged")] == "first"
    hub.add("org/merged", {"figure.svg": "drawn by hand", "more/model.safetensors": b"also"})
    push(bert / "single", "org/merged", private=False, message="second")
    kept = {".gitattributes", "figure.svg", "more/model.safetensors"}
    assert hub.files("org/merged").keys() - kept == names_in(bert / "single")
    assert hub.is_private("org/merged")  # as it was
    assert len(hub.repos["model", "org/merged"].commits) == 4  # made, first, by hand, second
    before = commit_of("org/merged")
    assert push(bert / "single", "org/merged", message="the same").endswith(f"commit/{before}")


def test_push_in_public_to_a_branch_of_ones_own(hub, tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    push(tmp_path, "merged", private=False, message="first", revision="v2")
    assert not hub.is_private("tester/merged")
    assert "README.md" in hub.files("tester/merged", revision="v2")
    assert "README.md" not in hub.files("tester/merged")
    push(tmp_path, "tester/merged", message="second", revision="v2")
    assert card_data("tester/merged@v2")["license"] == "mit"


def test_what_cannot_be_pushed_is_said(hub, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match=r"There is no folder .*none to push to 'org/a'"):
        push(tmp_path / "none", "org/a", message="m")
    with pytest.raises(InputError, match=r"token may not write to 'stranger/a' \(403: .*HF_TOKEN"):
        push(tmp_path, "stranger/a", message="m")
    hub.add("stranger/b", {"config.json": "{}"})
    with pytest.raises(InputError, match=r"token may not write to 'stranger/b' \(403: "):
        push(tmp_path, "stranger/b", message="m")
    with pytest.raises(InputError, match=r"'org/a--b' is no name on the hub"):
        push(tmp_path, "org/a--b", message="m")
    with pytest.raises(InputError, match=r"token may not write to 'org/a' \(401: "):
        push(tmp_path, "org/a", message="m", token="hf_wrong")
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(InputError, match=r"The hub refuses what is pushed to 'org/a': Invalid metadata in README"):
        push(tmp_path, "org/a", message="m")
    (tmp_path / "README.md").unlink()
    hub.failing = 503
    with pytest.raises(InputError, match=r"cannot serve 'org/a' now \(503"):
        push(tmp_path, "org/a", message="m")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        InputError, match=r"Pushing to 'org/a' needs a token: log in with `hf auth login` or set HF_TOK"
    ):
        push(tmp_path, "org/a", message="m")
    hub.stop()
    with pytest.raises(InputError, match=r"Nothing was pushed to 'org/a': http.* does not answer .*push again"):
        push(tmp_path, "org/a", message="m", token="hf_any")


def test_a_data_set_of_the_hub(hub, tmp_path):
    import datasets

    first = hub.add(
        "org/rows", {"train.jsonl": '{"text": "a"}\n{"text": "b"}\n', "README.md": "# Rows"}, kind="dataset"
    )
    datasets.Dataset.from_dict({"text": ["c"]}).to_parquet(tmp_path / "train.parquet")
    hub.add("org/rows", {"train.jsonl": None, "train.parquet": tmp_path / "train.parquet"}, kind="dataset")
    assert datasets.load_dataset("org/rows", split="train", revision=first)["text"][:] == ["a", "b"]
    assert datasets.load_dataset("org/rows", split="train", revision="main")["text"][:] == ["c"]
    assert datasets.load_dataset("org/rows", split="train")["text"][:] == ["c"]


def test_transformers_and_a_fresh_process_use_it(hub, bert):
    hub.add("org/bert", folder(bert / "single"))
    assert AutoModelForSequenceClassification.from_pretrained("org/bert").config.hidden_size == CONFIG["hidden_size"]
    code = "from adamerge.hub import fetch; print(fetch('org/bert'))"
    environment = {**os.environ, **hub.environment}
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == str(fetch("org/bert"))
