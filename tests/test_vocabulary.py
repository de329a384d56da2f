"""Experts whose tokens are not the base's: refused by name, or merged as was asked for; nothing is cut to size."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import adamerge
from adamerge.config import parse
from adamerge.preflight import check
from adamerge.teachers import LOGITS, Teachers
from adamerge.types import InputError
from tests.checkpoints_hf import CLASSES, LENGTH, SPECIAL, WORDS, write
from tests.test_bad_checkpoints import FILE, config

TABLES = {"bert": "bert.embeddings.word_embeddings.weight", "t5": "shared.weight"}
AUTOS = {"bert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM"}
BACKBONES = {"bert": "TextClassifier", "t5": "Seq2Seq"}
MORE = ["yak", "zebu"]
SENTENCE = "the ant and cat pig owl lion zebra"


@pytest.fixture
def pool(tmp_path):
    return lambda kind="bert": write(tmp_path / "pool", kind, AUTOS[kind])


def edit_tokens(folder, change):
    """Change a tokenizer's table from token to number."""
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["vocab"] = change(told["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(told))


def more_tokens(folder, kind):
    """A table with two more rows, and a tokenizer that knows them: what `resize_token_embeddings` leaves."""
    net = getattr(transformers, AUTOS[kind]).from_pretrained(folder)
    net.resize_token_embeddings(len(SPECIAL) + len(WORDS) + len(MORE))
    net.save_pretrained(folder)
    made = transformers.AutoTokenizer.from_pretrained(folder)
    made.add_tokens(MORE)
    made.save_pretrained(folder)


def other_numbers(folder, kind):
    """The words in the opposite order, in the tokenizer as in the table."""
    first, last = len(SPECIAL), len(SPECIAL) + len(WORDS)
    edit_tokens(folder, lambda vocab: {t: n if n < first else first + last - 1 - n for t, n in vocab.items()})
    state = load_file(folder / FILE)
    for name in [each for each in (TABLES[kind], "lm_head.weight") if each in state]:
        state[name] = torch.cat([state[name][:first], state[name][first:last].flip(0), state[name][last:]])
    save_file(state, folder / FILE, {"format": "pt"})


def padded(folder, kind):
    """More rows for the same tokens, as some trainers leave for speed."""
    net = getattr(transformers, AUTOS[kind]).from_pretrained(folder)
    net.resize_token_embeddings(32)
    net.save_pretrained(folder)


def fewer_tokens(folder, kind):
    """Without the last word."""
    edit_tokens(folder, lambda vocab: {token: number for token, number in vocab.items() if token != WORDS[-1]})
    net = getattr(transformers, AUTOS[kind]).from_pretrained(folder)
    net.resize_token_embeddings(len(SPECIAL) + len(WORDS) - 1)
    net.save_pretrained(folder)


CHANGES = {
    "more": (more_tokens, r"it has more tokens: 2 \(yak, zebu\); .* is \[23, 16\], the base's \[21, 16\]"),
    "others": (other_numbers, r"tokens have other numbers: 16 \(first: ant, bee, cat\)"),
    "padded": (padded, r".*weight is \[32, 16\], the base's \[21, 16\]"),
    "fewer": (fewer_tokens, r"it lacks tokens: 1 \(pig\); .* is \[20, 16\], the base's \[21, 16\]"),
}


def planned(sources, root, kind="bert", vocabulary="error", **more):
    return config(sources, root, backbone=BACKBONES[kind], space={"vocabulary": vocabulary}, **more)


@pytest.mark.parametrize("kind", AUTOS)
@pytest.mark.parametrize("name", CHANGES)
def test_another_vocabulary_is_named_before_anything_is_made(name, kind, pool, tmp_path):
    sources, (change, message) = pool(kind), CHANGES[name]
    change(sources["a"], kind)
    plain = planned(sources, tmp_path, kind)
    for call in (lambda: check(parse(plain, {})), lambda: adamerge.train(plain)):
        with pytest.raises(InputError) as found:
            call()
        said = str(found.value)
        assert re.search(rf"^Expert 'a' has another vocabulary than the base: {message}", said), said
        assert "`model.space.vocabulary` to `base`" in said
        assert "does not match the network" not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow_unless("base-more-bert", "exclude-fewer-bert", "base-others-t5", "exclude-padded-t5")
@pytest.mark.parametrize("kind", AUTOS)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("policy", ["base", "exclude"])
def test_the_advice_works_and_the_merge_is_its_closed_form(policy, name, kind, pool, tmp_path):
    sources = pool(kind)
    CHANGES[name][0](sources["a"], kind)
    plain = planned(sources, tmp_path, kind, policy)
    check(parse(plain, {}), deep=True)
    plain["trainer"]["max_steps"] = 0
    run = adamerge.train(plain)
    base, other = (load_file(sources[each] / FILE)[TABLES[kind]] for each in ("base", "b"))
    merged = run.merge.net.state_dict()[TABLES[kind]]
    if policy == "base":
        assert torch.equal(merged, base)
        assert TABLES[kind] not in run.learned.vectors.space.shapes
    else:
        torch.testing.assert_close(merged, base + 0.3 * (other - base))
    loaded = adamerge.load(run.dir)
    assert torch.equal(loaded.net.state_dict()[TABLES[kind]], merged)
    assert adamerge.export(run.dir, tmp_path / "out").difference < 1e-5


def test_all_experts_may_be_left_out(pool, tmp_path):
    sources = pool()
    for task in CLASSES:
        more_tokens(sources[task], "bert")
    plain = planned(sources, tmp_path, vocabulary="exclude")
    run = adamerge.train(plain)
    assert torch.equal(run.merge.net.state_dict()[TABLES["bert"]], load_file(sources["base"] / FILE)[TABLES["bert"]])


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("policy", ["base", "exclude"])
def test_the_expert_teaches_what_it_says_itself(policy, name, pool, tmp_path):
    """With its own tokenizer and embeddings, of a text of tokens that it knows."""
    sources = pool()
    CHANGES[name][0](sources["a"], "bert")
    job = parse(planned(sources, tmp_path, vocabulary=policy), {})
    data = job.data.prepared_by(job.recipe.backbone.preparer, job.recipe.backbone.collate)
    opened = job.recipe.open(data.classes)
    opened.probe(data.stream()[0], torch.device("cpu"))
    model = opened.merged(opened.load_vectors())
    text = SENTENCE.replace("pig", "eel")
    batch = job.recipe.backbone.collate([job.recipe.backbone.prepare({"text": text})])
    teachers = Teachers(opened, model)
    with teachers.expert("a"):
        said = teachers.outputs("a", batch, {LOGITS})[LOGITS]
    net = transformers.AutoModelForSequenceClassification.from_pretrained(sources["a"]).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(sources["a"])(text, return_tensors="pt")
    torch.testing.assert_close(said, net(**tokens).logits.detach())


@pytest.mark.slow_unless("base-more-bert", "exclude-others-t5")
@pytest.mark.parametrize("kind", AUTOS)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("policy", ["base", "exclude"])
def test_distillation_learns_from_such_an_expert(policy, name, kind, pool, tmp_path):
    sources = pool(kind)
    CHANGES[name][0](sources["a"], kind)
    plain = planned(sources, tmp_path, kind, policy)
    plain["model"]["objectives"] = [{"class_path": "adamerge.objectives.Distillation"}]
    run = adamerge.train(plain)
    assert bool((run.learned.rule.raw_TG != 0.3).any())


# --- uses that no embedding knows of


def other_template(folder):
    made = PreTrainedTokenizerFast.from_pretrained(folder)
    made.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    made.save_pretrained(folder)


def other_special_token(folder):
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(folder / "tokenizer.json")), model_max_length=LENGTH,
        pad_token="[UNK]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    made.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_template, "it has another chat template"),
        (other_special_token, r"its pad_token is \[UNK\], the base's \[PAD\]"),
    ],
)
@pytest.mark.parametrize("policy", ["base", "exclude"])
def test_other_uses_of_the_same_tokens(policy, change, message, pool, tmp_path):
    """The base's are used, if that is asked for; the embeddings of all experts are merged then."""
    sources = pool()
    for name, folder in sources.items():
        made = PreTrainedTokenizerFast.from_pretrained(folder)
        made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        made.save_pretrained(folder)
        if name == "a":
            change(folder)
    with pytest.raises(InputError, match=f"^Expert 'a' has another vocabulary than the base: {message}"):
        check(parse(planned(sources, tmp_path), {}))
    plain = planned(sources, tmp_path, vocabulary=policy)
    plain["trainer"]["max_steps"] = 0
    run = adamerge.train(plain)
    tables = {name: load_file(folder / FILE)[TABLES["bert"]] for name, folder in sources.items()}
    expected = tables["base"] + 0.3 * sum(tables[task] - tables["base"] for task in CLASSES)
    torch.testing.assert_close(run.merge.net.state_dict()[TABLES["bert"]], expected)


def test_what_one_tokenizer_leaves_open_is_no_difference(pool, tmp_path):
    """A chat template that the base has none of, or an expert without a tokenizer."""
    sources = pool()
    other_template(sources["a"])
    for file in [*sources["b"].glob("*token*"), *sources["b"].glob("vocab*")]:
        file.unlink()
    check(parse(planned(sources, tmp_path), {}))


def test_tables_of_experts_without_tokenizers_are_compared_by_their_rows(pool, tmp_path):
    sources = pool()
    padded(sources["a"], "bert")
    for file in sources["a"].glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"'a' has another vocabulary .* is \[32, 16\], the base's \[21, 16\]"):
        check(parse(planned(sources, tmp_path), {}))
    check(parse(planned(sources, tmp_path, vocabulary="base"), {}), deep=True)


def test_equal_tokenizers_are_read_once(pool, tmp_path, monkeypatch):
    from adamerge.backbones import TextClassifier

    sources, read = pool(), []
    inner = TextClassifier._tokenizer
    monkeypatch.setattr(TextClassifier, "_tokenizer", lambda self, source: read.append(source) or inner(self, source))
    check(parse(planned(sources, tmp_path), {}))
    assert len(read) == 2  # for its tokens, and to prepare samples


def test_a_tokenizer_that_cannot_be_read_is_said(pool, tmp_path):
    sources = pool()
    (sources["a"] / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"The tokenizer of '.*a' cannot be had"):
        check(parse(planned(sources, tmp_path), {}))


def test_tokens_that_are_skipped_are_not_compared(pool, tmp_path):
    sources = pool()
    more_tokens(sources["a"], "bert")
    plain = planned(sources, tmp_path)
    plain["model"]["space"]["skip"] = "word_embeddings"
    run = adamerge.train(plain)
    shutil.rmtree(run.dir)
