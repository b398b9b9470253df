"""Stages wired together: a recipe, or `compress`, becomes directories under one run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_cli.checkpoint.card import evaluated
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import read_config
from minitron_cli.config.recipe import Recipe, load_recipe
from minitron_cli.config.run import CompressConfig, RunConfig
from minitron_cli.errors import OutputError, UserError
from minitron_cli.manifest import read_manifest, write_json
from minitron_cli.runtime.progress import duration, say
from minitron_cli.runtime.table import Table, plain
from minitron_cli.shape import Shape

if TYPE_CHECKING:
    from minitron_cli.runtime.group import Group

RUN, RECIPE = "run.json", "recipe.json"
LABELS = {
    "teacher": "teacher",
    "corrected": "corrected",
    "pruned": "pruned",
    "student": "distilled",
    "aligned": "aligned",
    "cross-entropy": "cross-entropy",
    "scratch": "from scratch",
}
TOGETHER = ("corrected", "importance", "search", "student", "aligned", "cross-entropy", "scratch")
"""Stages that all processes of a torchrun run together; process 0 runs the others while the rest wait."""
BASELINES = {"cross-entropy": {"loss": "ce"}, "scratch": {"loss": "ce", "init": "random"}}


@dataclass
class RunResult:
    """What a run did; keys of `--json`. `models` are the rows of the comparison, teacher first."""

    out: str
    name: str
    description: str
    stages: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    teacher: str = ""
    student: str = ""
    seconds: float = 0.0
    report: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_recipe(config: RunConfig) -> RunResult:
    """Run a recipe file or a shipped recipe.

    Raises:
        UserError: any stage's input is wrong.
    """
    recipe = load_recipe(config.recipe, config.set)
    return Chain(recipe, config.out or Path("runs") / recipe.name, config.force).run()


def plan_recipe(config: RunConfig) -> dict[str, Any]:
    """What `run --dry-run` prints: the checked recipe and the stages it means."""
    recipe = load_recipe(config.recipe, config.set)
    return Chain(recipe, config.out or Path("runs") / recipe.name, config.force).plan()


def run_compress(config: CompressConfig) -> RunResult:
    """Compress with defaults chosen from the checkpoint's size.

    Raises:
        UserError: any stage's input is wrong.
    """
    return Chain(compress_recipe(config), config.out, config.force).run()


def plan_compress(config: CompressConfig) -> dict[str, Any]:
    """What `compress --dry-run` prints: the recipe it stands for, which can be saved and changed."""
    return Chain(compress_recipe(config), config.out, config.force).plan()


def compress_recipe(config: CompressConfig) -> Recipe:
    """The recipe that `compress` stands for."""
    shape = Shape.of(read_config(resolve(config.checkpoint, config_only=True)))
    context = int(shape.config.get("max_position_embeddings") or 1024)
    seq_len = config.seq_len or min(1024, context)
    # Minitron retrains 3072-wide models at 1e-4 (P2); the best rate grows as models get narrower, about as 1/width.
    lr = min(2e-3, 1e-4 * 3072 / shape["hidden"])
    steps = max(1, round(config.tokens / (config.batch_size * seq_len)))
    short = max(1, min(200, steps // 10))
    return Recipe(
        name=config.out.name,
        description=f"{config.checkpoint} compressed to {config.params} parameters.",
        teacher=config.checkpoint,
        data={"sources": list(config.data), "seq_len": seq_len, "text_column": config.text_column},
        importance={"samples": 512},
        search={
            "params": config.params, "candidates": 12, "finalists": 6, "steps": short,
            "rungs": min(3, short.bit_length()), "batch_size": config.batch_size, "lr": lr,
        },
        distill={"steps": steps, "batch_size": config.batch_size, "lr": lr},
        eval={"tasks": list(config.tasks), **({"data_dir": str(config.data_dir)} if config.data_dir else {})},
    )  # fmt: skip


class Chain:
    """One recipe under one directory. Every stage decides itself whether it is up to date, resumes or starts.

    Directories of the last round are called pruned, student and so on; those of earlier ones round-1-pruned.
    """

    def __init__(self, recipe: Recipe, out: Path, force: bool) -> None:
        self.recipe, self.out, self.force = recipe, out, force
        self.result = RunResult(str(out), recipe.name, recipe.description, teacher=recipe.teacher)
        self.last = len(recipe.rounds) - 1
        self._original: dict[str, Any] = {}

    def plan(self) -> dict[str, Any]:
        """The recipe, the directory and the stages, as JSON values."""
        return {"recipe": self.recipe.to_json(), "out": str(self.out), "stages": [name for name, _ in self.steps()]}

    @property
    def teacher(self) -> str:
        """What is scored and cut, and what students learn from."""
        return str(self.out / "corrected") if self.recipe.correct is not None else self.recipe.teacher

    def has(self, name: str, number: int) -> bool:
        """Whether a round has a section."""
        return self.recipe.rounds[number].get(name) is not None

    def prunes(self, number: int) -> bool:
        """Whether a round cuts anything."""
        return self.has("search", number) or self.has("prune", number)

    def place(self, name: str, number: int) -> str:
        """The directory of a stage of a round."""
        return name if number == self.last else f"round-{number + 1}-{name}"

    def uncut(self, number: int) -> str:
        """What a round starts from."""
        return str(self.out / self.place("student", number - 1)) if number else self.teacher

    def student(self, number: int) -> str:
        """What a round's distillation starts from."""
        return str(self.out / self.place("pruned", number)) if self.prunes(number) else self.uncut(number)

    def steps(self) -> list[tuple[str, Callable[[], Any]]]:
        """The stages in order, by the name of their directory."""
        recipe = self.recipe
        steps: list[tuple[str, Callable[[], Any]]] = [("data", self._data)]
        if recipe.correct is not None:
            steps.append(("corrected", self._correct))
        for number in range(len(recipe.rounds)):
            stages: list[tuple[str, bool, Callable[[int], Any]]] = [
                ("importance", self.has("importance", number), self._importance),
                ("search", self.has("search", number), self._search),
                ("pruned", self.prunes(number), self._prune),
                ("student", self.has("distill", number), partial(self._distill, name="student", changes={})),
            ]
            steps += [(self.place(name, number), partial(step, number)) for name, present, step in stages if present]
        if recipe.align is not None:
            steps.append(("aligned", self._align))
        for name in recipe.baselines:
            steps.append((name, partial(self._distill, self.last, name=name, changes=BASELINES[name])))
        if recipe.eval is not None:
            steps += [(f"eval/{name}", partial(self._eval, name)) for name in self.models()]
        if recipe.bench is not None:
            steps.append(("bench", self._bench))
        return steps

    def models(self) -> dict[str, str]:
        """The models of the run and where they are, teacher first."""
        models = {"teacher": self.recipe.teacher}
        names = ["corrected"] if self.recipe.correct is not None else []
        for number in range(len(self.recipe.rounds)):
            names += [self.place("pruned", number)] if self.prunes(number) else []
            names += [self.place("student", number)] if self.has("distill", number) else []
        names += ["aligned"] if self.recipe.align is not None else []
        return models | {name: str(self.out / name) for name in (*names, *self.recipe.baselines)}

    @property
    def product(self) -> str:
        """What the chain makes: the aligned student, the distilled one, or what there is before them."""
        models = self.models()
        return models.get("aligned", models.get("student", self.student(self.last)))

    def run(self) -> RunResult:
        """All stages, then the report; a second run finds everything up to date.

        Under torchrun every process runs the chain; process 0 alone writes and has the result.
        """
        from minitron_cli.runtime.group import process_group

        with process_group() as group:
            self._run(group)
        return self.result

    def _run(self, group: Group) -> None:
        began = time.monotonic()
        new = not self.out.exists()
        group.alone(self._claim)
        try:
            self._run_steps(group)
        except UserError:
            if new and group.main:  # the first stage refused its input: nothing stays behind
                self._disclaim()
            raise
        group.alone(lambda: self._conclude(time.monotonic() - began))

    def _run_steps(self, group: Group) -> None:
        steps = self.steps()
        for number, (name, step) in enumerate(steps, 1):
            before = read_manifest(self.out / name)
            say(f"[{number}/{len(steps)}] {name}")
            started = time.monotonic()
            if _stage_of(name) in TOGETHER:
                step()
            else:
                group.alone(step)
            reused = before is not None and before == read_manifest(self.out / name)
            status = "up to date" if reused else "done"
            self.result.stages.append({"name": name, "status": status, "seconds": round(time.monotonic() - started, 2)})

    def _conclude(self, seconds: float) -> None:
        """Compare the models and write the report."""
        self.result.models = [self._row(name, path) for name, path in self.models().items()]
        self.result.student = self.product
        self.result.seconds = round(seconds, 1)
        self._report()

    def _disclaim(self) -> None:
        """Remove the run's own files and its directory, unless a stage has left something there."""
        if {item.name for item in self.out.iterdir()} <= {RUN, RECIPE}:
            for name in (RUN, RECIPE):
                (self.out / name).unlink(missing_ok=True)
            self.out.rmdir()

    def _claim(self) -> None:
        """The run directory must be new, empty or a run."""
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file; choose another --out.")
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / RUN).exists():
            raise OutputError(f"{self.out} holds files that are not a minitron run; choose another --out.")
        resolve(self.recipe.teacher)  # a wrong teacher leaves nothing behind
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.out / RUN).exists():
            write_json(self.out / RUN, self.result.to_json())
        write_json(self.out / RECIPE, self.recipe.to_json())

    def _stage(self, name: str, out: str, number: int = 0, **wires: Any) -> Any:
        return self.recipe.stage(name, {**wires, "out": self.out / out, "force": self.force}, number)

    def _data(self) -> None:
        from minitron_cli.data.prepare import run_data

        run_data(self._stage("data", "data", tokenizer=self.recipe.teacher))

    def _correct(self) -> None:
        from minitron_cli.distill.correct import run_correct

        run_correct(self._stage("correct", "corrected", teacher=self.recipe.teacher, data=self.out / "data"))

    def _importance(self, number: int) -> None:
        from minitron_cli.importance.stage import run_importance

        wires = {"checkpoint": self.uncut(number), "data": self.out / "data"}
        run_importance(self._stage("importance", self.place("importance", number), number, **wires))

    def _search(self, number: int) -> None:
        from minitron_cli.search.stage import run_search

        paths = {"importance": self.out / self.place("importance", number), "data": self.out / "data"}
        wires = {"checkpoint": self.uncut(number), "teacher": self.teacher, **paths}
        run_search(self._stage("search", self.place("search", number), number, **wires))

    def _prune(self, number: int) -> None:
        from minitron_cli.prune.stage import run_prune

        found = next((name for name in ("search", "importance") if self.has(name, number)), None)
        sources = {found: self.out / self.place(found, number)} if found else {}
        wires = {"checkpoint": self.uncut(number), "data": self.out / "data", **sources}
        run_prune(self._stage("prune", self.place("pruned", number), number, **wires))

    def _distill(self, number: int, name: str, changes: dict[str, Any]) -> None:
        from minitron_cli.distill.stage import run_distill

        wires = {"student": self.student(number), "teacher": self.teacher, "data": self.out / "data"}
        run_distill(self._stage("distill", self.place(name, number), number, **wires, **changes))

    def _align(self) -> None:
        from minitron_cli.align.stage import run_align

        policy = self.models().get("student", self.student(self.last))
        run_align(self._stage("align", "aligned", policy=policy, prompts=self.out / "data"))

    def _eval(self, name: str) -> None:
        from minitron_cli.evaluate.stage import run_eval

        (self.out / "eval").mkdir(exist_ok=True)
        found = run_eval(self._stage("eval", f"eval/{name}", checkpoint=self.models()[name], data=self.out / "data"))
        if name == "teacher":
            self._original = found.to_json()
        else:
            evaluated(self.out / name, {**found.to_json(), "original": self._original})

    def _bench(self) -> None:
        from minitron_cli.bench.stage import run_bench

        run_bench(self._stage("bench", "bench", checkpoint=self.product, against=self.recipe.teacher))

    def _row(self, name: str, path: str) -> dict[str, Any]:
        """One line of the comparison, from what the stages wrote."""
        shape = Shape.of(read_config(resolve(path)))
        measured = (read_manifest(self.out / "eval" / name) or {}).get("result", {})
        trained = [(read_manifest(self.out / each) or {}).get("result", {}) for each in self._trainings(name)]
        return {
            "name": name,
            "label": _label(name),
            "path": path,
            "shape": shape.shown(),
            "params": shape.params,
            "params_non_embedding": shape.params_non_embedding,
            "loss": measured.get("loss"),
            "perplexity": measured.get("perplexity"),
            "bits_per_byte": measured.get("bits_per_byte"),
            "tasks": measured.get("tasks", {}),
            "tokens": sum(result.get("tokens", 0) for result in trained),
            "train_seconds": sum(result.get("seconds", 0.0) for result in trained),
        }

    def _trainings(self, name: str) -> list[str]:
        """Directories of all distillations behind a model, or of the correction behind a teacher."""
        students = [self.place("student", number) for number in range(self.last + 1) if self.has("distill", number)]
        if name in students:
            return students[: students.index(name) + 1]
        if name == "aligned":
            return [*students, name]
        return [name] if name == "corrected" or name in self.recipe.baselines else []

    def _report(self) -> None:
        from minitron_cli.report.stage import write_report

        if all(stage["status"] == "up to date" for stage in self.result.stages) and (self.out / "report.html").exists():
            self.result = RunResult(**{**json.loads((self.out / RUN).read_text("utf-8")), "stages": self.result.stages})
            say("Everything is up to date; nothing was done.")
            return
        self.result.report = str(self.out / "report.html")
        write_json(self.out / RUN, self.result.to_json())
        write_report(self.out)


def _label(name: str) -> str:
    """What people call a model by its directory."""
    base = _stage_of(name)
    return LABELS[base] if base == name else f"{LABELS[base]} {name.split('-')[1]}"


def _stage_of(name: str) -> str:
    """The directory's name without its round."""
    return name.split("-", 2)[2] if name.startswith("round-") else name


def format_run(result: dict[str, Any]) -> str:
    """The comparison as a table, and how long each stage took."""
    return plain(show_run(result))


def show_run(result: dict[str, Any]) -> list[str | Table]:
    """The same in parts."""
    models = result["models"]
    whole = max(models[0]["params_non_embedding"], 1) if models else 1
    header = ["model", "params", "non-embedding", "train tokens", "val loss", "perplexity", "bits/byte"]
    rows = []
    for row in models:
        measured = [("loss", 3), ("perplexity", 2), ("bits_per_byte", 3)]
        rows.append([
            row["label"], f"{row['params']:,}", f"{100 * row['params_non_embedding'] / whole:.1f} %",
            f"{row['tokens']:,}",
            *("" if row[key] is None else f"{row[key]:.{digits}f}" for key, digits in measured),
        ])  # fmt: skip
    product = [number for number, row in enumerate(models) if row["path"] == result["student"]]
    done = [stage for stage in result["stages"] if stage["status"] == "done"]
    timing = ", ".join(f"{stage['name']} {duration(stage['seconds'])}" for stage in done)
    lines: list[str | Table] = [Table(header, rows, strong=product), ""]
    lines += [f"stages: {timing or 'all up to date'}; total {duration(result['seconds'])}"]
    lines += [f"student: {result['student']}"]
    return lines + ([f"report:  {result['report']}"] if result["report"] else [])
