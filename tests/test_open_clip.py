"""CLIP models of open_clip: every way to name one, its heads, and what a mismatch says."""

import json
import logging
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from adamerge.backbones import OpenCLIP
from adamerge.backbones import open_clip as open_clip_backbone
from adamerge.recipe import Recipe
from adamerge.types import InputError
from tests.clips import CLASSES, MODEL, PREPROCESS, write_clip, write_clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


def recipe_of(clips, **more):
    experts = {task: str(clips[task]) for task in CLASSES}
    return Recipe(str(clips["base"]), experts, OpenCLIP(f"local-dir:{clips['base']}", templates=["a {}."]), **more)


def picture(seed=0, size=(40, 50)):
    return Image.fromarray(
        torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed)).byte().numpy()
    )


def test_heads_and_features_are_open_clips_own(clips):
    """Cosines of open_clip's image embedding, by its own preprocessing, with its zero-shot classifier."""
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clips['base']}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clips['base']}")
    opened = recipe_of(clips).open(CLASSES)
    backbone = opened.recipe.backbone
    images = [picture(seed) for seed in range(3)]
    batch = {"image": torch.stack([backbone.prepare({"image": image})["image"] for image in images])}
    assert batch["image"].dtype == torch.uint8
    with torch.no_grad():
        expected = clip.eval().encode_image(torch.stack([preprocess(image) for image in images]))
        found = backbone.features(opened.net.eval(), batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for task, names in CLASSES.items():
            head_DC = open_clip.build_zero_shot_classifier(clip, tokenizer, names, ["a {}."])
            logits = clip.logit_scale.exp() * torch.nn.functional.normalize(expected, dim=-1) @ head_DC
            head = opened.heads[task]
            torch.testing.assert_close(head(found), logits, rtol=1e-5, atol=1e-5)
            assert head.classes == tuple(names)
            assert not any(parameter.requires_grad for parameter in head.parameters())


def test_only_the_image_tower_is_merged_and_the_logit_scale_is_the_bases(clips):
    opened = recipe_of(clips).open(CLASSES)
    names = set(opened.space.shapes) | set(opened.space.left_out)
    assert names == {
        name for name in load_file(clips["base"] / "open_clip_model.safetensors") if name.startswith("visual.")
    }
    base = load_file(clips["base"] / "open_clip_model.safetensors")["logit_scale"].exp()
    expert = load_file(clips["b"] / "open_clip_model.safetensors")["logit_scale"].exp()
    torch.testing.assert_close(opened.heads["b"].weight.norm(dim=-1), base.expand(len(CLASSES["b"])))
    assert float(base) != pytest.approx(float(expert))


@pytest.mark.parametrize("form", ["folder", "local-dir", "file", "pt", "state_dict", "module", "image tower"])
def test_every_form_of_a_checkpoint_is_the_same(clips, tmp_path, form):
    folder = clips["a"]
    state = load_file(folder / "open_clip_model.safetensors")
    source = {
        "folder": str(folder),
        "local-dir": f"local-dir:{folder}",
        "file": f"{folder}/open_clip_model.safetensors",
    }
    if form == "pt":
        torch.save(state, tmp_path / "a.pt")
    elif form == "state_dict":  # a training checkpoint of open_clip's
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pt")
    elif form == "module":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "a.pt")
    elif form == "image tower":
        torch.save({name: tensor for name, tensor in state.items() if name.startswith("visual.")}, tmp_path / "a.pt")
    found = OpenCLIP(str(clips["base"])).open(source.get(form, str(tmp_path / "a.pt")))
    assert set(found) == {name for name in state if name.startswith("visual.")}
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert all(found.meta(name) == (state[name].shape, state[name].dtype) for name in found)
    assert found.sha256()


def test_another_librarys_layout_is_converted_by_open_clip(clips, tmp_path):
    """A CLIP with a text tower of its own in the older flat layout, which open_clip converts."""
    model = {**MODEL, "custom_text": True}
    write_clip(tmp_path / "custom", model, seed=1)
    state = load_file(tmp_path / "custom" / "open_clip_model.safetensors")
    flat = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    save_file(flat, tmp_path / "custom" / "open_clip_model.safetensors")
    opened = Recipe(str(tmp_path / "custom"), {"a": str(tmp_path / "custom")}, OpenCLIP(str(tmp_path / "custom"))).open(
        {"a": CLASSES["a"]}
    )
    assert opened.heads["a"].weight.shape == (len(CLASSES["a"]), MODEL["embed_dim"])


def test_a_name_of_open_clips_brings_its_own_settings():
    source = OpenCLIP("open_clip:ViT-B-32/laion2b_s34b_b79k")._source
    assert source.config()["vision_cfg"]["patch_size"] == 32
    with pytest.raises(InputError, match=r"no weights 'nonsense' of ViT-B-32; it has openai, "):
        OpenCLIP("open_clip:ViT-B-32/nonsense")._source.create()
    with pytest.raises(InputError, match=r"want QuickGELU, unlike ViT-B-32"):
        OpenCLIP("open_clip:ViT-B-32/openai")._source.create()
    with pytest.raises(InputError, match=r"open_clip has no model 'ViT-B-33'"):
        OpenCLIP("ViT-B-33").build()
    with pytest.raises(InputError, match=r"write open_clip:ViT-B-32/TAG"):
        OpenCLIP("ViT-B-32").open("open_clip:ViT-B-32")


def test_heads_are_made_once_and_again_for_other_names(clips, tmp_path, monkeypatch):
    backbone = recipe_of(clips).backbone
    made = []
    embed = open_clip_backbone._embedded
    monkeypatch.setattr(open_clip_backbone, "_embedded", lambda *rest: (made.append(len(rest[2])), embed(*rest))[1])
    for expected in ([2, 3], []):
        made.clear()
        recipe_of(clips).open(CLASSES)
        assert made == expected
    recipe_of(clips).open({**CLASSES, "b": ["cup", "pan", "plate"]})
    assert made == [3]
    assert backbone.templates("a") == ["a {}."]


def test_a_finetune_of_another_architecture_or_resolution_is_one_clear_error(clips, tmp_path):
    vision = MODEL["vision_cfg"]

    def opened(name, **changed):
        write_clip(tmp_path / name, {**MODEL, "vision_cfg": {**vision, **changed}}, seed=5)
        backbone = OpenCLIP(str(clips["base"]))
        return Recipe(str(clips["base"]), {"a": str(tmp_path / name)}, backbone).open({"a": CLASSES["a"]})

    other = (
        r"larger is of another architecture or resolution than `backbone.model` .*: image_size is 32, the model's 16"
    )
    with pytest.raises(InputError, match=other):
        opened("larger", image_size=32)
    (tmp_path / "larger" / "open_clip_config.json").unlink()  # as a bare checkpoint, its tensors say it
    backbone, start = OpenCLIP(str(clips["base"])), r"Expert 'a' .* does not match the network: "
    recipe = Recipe(str(clips["base"]), {"a": str(tmp_path / "larger")}, backbone)
    with pytest.raises(InputError, match=start + "other shapes: .*positional_emb"):
        recipe.open({"a": CLASSES["a"]})
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"is no checkpoint of the whole CLIP"):
        OpenCLIP(str(clips["base"])).open(str(tmp_path / "other.safetensors"))


def test_a_base_without_a_text_tower_says_so(clips, tmp_path):
    state = load_file(clips["base"] / "open_clip_model.safetensors")
    image = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    save_file(image, tmp_path / "tower.safetensors")
    recipe = Recipe(str(tmp_path / "tower.safetensors"), {"a": str(clips["a"])}, OpenCLIP(str(clips["base"])))
    with pytest.raises(InputError, match=r"tower.safetensors is no checkpoint of the whole CLIP"):
        recipe.open({"a": CLASSES["a"]})


def test_class_names_that_make_no_head_are_refused(clips):
    with pytest.raises(InputError, match=r"Task 'a' has the class names 1 \(cat\) more than once"):
        recipe_of(clips).open({**CLASSES, "a": ["cat", "dog", "cat"]})
    with pytest.raises(InputError, match=r"Task 'a' has no class names"):
        recipe_of(clips).open({**CLASSES, "a": []})


@pytest.mark.parametrize("templates", [["a photo"], [], {"a": ["a {}."], "b": []}])
def test_templates_name_the_class(templates):
    with pytest.raises(InputError, match=r"`backbone.templates` need \{\}"):
        OpenCLIP("ViT-B-32", templates=templates)


def test_templates_of_each_task(clips):
    backbone = OpenCLIP(str(clips["base"]), templates={"a": ["an {}."]})
    recipe = Recipe(str(clips["base"]), {task: str(clips[task]) for task in CLASSES}, backbone)
    with pytest.raises(InputError, match=r"`backbone.templates` has none for task 'b'; it has a"):
        recipe.open(CLASSES)


@pytest.mark.parametrize("change", [{"image_size": 32}, {"head_width": 4}])
def test_a_configuration_that_changes_no_shape_is_compared(clips, tmp_path, change):
    """Another resolution of a tower without position embeddings, or another number of heads, has the same tensors."""
    shutil.copytree(clips["a"], tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "open_clip_config.json").read_text())
    settings["model_cfg"]["vision_cfg"] |= change
    (tmp_path / "a" / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=r"is of another architecture or resolution than .*: (image_size|head_width) is"
    ):
        OpenCLIP(str(clips["base"])).open(str(tmp_path / "a"))


def test_a_sharded_base_is_read(clips, tmp_path):
    state = load_file(clips["base"] / "open_clip_model.safetensors")
    shutil.copytree(clips["base"], tmp_path / "base")
    (tmp_path / "base" / "open_clip_model.safetensors").unlink()
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, tmp_path / "base" / file)
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    sharded = Recipe(
        str(tmp_path / "base"), {"a": str(clips["a"])}, OpenCLIP(str(tmp_path / "base"), templates=["a {}."])
    )
    whole = recipe_of(clips).open(CLASSES).heads["a"]
    torch.testing.assert_close(sharded.open({"a": CLASSES["a"]}).heads["a"].weight, whole.weight)


def test_a_kept_head_that_is_cut_short_is_made_again(clips, tmp_path):
    expected = recipe_of(clips).open(CLASSES).heads["a"].weight
    for file in (tmp_path / "cache" / "heads").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(recipe_of(clips).open(CLASSES).heads["a"].weight, expected)


def test_images_of_16_bits_keep_their_range(clips):
    backbone = recipe_of(clips).backbone
    deep = Image.fromarray(np.full((20, 20), 128 * 256, dtype=np.uint16))
    assert deep.mode.startswith("I;16")
    assert backbone.prepare({"image": deep})["image"].unique().tolist() == [128]
    for mode in ("I", "F"):
        with pytest.raises(InputError, match=f"of mode {mode}, 32-bit numbers"):
            backbone.prepare({"image": Image.new(mode, (20, 20))})


def test_no_network_with_a_hub_id_is_one_clear_error(monkeypatch):
    """Connections are refused at once, as without a network; nothing waits and nothing is retried for long."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"The configuration of 'hf-hub:nobody/nothing' cannot be had: .*Check the name"
    ):
        OpenCLIP("hf-hub:nobody/nothing").build()
    with pytest.raises(InputError, match=r"The configuration of 'hf-hub:nobody/nothing' cannot be had"):
        OpenCLIP("ViT-B-32").open("hf-hub:nobody/nothing")


def test_a_folder_without_a_configuration_or_weights(clips, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"configuration of 'local-dir:.*empty' cannot be had"):
        OpenCLIP(str(tmp_path / "empty")).build()
    with pytest.raises(InputError, match=r"holds no weights"):
        OpenCLIP(str(clips["base"])).open(str(tmp_path / "empty"))


def test_images_are_prepared_once_and_tensors_pass(clips):
    backbone = recipe_of(clips).backbone
    sample = {"image": torch.zeros(3, 16, 16), "label": 1}
    assert backbone.prepare(sample) is sample
    grey = backbone.prepare({"image": picture().convert("L"), "label": 1})
    assert grey["image"].shape == (3, 16, 16)
    assert grey["label"] == 1
    with pytest.raises(InputError, match=r"`backbone.input` is 'image', but a batch holds pixels"):
        backbone.features(backbone.build(), {"pixels": torch.zeros(1)})


def test_making_a_model_leaves_the_root_logger_as_it_was(clips):
    level = logging.getLogger().level
    recipe_of(clips).backbone.build()
    assert logging.getLogger().level == level


def test_the_preprocessing_stands_in_the_configuration(clips):
    settings = json.loads((clips["base"] / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert settings["mean"] == PREPROCESS["mean"]
    tower = recipe_of(clips).backbone.build()
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    mean, std = (torch.tensor(PREPROCESS[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(tower(white), tower((1 - mean) / std * torch.ones(1, 3, 16, 16)))
