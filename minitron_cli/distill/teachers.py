"""Where a run's lessons come from: a live model, or a cache of its answers, written first where it is absent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from minitron_cli.checkpoint.hub import is_local, resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.distill import DEFAULT_TOP_K, DistillConfig
from minitron_cli.distill.cache import STAGE, Content, TeacherCache, is_cache
from minitron_cli.distill.cache_fit import cached_loss, first_visits, require_fit
from minitron_cli.distill.cache_reader import CachedTeacher
from minitron_cli.distill.cache_writer import record_starts, require_caching_memory, write_cache
from minitron_cli.distill.trainer import Teacher
from minitron_cli.errors import ConfigError, OutputError
from minitron_cli.manifest import StageOutput, digest, fingerprint, require_disk
from minitron_cli.models.load import load_model
from minitron_cli.models.shard import Sharding
from minitron_cli.runtime.group import Group
from minitron_cli.runtime.progress import quantity, say
from minitron_cli.tokens import Split, TokenDataset, batch_rows


def teacher_checkpoint(config: DistillConfig) -> Checkpoint | None:
    """The model to learn from; None where the loss needs no teacher, or `teacher` is a cache.

    Raises:
        CheckpointError: it is not there, or is quantised.
        ConfigError: a cache is to be cached.
    """
    if config.teacher is None or not config.needs_teacher:
        return None
    if is_local(config.teacher) and is_cache(Path(config.teacher).expanduser()):
        if config.cache_teacher is not None:
            raise ConfigError(f"--teacher {config.teacher} is a cache already; leave out --cache-teacher.")
        if config.states:
            raise ConfigError(f"--teacher {config.teacher} is a cache, which holds no states; leave out --states.")
        return None
    checkpoint = Checkpoint(resolve(config.teacher))
    checkpoint.require_unquantised()
    return checkpoint


@dataclass(frozen=True)
class TeacherPlan:
    """How a run is taught.

    `checkpoint`: the model to load, None where a cache is there. `loss`: what the student is trained on, in terms of
    what the teacher will say. `identity`: of all that decides what it says.
    """

    checkpoint: Checkpoint | None
    loss: str
    identity: str
    dtype: torch.dtype
    cache: CachePlan | None = None

    @property
    def live(self) -> Checkpoint | None:
        """The model held while the student trains."""
        return None if self.cache else self.checkpoint

    def require_room(self, device: torch.device) -> None:
        """Refuse a cache that cannot be written.

        Raises:
            ResourceError: too little memory or disk.
        """
        if self.cache and self.checkpoint and self.cache.absent:
            require_caching_memory(self.checkpoint.shape, self.cache.split, self.dtype, device)
            self.cache.require_disk()

    def open(
        self, device: torch.device, group: Group | None = None, sharding: Sharding | None = None
    ) -> Teacher | CachedTeacher:
        """Load the model, split where `sharding` says so, or the cache, written by one process where it is absent.

        Raises:
            CheckpointError: the stock class cannot load the model.
            RunError: writing the cache failed midway; what is written is kept.
        """
        if self.cache is None:
            assert self.checkpoint is not None
            if sharding is not None:
                return Teacher(sharding.load(self.checkpoint, trained=False))
            return Teacher(self._whole(device))
        cache, group = self.cache, group or Group()
        if cache.absent:
            group.alone(lambda: cache.write(Teacher(self._whole(device)), device))
        return CachedTeacher(TeacherCache(cache.directory), cache.visits_of(group), device)

    def _whole(self, device: torch.device) -> PreTrainedModel:
        assert self.checkpoint is not None
        return load_model(self.checkpoint.path, device=device, dtype=self.dtype)


@dataclass(frozen=True)
class CachePlan:
    """A cache to read, after writing it where `output` is given. `visits`: rows of the split as training meets them,
    `batch` of them in each step.
    """

    directory: Path
    content: Content
    split: Split
    visits: npt.NDArray[np.int64]
    batch: int
    output: StageOutput | None = None

    @property
    def absent(self) -> bool:
        """Whether it has to be written."""
        return self.output is not None and self.output.result is None

    def visits_of(self, group: Group) -> npt.NDArray[np.int64]:
        """What one process meets of them."""
        return self.visits.reshape(-1, self.batch)[:, group.part].ravel()

    def require_disk(self) -> None:
        """Say what will be written, and refuse what does not fit.

        Raises:
            ResourceError: too little disk.
        """
        rows = first_visits(self.visits)
        records = int(record_starts(self.split, rows)[-1])
        size = self.content.record.nbytes
        say(
            f"{self.directory}: caches {len(rows)} sequences, {records * size / 1e9:.3g} GB: {size} bytes for each of "
            f"{quantity(records)} target tokens (k = {self.content.top_k} of {self.content.vocab} words)."
        )
        require_disk(self.directory, records * size + 16 * (len(rows) + 1), "The cached teacher", "--cache-teacher")

    def write(self, teacher: Teacher, device: torch.device) -> None:
        """Ask the teacher about every sequence once."""
        assert self.output is not None
        write_cache(self.output, self.content, teacher, self.split, first_visits(self.visits), device)


def plan_teacher(
    config: DistillConfig,
    checkpoint: Checkpoint | None,
    student_vocab: int,
    dataset: TokenDataset | None,
    data: str,
    steps: int,
    dtype: torch.dtype,
) -> TeacherPlan | None:
    """Decide and check, without loading the model; None where the loss needs no teacher.

    Args:
        checkpoint: what `teacher_checkpoint` found.
        dataset: None for streamed data, which no cache can name.
        data: the fingerprint of the training data.

    Raises:
        UserError: options that do not go together, or a cache that does not fit this run.
    """
    if not config.needs_teacher:
        return None
    directory = config.cache_teacher if checkpoint else Path(config.teacher or "").expanduser()
    if directory is None:
        assert checkpoint is not None
        if config.top_k is not None:
            raise ConfigError("--top-k goes with a cached teacher; add --cache-teacher DIR, or train on --loss topk:K.")
        _say_common(student_vocab, checkpoint.shape["vocab"])
        return TeacherPlan(checkpoint, config.loss, fingerprint(checkpoint.path), dtype)
    if dataset is None:
        raise ConfigError("A cached teacher needs prepared data; run `minitron data prepare`, or leave the cache out.")
    split = dataset.split("train")
    visits = np.concatenate(
        [batch_rows(config.seed, step, config.batch_size, len(split)) for step in range(steps)], dtype=np.int64
    )
    output, source = None, fingerprint(checkpoint.path) if checkpoint else None
    if checkpoint and source and not is_cache(directory):
        output = _new_cache(config, checkpoint, source, student_vocab, data, visits, dtype)
    if output is None or output.result is not None:
        cache = TeacherCache(directory)
        require_fit(cache, config, source, data, student_vocab, visits)
        content, key = cache.content, cache.key
        cache.close()
    else:
        assert isinstance(output.config, Content)
        content, key = output.config, output.key
    _say_common(student_vocab, content.vocab)
    loss = cached_loss(config, directory, content)
    plan = CachePlan(directory, content, split, visits, config.batch_size, output)
    return TeacherPlan(checkpoint if output else None, loss, digest([key, loss]), dtype, plan)


def _new_cache(
    config: DistillConfig,
    checkpoint: Checkpoint,
    source: str,
    student_vocab: int,
    data: str,
    visits: npt.NDArray[np.int64],
    dtype: torch.dtype,
) -> StageOutput:
    """The cache to be written.

    Raises:
        ConfigError: the directory is that of the student.
        OutputError: the directory holds something else.
    """
    directory = config.cache_teacher
    assert directory is not None
    if directory.absolute().is_relative_to(config.out.absolute()):
        raise ConfigError(f"--cache-teacher {directory} lies in --out {config.out}; give it a directory of its own.")
    if directory.is_dir() and any(directory.iterdir()):
        raise OutputError(f"{directory} holds files that are no cached teacher; choose another --cache-teacher DIR.")
    vocab = min(student_vocab, checkpoint.shape["vocab"])
    asked = [config.top_k or 0, *config.objective.top_k]
    content = Content(
        vocab=vocab,
        top_k=min(max(asked) or DEFAULT_TOP_K, vocab - 1),
        temperature=config.temperature,
        dtype=str(dtype).removeprefix("torch."),
    )
    sequences = hashlib.sha256(first_visits(visits).astype("<i8").tobytes()).hexdigest()
    inputs = {"teacher": source, "data": data, "sequences": sequences}
    return StageOutput(directory, STAGE, content, inputs, resumable=True)


def _say_common(student: int, teacher: int) -> None:
    if student != teacher:
        common = min(student, teacher)
        say(f"The student has {student} words and the teacher {teacher}; they are compared over the first {common}.")


def as_taught(config: DistillConfig, plan: TeacherPlan | None) -> DistillConfig:
    """The configuration with the loss that the teacher can serve."""
    return replace(config, loss=plan.loss) if plan else config
