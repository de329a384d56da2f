"""Sources: every layout that is read, and every kind of bad one with its message."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from adamerge import files
from adamerge.audit import header_problems
from adamerge.checkpoints import open_state
from adamerge.files import sha256
from adamerge.space import ParamSpace
from adamerge.task_vectors import TaskVectors
from adamerge.types import InputError
from tests.tiny import TASKS, Net, NormNet, TiedNet, states


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)}


def sharded(folder, name="model"):
    save_file({"a": TENSORS["a"]}, folder / f"{name}-00001-of-00002.safetensors")
    save_file({key: TENSORS[key] for key in ("b", "n")}, folder / f"{name}-00002-of-00002.safetensors")
    weight_map = {
        "a": f"{name}-00001-of-00002.safetensors",
        **dict.fromkeys(("b", "n"), f"{name}-00002-of-00002.safetensors"),
    }
    (folder / f"{name}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


def layouts(folder):
    save_file(TENSORS, folder / "one.safetensors")
    yield folder / "one.safetensors"
    (folder / "single").mkdir()
    save_file(TENSORS, folder / "single" / "model.safetensors")
    yield folder / "single"
    (folder / "sharded").mkdir()
    yield sharded(folder / "sharded")
    torch.save(TENSORS, folder / "plain.pt")
    yield folder / "plain.pt"
    torch.save({"state_dict": TENSORS, "epoch": 3}, folder / "nested.ckpt")
    yield folder / "nested.ckpt"
    torch.save(TENSORS, folder / "old.bin", _use_new_zipfile_serialization=False)
    yield folder / "old.bin"


def test_every_layout_gives_the_same_tensors(tmp_path):
    for source in layouts(tmp_path):
        state = open_state(str(source))
        assert set(state) == set(TENSORS)
        assert len(state) == 3
        for name, tensor in TENSORS.items():
            assert torch.equal(state[name], tensor)
            assert state.meta(name) == (tensor.shape, tensor.dtype)
        assert len(state.sha256()) == 64


def test_the_digest_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    first = sha256(path)
    monkeypatch.setattr(files.hashlib, "file_digest", None)  # a second reading would fail
    assert sha256(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    save_file({"a": torch.zeros(2)}, path)
    assert sha256(path) != first


def test_the_digest_of_shards_is_of_all_of_them(tmp_path):
    folder = sharded(tmp_path)
    before = open_state(folder).sha256()
    save_file({"a": TENSORS["a"] + 1}, folder / "model-00001-of-00002.safetensors")
    assert open_state(folder).sha256() != before


def truncated(folder):
    path = folder / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    return path, "is not a whole safetensors file.*truncated"


def lying_header(folder):
    path = folder / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    return path, "is not a whole safetensors file"


def huge_header(folder):
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return path, "is not a whole safetensors file"


def pickle_named_safetensors(folder):
    path = folder / "x.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    return path, "is not a whole safetensors file"


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def pickle_with_code(folder):
    path = folder / "x.pt"
    torch.save({"a": torch.ones(2), "b": Bomb()}, path)
    return path, "holds other objects than tensors.*never read"


def raw_pickle_with_code(folder):
    path = folder / "x.pth"
    path.write_bytes(pickle.dumps(Bomb()))
    return path, "holds other objects than tensors"


def damaged_zip(folder):
    path = folder / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"nonsense")
    return path, "is not a plain state dict"


def not_tensors(folder):
    path = folder / "x.pt"
    torch.save({"a": torch.ones(2), "epoch": 3}, path)
    return path, "holds other things than named tensors"


def outside_index(folder):
    save_file({"a": torch.ones(2)}, folder / "secret.safetensors")
    inner = folder / "inner"
    inner.mkdir()
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    return inner, r"points outside its folder \('../secret.safetensors'\)"


def missing_shard(folder):
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder, "names the shard 'model-00002-of-00002.safetensors', which is missing"


def bad_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")
    return folder, "is no index of shards"


def two_indices(folder):
    sharded(folder), sharded(folder, "other")
    return folder, "holds 2 indices"


def no_weights(folder):
    return folder, "holds 0 safetensors files"


def twice_in_shards(folder):
    sharded(folder)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    return folder, "tensor 'a' stands in two files"


def nothing_there(folder):
    return folder / "gone.safetensors", "There is no checkpoint at"


def unknown_kind(folder):
    (folder / "x.gguf").touch()
    return folder / "x.gguf", "unknown kind of checkpoint"


BAD = [
    *(
        truncated,
        lying_header,
        huge_header,
        pickle_named_safetensors,
        pickle_with_code,
        raw_pickle_with_code,
        damaged_zip,
    ),
    *(
        not_tensors,
        outside_index,
        missing_shard,
        bad_index,
        two_indices,
        no_weights,
        twice_in_shards,
        nothing_there,
        unknown_kind,
    ),
]


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_source(make, tmp_path):
    (tmp_path / "here").mkdir()
    path, message = make(tmp_path / "here")
    with pytest.raises(InputError, match=message):
        open_state(str(path))


@pytest.mark.parametrize("name", ["digits/nobody", "nowhere/base"])
def test_unknown_demo(name):
    with pytest.raises(InputError, match=r"The demo pool digits has no model|There is no demo pool"):
        open_state(f"demo:{name}")


# --- experts that do not fit


def load(pool, net=Net, **options):
    space = ParamSpace.of(net(), **{"skip": r"^head\.", **options})
    return TaskVectors.load(space, pool["base"], {task: state for task, state in pool.items() if task != "base"})


def without(pool, task, name):
    del pool[task][name]


def with_extra(pool, task, name):
    pool[task][name] = torch.ones(2)


def with_shape(pool, task, name):
    pool[task][name] = torch.ones(2, 2)


def with_value(pool, task, name, value):
    pool[task][name] = pool[task][name].clone()
    pool[task][name].view(-1)[0] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: without(p, "b", "stem.bias"),
            r"Expert 'b' .* does not match the network: missing tensors: 1 \(stem.bias\)",
        ),
        (lambda p: without(p, "base", "stem.bias"), r"The base .* missing tensors: 1 \(stem.bias\)"),
        (lambda p: with_extra(p, "b", "lora.weight"), r"tensors the network does not have: 1 \(lora.weight\)"),
        (
            lambda p: with_shape(p, "b", "stem.weight"),
            r"stem.weight is \[2, 2\], the network's \[6, 5\].*`model.space.skip`",
        ),
        (
            lambda p: p["b"].update({"stem.weight": torch.ones(6, 5, dtype=torch.int8)}),
            "quantised or integer.*stem.weight is int8",
        ),
        (lambda p: p.update(b=dict(p["base"])), "Expert 'b' equals the base in every merged tensor"),
        (lambda p: p.update(c=dict(p["b"])), "Experts 'b' and 'c' are identical"),
        (
            lambda p: with_value(p, "b", "stem.weight", torch.nan),
            r"Expert 'b' holds NaN or Inf in 1 \(stem.weight\) tensors",
        ),
        (lambda p: with_value(p, "c", "stem.weight", torch.inf), r"Expert 'c' holds NaN or Inf"),
        (
            lambda p: with_value(p, "base", "stem.weight", torch.nan),
            r"The base holds NaN or Inf in 1 \(stem.weight\) tensors",
        ),
    ],
)
def test_bad_pool(change, message):
    pool = states()
    change(pool)
    with pytest.raises(InputError, match=message):
        load(pool)


def test_all_problems_are_listed_at_once():
    pool = states()
    without(pool, "a", "stem.bias"), with_extra(pool, "b", "x"), with_shape(pool, "b", "stem.weight")
    with pytest.raises(InputError) as error:
        load(pool)
    assert str(error.value).startswith("2 problems with the checkpoints:\n")
    assert str(error.value).count("\n  - ") == 2


def test_large_finite_values_are_no_inf():
    pool = states()
    with_value(pool, "b", "stem.weight", 1e30)  # its square overflows fp32
    assert float(load(pool).deltas("stem.weight").dense()[1].max()) > 9e29


def test_the_fix_that_the_error_suggests_works():
    pool = states()
    with_shape(pool, "b", "stem.weight")
    vectors = load(pool, skip=r"^head\.|^stem\.weight$")
    assert "stem.weight" not in vectors.space.shapes


def test_checkpoints_may_use_either_name_of_a_tied_tensor():
    pool = states(TiedNet)
    without(pool, "a", "inner.weight"), without(pool, "b", "outer.weight")
    vectors = load(pool, TiedNet)
    expected = pool["a"]["outer.weight"] - pool["base"]["inner.weight"]
    torch.testing.assert_close(vectors.deltas("inner.weight").dense()[0], expected)


def test_an_untied_expert_of_a_tied_network_is_refused():
    pool = states(TiedNet)
    pool["b"]["outer.weight"] = pool["b"]["outer.weight"] + 1
    with pytest.raises(InputError, match=r"network ties but that differ here: 1 .inner.weight and outer.weight"):
        load(pool, TiedNet)


def test_every_copy_of_a_tied_tensor_is_compared():
    class Thrice(TiedNet):
        def __init__(self):
            super().__init__()
            self.third = torch.nn.Linear(6, 6)
            self.third.weight = self.inner.weight

    pool = states(Thrice)
    pool["b"]["third.weight"] = pool["b"]["third.weight"] + 1
    with pytest.raises(InputError, match=r"network ties but that differ here"):
        load(pool, Thrice)


def test_a_buffer_of_another_shape_is_refused():
    pool = states(NormNet)
    pool["base"]["norm.running_mean"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"norm.running_mean is \[1\], the network's \[6\]"):
        load(pool, NormNet)


def test_a_module_used_twice_has_its_buffers_under_either_name():
    class Twice(NormNet):
        def __init__(self):
            super().__init__()
            self.again = self.norm

    pool = states(Twice)
    assert ParamSpace.of(Twice()).aliases["again.running_mean"] == "norm.running_mean"
    load(pool, Twice)


def test_no_experts():
    with pytest.raises(InputError, match="There are no experts"):
        load({"base": states()["base"]})


def test_missing_buffers_are_missed():
    pool = states(NormNet)
    without(pool, "a", "norm.running_mean")
    space = ParamSpace.of(NormNet(), skip=r"^head\.")
    problems = list(header_problems(space, open_state(pool["base"]), {t: open_state(pool[t]) for t in TASKS}))
    assert len(problems) == 1
    assert "norm.running_mean" in problems[0]


def test_a_broken_expert_is_never_cached(tmp_path):
    from tests.tiny import write_pool

    paths = write_pool(tmp_path)
    base = paths.pop("base")
    paths["c"] = paths["b"]
    space = ParamSpace.of(Net(), skip=r"^head\.")
    for _ in range(2):
        with pytest.raises(InputError, match="identical"):
            TaskVectors.load(space, base, paths, placement="mmap")
