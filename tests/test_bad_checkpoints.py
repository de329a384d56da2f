"""Checkpoints that cannot be merged: said by their headers, all at once, before anything is fetched or written."""

# The pains of users that concern checkpoints and data, by their number in the study, and where each is tested:
#  1 errors after long downloads     here: test_what_is_wrong_*, test_all_of_it_at_once; test_preflight.py
#  2 vocabularies                    test_vocabulary.py
#  3 shapes                          here: OF_HEADERS["shape"], test_the_advice_of_skip_works
#  4 out of memory                   test_preflight.py: test_what_a_check_tells
#  8 tied or missing weights         here: test_untied_copies_*; test_networks.py: test_a_tied_tensor_may_be_stored_*
#  9 architectures                   test_transformers.py: test_other_architectures_too; test_networks.py
# 10 pickles                         here: test_a_pickled_folder_names_convert_and_that_works; test_convert.py
# 12 my own tasks                    test_text_data.py, test_images.py; test_preflight.py: LOCAL_DATA
# 15 merged is not the live model    test_transformers.py: test_it_trains_saves_loads_exports_and_loads_again
# close behind: disk (test_preflight.py: test_a_full_disk_*), quantised (here: OF_HEADERS["int8"] and on),
#               unsafe loading (test_checkpoints.py: test_bad_source; test_convert.py)

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import adamerge
from adamerge.config import parse
from adamerge.convert import convert
from adamerge.preflight import check
from adamerge.types import InputError
from tests.checkpoints_hf import CLASSES, CONFIGS, save, shard, write
from tests.hub_server import served_hub  # noqa: F401

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Pools of good checkpoints by the kind of network; not to be changed."""
    root, made = tmp_path_factory.mktemp("pools"), {}
    autos = {"t5": "AutoModelForSeq2SeqLM", "clip": "AutoModel"}

    def of(kind):
        if kind not in made:
            made[kind] = write(root / kind, kind, autos.get(kind, "AutoModelForSequenceClassification"))
            if kind == "bert":
                made["distilbert"] = write(root / "distilbert", "distilbert", "AutoModelForSequenceClassification")
        return made[kind]

    return of


@pytest.fixture
def pool(pools, tmp_path):
    """A pool of one's own."""

    def copy(kind="bert"):
        shutil.copytree(pools(kind)["base"].parent, tmp_path / "pool")
        return {name: tmp_path / "pool" / name for name in ("base", *CLASSES)}

    return copy


def config(sources, root, *, backbone="TextClassifier", data="Texts", arguments=(), **model):
    """A configuration of a pool, as plain data."""
    return {
        "model": {
            "base": str(sources["base"]),
            "experts": {task: str(sources[task]) for task in CLASSES},
            "backbone": {"class_path": f"adamerge.backbones.{backbone}", "init_args": dict(arguments)},
            **model,
        },
        "data": {
            "tasks": {t: {"class_path": f"tests.checkpoints_hf.{data}", "init_args": {"task": t}} for t in CLASSES},
            "batch_size": 4,
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "logger": False},
        "run": {"baselines": False, "root": str(root / "runs")},
    }


def checked(plain, *, deep=False):
    return check(parse(plain, {}), deep=deep)


def refused(plain, messages, root, *, deep=False):
    """What both a check and a run say; neither leaves anything."""
    with pytest.raises(InputError) as found:
        checked(plain, deep=deep)
    said = str(found.value)
    with pytest.raises(InputError) as of_run:
        adamerge.train(plain)
    assert not (root / "runs").exists()
    for message in messages:
        assert re.search(message, said), said
        assert deep or re.search(message, str(of_run.value))
    return said


def edit(folder, **options):
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **options}))


def tensors(folder, change):
    state = load_file(folder / FILE)
    save_file(change(state) or state, folder / FILE, {"format": "pt"})


# --- changes, each of a pool's folders by name


def other_architecture(pool, pools):
    shutil.rmtree(pool["a"])
    shutil.copytree(pools("distilbert")["a"], pool["a"])


def other_activation(pool, pools):
    edit(pool["a"], hidden_act="relu")


def other_heads(pool, pools):
    edit(pool["a"], num_attention_heads=4)


def other_number_of_labels(pool, pools):
    shutil.rmtree(pool["a"])
    shutil.copytree(pool["b"], pool["a"])


def other_order(pool, pools):
    edit(pool["b"], id2label={"0": "eel", "1": "cat", "2": "dog"}, label2id={"eel": 0, "cat": 1, "dog": 2})


def no_head(pool, pools):
    tensors(pool["a"], lambda state: {name: t for name, t in state.items() if not name.startswith("classifier")})


def missing(pool, pools):
    tensors(pool["a"], lambda state: drop(state, "layer.1.output"))


def drop(state, part):
    return {name: tensor for name, tensor in state.items() if part not in name}


def extra_layer(pool, pools):
    def change(state):
        more = {name.replace("layer.1.", "layer.2."): tensor.clone() for name, tensor in state.items()}
        return {**more, **state}

    tensors(pool["a"], change)


def shape(pool, pools):
    name = "bert.encoder.layer.0.intermediate.dense.bias"
    tensors(pool["a"], lambda state: {**state, name: torch.zeros(40)})


def narrow(dtype):
    name = "bert.encoder.layer.0.output.dense.weight"
    return lambda pool, pools: tensors(pool["a"], lambda state: {**state, name: state[name].to(dtype)})


def quantised_by_config(pool, pools):
    edit(pool["a"], quantization_config={"quant_method": "gptq", "bits": 4})


def base_without_config(pool, pools):
    (pool["base"] / "config.json").unlink()


def expert_that_is_not_there(pool, pools):
    shutil.rmtree(pool["b"])


def twice(pool, pools):
    def change(state):
        both = {f"{prefix}.{name}": tensor.clone() for prefix in ("model", "ema") for name, tensor in state.items()}
        return {name: tensor for name, tensor in both.items() if "classifier" not in name} | {
            name: tensor for name, tensor in state.items() if "classifier" in name
        }

    tensors(pool["a"], change)


def truncated(pool, pools):
    (pool["a"] / FILE).write_bytes((pool["a"] / FILE).read_bytes()[:-1000])


def lost_shard(pool, pools):
    shard(pool["a"])
    sorted(pool["a"].glob("*.safetensors"))[0].unlink()


def base_lacks(part):
    return lambda pool, pools: tensors(pool["base"], lambda state: drop(state, part))


def remote_code(pool, pools):
    edit(pool["a"], model_type="newbert", auto_map={"AutoConfig": "code.NewConfig"})
    (pool["a"] / "code.py").write_text("raise SystemExit('it ran')")


OF_HEADERS = {  # a change, and what is said of it
    "other architecture": (other_architecture, [r"is a distilbert, .* a bert\. Merge fine-tunes of one model"]),
    "other activation": (other_activation, [r"Expert 'a': .*otherwise than .*: hidden_act is relu, not gelu"]),
    "other heads": (other_heads, [r"num_attention_heads is 4, not 2"]),
    "number of labels": (other_number_of_labels, [r"Task 'a' has 2 classes, its head in .*/a 3"]),
    "other order": (other_order, [r"numbers its classes eel, cat, dog; the data number them cat, dog, eel\. Give"]),
    "no head": (no_head, [r"Task 'a': .* has no head 'classifier.weight'; give an expert that was saved with"]),
    "missing": (missing, [r"Expert 'a' .*missing tensors: 4 \(first: bert\.encoder\.layer\.1\.output"]),
    "extra layer": (extra_layer, [r"tensors the network does not have: 16 \(first: bert\.encoder\.layer\.2"]),
    "shape": (shape, [r"other shapes: 1 \(bert.*bias is \[40\], the network's \[32\]\).*`model\.space\.skip`"]),
    "int8": (narrow(torch.int8), [r"quantised or integer .*dense\.weight is int8"]),
    "uint8": (narrow(torch.uint8), [r"quantised or integer .*dense\.weight is uint8"]),
    "float8": (narrow(torch.float8_e4m3fn), [r"quantised or integer .*dense\.weight is float8_e4m3fn"]),
    "quantised": (quantised_by_config, [r"is quantised, and quantised weights have no task vector\. Name the checkp"]),
    "base without config": (base_without_config, [r"'.*base' has no config\.json\. Name a folder or hub id"]),
    "no expert": (expert_that_is_not_there, [r"no .*pool/b'"]),
    "twice": (twice, [r"holds the network 2 times, under 'ema\.bert\.' and 'model\.bert\.'; save the one"]),
    "truncated": (truncated, [r"is not a whole safetensors file .*copy it again"]),
    "lost shard": (lost_shard, [r"names the shard 'model-00001.*', which is missing; copy the whole folder"]),
    "base lacks a layer": (base_lacks("layer.1."), [r"The base .*missing tensors: 16"]),
    "base lacks embeddings": (base_lacks("embeddings"), [r"The base .*missing tensors: 5"]),
    "base lacks all layers": (base_lacks("encoder"), [r"The base .*missing tensors: 32"]),
    "remote code": (remote_code, [r"brings code of its own\. Read that, .*`backbone\.remote_code` to true"]),
}
LOCAL_ONLY = ("no expert", "truncated")  # on the hub these have other words: see test_hub.py


@pytest.mark.parametrize("name", OF_HEADERS)
def test_what_is_wrong_is_said_by_a_check_and_by_a_run(name, pool, pools, tmp_path):
    change, messages = OF_HEADERS[name]
    sources = pool()
    change(sources, pools)
    said = refused(config(sources, tmp_path), messages, tmp_path)
    assert "Traceback" not in said
    assert len(said) < 1500


@pytest.mark.parametrize("name", [name for name in OF_HEADERS if name not in (*LOCAL_ONLY, "lost shard")])
def test_what_is_wrong_on_the_hub_is_said_by_headers_alone(name, hub, pool, pools, tmp_path):
    change, messages = OF_HEADERS[name]
    sources = pool()
    change(sources, pools)
    for key, folder in sources.items():
        hub.add(f"org/{key}", folder)
    messages = [re.sub(r"(/a|'\.\*base'|\.\*pool/b)", ".*", message) for message in messages]
    refused(config({key: f"org/{key}" for key in sources}, tmp_path), messages, tmp_path)
    assert no_weights_fetched(hub, tmp_path)


def no_weights_fetched(hub, folder):
    asked = [each for each in hub.requests if each.path.endswith(".safetensors") and each.method == "GET"]
    kept = list((folder / "huggingface").rglob("*.safetensors"))
    return all(each.range == "bytes=0-100000" for each in asked) and not kept


def test_a_good_pool_on_the_hub_is_checked_by_headers_alone(hub, pools, tmp_path):
    for key, folder in pools("bert").items():
        hub.add(f"org/{key}", folder)
    plain = config({key: f"org/{key}" for key in pools("bert")}, tmp_path)
    assert "No problems found" in str(checked(plain))
    assert no_weights_fetched(hub, tmp_path)
    assert "All values read" in str(checked(plain, deep=True))


def test_all_of_it_at_once(pool, pools, tmp_path):
    sources = pool()
    other_architecture(sources, pools)
    shape({"a": sources["b"]}, pools)
    no_head({"a": sources["b"]}, pools)
    edit(sources["b"], hidden_act="relu")
    base_lacks("layer.1.")(sources, pools)
    plain = config(sources, tmp_path)
    plain["data"]["tasks"]["c"] = plain["data"]["tasks"]["a"]
    said = refused(plain, [r"^7 problems|^6 problems"], tmp_path)
    for part in ("`data.tasks` has c", "is a distilbert", "hidden_act is relu", "The base", "[40]", "has no head"):
        assert said.count(part) == 1, said


def test_one_cause_is_said_once(pool, tmp_path):
    sources = pool()
    (sources["base"] / "config.json").unlink()
    said = refused(config(sources, tmp_path), ["no config.json"], tmp_path)
    assert said.count("config.json") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_floating_types_are_fine(dtype, pool, tmp_path):
    sources = pool()
    tensors(sources["a"], lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    found = checked(config(sources, tmp_path), deep=True)
    assert str(dtype).removeprefix("torch.") in str(found)


def test_fine_tunes_that_were_configured_for_training_are_fine(pool, tmp_path):
    sources = pool()
    edit(sources["a"], use_cache=False, hidden_dropout_prob=0.3, _name_or_path="x", problem_type="regression")
    edit(sources["b"], task_specific_params={"x": 1}, gradient_checkpointing=True, max_length=20, of_mine=3)
    (sources["b"] / "training_args.bin").write_bytes(b"x")
    checked(config(sources, tmp_path))


def test_an_expert_of_weights_alone_is_known_by_names_and_shapes(pool, tmp_path):
    sources = pool()
    for name in ("a", "b"):
        (sources[name] / "config.json").unlink()
    checked(config(sources, tmp_path))
    checked(config({**sources, "a": sources["a"] / FILE}, tmp_path))


def test_a_base_without_a_pooler_is_fine_and_said(pool, pools, tmp_path):
    sources = pool()
    base_lacks("pooler")(sources, pools)
    assert "each task's own, not in the base: 2" in str(checked(config(sources, tmp_path)))


def test_the_advice_of_skip_works(pool, pools, tmp_path):
    sources = pool()
    name = "bert.encoder.layer.0.attention.self.query.bias"
    tensors(sources["a"], lambda state: {key: tensor for key, tensor in state.items() if key != name})
    refused(config(sources, tmp_path), [r"missing tensors: 1 .*`model\.space\.skip`"], tmp_path)
    run = adamerge.train(config(sources, tmp_path, space={"skip": r"layer\.0\.attention\.self\.query\.bias"}))
    assert torch.equal(run.merge.net.state_dict()[name], load_file(sources["base"] / FILE)[name])


def test_a_pickled_folder_names_convert_and_that_works(pool, tmp_path):
    sources = pool()
    state = load_file(sources["a"] / FILE)
    (sources["a"] / FILE).unlink()
    torch.save(state, sources["a"] / "pytorch_model.bin")
    said = refused(config(sources, tmp_path), [r"no safetensors files, but pickles: 1 \(pytorch_model\.bin"], tmp_path)
    source, out = re.search(r"`adamerge convert (\S+) (\S+)`", said).groups()
    convert(source, out)
    checked(config({**sources, "a": out}, tmp_path), deep=True)
    checked(config({**sources, "a": sources["a"] / "pytorch_model.bin"}, tmp_path))  # a state dict alone may be named


def test_code_of_ones_own_runs_when_asked_for_alone(pool, pools, tmp_path):
    sources = pool()
    for folder in sources.values():
        edit(folder, model_type="newbert", auto_map={"AutoConfig": "code.NewConfig"})
        (folder / "code.py").write_text("raise RuntimeError('it ran')")
    said = refused(config(sources, tmp_path), [r"`backbone\.remote_code` to true"], tmp_path)
    assert "it ran" not in said
    refused(config(sources, tmp_path, arguments={"remote_code": True}), ["it ran"], tmp_path)


@pytest.mark.parametrize("option", [{"hidden_act": "gelu"}, {"num_attention_heads": 4}])
def test_towers_of_clip_are_compared_too(option, pool, tmp_path):
    sources = pool("clip")
    told = json.loads((sources["a"] / "config.json").read_text())
    edit(sources["a"], vision_config={**told["vision_config"], **option})
    (name,) = option
    plain = config(sources, tmp_path, backbone="CLIP", data="Pictures")
    refused(plain, [rf"Expert 'a': .*otherwise than .*: {name} is"], tmp_path)


def test_untied_copies_are_seen_in_the_values(pool, tmp_path):
    """Which headers cannot tell: a file with both copies is fine as long as they are equal."""
    sources = pool("t5")
    state = load_file(sources["a"] / FILE)
    copies = {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    save_file({**state, **copies}, sources["a"] / FILE, {"format": "pt"})
    plain = config(sources, tmp_path, backbone="Seq2Seq")
    checked(plain, deep=True)
    copies["encoder.embed_tokens.weight"] += 1
    save_file({**state, **copies}, sources["a"] / FILE, {"format": "pt"})
    checked(plain)
    refused(plain, [r"Expert 'a' .*network ties but that differ here: 1 \(.*shared\.weight"], tmp_path, deep=True)


# --- what only the values tell


def broken(pool):
    tensors(pool["a"], lambda state: {n: t / 0 if n.endswith("query.weight") else t for n, t in state.items()})
    return "Expert 'a' holds NaN or Inf in 2 .*take an earlier one"


def same_as_base(pool):
    head = {n: t for n, t in load_file(pool["a"] / FILE).items() if n.startswith("classifier")}
    save_file({**load_file(pool["base"] / FILE), **head}, pool["a"] / FILE, {"format": "pt"})
    return "Expert 'a' equals the base in every merged tensor; check its path"


def duplicates(pool):
    head = {n: t for n, t in load_file(pool["a"] / FILE).items() if n.startswith("classifier")}
    save_file({**load_file(pool["b"] / FILE), **head}, pool["a"] / FILE, {"format": "pt"})
    return "Experts 'a' and 'b' are identical; check their paths or keep one"


def stranger(pool):
    import transformers

    torch.manual_seed(7)
    made = CONFIGS["bert"]()
    made.num_labels = 2
    net = transformers.AutoModelForSequenceClassification.from_config(made)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    net.config.id2label = dict(enumerate(CLASSES["a"]))
    save(net, pool["a"])
    return "Expert 'a' does not descend from this base: .*times as long.*`model.vectors.ancestry` to `warn`"


@pytest.mark.parametrize("change", [broken, same_as_base, duplicates, stranger], ids=lambda change: change.__name__)
def test_what_only_the_values_tell(change, pool, tmp_path):
    sources = pool()
    message = change(sources)
    plain = config(sources, tmp_path)
    assert "No problems" in str(checked(plain))
    said = refused(plain, [message], tmp_path, deep=True)
    assert "\n" not in said
    with pytest.raises(InputError, match=message):
        adamerge.train(plain)


def test_the_advice_on_ancestry_works(pool, tmp_path, caplog):
    sources = pool()
    stranger(sources)
    plain = config(sources, tmp_path, vectors={"ancestry": "warn"})
    caplog.clear()
    checked(plain, deep=True)
    assert "does not descend" in caplog.text
    adamerge.train(plain)


@pytest.mark.parametrize("how", ["near", "as long as the base", "longer, of equal signs"])
def test_heavily_trained_experts_descend_from_their_base(how, pool, tmp_path):
    sources = pool()
    base = load_file(sources["base"] / FILE)
    torch.manual_seed(0)

    def change(state):
        for name, tensor in base.items():
            if not name.startswith("classifier"):
                moves = {
                    "near": 0.1 * torch.randn_like(tensor),
                    "as long as the base": tensor.std(correction=0) * torch.randn_like(tensor),
                    "longer, of equal signs": 4 * tensor * torch.rand_like(tensor),
                }
                state[name] = tensor + moves[how]

    tensors(sources["a"], change)
    checked(config(sources, tmp_path), deep=True)


def test_experts_of_the_demo_descend_from_its_base():
    checked("configs/digits.yaml", deep=True)


def test_a_head_that_is_not_a_number(tmp_path):
    """The head is no part of what is merged, and is looked at where it is made."""
    from adamerge.task_modules import LinearHead
    from adamerge.types import TaskInfo

    state = {"head.weight": torch.full((2, 3), torch.nan)}
    with pytest.raises(InputError, match=r"The head of task 'a' .* holds NaN or Inf"):
        LinearHead(TaskInfo("a", expert=state))
