"""Run a command's body: signals, errors and exit codes in one place."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from minitron_cli.errors import MinitronError, is_disk_full
from minitron_cli.runtime.launch import rank
from minitron_cli.runtime.table import Shown, put

LAST_SECONDS = 20.0
"""How long a process that has nothing to say waits for the one that has."""


class Terminated(BaseException):
    """SIGTERM arrived; like Ctrl-C it unwinds the stack, so that locks and files are let go."""


def _on_sigterm(number: int, frame: Any) -> NoReturn:
    raise Terminated


def enter(app: typer.Typer) -> NoReturn:
    """Run the command line of this process; what typer finds wrong in it is told in one line, like our own errors."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help page is the message, and may be printed already
            print(error.format_message(), file=sys.stderr, end="")
            raise SystemExit(2) from None
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "minitron"
        if not _speaks():
            _leave_last(2)
        message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        fail(f"{message}; see `{command} --help`.", 2)
    raise SystemExit(code if isinstance(code, int) else 0)


def execute(body: Callable[[], Any], *, quiet: bool, as_json: bool, show: Callable[[Any], Shown]) -> None:
    """Run `body`, print its result (as one JSON object or for people), and exit with the contract's code.

    0 done; 2 the user's input; 1 our bug or the machine; 130 Ctrl-C; 143 SIGTERM.
    """
    from minitron_cli.runtime.progress import set_quiet

    set_quiet(quiet)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        result = body()
        if _speaks():
            put(json.dumps(result, ensure_ascii=False) if as_json else show(result))
    except MinitronError as error:
        if error.exit_code == 2 and not (_speaks() or error.for_all):
            _leave_last(2)
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, Terminated) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 143
        fail("Stopped. What was finished is kept; the same command continues from the last checkpoint.", code)
    except BrokenPipeError:  # the reader of stdout went away (`| head`): not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except PermissionError as error:
        fail(f"Permission denied: {error.filename}; choose another place or change its permissions.", 2)
    except MemoryError:
        fail("Out of memory; use a smaller --batch-size, --micro-batch or model.", 1)
    except Exception as error:
        if is_disk_full(error):
            fail("The disk is full; free some space and run the same command again.", 1)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
            fail("The device ran out of memory; use a smaller --batch-size or --micro-batch.", 1)
        raise


def _speaks() -> bool:
    """Whether this is the process that prints: the only one, or the first that torchrun started."""
    return rank() == 0


def _leave_last(code: int) -> NoReturn:
    """Every process of a torchrun finds the same mistake; the first one says it, and torchrun then stops all others.

    It would stop the first one too if another left before it has spoken.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
    time.sleep(LAST_SECONDS)
    raise SystemExit(code)


def fail(message: str, code: int) -> NoReturn:
    """One sentence on stderr, and out."""
    print(f"minitron: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
