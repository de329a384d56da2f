"""Texts of others: bombs, pipes, devices and odd values end in one paragraph, in bounded time; plain data are read."""

import os
import socket
import time

import pytest
import yaml

from adamerge import InputError, reading
from adamerge.reading import check_regular, open_regular, parse_yaml, read_json, read_text, read_yaml


def laughs(depth, last=""):
    rows = (f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]\n" for i in range(1, depth))
    return "a0: &a0 [x]\n" + "".join(rows) + last


def merges(depth):
    rows = (f"a{i}: &a{i} {{<<: [" + ", ".join([f"*a{i - 1}"] * 10) + f"], k{i}: 1}}\n" for i in range(1, depth))
    return "a0: &a0 {x: 1}\n" + "".join(rows)


BOMBS = {
    "aliases": laughs(10),
    "aliases as keys": laughs(10, "? [*a9]\n: x\n"),
    "merge keys": merges(8),
    "self-reference": "t: &t [*t]",
    "self-reference in a mapping": "t: &t {a: {b: *t}}",
    "two that hold each other": "a: &a [&b [*a]]\nb: *b",
    "a chain of aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 1000)),
    "5,000 [": "[" * 5000,
    "5,000 [ and ]": "[" * 5000 + "]" * 5000,
    "5,000 {": "{a: " * 5000 + "}" * 5000,
    "5,000 dashes": "- " * 5000 + "x",
    "5,000 indents": "".join(" " * i + "a:\n" for i in range(5000)),
    "1,000,001 lists": "[" + "[]," * 1_000_001 + "]",
    "to the base of 60": ":".join(["1"] * 100_000),
    "to the base of 60, tagged": '!!int "' + ":".join(["1"] * 100_000) + '"',
    "a long number": "1" * 5000,
    "a long hexadecimal number": "0x" + "f" * 5000,
}
ODD = {
    "code": "!!python/object/apply:os.system [x]",
    "bytes": "!!binary aGk=",
    "a set": "!!set {a}",
    "a number that is none": "!!int ''",
    "a truth that is none": "!!bool maybe",
    "a list as key": "? [a]\n: b",
    "two documents": "a: 1\n---\nb: 2",
    "a null character": "a\0",
    "half a character": '"\\ud800"',
    "a value sign": "a: =",
    "an open bracket": "{a: [}",
}


@pytest.fixture(params=["fast", "slow"])
def loader(request, monkeypatch):
    """Both of PyYAML's safe loaders; libyaml's is not everywhere."""
    if request.param == "slow":
        slow = type("Slow", (yaml.SafeLoader,), {"yaml_implicit_resolvers": reading._Loader.yaml_implicit_resolvers})
        monkeypatch.setattr(reading, "_SAFE", yaml.SafeLoader)
        monkeypatch.setattr(reading, "_Loader", slow)
        monkeypatch.setattr(reading, "NODES", 20_000)  # it is ten times slower


@pytest.mark.parametrize("name", [*BOMBS, *ODD])
def test_bombs_and_odd_values_of_yaml_are_refused_at_once(name, loader, request):
    if "[slow" in request.node.name and name.startswith("5,000 ["):
        pytest.skip("takes PyYAML's own scanner eight seconds, however many there are")
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"^F[ ,]") as refused:
        parse_yaml({**BOMBS, **ODD}[name], "F")
    assert time.perf_counter() - start < 10
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: {b: [1, 2.5, true, null, tâche]}", {"a": {"b": [1, 2.5, True, None, "tâche"]}}),
        ("2001-01-01: 2001-01-01", {"2001-01-01": "2001-01-01"}),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        ("[&a [1], *a]", [[1], [1]]),
        ('!!str 2020: "' + "1" * 5000 + '"', {"2020": "1" * 5000}),
        ("", None),
    ],
)
def test_plain_yaml_is_read(text, value, loader):
    assert parse_yaml(text, "F") == value


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b"[" * 200 + b"]" * 200,
        b'{"a":' * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b"1" + b"0" * 30,
        b'"\\ud800"',
        b'{"\\udfff": 1}',
        b"\xff\xfe{}",
        b"",
        b"{]",
    ],
)
def test_json_that_is_a_bomb_or_odd_is_refused(raw, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"config\.json"):
        read_json(file)


def test_plain_json_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"weight_map": {"a": "\\ud83d\\ude00", "b": [1, 2.5, null, true]}}')
    assert read_json(tmp_path / "a.json") == {"weight_map": {"a": "😀", "b": [1, 2.5, None, True]}}


def special_files(folder):
    """What stands where a file should, by name."""
    os.mkfifo(folder / "pipe")
    (folder / "link to a pipe").symlink_to("pipe")
    (folder / "zeros").symlink_to("/dev/zero")
    (folder / "nothing").symlink_to("/dev/null")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(folder)  # names of sockets are short
        made.bind("socket")
        os.chdir(here)
    return [folder / name for name in ("pipe", "link to a pipe", "zeros", "nothing", "folder", "socket")]


def test_only_regular_files_are_opened(tmp_path):
    for path in special_files(tmp_path):
        for use in (check_regular, open_regular, read_text, read_yaml, read_json):
            with pytest.raises(InputError, match="not a file"):
                use(path)


@pytest.mark.parametrize("name", ["missing", "\0", "x" * 300])
def test_a_file_that_cannot_be_is_refused(name, tmp_path):
    with pytest.raises(InputError, match=r"cannot be read|no name of a file"):
        read_text(tmp_path / name)


def test_a_text_that_is_too_large_or_not_utf8_is_refused(tmp_path):
    large, latin = tmp_path / "large", tmp_path / "latin"
    with large.open("wb") as file:
        file.truncate(10**12)  # takes no room on the disk
    latin.write_bytes("tâche".encode("latin1"))
    with pytest.raises(InputError, match="larger than 16 MiB"):
        read_text(large)
    with pytest.raises(InputError, match=r"no UTF-8 text: byte 1 is 0xe2"):
        read_text(latin)
