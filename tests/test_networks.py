"""Real architectures, tiny: of torchvision and timm through `Module`, of transformers as they tie, share and freeze."""

import shutil
from functools import partial

import pytest
import timm
import torch
import torchvision
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

import adamerge
from adamerge import Recipe, UnlabeledTasks, backbones
from adamerge.backbones import Module, Seq2Seq, TextClassifier
from adamerge.backbones.base import Backbone
from adamerge.data import TensorTask
from adamerge.merged import MergedModel
from adamerge.module import AdaMerge
from adamerge.objectives import Entropy, FeatureDistillation
from adamerge.recipe import SpaceOptions
from adamerge.recorded import revive
from adamerge.rules import LayerWise
from adamerge.space import ParamSpace
from adamerge.task_modules import AsIs
from adamerge.task_vectors import TaskVectors
from adamerge.types import InputError, TaskInfo
from tests import checkpoints_hf
from tests.checkpoints_hf import CLASSES, CONFIGS, LENGTH, Pictures, Texts, write
from tests.test_engine import Silent

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 2}
ALBERT = partial(
    transformers.AlbertConfig, vocab_size=21, embedding_size=8, hidden_size=16, num_hidden_layers=4,
    num_hidden_groups=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=LENGTH,
)  # fmt: skip


def moved(net, seed, scale=0.1):
    """The network with every parameter moved once, tied ones together."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return net


def size_of(net):
    """Distinct parameters and their elements."""
    return len(list(net.parameters())), sum(parameter.numel() for parameter in net.parameters())


# --- torchvision and timm


def shuffle_net(classes: int = 0) -> nn.Module:
    """With classes, as an expert is trained; without, as it is merged."""
    net = torchvision.models.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 16], num_classes=classes or 1)
    return without_fc(net, classes)


def residual_net(classes: int = 0) -> nn.Module:
    net = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes or 1)
    return without_fc(net, classes)


def without_fc(net, classes):
    if not classes:
        net.fc = nn.Identity()
    return net


def of_timm(**options):
    """The build and its arguments; experts have classes."""
    return {"build": timm.create_model, "build_args": {**options, "num_classes": 0}}


VISION_TRANSFORMER = of_timm(
    model_name="vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2
)
# by name: how it is built, the prefix of its head, the path by which a configuration names the build
NETWORKS = {
    "shufflenet": ({"build": shuffle_net}, "fc.", "tests.test_networks.shuffle_net"),
    "resnet": ({"build": residual_net}, "fc.", "tests.test_networks.residual_net"),
    "vit": (VISION_TRANSFORMER, "head.", "timm.create_model"),
    "convnext": (
        of_timm(model_name="convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 16, 16]), "head.fc.", "timm.create_model"
    ),
    "efficientnet": (of_timm(model_name="test_efficientnet"), "classifier.", "timm.create_model"),
}  # fmt: skip


class Images(TensorTask):
    """Random pictures [3, 32, 32] of classes that are told by their brightness."""

    def __init__(self, task: str) -> None:
        generator = torch.Generator().manual_seed(ord(task))

        def draw(number):
            label = torch.arange(number) % len(CLASSES[task])
            return torch.randn(number, 3, 32, 32, generator=generator) + label[:, None, None, None], label

        super().__init__(CLASSES[task], train=draw(24), test=draw(12))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """State dicts by the network's name, made when first asked for: a base, and experts with heads."""
    made = {}

    def of(name):
        if name not in made:
            folder, (options, prefix, _) = tmp_path_factory.mktemp(name), NETWORKS[name]
            torch.manual_seed(0)

            def net(classes):
                if "build_args" in options:
                    return options["build"](**{**options["build_args"], "num_classes": classes})
                return options["build"](classes)

            base = net(0)
            for index, key in enumerate(("base", *CLASSES)):
                expert = net(len(CLASSES.get(key, ())))
                expert.load_state_dict(base.state_dict(), strict=False)
                if key != "base":
                    assert all(name.startswith(prefix) for name in set(expert.state_dict()) - set(base.state_dict()))
                    moved(expert, index, 0.02)
                    for buffer, tensor in expert.named_buffers():
                        tensor += index if tensor.is_floating_point() else 10 * index
                        assert buffer.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
                save_file(expert.state_dict(), folder / f"{key}.safetensors")
            made[name] = {key: folder / f"{key}.safetensors" for key in ("base", *CLASSES)}
        return made[name]

    return of


def plain_config(paths, name, root, *, buffers="base"):
    """As a YAML file says it."""
    options, prefix, path = NETWORKS[name]
    arguments = {"build": path, "heads": prefix, "train_heads": True}
    if "build_args" in options:
        arguments["build_args"] = options["build_args"]
    return {
        "model": {
            "base": str(paths["base"]),
            "experts": {task: str(paths[task]) for task in CLASSES},
            "backbone": {"class_path": "adamerge.backbones.Module", "init_args": arguments},
            "space": {"skip": "^" + prefix.replace(".", r"\."), "buffers": buffers},
        },
        "data": {
            "tasks": {t: {"class_path": "tests.test_networks.Images", "init_args": {"task": t}} for t in CLASSES},
            "batch_size": 4,
        },
        "trainer": QUIET,
        "run": {"root": str(root), "baselines": False},
    }


def in_python(paths, name, root, *, buffers="base"):
    options, prefix, _ = NETWORKS[name]
    recipe = Recipe(
        str(paths["base"]),
        {task: str(paths[task]) for task in CLASSES},
        Module(**options, heads=prefix, train_heads=True),
        space=SpaceOptions(skip="^" + prefix.replace(".", r"\."), buffers=buffers),
    )
    data = UnlabeledTasks({task: Images(task) for task in CLASSES}, batch_size=4)
    return adamerge.train(recipe, data, trainer=QUIET, run={"root": str(root), "baselines": False})


def from_text(paths, name, root, **options):
    file = root / "merge.yaml"
    file.write_text(yaml.safe_dump(plain_config(paths, name, root, **options)))
    return adamerge.train(file)


def answers(merge):
    inputs = {task: Images(task).split("test")[0]["input"][None].repeat(2, 1, 1, 1) for task in CLASSES}
    with torch.inference_mode():
        return {task: merge({"input": inputs[task]}, task=task) for task in CLASSES}


def check_heads(run, paths, prefix):
    """They began as the experts' and were trained."""
    for task in CLASSES:
        expert, head = load_file(paths[task]), run.learned.chain(task)[-1]
        for name in ("weight", "bias"):
            change = (getattr(head, name).detach() - expert[prefix + name]).abs().max()
            assert 1e-4 < change < 1e-2  # two steps of Adam at 1e-3


@pytest.mark.slow_unless("resnet-yaml", "vit-python")
@pytest.mark.parametrize("how", [in_python, from_text], ids=["python", "yaml"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_libraries(name, how, files, tmp_path):
    paths = files(name)
    run = how(paths, name, tmp_path)
    assert (run.learned.rule.raw_TG.detach() != 0.3).any(1).all()
    check_heads(run, paths, NETWORKS[name][1])
    loaded, expected = adamerge.load(run.dir, trust=True), answers(run.merge)
    for task, logits in answers(loaded).items():
        assert logits.shape == (2, len(CLASSES[task]))
        assert torch.equal(logits, expected[task])
    net = Module(**NETWORKS[name][0]).build()
    assert size_of(loaded.net) == size_of(net)
    assert loaded.net.state_dict().keys() == net.state_dict().keys()


@pytest.mark.slow_unless("efficientnet-mean", "efficientnet-base")
@pytest.mark.parametrize("policy", ["base", "mean"])
@pytest.mark.parametrize("name", ["shufflenet", "efficientnet"])
def test_running_statistics(name, policy, files, tmp_path):
    """They follow the policy, training leaves them alone, and counters are the base's."""
    paths = files(name)
    run = in_python(paths, name, tmp_path, buffers=policy)
    base, *experts = (load_file(path) for path in paths.values())
    buffers = dict(run.merge.net.named_buffers())
    assert {key.rpartition(".")[2] for key in buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    for key, buffer in buffers.items():
        mean = policy == "mean" and "num_batches" not in key
        expected = torch.stack([expert[key] for expert in experts]).mean(0) if mean else base[key]
        assert torch.equal(buffer, expected)
    again = adamerge.load(run.dir, trust=True)
    assert all(torch.equal(buffers[key], buffer) for key, buffer in again.net.named_buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"build": nn.Linear(2, 2)}, r"`backbone.build` is a Linear already: name the class or function that makes it"),
        (
            {"build": timm.create_model},
            r"does not make a network: .*'model_name'. Give it its arguments in `backbone.b",
        ),
        (of_timm(model_name="vit_tiny_patch16_224", widht=3), r"does not make a network: .*'widht'. Give"),
    ],
)
def test_a_build_that_makes_no_network(options, message):
    with pytest.raises(InputError, match=message):
        Module(**options).build()


def test_a_function_under_class_path_is_refused_with_the_way_to_say_it(files, tmp_path):
    config = plain_config(files("vit"), "vit", tmp_path)
    arguments = config["model"]["backbone"]["init_args"]
    arguments["build"] = {"class_path": "torchvision.models.squeezenet1_1"}
    with pytest.raises(InputError, match=r"is a SqueezeNet already: name .* its arguments in `backbone.build_args`"):
        adamerge.train(config)


def test_a_class_whose_arguments_are_classes_is_made_again():
    options = {"block": "torchvision.models.resnet.BasicBlock", "layers": [1, 1, 1, 1], "norm_layer": None}
    text = {"class_path": "torchvision.models.resnet.ResNet", "init_args": options}
    assert type(revive(text, trust=True).layer1[0]).__name__ == "BasicBlock"


def test_arguments_by_partial(files, tmp_path):
    options, prefix, _ = NETWORKS["vit"]
    module = Module(partial(options["build"], **options["build_args"]), heads=prefix)
    assert size_of(module.build()) == size_of(Module(**options).build())
    recipe = Recipe(
        str(files("vit")["base"]), {t: str(files("vit")[t]) for t in CLASSES}, module, space=SpaceOptions(skip="^head")
    )
    data = UnlabeledTasks({task: Images(task) for task in CLASSES}, batch_size=4)
    run = adamerge.train(recipe, data, trainer=QUIET, run={"root": str(tmp_path), "baselines": False})
    expected, found = answers(run.merge), answers(adamerge.load(run.dir, trust=True))
    assert all(torch.equal(expected[task], found[task]) for task in CLASSES)


# --- transformers, in memory and in float64


class Whole(Backbone):
    """A network with all that it puts out: [B, ...] flattened."""

    def __init__(self, make) -> None:
        self._make = make

    def build(self):
        return self._make()

    def features(self, net, batch):
        out = net(**batch)
        return (out.logits if "logits" in out else out.last_hidden_state).flatten(1)

    def head(self, task):
        return AsIs(task)


def config(kind, **changes):
    made = {**CONFIGS, "albert": ALBERT}[kind]()
    for key, value in {"pad_token_id": 0, **changes}.items():
        setattr(made, key, value)
    return made


def pegasus():
    """Its sinusoidal positions are frozen parameters of the model class."""
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
              (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    options = {"vocab_size": 21, "d_model": 16, "max_position_embeddings": LENGTH, "pad_token_id": 0, **layers}
    return transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**options))


# by name: what makes it, its tied tensors' other names, whether it takes decoder inputs
TIED = {
    "t5": ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
    "bart": ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"],
    "pegasus": ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"],
    "gpt2 lm": ["lm_head.weight"],
    "qwen2 tied": ["lm_head.weight"],
    "bert lm": ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"],
}
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(config("t5")),
    "bart": lambda: transformers.BartForConditionalGeneration(config("bart")),
    "pegasus": pegasus,
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(config("gpt2", bos_token_id=2, eos_token_id=3)),
    "gpt2 lm": lambda: transformers.GPT2LMHeadModel(config("gpt2", bos_token_id=2, eos_token_id=3)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(config("qwen2", tie_word_embeddings=False)),
    "qwen2 tied": lambda: transformers.Qwen2ForCausalLM(config("qwen2", tie_word_embeddings=True)),
    "bert lm": lambda: transformers.BertForMaskedLM(config("bert")),
    "albert": lambda: transformers.AlbertForSequenceClassification(config("albert")),
}
models = pytest.mark.parametrize("name", MODELS)


def made_pool(name):
    """A base, and two experts that have everything moved, as state dicts in float64 with all names."""
    torch.manual_seed(0)
    base = moved(MODELS[name]().double(), 0).eval()
    pool = {"base": {key: tensor.clone() for key, tensor in base.state_dict().items()}}
    for seed, task in enumerate("ab", start=1):
        net = MODELS[name]().double()
        net.load_state_dict(pool["base"])
        pool[task] = {key: tensor.clone() for key, tensor in moved(net, seed).state_dict().items()}
    return base, pool


class Wide(TorchFunctionMode):
    """Norms, softmax and positions that are computed in fp32, whatever the network's dtype, in float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def merged_of(name, net, pool, **options):
    # what has no gradient by its class is found by `Opened.probe` in a run
    space = ParamSpace.of(net)
    unreached = [key for key, parameter in net.named_parameters() if not parameter.requires_grad]
    space = space.without(unreached, "not reached by the loss") if unreached else space
    vectors = TaskVectors.load(space, pool["base"], {task: pool[task] for task in "ab"})
    chains = {task: [AsIs(TaskInfo(task))] for task in "ab"}
    model = MergedModel(Whole(MODELS[name]), net, vectors, LayerWise(vectors), chains, **options)
    model.rule.raw_TG.data = model.rule.raw_TG.double() + 0.1 * torch.rand(model.rule.raw_TG.shape).double()
    return model


def batch_for(name, seed=0):
    ids = torch.randint(4, 21, (3, 5), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :3] - 1} if name in ("t5", "bart", "pegasus") else {})}


def by_hand(name, pool, coefficients):
    """A network of the library's own with the state merged key by key."""
    state = {}
    for key, base in pool["base"].items():
        state[key] = base
        for task, coefficient in zip("ab", coefficients(key), strict=True):
            state[key] = state[key] + coefficient * (pool[task][key] - base)
    net = MODELS[name]().double().eval()
    net.load_state_dict(state)
    return net


@models
def test_a_tied_tensor_is_one_in_space_merge_and_export(name):
    net, pool = made_pool(name)
    before, stored = size_of(net), len(pool["base"])
    space = ParamSpace.of(net)
    assert set(space.aliases) == set(TIED.get(name, ()))
    assert (len(space.shapes), space.num_elements) == before
    assert len(space.shapes) + len(space.aliases) + len(space.buffers) == stored
    model = merged_of(name, net, pool)
    assert len(model.vectors.space.shapes) == before[0] - 2 * (name == "pegasus")
    plain = model.materialize()
    assert size_of(plain) == before
    assert plain.state_dict().keys() == pool["base"].keys()


@models
def test_the_merge_is_the_state_merged_by_hand(name):
    net, pool = made_pool(name)
    model, batch = merged_of(name, net, pool), batch_for(name)
    space, raw_TG = model.vectors.space, model.rule.raw_TG.detach()

    def coefficients(key):
        group = space.group_of.get(space.aliases.get(key, key))
        return (0.0, 0.0) if group is None else raw_TG[:, group]

    expected = Whole(None).features(by_hand(name, pool, coefficients), batch)
    assert expected.std() > 1e-3
    with torch.no_grad():
        for found in (model(batch, task="a"), model.folded()(batch, task="a")):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow_unless("leaf-bart", "leaf-t5", "swap-gpt2", "leaf-qwen2 tied")
@models
@pytest.mark.parametrize("way", ["leaf", "swap"])
def test_gradients_are_finite_differences(name, way):
    """Of each task's coefficient of the tied or shared tensors, and along a direction through all."""
    net, pool = made_pool(name)
    model, batch = merged_of(name, net, pool, apply_mode=way), batch_for(name)
    target = torch.randn(3, 1, generator=torch.Generator().manual_seed(1)).double()

    def loss():
        return (model.respond("a", batch).logits_BC.tanh() * target).sum()

    with Wide(), model.step() as step:
        step.backward(loss())
    step.scalar(torch.zeros(())).backward()
    raw_TG, grad_TG = model.rule.raw_TG.data, model.rule.raw_TG.grad
    space = model.vectors.space
    looked = {*space.aliases.values(), *(key for key in space.shapes if "albert_layers" in key)}
    directions = [torch.randn(raw_TG.shape, generator=torch.Generator().manual_seed(2)).double()]
    for key in sorted(looked) or list(space.shapes)[:2]:
        for task in range(2):
            directions.append(torch.zeros_like(raw_TG))
            directions[-1][task, space.group_of[key]] = 1
    found, eps = [], 1e-6
    for direction in directions:
        sides = []
        for sign in (1, -1):
            raw_TG += sign * eps * direction
            with Wide(), torch.no_grad(), model.applied():
                sides.append(float(loss()))
            raw_TG -= sign * eps * direction
        found.append((sides[0] - sides[1]) / (2 * eps))
    expected = [float((grad_TG * direction).sum()) for direction in directions]
    assert max(map(abs, expected)) > 1e-3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", TIED)
def test_tied_copies_that_differ_are_refused(name):
    net, pool = made_pool(name)
    key = TIED[name][0]
    pool["b"][key] = pool["b"][key] + 1e-3
    with pytest.raises(InputError, match=rf"Expert 'b' .* that the network ties but that differ here: .*{key}"):
        merged_of(name, net, pool)


# --- transformers, as files

FILES = {
    "t5": (Seq2Seq, "AutoModelForSeq2SeqLM", None),
    "bart": (Seq2Seq, "AutoModelForSeq2SeqLM", None),
    "gpt2": (TextClassifier, "AutoModelForSequenceClassification", "AutoModelForCausalLM"),
    "qwen2": (TextClassifier, "AutoModelForSequenceClassification", "AutoModelForCausalLM"),
    "bert": (TextClassifier, "AutoModelForSequenceClassification", None),
    "albert": (TextClassifier, "AutoModelForSequenceClassification", None),
    "resnet": (backbones.ImageClassifier, "AutoModelForImageClassification", None),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of transformers by kind, made when first asked for."""
    held = {}

    def of(kind):
        if kind not in held:
            _, auto, base_auto = FILES[kind]
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(checkpoints_hf.CONFIGS, "albert", ALBERT)
                held[kind] = write(tmp_path_factory.mktemp(kind), kind, auto, base_auto=base_auto)
        return held[kind]

    return of


def recipe_of(paths, kind, **options):
    experts = {task: str(paths[task]) for task in CLASSES}
    return Recipe(str(paths["base"]), experts, FILES[kind][0](), **options)


def vectors_of(paths, kind):
    return recipe_of(paths, kind).open(dict(CLASSES)).load_vectors()


def stored_otherwise(paths, folder, change, key="a"):
    """The pool with the tensors of one, the first expert by default, changed."""
    shutil.copytree(paths[key], folder)
    state = load_file(folder / "model.safetensors")
    save_file({n: t.clone() for n, t in change(state).items()}, folder / "model.safetensors", {"format": "pt"})
    return {**paths, key: folder}


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_tied_tensor_may_be_stored_under_any_of_its_names(kind, folders, tmp_path):
    paths, names = folders(kind), [*TIED[kind], "shared.weight" if kind == "t5" else "model.shared.weight"]
    expected = vectors_of(paths, kind)
    (held,) = set(load_file(paths["a"] / "model.safetensors")) & set(names)
    assert names[-1] in expected.space.shapes
    assert expected.deltas(names[-1]).dense().abs().amax((1, 2)).min() > 0.05

    def under(*others):
        def change(state):
            tensor = state.pop(held)
            return {**state, **dict.fromkeys(others, tensor)}

        return change

    for number, others in enumerate([(name,) for name in names] + [tuple(names), tuple(TIED[kind][:2])]):
        found = vectors_of(stored_otherwise(paths, tmp_path / str(number), under(*others)), kind)
        assert found.space.shapes == expected.space.shapes
        for name in expected.space.shapes:
            assert torch.equal(found.deltas(name).dense(), expected.deltas(name).dense()), (others, name)

    def apart(state):
        tensor = state.pop(held)
        return {**state, names[-1]: tensor, names[2]: tensor + 1}

    with pytest.raises(InputError, match=r"Expert 'a' .* ties but that differ here: .*lm_head.weight"):
        vectors_of(stored_otherwise(paths, tmp_path / "apart", apart), kind)


@pytest.mark.parametrize("name", TIED["t5"])
def test_a_base_may_store_a_tied_tensor_under_any_of_its_names(name, folders, tmp_path):
    paths = folders("t5")
    expected = vectors_of(paths, "t5")

    def change(state):
        return {name if key == "shared.weight" else key: tensor for key, tensor in state.items()}

    found = vectors_of(stored_otherwise(paths, tmp_path / "base", change, "base"), "t5")
    assert found.space.shapes.keys() == expected.space.shapes.keys()
    assert torch.equal(found.deltas("shared.weight").dense(), expected.deltas("shared.weight").dense())


def trained(paths, kind, root, *, objectives=None, buffers="base", more=None):
    data = Pictures if kind == "resnet" else partial(Texts, more=more)
    recipe = recipe_of(paths, kind, objectives=objectives or [Entropy()], space=SpaceOptions(buffers=buffers))
    tasks = UnlabeledTasks({task: data(task) for task in CLASSES}, batch_size=4, eval_split=None, eval_batch_size=8)
    return adamerge.train(recipe, tasks, trainer=QUIET, run={"root": str(root), "baselines": False})


@pytest.mark.slow_unless("bert", "t5")
@pytest.mark.parametrize("kind", FILES)
def test_the_export_has_as_many_parameters_as_the_base(kind, folders, tmp_path):
    paths, auto = folders(kind), getattr(transformers, FILES[kind][1])
    run = trained(paths, kind, tmp_path)
    adamerge.export(run.dir, tmp_path / "out")
    if FILES[kind][0] is Seq2Seq:
        assert size_of(auto.from_pretrained(tmp_path / "out")) == size_of(auto.from_pretrained(paths["base"]))
        one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", paths["base"]))
        assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}
        return
    whole, base = (transformers.AutoModel.from_pretrained(path) for path in (tmp_path / "out", paths["base"]))
    assert size_of(whole) == size_of(base)
    for task in CLASSES:
        one, other = (auto.from_pretrained(folder / task) for folder in (tmp_path / "out" / "tasks", paths["a"].parent))
        assert size_of(one) == size_of(other)
    assert (run.learned.rule.raw_TG.detach() != 0.3).any(1).all()


@pytest.mark.parametrize("policy", ["base", "mean"])
def test_running_statistics_of_transformers(policy, folders, tmp_path):
    paths = dict(folders("resnet"))
    for number, task in enumerate(CLASSES, start=1):

        def change(state, number=number):
            return {n: t + number if "running" in n or "num_batches" in n else t for n, t in state.items()}

        swapped = stored_otherwise({**paths, "a": paths[task]}, tmp_path / f"expert-{task}", change)
        paths[task] = swapped["a"]
    run = trained(paths, "resnet", tmp_path, buffers=policy)
    adamerge.export(run.dir, tmp_path / "out")
    state = transformers.AutoModel.from_pretrained(tmp_path / "out").state_dict()
    live = {name.removeprefix("resnet."): buffer for name, buffer in run.merge.net.named_buffers()}
    base, *experts = (load_file(paths[key] / "model.safetensors") for key in ("base", *CLASSES))
    assert live
    for name, buffer in live.items():
        mean = policy == "mean" and "num_batches" not in name
        key = f"resnet.{name}"
        assert torch.equal(buffer, torch.stack([e[key] for e in experts]).mean(0) if mean else base[key])
        assert torch.equal(state[name], buffer)


@pytest.mark.parametrize("blocks", [None, r"albert\.encoder\.albert_layer_groups\.0"])
def test_a_layer_that_runs_four_times_is_merged_once(blocks, folders, tmp_path):
    """What it puts out has no one place to compare at: objectives on blocks are refused, with a sentence."""
    paths = folders("albert")
    opened = recipe_of(paths, "albert").open(dict(CLASSES))
    assert sum("albert_layers" in name for name in opened.space.shapes) == 16
    recipe = Recipe(
        str(paths["base"]), {t: str(paths[t]) for t in CLASSES}, TextClassifier(blocks=blocks),
        objectives=[FeatureDistillation(on="blocks")],
    )  # fmt: skip
    data = UnlabeledTasks({task: Texts(task) for task in CLASSES}, batch_size=4, eval_split=None, eval_batch_size=8)
    with pytest.raises(InputError, match="An objective is on the network's blocks, but none are known"):
        adamerge.train(recipe, data, trainer=QUIET, run={"root": str(tmp_path), "baselines": False})


# --- frozen parameters


class Frozen(nn.Module):
    """A parameter that its class does not train, though a gradient reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 8)
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x):
        return self.layer(x.flatten(1)) * self.scale


def test_a_frozen_parameter_is_merged_as_the_others(tmp_path):
    torch.manual_seed(0)
    base, paths = Frozen(), {}
    for number, key in enumerate(("base", *CLASSES)):
        state = {name: tensor + 0.01 * number * torch.randn_like(tensor) for name, tensor in base.state_dict().items()}
        head = {"head.weight": torch.randn(len(CLASSES[key]), 8)} if number else {}
        paths[key] = tmp_path / f"{key}.safetensors"
        save_file({**state, **head}, paths[key])
    recipe = Recipe(
        str(paths["base"]), {t: str(paths[t]) for t in CLASSES}, Module(Frozen), space=SpaceOptions(skip="head")
    )
    data = UnlabeledTasks({task: Images(task) for task in CLASSES}, batch_size=4)
    run = adamerge.train(recipe, data, trainer=QUIET, run={"root": str(tmp_path), "baselines": False})
    space, raw_TG = run.learned.vectors.space, run.learned.rule.raw_TG.detach()
    assert not space.left_out
    assert (raw_TG[:, space.group_of["scale"]] != 0.3).all()
    state, *experts = (load_file(paths[key]) for key in ("base", *CLASSES))
    for name in space.shapes:
        taus = [expert[name] - state[name] for expert in experts]
        expected = state[name] + sum(c * tau for c, tau in zip(raw_TG[:, space.group_of[name]], taus, strict=True))
        torch.testing.assert_close(run.merge.net.get_parameter(name), expected, check_dtype=False)


# --- dropout


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_dropout_never_acts(kind):
    """With nearly all dropped, two forwards of a training step agree with one outside of training, bit for bit."""
    rates = {"hidden_dropout_prob": 0.9, "attention_probs_dropout_prob": 0.9, "dropout_rate": 0.9}
    auto = {"bert": transformers.BertForSequenceClassification, "t5": transformers.T5ForConditionalGeneration}[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, kind, lambda: auto(config(kind, **rates)))
        net, pool = made_pool(kind)
        dropouts = [module for module in net.modules() if isinstance(module, nn.Dropout)]
        assert dropouts
        assert {module.p for module in dropouts} == {0.9}
        model, batch = merged_of(kind, net, pool), batch_for(kind)
        expected = model(batch, task="a").detach()
        module = Silent(model, objectives=[Entropy()])
        module.train()
        assert not any(dropout.training for dropout in dropouts)
        found = []
        for _ in range(2):
            with module.step({"a": batch}) as step:
                logits = module.respond("a", batch).logits_BC
                step.backward(logits.square().sum())
            found.append((logits.detach(), step.gradients["rule.raw_TG"]))
        for logits, gradient in found:
            assert torch.equal(logits, expected)
            assert torch.equal(gradient, found[0][1])
        net.train()  # it would act
        with model.applied():
            assert not torch.equal(model.respond("a", batch).logits_BC, expected)
    assert isinstance(module, AdaMerge)


# --- T5


@pytest.fixture(scope="module")
def odd_t5(tmp_path_factory):
    """A T5 whose decoder starts with token 7."""
    with pytest.MonkeyPatch.context() as patch:
        odd = config("t5", decoder_start_token_id=7)
        patch.setitem(checkpoints_hf.CONFIGS, "t5", lambda: odd)
        return write(tmp_path_factory.mktemp("odd"), "t5", "AutoModelForSeq2SeqLM")


def on_text(backbone, more=None, size=6):
    samples = Texts("a", more=more).split("test")[:size]
    return samples, backbone.collate([backbone.prepare(sample) for sample in samples])


@torch.no_grad()
def test_the_decoder_starts_with_the_configurations_token(odd_t5):
    backbone, net = (
        Seq2Seq(str(odd_t5["base"])),
        transformers.T5ForConditionalGeneration.from_pretrained(odd_t5["base"]),
    )
    _, batch = on_text(backbone)
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = net.generate(**backbone.inputs(batch), **options)
    assert (made.sequences[:, 0] == 7).all()
    found = backbone.features(net, batch)
    torch.testing.assert_close(found, made.logits[0].float(), rtol=1e-5, atol=1e-6)
    net.config.decoder_start_token_id = 0
    net.generation_config.decoder_start_token_id = 0
    other = net.generate(**backbone.inputs(batch), **options).logits[0]
    assert not torch.allclose(found, other, atol=1e-3)


@torch.no_grad()
def test_the_entropy_of_targets_is_the_mean_over_their_tokens(odd_t5):
    backbone, net = (
        Seq2Seq(str(odd_t5["base"])),
        transformers.T5ForConditionalGeneration.from_pretrained(odd_t5["base"]),
    )
    samples, batch = on_text(backbone, "target")
    total, tokens = 0.0, 0
    for sample in samples:  # one by one, without padding; the library shifts the targets itself
        ids, target = (backbone.tokenizer(sample[key], return_tensors="pt").input_ids for key in ("text", "target"))
        log_p_TV = net(input_ids=ids, labels=target).logits[0].log_softmax(-1)
        total -= float((log_p_TV.exp() * log_p_TV).sum())
        tokens += target.shape[1]
    features = backbone.features(net, batch)
    out = adamerge.types.TaskOutput("a", features, AsIs(TaskInfo("a"))(features))
    term = Entropy()(out, batch)["entropy"]
    assert term.count == tokens == len(batch["label"])
    assert float(term.sum / term.count) == pytest.approx(total / tokens, rel=1e-5)
    assert len({len(sample["target"].split()) for sample in samples}) > 1  # so that a mean of means would differ


def test_targets_are_learned_from_by_the_mean_over_tokens(odd_t5, tmp_path):
    """The loss of a step, at coefficients of 0.3 for both tasks, by hand from the state merged by hand."""
    losses = []

    class Watch(adamerge.training.pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append((float(outputs["loss"]), batch))

    data = UnlabeledTasks({t: Texts(t, more="target") for t in CLASSES}, batch_size=4, eval_split=None)
    options = {**QUIET, "max_steps": 1, "callbacks": [Watch()]}
    recipe = recipe_of(odd_t5, "t5")
    adamerge.train(recipe, data, trainer=options, run={"root": str(tmp_path), "baselines": False})
    base, *experts = (load_file(odd_t5[key] / "model.safetensors") for key in ("base", *CLASSES))
    net = transformers.T5ForConditionalGeneration.from_pretrained(odd_t5["base"])
    state = {n: t + 0.3 * sum(expert[n] - t for expert in experts) for n, t in base.items()}
    assert not net.load_state_dict(state, strict=False).unexpected_keys
    ((loss, batches),) = losses
    expected = 0.0
    for batch in batches.values():
        with torch.no_grad():
            log_p_BTV = net(**recipe.backbone.inputs(batch), labels=batch["target"]).logits.log_softmax(-1)
        entropy_BT = -(log_p_BTV.exp() * log_p_BTV).sum(-1)
        expected += float(entropy_BT[batch["target"] >= 0].mean())
    assert loss == pytest.approx(expected, rel=1e-5)
