"""How the models of a run are spread over processes, decided from their sizes before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minitron_cli.config.sharding import ShardingConfig
from minitron_cli.errors import ConfigError
from minitron_cli.models.shard import Sharding
from minitron_cli.runtime.group import Group
from minitron_cli.shape import Shape

LITTLE = 0.125
"""Share of a device's memory that a model may take whole under --shard auto; gathering it would cost more."""


@dataclass(frozen=True)
class Spread:
    """`processes` of a run, and over how many of them each model's weights are split (1: every process has all).

    `keep_gathered`, `offload`: as in `ShardingConfig`.
    """

    processes: int = 1
    student: int = 1
    teacher: int = 1
    keep_gathered: bool = False
    offload: bool = False

    @classmethod
    def of(
        cls,
        config: ShardingConfig,
        processes: int,
        student: Shape,
        teacher: Shape | None,
        dtype: torch.dtype,
        memory: int,
    ) -> Spread:
        """What `--shard` means.

        Args:
            teacher: None where there is none, or it is a cache.
            memory: bytes of one process's device.

        Raises:
            ConfigError: --offload without a split student.
        """
        little = {
            "student": 16 * student.params <= LITTLE * memory,
            "teacher": teacher is None or dtype.itemsize * teacher.params <= LITTLE * memory,
        }
        split = {
            "auto": {name for name in little if not little[name]},
            "both": {"student", "teacher"},
            "teacher": {"teacher"},
            "none": set[str](),
        }[config.shard]
        if config.offload and config.shard == "auto":
            split.add("student")
        if config.offload and processes > 1 and "student" not in split:
            raise ConfigError(f"--offload moves a split student's parts; leave it out, or --shard {config.shard}.")
        parts = {name: processes if name in split else 1 for name in little}
        return cls(processes, parts["student"], parts["teacher"], config.keep_gathered, config.offload)

    def share(self, batch_size: int) -> int:
        """Sequences of a step in each process.

        Raises:
            ConfigError: they cannot be shared evenly.
        """
        if batch_size % self.processes:
            down = batch_size - batch_size % self.processes
            near = " or ".join(str(each) for each in (down, down + self.processes) if each)
            raise ConfigError(
                f"--batch-size {batch_size} is not a multiple of the {self.processes} processes; use {near}."
            )
        return batch_size // self.processes

    def student_sharding(self, group: Group, device: torch.device, dtype: torch.dtype) -> Sharding | None:
        """How the student is spread; None in one process."""
        if group.size == 1:
            return None
        return Sharding(group, device, self.student, dtype, self.keep_gathered, self.offload)

    def teacher_sharding(self, group: Group, device: torch.device, dtype: torch.dtype) -> Sharding | None:
        """How the teacher is spread; None where every process has all of it."""
        return None if self.teacher == 1 else Sharding(group, device, self.teacher, dtype)

    def describe(self) -> str:
        """One line for the user."""
        told = []
        for name, parts in (("student", self.student), ("teacher", self.teacher)):
            told.append(f"the {name} is " + ("whole in each" if parts == 1 else f"split into {parts} parts"))
        return f"{self.processes} processes; {', '.join(told)}."
