"""The one exception tree.

    MinitronError                 every error we raise on purpose
    ├── UserError                 exit 2: the input is wrong; nothing was written
    │   ├── ConfigError           an option, a recipe key, a combination of options
    │   ├── InputError            a path, a corpus, a file we cannot use
    │   ├── CheckpointError       not a checkpoint, damaged, or not whole
    │   ├── FamilyError           a model type or tensor no family file explains
    │   ├── ShapeError            sizes that the stock class or the checkpoint forbids
    │   ├── OutputError           the output directory holds something else
    │   └── ResourceError         too little disk or memory, seen before any work
    └── RunError                  exit 1: the machine or the numbers failed midway; last valid state kept

Messages are one sentence that names the thing and says what to do next.
"""

from __future__ import annotations

import errno


class MinitronError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns.

    `for_all`: of several processes, this one tells it, whoever else found it too.
    """

    exit_code = 1
    for_all = False


class UserError(MinitronError):
    """Something the user can change; raised before expensive work starts."""

    exit_code = 2


class ConfigError(UserError):
    """A wrong option, recipe key or combination of options."""


class InputError(UserError):
    """A path or corpus that cannot be used as given."""


class CheckpointError(UserError):
    """A directory that is not a whole, readable checkpoint."""


class FamilyError(UserError):
    """A model type or tensor that no family file explains."""


class ShapeError(UserError):
    """Sizes that the stock class or the checkpoint forbids."""


class OutputError(UserError):
    """The output directory holds something this run must not replace."""


class ResourceError(UserError):
    """Too little disk or memory, found out before any work was done."""


class RunError(MinitronError):
    """The machine or the numbers failed midway; the last valid state is on disk."""

    exit_code = 1


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk (or the quota) is full; safetensors says so in words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)
