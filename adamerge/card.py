"""A model card (README.md) for a merge: what it is made from, how, how well it does, under which licences."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from adamerge.hub import hub_id
from adamerge.report.tables import mean, with_experts_joined

THIS = "this merge"
_NON_COMMERCIAL = "non-commercial terms bind the merge as well"
_TERMS = {
    r"-nc\b|-nc-|non-?commercial|research": _NON_COMMERCIAL,
    r"-nd\b|-nd-": "it forbids sharing changed versions, which a merge is",
    r"-sa\b|-sa-|gpl": "changed versions, which a merge is, keep these terms",
    r"llama|gemma|openrail|^other$|falcon|deepseek|apple": "it has terms of its own: read them",
}
_TASK_TYPES = {
    "TextClassifier": "text-classification",
    "TokenClassifier": "token-classification",
    "Seq2Seq": "text-generation",
    "SentenceEncoder": "sentence-similarity",
    **dict.fromkeys(("ImageClassifier", "CLIP", "OpenCLIP"), "image-classification"),
}


def model_card(
    record: Mapping[str, Any],
    *,
    name: str,
    licences: Mapping[str, str | None],
    library_name: str | None = None,
    task_type: str | None = None,
    files: str = "",
    load: str = "",
) -> str:
    """The card as text, with the front matter that the hub reads.

    Nothing of this machine stands in it: a path is named by its last part only.

    Args:
        record: The merge's record, as `artifact.read_record` gives it.
        name: What the model is called.
        licences: By source, as the record names it (`base`, `expert TASK`) or by its hub id: the licence as the hub
            names it, None where it is unknown. What is not in here is unknown.
        library_name: What loads the model, as the hub names it.
        task_type: As the hub names it; by default told from the backbone, or else from the data where they are images
            or texts.
        files: What the files are, as Markdown.
        load: How to load the model: Python, or Markdown with code blocks of its own.
    """
    from huggingface_hub import ModelCardData

    sources = _sources(record, licences)
    scores: Mapping[str, Mapping[str, float]] = record.get("scores") or {}
    data = ModelCardData(
        base_model=list(dict.fromkeys(repo for source in sources if source.is_model for repo in source.repos)) or None,
        base_model_relation="merge",
        library_name=library_name,
        tags=["merge", "adamerge"],
        datasets=list(dict.fromkeys(filter(None, _datasets(record).values()))) or None,
        model_name=name,
        eval_results=_results(record, scores.get(THIS) or {}, task_type) or None,
        **_licence(sources),
    )
    if data.eval_results is None:
        data.model_name = None  # it is no field of the front matter, but the model index's
    code = load if not load or "```" in load else f"```python\n{load.strip()}\n```"
    sections = {
        "": _summary(record, name),
        "How to load": code,
        "Files": files,
        "How it was made": _method(record),
        "Scores": _scores(record, scores),
        "Sources": _table(["", "source", "revision", "sha256", "licence"], [source.row() for source in sources]),
        "Licences": _terms(sources),
        "Versions": _versions(record),
    }
    text = "\n\n".join(f"## {title}\n\n{body.strip()}" if title else body for title, body in sections.items() if body)
    return f"---\n{data.to_yaml()}\n---\n\n# {_plain(name)}\n\n{text}\n"


class _Source:
    """One source of the merge, as a card may name it."""

    def __init__(self, who: str, entry: Mapping[str, Any], licences: Mapping[str, str | None]) -> None:
        source = str(entry.get("source", ""))
        known = [hub_id(part) for part in source.split("+")]
        self.who, self.is_model = who, who == "base" or who.startswith("expert ")
        self.repos = [each.repo for each in known if each is not None] if all(known) and not _is_path(source) else []
        self.name = " + ".join(self.repos) or _plain(source)
        given = known[0].revision if self.repos and known[0] else None
        self.revision = str(entry.get("revision") or given or "")
        self.sha256 = str(entry.get("sha256", ""))[:12]
        keys = [who, source, *self.repos]
        found = next((licences[key] for key in keys if licences.get(key)), None)
        self.licence = found.strip().lower() if found else None

    def row(self) -> list[str]:
        linked = " + ".join(f"[{repo}](https://huggingface.co/{repo})" for repo in self.repos) or self.name
        revision = self.revision[:12] if re.fullmatch(r"[0-9a-f]{40}", self.revision) else self.revision
        digest = _code(self.sha256) if self.sha256 else "–"
        return [
            _plain(self.who),
            linked,
            _code(revision) if revision else "–",
            digest,
            _plain(self.licence or "unknown"),
        ]


def _sources(record: Mapping[str, Any], licences: Mapping[str, str | None]) -> list[_Source]:
    entries = record["sources"]
    order = sorted(entries, key=lambda who: (who != "base", not who.startswith("expert ")))
    return [_Source(who, entries[who], licences) for who in order]


# --- licences


def _licence(sources: Sequence[_Source]) -> dict[str, Any]:
    kinds = {source.licence for source in sources}
    if len(kinds) == 1:
        return {"license": kinds.pop() or "unknown"}
    return {"license": "other", "license_name": "several-see-licences"}


def _terms(sources: Sequence[_Source]) -> str:
    kinds: dict[str | None, list[str]] = {}
    for source in sources:
        kinds.setdefault(source.licence, []).append(source.who)
    if len(kinds) == 1:
        only = next(iter(kinds))
        return (
            f"All sources are under {_plain(only)}{_remark(only)}."
            if only
            else "The licences of the sources are unknown: find them out."
        )
    lines = [
        f"- {_plain(licence or 'unknown')}: {', '.join(map(_plain, who))}{_remark(licence)}"
        for licence, who in kinds.items()
    ]
    known = [licence for licence in kinds if licence]
    conflict = ""
    if len(known) > 1:
        conflict = "The sources' licences differ, and a merge is made from all of them: each one's terms apply to it. "
        if len({_NON_COMMERCIAL in _remark(licence) for licence in known}) == 2:
            conflict += "They conflict: the non-commercial terms bind the merge, whatever the others allow. "
    unknown = "Where a licence is unknown, find it out before you use or pass on the merge." if None in kinds else ""
    return "\n".join(lines) + f"\n\n{conflict}{unknown}".rstrip()


def _remark(licence: str | None) -> str:
    said = [text for pattern, text in _TERMS.items() if licence and re.search(pattern, licence.lower())]
    return f" ({'; '.join(said)})" if said else ""


# --- scores


def _scores(record: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]) -> str:
    if not scores:
        return "Nothing was scored."
    rows = with_experts_joined({row: dict(each) for row, each in scores.items()})
    tasks = list(dict.fromkeys(task for each in rows.values() for task in each))
    cells = [
        [
            _plain(row),
            *(f"{100 * each[task]:.1f}" if task in each else "–" for task in tasks),
            f"{100 * mean(each):.1f}",
        ]
        for row, each in rows.items()
    ]
    split = _options(record.get("data")).get("eval_split")
    where = f" on the split {_code(split)}" if split else ""
    note = f"\n\n{_transductive(record)}" if _is_transductive(record) else ""
    return f"Accuracy in %{where}.\n\n{_table(['', *map(_plain, tasks), 'mean'], cells)}{note}"


def _is_transductive(record: Mapping[str, Any]) -> bool:
    return record.get("split") is not None and record["split"] == _options(record.get("data")).get("eval_split")


def _transductive(record: Mapping[str, Any]) -> str:
    return (
        f"**The scores are transductive**: the merge was adapted on the inputs of the split {_code(record['split'])}, "
        "which is also the split that it is scored on. Expect lower ones on other data."
    )


def _results(record: Mapping[str, Any], scores: Mapping[str, float], task_type: str | None) -> list[Any]:
    from huggingface_hub import EvalResult

    options = _options(record.get("data"))
    tasks, split = options.get("tasks") or {}, options.get("eval_split")
    datasets, seen, results = _datasets(record), set(), []
    for task, accuracy in scores.items():
        given = tasks.get(task) if isinstance(tasks, Mapping) else None
        config = _options(given).get("name") if datasets.get(task) else None
        kind = datasets.get(task) or re.sub(r"\W+", "-", task)
        if (kind, config) in seen:  # the hub keeps one result for each data set and configuration
            kind = re.sub(r"\W+", "-", task)
        seen.add((kind, config))
        results.append(
            EvalResult(
                task_type=task_type or _task_type(given, _class(record.get("backbone"))),
                dataset_type=kind,
                dataset_name=task,
                dataset_config=config,
                dataset_split=split,
                metric_type="accuracy",
                metric_name="Accuracy (transductive)" if _is_transductive(record) else "Accuracy",
                metric_value=round(float(accuracy), 6),
            )
        )
    return results


def _task_type(data: Any, backbone: str) -> str:
    known = _TASK_TYPES.get(backbone.rpartition(".")[2])
    if known:
        return known
    path = _class(data).lower()
    if "image" in path or "hfdataset" in path:
        return "image-classification"
    return "text-classification" if "text" in path else "other"


def _datasets(record: Mapping[str, Any]) -> dict[str, str | None]:
    """The hub id of each task's data, where they have one."""
    tasks = _options(record.get("data")).get("tasks")
    found = {task: _options(each).get("path") for task, each in tasks.items()} if isinstance(tasks, Mapping) else {}
    known = {
        task: hub_id(path) if isinstance(path, str) and not _is_path(path) else None for task, path in found.items()
    }
    return {task: each.repo if each else None for task, each in known.items()}


# --- text


def _summary(record: Mapping[str, Any], name: str) -> str:
    tasks = list(record.get("classes") or {})
    listed = ", ".join(map(_plain, tasks))
    text = f"{_plain(name)} is a merge of {len(tasks)} fine-tuned models into one, for the tasks {listed}"
    text += ". It was made with `adamerge`, which learns merges by gradient."
    if not record.get("folds", True):
        text += " Task modules, which run beside the merged weights, belong to it."
    if record.get("finished") is False:
        text += " **The run that made it was not finished.**"
    split = record.get("split")
    text += f" It was adapted on the split {_code(split)}." if split else ""
    return text + (f"\n\n{_transductive(record)}" if _is_transductive(record) else "")


def _method(record: Mapping[str, Any]) -> str:
    cost = record.get("cost") or {}
    space = record.get("space") or {}
    lines = {
        "Rule": _described(record.get("rule")),
        "Coefficients": f"one for each task and {_plain(space['group'])}" if space.get("group") else "",
        "Transforms of the task vectors": _listed(record.get("transforms")) or "none",
        "Task modules": _listed(record.get("task_modules")) or "none",
        "Objectives": _listed(record.get("objectives")),
        "Backbone": _plain(_class(record.get("backbone")).rpartition(".")[2]),
        "Started from": _plain(record["init_from"]) if record.get("init_from") else "",
        "Tensors not merged": ", ".join(map(_plain, record.get("left_out") or ())) if record.get("left_out") else "",
        "Steps": _plain(record["steps"]) if record.get("steps") is not None else "",
        "Learned numbers": f"{cost['learnables']:,}" if "learnables" in cost else "",
        "Seed": _plain(record["seed"]) if record.get("seed") is not None else "",
    }
    if _class(record.get("rule")).endswith("TaskWise"):
        lines["Coefficients"] = "one for each task"
    return "\n".join(f"- {key}: {value}" for key, value in lines.items() if value)


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{_plain(name)} {_plain(number)}" for name, number in (record.get("versions") or {}).items())


def _listed(parts: Any) -> str:
    return ", ".join(dict.fromkeys(_described(part) for part in parts or ()))


def _described(part: Any) -> str:
    """A part of the record as a person writes it: `Trim` (keep: 0.2)."""
    if not isinstance(part, Mapping):
        return _plain(part)
    options = ", ".join(f"{_plain(key)}: {_value(value)}" for key, value in _options(part).items() if value is not None)
    return _code(_class(part).rpartition(".")[2]) + (f" ({options})" if options else "")


def _value(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        return _described(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{_plain(key)} {_value(each)}" for key, each in value.items())
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else _plain(value)


def _class(part: Any) -> str:
    return str(part["class_path"]) if isinstance(part, Mapping) and "class_path" in part else str(part or "")


def _options(part: Any) -> Mapping[str, Any]:
    options = part.get("init_args") if isinstance(part, Mapping) else None
    return options if isinstance(options, Mapping) else {}


def _is_path(text: str) -> bool:
    """Tell whether a text names a place on a machine."""
    return text.startswith(("/", "~", ".", "\\", "file:", "local-dir:")) or bool(re.match(r"[A-Za-z]:[\\/]", text))


def _plain(value: Any) -> str:
    """Text for Markdown, in one line and without what lies before the last part of a path."""
    text = str(value)
    if _is_path(text):
        windows = "\\" in text
        text = (PureWindowsPath if windows else PurePosixPath)(text.removeprefix("local-dir:")).name
    return re.sub(r"([\\|<>*_`\[\]&])", r"\\\1", " ".join(text.split()))


def _code(value: Any) -> str:
    return f"`{' '.join(str(value).replace('`', '').replace('|', '').split())}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
