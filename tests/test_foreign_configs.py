"""What the configuration files of other libraries can switch on: no code of the folder, nor of the hub."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import transformers
from transformers import dynamic_module_utils

import adamerge
from adamerge import Recipe, backbones, data
from adamerge.backbones.explained import explained
from adamerge.config import parse
from adamerge.preflight import check
from adamerge.types import InputError, TaskInfo
from tests.canary import backbone, edit, quiet_canary, strange_folder, write_record  # noqa: F401
from tests.checkpoints_hf import CLASSES, write
from tests.clips import MODEL, write_clip

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "max_steps": 1}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts"), "bert", "AutoModelForSequenceClassification")


def class_of_tokenizer(folder, canary):
    (folder / "stranger.py").write_text(canary.code())
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["stranger.Tokenizer", "stranger.Tokenizer"]},
    )


def clip_with(folder, **text):
    write_clip(folder)
    edit(folder / "open_clip_config.json", model_cfg={**MODEL, "text_cfg": {**MODEL["text_cfg"], **text}})
    return folder


def clip_kwargs(folder, canary, stranger):
    clip_with(folder, hf_tokenizer_name="any", tokenizer_kwargs={"trust_remote_code": True})
    class_of_tokenizer(folder, canary)


def clip_words(folder, canary, stranger):
    clip_with(folder, hf_tokenizer_name="any", tokenizer_kwargs={"trust_remote_code": "yes", "use_fast": False})
    class_of_tokenizer(folder, canary)


def clip_tokenizer(folder, canary, stranger):
    clip_with(folder, hf_tokenizer_name="any")
    class_of_tokenizer(folder, canary)


def clip_tokenizers_config(folder, canary, stranger):
    clip_with(folder, hf_tokenizer_name="any", tokenizer_kwargs={"trust_remote_code": True})
    shutil.copy(stranger / "config.json", folder)
    shutil.copy(stranger / "stranger.py", folder)


def clip_text_tower(folder, canary, stranger):
    clip_with(folder, hf_model_name=str(stranger))


def clip_kernel(folder, canary, stranger):
    edit(stranger / "config.json", model_type="bert", auto_map=None, attn_implementation="org/kernel")
    clip_with(folder, hf_model_name=str(stranger))


def clip_pickle(folder, canary, stranger):
    clip_with(folder)
    (folder / "open_clip_model.safetensors").unlink()
    canary.pickle(folder / "open_clip_pytorch_model.bin")


def clip_timm(folder, canary, stranger):
    canary.pickle(stranger / "pytorch_model.bin")
    edit(stranger / "config.json", model_type=None, architecture="resnet18", auto_map=None)
    clip_with(folder)
    model = {**MODEL, "vision_cfg": {"timm_model_name": f"local-dir:{stranger}", "timm_model_pretrained": True}}
    edit(folder / "open_clip_config.json", model_cfg=model)


CLIPS = [clip_kwargs, clip_words, clip_tokenizer, clip_tokenizers_config, clip_text_tower, clip_kernel, clip_pickle]


@pytest.mark.parametrize("way", [*CLIPS, clip_timm], ids=lambda way: way.__name__)
def test_no_configuration_of_open_clip_runs_code(canary, stranger, tmp_path, way):
    way(tmp_path / "clip", canary, stranger)
    source = str(tmp_path / "clip")
    recipe = Recipe(source, {"a": source, "b": source}, backbones.OpenCLIP(source))
    classes = {"a": ["x", "y"], "b": ["x", "y"]}
    recipe.survey(classes)
    with pytest.raises(InputError):
        recipe.open(classes)
    made = backbones.OpenCLIP(source)

    def heads():
        made.heads([TaskInfo("a", ["x"], None, made.open(source))])

    said = []
    for step in (made.build, heads, made._source.tokenizer):
        try:
            step()
        except InputError as error:
            said.append(str(error))
    assert any("not trusted" in each for each in said) or way not in (clip_kwargs, clip_words, clip_kernel)
    sources = dict.fromkeys(("base", "a", "b"), source)
    merge = write_record(tmp_path / "merge", backbone(backbones.OpenCLIP, model=source), sources)
    with pytest.raises(InputError):
        adamerge.load(merge)
    assert canary.said is None


def text_config(folder, canary):
    (folder / "stranger.py").write_text(canary.code())
    edit(folder / "config.json", model_type="stranger", auto_map={"AutoConfig": "stranger.Config"})


def text_model(folder, canary):
    (folder / "stranger.py").write_text(canary.code())
    auto_map = {f"AutoModel{kind}": "stranger.Net" for kind in ("", "ForSequenceClassification")}
    edit(folder / "config.json", auto_map={"AutoConfig": "stranger.Config", **auto_map})


def text_tokenizer(folder, canary):
    class_of_tokenizer(folder, canary)


def text_tokenizer_of_config(folder, canary):
    (folder / "stranger.py").write_text(canary.code())
    edit(folder / "config.json", auto_map={"AutoTokenizer": ["stranger.Tokenizer", None]})


def text_kernel(folder, canary):
    edit(folder / "config.json", attn_implementation="org/kernel")


def text_kernels(folder, canary):
    edit(folder / "config.json", _attn_implementation={"": "org/kernel@main:fast"})


def text_pickle(folder, canary):
    (folder / "model.safetensors").unlink()
    canary.pickle(folder / "pytorch_model.bin")


def text_generate(folder, canary):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(canary.code())
    edit(folder / "generation_config.json", custom_generate="custom_generate", trust_remote_code=True)


def text_pipeline(folder, canary):
    (folder / "stranger.py").write_text(canary.code())
    pipelines = {"own": {"impl": "stranger.Net", "pt": ["AutoModel"]}}
    edit(folder / "config.json", custom_pipelines=pipelines, trust_remote_code=True, code_revision="main")


def text_modules(folder, canary):
    (folder / "stranger.py").write_text(canary.code())
    modules = [{"idx": 0, "name": "0", "path": "", "type": "stranger.Net"}]
    (folder / "modules.json").write_text(repr(modules).replace("'", '"'))


def text_template(folder, canary):
    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    edit(folder / "tokenizer_config.json", chat_template=code)


HARMLESS = [text_model, text_generate, text_pipeline, text_modules, text_template]  # the library knows the rest itself
REFUSED = [text_config, text_kernel, text_kernels, text_pickle]
EITHER = [text_tokenizer, text_tokenizer_of_config]  # by the version of transformers


@pytest.mark.parametrize("way", [*HARMLESS, *REFUSED, *EITHER], ids=lambda way: way.__name__)
def test_no_configuration_of_transformers_runs_code(canary, texts, tmp_path, monkeypatch, way):
    for name, folder in texts.items():
        shutil.copytree(folder, tmp_path / "pool" / name)
        way(tmp_path / "pool" / name, canary)
    monkeypatch.syspath_prepend(str(tmp_path / "pool" / "base"))
    plain = {
        "model": {
            **{"base": str(tmp_path / "pool" / "base"), "experts": {t: str(tmp_path / "pool" / t) for t in CLASSES}},
            "backbone": backbone(backbones.TextClassifier),
        },
        "data": {
            "tasks": {t: {"class_path": "tests.checkpoints_hf.Texts", "init_args": {"task": t}} for t in CLASSES},
            **{"batch_size": 4, "eval_split": None},
        },
        "trainer": QUIET,
        "run": {"root": str(tmp_path / "runs"), "baselines": False},
    }
    outcomes = []
    for door in (lambda: check(parse(plain, {})), lambda: adamerge.train(plain)):
        try:
            outcomes.append(door())
        except InputError as error:
            outcomes.append(error)
        assert canary.said is None
    assert (way in EITHER) or isinstance(outcomes[-1], InputError) == (way in REFUSED)
    if not isinstance(outcomes[-1], InputError):
        adamerge.load(outcomes[-1].dir)
        adamerge.export(outcomes[-1].dir, tmp_path / "out")
    assert canary.said is None


IMAGES = {
    "processor": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "stranger.Processor"}}),
    "processor of its own": (
        "preprocessor_config.json",
        {"image_processor_type": "Processor", "auto_map": {"AutoImageProcessor": "stranger.Processor"}},
    ),
    "extractor": (
        "preprocessor_config.json",
        {"feature_extractor_type": "Processor", "auto_map": {"AutoFeatureExtractor": "stranger.Processor"}},
    ),
    "processor by the configuration": ("config.json", {"auto_map": {"AutoImageProcessor": "stranger.Processor"}}),
}


@pytest.mark.parametrize("way", IMAGES)
def test_no_processor_runs_code(canary, tmp_path, way):
    folder = write(tmp_path / "pool", "vit", "AutoModelForImageClassification")["base"]
    (folder / "stranger.py").write_text(canary.code())
    file, changes = IMAGES[way]
    edit(folder / file, **changes)
    made = backbones.ImageClassifier(str(folder))
    with suppress(InputError):
        assert made.processor is not None
        made.build()
    assert canary.said is None


def test_timm_reads_no_pickle_that_a_configuration_names(canary, tmp_path):
    canary.pickle(tmp_path / "net.pth")
    told = {"architecture": "resnet10t", "model_args": {"checkpoint_path": str(tmp_path / "net.pth")}}
    folder = tmp_path / "net"
    folder.mkdir()
    edit(folder / "config.json", model_type="timm_wrapper", num_classes=2, label_names=["x", "y"], **told)
    with pytest.raises(InputError):
        backbones.ImageClassifier(str(folder)).build()
    assert canary.said is None


def test_an_adapter_is_no_base(canary, tmp_path):
    """With peft installed, transformers would read another model in its place, and import what the adapter names."""
    pool = write(tmp_path / "pool", "clip", "AutoModel")
    edit(pool["base"] / "adapter_config.json", base_model_name_or_path="org/elsewhere", megatron_core="stranger")
    made = backbones.CLIP(str(pool["base"]))
    base = made.open(str(pool["base"]))
    with pytest.raises(InputError, match=r"has an adapter_config\.json: it is an adapter to another model\. Merge it"):
        made.heads([TaskInfo("a", ["x", "y"], None, base)])


def test_a_data_folder_runs_no_script(canary, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "words.py").write_text(canary.code())
    (folder / "train.jsonl").write_text('{"text": "ant", "label": 0}\n')
    canary.pickle(folder / "train.pkl")
    with suppress(InputError):
        assert len(data.HFDataset(str(folder)).split("train")) == 1
    assert canary.said is None


# --- the guard itself


def test_the_guard_refuses_what_another_library_asks_for(canary, stranger):
    refused = pytest.raises(InputError, match=r"has code of its own run \(stranger\.py\), which is not trusted")
    with refused, explained("x"):
        transformers.AutoConfig.from_pretrained(stranger, trust_remote_code=True)
    with explained("x"), explained("y", str(stranger)):  # the innermost decides
        transformers.AutoConfig.from_pretrained(stranger, trust_remote_code=True)
    assert canary.said == "it ran"
    canary.mark.unlink()
    with pytest.raises(InputError), explained("x", str(stranger)), explained("y"):
        transformers.AutoConfig.from_pretrained(stranger, trust_remote_code=True)
    assert canary.said is None


def test_the_guard_reads_pickles_for_tensors_alone(canary, tmp_path, monkeypatch):
    canary.pickle(tmp_path / "net.pth")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(InputError), explained("The file cannot be had"):
        torch.load(tmp_path / "net.pth", weights_only=False)
    assert canary.said is None


def test_the_guard_leaves_everything_as_it_was(canary, stranger, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with pytest.raises(InputError), explained("x"), explained("y"):
        raise ValueError
    assert seconds == dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    transformers.AutoConfig.from_pretrained(stranger, trust_remote_code=True)  # the user's own
    assert canary.said == "it ran"


def test_what_is_imported_in_a_guarded_block_is_the_users_own_again(canary, stranger):
    (stranger / "custom_generate").mkdir()
    (stranger / "custom_generate" / "generate.py").write_text(canary.code() + "\ndef generate(model): return 'own'\n")
    ask = f"GenerationMixin().load_custom_generate({str(stranger)!r}, trust_remote_code=True)"
    code = f"""
import sys, transformers
from adamerge.backbones.explained import explained
from adamerge.types import InputError
assert "transformers.generation.utils" not in sys.modules
for number in range(2):
    try:
        with explained("x"):
            from transformers.generation.utils import GenerationMixin
            {ask}
    except InputError as error:
        print("refused" if "not trusted" in str(error) else error)
print({ask}(None))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["refused", "refused", "own"]
