"""Harness tasks from files on disk: only rows come from here; prompts, groups, metrics and averages are the harness's.

    DIR/TASK.jsonl            arc_easy, arc_challenge, hellaswag, piqa, winogrande, openbookqa, boolq
    DIR/blimp/PARADIGM.jsonl  BLiMP
    DIR/dev, DIR/test         MMLU (see mmlu.py)

The same inside DIR/evals and DIR/mmlu. A name may go on with the split (`piqa_train.jsonl`), or with anything after
two underscores (`arc_easy__test.jsonl`); without a split it is the one that the task asks questions from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_cli.errors import InputError
from minitron_cli.evaluate import mmlu
from minitron_cli.manifest import digest, fingerprint

Row = dict[str, Any]
SPLIT_WORDS = {"train": "train", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}
BLIMP = "nyu-mll/blimp"
BLIMP_QUESTIONS = 1000


@dataclass(frozen=True)
class Form:
    """How a task's rows look: the harness's columns, or another form that `convert` turns into them.

    `questions`: how many a whole split has, for those splits that are asked from.
    """

    columns: tuple[str, ...]
    questions: Mapping[str, int]
    convert: Callable[[Row], Row] = dict
    other: tuple[str, ...] = ()
    """Columns of the other form."""

    def row(self, values: Any) -> Row:
        """One row for the harness.

        Raises:
            ValueError: it has neither form.
        """
        if isinstance(values, dict):
            if all(column in values for column in self.columns):
                return {column: values[column] for column in self.columns}
            if self.other and all(column in values for column in self.other):
                return self.convert(values)
        either = f", or {', '.join(self.other)}" if self.other else ""
        raise ValueError(f"expected the columns {', '.join(self.columns)}{either}")


def _arc(values: Row) -> Row:
    """From a request (its prompt, the answers, the index of the right one)."""
    found = re.fullmatch(r"Question: (.*)\nAnswer:", values["query"], re.DOTALL)
    if found is None:
        raise ValueError('expected a query like "Question: ...\\nAnswer:"')
    labels = [chr(ord("A") + number) for number in range(len(values["choices"]))]
    choices = {"text": values["choices"], "label": labels}
    return {"question": found[1], "choices": choices, "answerKey": labels[values["gold"]]}


def _hellaswag(values: Row) -> Row:
    """From a request; the harness joins the parts again, to the same text."""
    activity, colon, context = values["query"].partition(": ")
    if not colon:
        raise ValueError('expected a query like "ACTIVITY: CONTEXT"')
    label = str(values["gold"])
    return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": values["choices"], "label": label}


def _boolq(values: Row) -> Row:
    """From its authors' files."""
    return {"question": values["question"], "passage": values["passage"], "label": int(values["answer"])}


REQUEST = ("query", "choices", "gold")
ARC = ("question", "choices", "answerKey")
FORMS = {
    "arc_easy": Form(ARC, {"test": 2376}, _arc, REQUEST),
    "arc_challenge": Form(ARC, {"test": 1172}, _arc, REQUEST),
    "hellaswag": Form(
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"), {"validation": 10_042}, _hellaswag, REQUEST
    ),
    "piqa": Form(("goal", "sol1", "sol2", "label"), {"validation": 1838}),
    "winogrande": Form(("sentence", "option1", "option2", "answer"), {"validation": 1267}),
    "openbookqa": Form(("question_stem", "choices", "answerKey"), {"test": 500}),
    "boolq": Form(("question", "passage", "label"), {"validation": 3270}, _boolq, ("question", "passage", "answer")),
}
PARADIGM = Form(("sentence_good", "sentence_bad"), {"train": BLIMP_QUESTIONS})

FOLDERS = ("mmlu/default", "arc", "hellaswag", "piqa", "winogrande", "openbookqa", "super_glue/boolq", "blimp")
"""Where the harness keeps these tasks."""


def is_mmlu(config: Mapping[str, Any]) -> bool:
    """Whether a task's harness configuration is one of MMLU's subjects."""
    return str(config.get("task", "")).startswith("mmlu_")


def form_of(name: str, config: Mapping[str, Any]) -> Form | None:
    """How the rows of a harness task look, or None where only the harness can get them."""
    return PARADIGM if config.get("dataset_path") == BLIMP else FORMS.get(name)


@dataclass
class LocalFiles:
    """Files of tasks, checked to be there.

    `files`: by task and the harness's split; `mmlu`: the folder of MMLU's, where one of its subjects is asked for.
    `absent`: tasks of a group that have no file. `notes`: what is not as in the whole task, by task or group.
    """

    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    mmlu: Path | None = None
    absent: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Of every file that is read."""
        own = [fingerprint(path) for name in sorted(self.files) for _, path in sorted(self.files[name].items())]
        return digest([own, fingerprint(self.mmlu) if self.mmlu is not None else None])

    def rows(self, task: str, subset: str) -> dict[str, list[Row]]:
        """Rows by split.

        Raises:
            InputError: a file that cannot be read as such.
        """
        if task in self.files:
            return {split: _read(path, self.forms[task]) for split, path in self.files[task].items()}
        assert self.mmlu is not None
        return {split: mmlu.read_rows(mmlu.subject_file(self.mmlu, subset, split)) for split in mmlu.SPLITS}

    def add(self, name: str, config: Mapping[str, Any], form: Form, folders: Sequence[Path]) -> None:
        """Find the files of one task; `absent` where there is none.

        Raises:
            InputError: two files for one split.
        """
        asked = config.get("test_split") or config["validation_split"]
        found = _find(_file_name(name, config), asked, folders)
        if asked not in found and "validation" in found:
            found[asked] = found["validation"]
            self.notes[name] = f"asked from its validation split: there is no file of {asked} questions"
        if asked not in found:
            self.absent.add(name)
            return
        self.files[name], self.forms[name] = found, form
        with found[asked].open("rb") as stream:
            count = sum(1 for line in stream if line.strip())
        whole = form.questions.get(asked)
        if whole is not None and count < whole and name not in self.notes:
            self.notes[name] = f"{count:,} of its {whole:,} questions"


def _file_name(name: str, config: Mapping[str, Any]) -> str:
    return f"blimp/{config['dataset_name']}" if config.get("dataset_path") == BLIMP else name


def _find(name: str, asked: str, folders: Sequence[Path]) -> dict[str, Path]:
    """Files of a task by split, from the first folder that has any."""
    for folder in folders:
        place = folder / name
        pattern = re.compile(re.escape(place.name) + rf"(__.*|[._-]({'|'.join(SPLIT_WORDS)}))?\.jsonl")
        found: dict[str, Path] = {}
        for path in sorted(place.parent.iterdir()) if place.parent.is_dir() else ():
            if pattern.fullmatch(path.name):
                words = re.split(r"[^a-z]+", path.stem.removeprefix(place.name).lower())
                split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), asked)
                if split in found:
                    raise InputError(f"{found[split]} and {path} are both the {split} split of {name}; keep one.")
                found[split] = path
        if found:
            return found
    return {}


def _read(path: Path, form: Form) -> list[Row]:
    rows = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        rows.append(form.row(json.loads(line)))
                    except (ValueError, TypeError, IndexError) as error:
                        raise InputError(f"{path}, line {number}: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); get a fresh copy.") from None
    if not rows:
        raise InputError(f"{path} has no rows; get a fresh copy.")
    return rows


def find_files(data_dir: Path, leaves: Mapping[str, Mapping[str, Any]]) -> LocalFiles:
    """The files of these tasks (harness configurations by name).

    Raises:
        InputError: DIR does not exist, or holds none of a task's files; MMLU without all of its files.
    """
    if not data_dir.is_dir():
        raise InputError(
            f"--data-dir {data_dir} is not a directory; give the folder that holds the tasks' files, "
            "which docs/evaluating.md lists."
        )
    local = LocalFiles()
    subjects = {str(config["dataset_name"]): None for config in leaves.values() if is_mmlu(config)}
    if subjects:
        local.mmlu = mmlu.find_folder(data_dir)
        mmlu.require_subjects(local.mmlu, subjects)
    for name, config in leaves.items():
        form = form_of(name, config)
        if form is not None:
            local.add(name, config, form, (data_dir, data_dir / "evals"))
    return local
