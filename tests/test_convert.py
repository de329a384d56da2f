"""Pickles become safetensors, and nothing that they name is imported, made or run."""

import argparse
import errno
import json
import os
import pickle
import random
import sys
import types
import zipfile
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from adamerge.checkpoints import open_state
from adamerge.convert import convert, converting
from adamerge.types import InputError
from tests.tiny import Net, NormNet, TiedNet


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


class Evil:
    """Pickled, it makes whoever loads it run a command."""

    def __init__(self, path, function=os.system):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (f"touch {self.path}",)


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_state_dict(net, tmp_path, suffix, zipped):
    source, out = tmp_path / f"model{suffix}", tmp_path / "model.safetensors"
    torch.save(net.state_dict(), source, _use_new_zipfile_serialization=zipped)
    done = convert(source, out)
    same(dict(net.state_dict()), {name: load_file(out)[name] for name in net.state_dict()})
    assert done.out == out
    assert (done.tensors, dict(done.dtypes), done.left_out) == (10, {"F32": 10}, ())
    assert done.bytes == sum(t.numel() * 4 for t in net.state_dict().values())
    assert "Converted 10 tensors (F32: 10; 0.0 MB), read back and equal bit by bit." in str(done)
    assert f"File: {out}" in str(done)
    assert set(open_state(out)) == set(net.state_dict())
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_type_and_odd_values(tmp_path):
    wide = torch.tensor([1.5, float("nan"), -0.0, float("inf")])
    state = {str(kind): wide.nan_to_num().to(kind) for kind in converting._NAMES}
    state |= {"nan": wide, "empty": torch.zeros(0, 3), "scalar": torch.tensor(7), "column": torch.eye(3)[:, 1]}
    state |= {"turned": torch.arange(6.0).view(2, 3).T, "wide": torch.ones(1, 3).expand(4, 3)}
    state["parameter"] = nn.Parameter(torch.ones(2))
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    same({k: v.detach() for k, v in sorted(state.items())}, dict(sorted(found.items())))


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_and_overlapping_tensors_stand_under_each_name(tmp_path, zipped):
    net, whole = TiedNet(), torch.arange(10.0)
    state = {**net.state_dict(), "front": whole[:6], "back": whole[4:]}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    done = convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    same(dict(sorted(state.items())), dict(sorted(found.items())))
    assert list(done.tied) == ["outer.weight"]
    assert "1 of them stand under several names, and are written under each." in str(done)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_a_training_checkpoint(net, tmp_path, key):
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 5)).sum().backward()
    adam.step()
    rest = {
        "epoch": 3,
        "optimizer": adam.state_dict(),
        "best": np.float64(0.5),
        "rng": np.random.RandomState(0).get_state(),
        "shape": torch.Size([2]),
        "kind": torch.float16,
        "where": torch.device("cpu"),
        "tags": {"a"},
        "z": 1j,
        "raw": b"\xff\0",
    }
    torch.save({"epoch": 3, key: net.state_dict(), **rest}, tmp_path / "a.ckpt")
    done = convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == set(net.state_dict())
    assert done.left_out == tuple(rest)
    assert f"Left out: {', '.join(rest)}.\n" in str(done)


def test_one_inside_another_and_one_named(net, tmp_path):
    state = net.state_dict()
    torch.save({"model": {"state_dict": state, "step": 1}, "epoch": 2}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "a.safetensors").left_out == ("epoch", "model.step")
    torch.save({"net": state, "ema": state, "epoch": 2}, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"has several entries with tensors: net, ema. Name the one .* --key net"):
        convert(tmp_path / "b.pt", tmp_path / "b.safetensors")
    assert convert(tmp_path / "b.pt", tmp_path / "b.safetensors", key="net").left_out == ("ema", "epoch")
    with pytest.raises(InputError, match=r"has no entry 'nett' \(of `key` 'nett'\); it has 3 \(net, ema, epoch\)"):
        convert(tmp_path / "b.pt", tmp_path / "c.safetensors", key="nett")
    torch.save({"weights": state, "epoch": 2}, tmp_path / "d.pt")
    assert convert(tmp_path / "d.pt", tmp_path / "d.safetensors").left_out == ("epoch",)


def test_an_optimizer_is_no_model(net, tmp_path):
    adam = torch.optim.Adam([net.stem.weight])
    net(torch.ones(2, 5)).sum().backward()
    adam.step()
    torch.save(adam.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"optimizer.pt holds no named tensors in state.; save `model.state_dict\(\)`"):
        convert(tmp_path / "optimizer.pt", tmp_path / "a.safetensors")


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numpy(tmp_path, order):
    state = {
        "a": np.asarray(np.arange(6.0, dtype=np.float32).reshape(2, 3), order=order),
        "b": np.arange(3, dtype=">i4"),
    }
    torch.save(state, tmp_path / "a.pt")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(state, protocol=4))
    for name in ("a.pt", "b.pkl"):
        convert(tmp_path / name, tmp_path / f"{name}.safetensors")
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found["b"].tolist() == [0, 1, 2]


def test_arrays_of_objects_are_refused(tmp_path):
    torch.save({"w": torch.ones(1), "a": np.array([{}, None], dtype=object)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"its pickle names 1 \(numpy.dtype\('O8'\)\)"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors")


# --- pickles that name classes


@pytest.mark.parametrize("modules", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "beside", "inside"])
def test_a_malicious_pickle_runs_nothing(tmp_path, modules, zipped, where):
    trap, evil = tmp_path / "trap", Evil(tmp_path / "trap")
    torch.save(
        {"alone": evil, "beside": {"state_dict": {"a": torch.ones(1)}, "x": evil}, "inside": {"a": evil}}[where],
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match=r"a.pt asks for posix.system, which no model needs .* looks like an attack"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors", modules=modules)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]
    assert not trap.exists()


def never(*args):
    raise AssertionError("run")


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch TRAP'\ntR.",
        b"(S'touch TRAP'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch TRAP'\no.",
        b'cbuiltins\neval\n(S\'open("TRAP","w")\'\ntR.',
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch TRAP\x85R.",
        b"\x80\x02cos\nsystem\n(X\x0a\x00\x00\x00touch TRAPt\x81.",
    ],
)
def test_every_way_to_call(tmp_path, code, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(code)
    for modules in (False, True):
        with pytest.raises(InputError, match="looks like an attack"):
            convert("a.bin", "a.safetensors", modules=modules)
    assert not (tmp_path / "TRAP").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02\x82\x01.",  # a registered name by number
        b"ctorch\nTensor\n}X\x01\x00\x00\x00aK\x01sb.",  # attributes for a class
        b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
        b"}\x8c\x01a\x8c\x01b(\x8c\x01ctRs.",  # a call of what is no function
        b"Pstorage\n.",
        b"",
        b"garbage",
    ],
)
def test_odd_pickles_end_in_a_sentence(tmp_path, code):
    (tmp_path / "a.bin").write_bytes(code)
    before = dict(vars(torch.Tensor)), torch.Tensor.__init__
    with pytest.raises(InputError, match=r"is damaged, or no checkpoint|holds no named tensors"):
        convert(tmp_path / "a.bin", tmp_path / "a.safetensors", modules=True)
    assert (dict(vars(torch.Tensor)), torch.Tensor.__init__) == before


def test_other_objects_are_listed_all_at_once(tmp_path):
    rest = {"args": argparse.Namespace(lr=1.0), "hook": never, "path": tmp_path}
    torch.save({"state_dict": {"w": torch.ones(2)}, **rest}, tmp_path / "a.pt")
    with pytest.raises(
        InputError,
        match=r"its pickle names 3 \(argparse.Namespace, pathlib.PosixPath, tests.test_convert.never\).*modules=True",
    ):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    done = convert(tmp_path / "a.pt", tmp_path / "a.safetensors", modules=True)
    assert done.left_out == tuple(rest)


@pytest.fixture
def foreign():
    """A module of code that is gone when the pickle is read."""
    home = types.ModuleType("src_modeling_of_others")
    ran = []

    class ImageEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.tied, self.norm = Net(), TiedNet(), NormNet()
            self.register_buffer("kept", torch.arange(3))
            self.register_buffer("passing", torch.ones(2), persistent=False)
            self.register_parameter("none", None)
            self.preprocess = [argparse.Namespace(size=224), max]
            self.register_forward_hook(never)

        def __setstate__(self, state):
            ran.append(state)

    for value in (ImageEncoder,):
        value.__module__, value.__qualname__ = home.__name__, value.__name__
        setattr(home, value.__name__, value)
    sys.modules[home.__name__] = home
    yield home, ran
    sys.modules.pop(home.__name__, None)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"epoch": 1, "model": m}, nn.DataParallel])
def test_a_whole_module_without_its_code(foreign, tmp_path, zipped, wrap):
    home, ran = foreign
    torch.manual_seed(0)
    encoder = home.ImageEncoder()
    expected = encoder.state_dict()
    wrapped = wrap(encoder)
    expected = wrapped.state_dict() if isinstance(wrapped, nn.Module) else expected
    torch.save(wrapped, tmp_path / "finetuned.pt", _use_new_zipfile_serialization=zipped)
    del sys.modules[home.__name__]
    with pytest.raises(
        InputError, match=r"src_modeling_of_others.ImageEncoder.*modules=True \(in a command: --modules"
    ):
        convert(tmp_path / "finetuned.pt", tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"its pickle names \d+ \(.* and \d+ more\)"):
        convert(tmp_path / "finetuned.pt", tmp_path / "a.safetensors")
    done = convert(tmp_path / "finetuned.pt", tmp_path / "a.safetensors", modules=True)
    found = load_file(tmp_path / "a.safetensors")
    same(dict(sorted(expected.items())), dict(sorted(found.items())))
    assert [name for name in done.tied if name.endswith("outer.weight")]
    assert done.left_out == (("epoch",) if isinstance(wrapped, dict) else ())
    assert ran == []
    assert home.__name__ not in sys.modules


def test_a_task_vector_object(tmp_path, monkeypatch):
    home = types.ModuleType("task_vectors_of_others")
    cls = type("TaskVector", (), {"__module__": home.__name__})
    home.TaskVector = cls
    monkeypatch.setitem(sys.modules, home.__name__, home)
    made = cls()
    made.vector = {"w": torch.ones(2)}
    torch.save(made, tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, home.__name__)
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors", modules=True)
    assert set(load_file(tmp_path / "a.safetensors")) == {"w"}


def test_special_tensors_are_refused(tmp_path):
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(
        InputError, match=r"sparse, quantised or otherwise special tensors \(torch._utils._rebuild_spar"
    ):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors", modules=True)
    torch.save({"a": torch.ones(1, dtype=torch.complex128)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"types that are not written \(torch.complex128\): 1 \(a\)"):
        convert(tmp_path / "b.pt", tmp_path / "a.safetensors")


# --- TorchScript


@pytest.mark.parametrize("traced", [True, False])
def test_a_torchscript_archive(net, tmp_path, traced):
    """As OpenAI's CLIP files are: half of the weights in fp16, statistics and integers as buffers."""
    model = nn.Sequential(net.half().float(), NormNet().eval())
    model[1].register_buffer("input_resolution", torch.tensor(224))
    inputs = torch.ones(2, 5)
    model[1].stem = nn.Linear(6, 6)
    script = torch.jit.trace(model.eval(), inputs) if traced else torch.jit.script(model[1].eval())
    torch.jit.save(script, tmp_path / "ViT.pt")
    done = convert(tmp_path / "ViT.pt", tmp_path / "a.safetensors")
    found, expected = load_file(tmp_path / "a.safetensors"), script.state_dict()
    same(dict(sorted(expected.items())), dict(sorted(found.items())))
    assert "the code of the TorchScript archive" in done.left_out


# --- folders


def shards(net, folder, prefix="pytorch_model"):
    folder.mkdir()
    names = list(net.state_dict())
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"{prefix}-{number:05d}-of-00002.bin"
        torch.save({name: net.state_dict()[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{prefix}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a")
    torch.save({"x": 1}, folder / "training_args.bin")


def test_a_folder_of_shards(net, tmp_path, monkeypatch):
    shards(net, tmp_path / "in")
    done = convert(tmp_path / "in", tmp_path / "one")
    assert sorted(str(f.relative_to(tmp_path / "one")) for f in (tmp_path / "one").rglob("*") if f.is_file()) == [
        *("config.json", "model.safetensors", "tokenizer/vocab.txt")
    ]
    assert done.left_out == ("training_args.bin",)
    assert f"Folder: {tmp_path / 'one'}" in str(done)
    monkeypatch.setattr(converting, "_SHARD", 200)
    convert(tmp_path / "in", tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert all(f"-of-{len(files):05d}." in file.name for file in files)
    assert index["metadata"]["total_size"] == done.bytes
    for out in ("one", "many"):
        state = open_state(tmp_path / out)
        same(dict(sorted(net.state_dict().items())), {name: state[name] for name in sorted(state)})


def test_transformers_loads_a_converted_folder(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    bert = BertModel(BertConfig(**tiny)).eval()
    (tmp_path / "in").mkdir()
    bert.config.save_pretrained(tmp_path / "in")
    torch.save(bert.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    convert(tmp_path / "in", tmp_path / "out")
    ids = torch.tensor([[1, 2, 3]])
    again = BertModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    assert torch.equal(again(ids).last_hidden_state, bert(ids).last_hidden_state)


def test_the_name_that_open_clip_looks_for(net, tmp_path):
    (tmp_path / "in").mkdir()
    torch.save(OrderedDict(net.state_dict()), tmp_path / "in" / "open_clip_pytorch_model.bin")
    convert(tmp_path / "in", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["open_clip_model.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "pytorch_model-00002-of-00002.bin").unlink(), r"names the shard 'pytorch_model-00002-of-00002"),
        (lambda d: (d / "pytorch_model.bin.index.json").write_text("[]"), r"is no index of shards"),
        (
            lambda d: (d / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            r"outside its fol",
        ),
        (
            lambda d: (d / "pytorch_model.bin.index.json").unlink(),
            r"holds 2 pickled checkpoints and 0 indices .*first|2",
        ),
        (lambda d: save_file({"a": torch.ones(1)}, d / "model.safetensors"), r"holds 1 \(model.safetensors\) already"),
        (lambda d: torch.save({"stem.weight": torch.ones(1)}, d / "pytorch_model-00002-of-00002.bin"), "in two shards"),
    ],
)
def test_folders_that_are_not_whole(net, tmp_path, change, message):
    shards(net, tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what goes wrong


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(net, tmp_path, zipped):
    source, out = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save(net.state_dict(), source, _use_new_zipfile_serialization=zipped)
    whole = source.read_bytes()
    place = whole.index(net.stem.weight.detach().numpy().tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    pieces = [whole[: len(whole) * part // 7] for part in range(7)]
    for damaged in [*pieces, *([flipped] if zipped else [])]:  # files of torch < 1.6 have no checksums
        source.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a.pt is (damaged|a zip archive that is cut short)"):
            convert(source, out)
        assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_tensors_beyond_their_storage(tmp_path):
    torch.save({"a": torch.ones(4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:8] if name.endswith("data/0") else old.read(name))
    with pytest.raises(InputError, match=r"b.pt is damaged: its tensors cannot be read"):
        convert(tmp_path / "b.pt", tmp_path / "a.safetensors")


def test_existing_places_are_left_alone(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(InputError, match=r"a.safetensors exists already and is not overwritten"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    with pytest.raises(InputError, match=r"is a file: give a name that ends in .safetensors"):
        convert(tmp_path / "a.pt", tmp_path / "b")
    with pytest.raises(InputError, match=r"is a safetensors file already"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"There is no checkpoint at"):
        convert(tmp_path / "none.pt", tmp_path / "b.safetensors")
    shards(net, tmp_path / "in")
    with pytest.raises(InputError, match=r"is a folder: give a folder to write"):
        convert(tmp_path / "in", tmp_path / "b.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"out exists already"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("folder", [True, False])
def test_a_full_disk_leaves_nothing(net, tmp_path, monkeypatch, folder):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    shards(net, tmp_path / "in")
    monkeypatch.setattr(converting, "save_file", full)
    source = tmp_path / "in" / ("" if folder else "pytorch_model-00001-of-00002.bin")
    with pytest.raises(InputError, match=r"No space left on the disk"):
        convert(source, tmp_path / ("out" if folder else "out.safetensors"))
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_what_is_written_is_read_back(net, tmp_path, monkeypatch):
    def other(tensors, file, metadata):
        save_file({name: tensor + (name == "stem.bias") for name, tensor in tensors.items()}, file, metadata)

    torch.save(net.state_dict(), tmp_path / "a.pt")
    monkeypatch.setattr(converting, "save_file", other)
    with pytest.raises(InputError, match=r"1 \(stem.bias\) came back otherwise from the disk than written"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_any_change_of_a_pickle_ends_in_a_sentence(foreign, tmp_path):
    home, ran = foreign
    torch.save({"model": home.ImageEncoder(), "a": np.arange(3.0), "s": {1}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old:
        members = {name: old.read(name) for name in old.namelist()}
    main = next(name for name in members if name.endswith("data.pkl"))
    draw = random.Random(0)
    for _ in range(300):
        code = bytearray(members[main])
        for _ in range(draw.randint(1, 3)):
            code[draw.randrange(len(code))] = draw.randrange(256)
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
            for name, content in {**members, main: bytes(code)}.items():
                new.writestr(name, content)
        with suppress(InputError):
            convert(tmp_path / "b.pt", tmp_path / "b.safetensors", modules=True)
        (tmp_path / "b.safetensors").unlink(missing_ok=True)
    assert ran == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_nesting_without_end(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x80\x02" + b"](" * 5000 + b"e" * 5000 + b".")
    (tmp_path / "b.bin").write_bytes(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.")
    for name in ("a.bin", "b.bin"):
        with pytest.raises(InputError):
            convert(tmp_path / name, tmp_path / "a.safetensors")
