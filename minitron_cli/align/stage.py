"""The align stage: a policy, a reward and prompts in; a plain checkpoint out; exact on resume."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from minitron_cli.align.lessons import Teaching, Writer, stop_tokens
from minitron_cli.align.loop import BAD_BATCH, Run, Stop
from minitron_cli.align.measure import Yardstick
from minitron_cli.align.plan import AlignPlan, describe, make_plan
from minitron_cli.align.policy import Cast, PolicyLearner
from minitron_cli.align.prompts import Prompt, PromptReader
from minitron_cli.align.reward_models import open_reward
from minitron_cli.align.rewards import Checked, RewardFailed
from minitron_cli.align.sampling import Sampler
from minitron_cli.checkpoint.card import CheckpointOutput
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.verify import check_contents, check_structure
from minitron_cli.config.align import AlignConfig
from minitron_cli.distill.logs import require_log
from minitron_cli.errors import ConfigError, FamilyError, InputError, OutputError
from minitron_cli.manifest import fingerprint, require_disk
from minitron_cli.models.load import context_length, load_model
from minitron_cli.models.save import save_model
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.group import Group, process_group
from minitron_cli.runtime.memory import peak_rss_bytes, require_memory
from minitron_cli.runtime.progress import say
from minitron_cli.tokens import tokenizer_identity

CURVE = "curve.json"
SAMPLES = "samples.jsonl"
EXAMPLES = 20
"""Prompts whose responses before and after are kept."""


@dataclass(frozen=True)
class AlignResult:
    """What alignment did; keys of `--json`.

    Rewards are means of single samples, `kl` is to the policy as it was, in nats per sequence; each with half the width
    of its 95 % interval. `best_of` is what best-of-n sampling of the policy as it was gives. `stopped`: the rail that
    ended the run, or None. `ties`: the share of pairs of one prompt's responses with equal rewards, before.
    `reward_source`: identity of a reward that is a function.
    """

    out: str
    method: str
    steps: int
    reward_before: float
    reward_before_error: float
    reward_after: float
    reward_after_error: float
    kl: float
    kl_error: float
    win_rate: float
    best_of: list[dict[str, Any]]
    ties: float
    eval_prompts: int
    eval_samples: int
    stopped: str | None
    seconds: float
    peak_rss_bytes: int
    reward_source: str | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A checked run; nothing is loaded and nothing written."""

    config: AlignConfig
    policy: Checkpoint
    teacher: Checkpoint | None
    tokenizer: Any
    prompts: list[Prompt]
    kept: list[Prompt]
    held_out: bool
    words: int
    inputs: dict[str, str]
    device: torch.device
    dtype: torch.dtype

    @property
    def plan(self) -> AlignPlan:
        """What it will do and hold."""
        longest = max(len(prompt.ids) for prompt in [*self.prompts, *self.kept])
        shape = self.teacher.shape if self.teacher else None
        return make_plan(
            self.config, self.policy.shape, shape, len(self.prompts), len(self.kept), self.held_out, longest,
            self.device, self.dtype,
        )  # fmt: skip


def plan_align(config: AlignConfig) -> AlignPlan:
    """What `align --dry-run` prints.

    Raises:
        UserError: the input is wrong.
    """
    return _job(config).plan


def run_align(config: AlignConfig) -> AlignResult:
    """Align a policy and write it as a plain checkpoint of the type it came in.

    Raises:
        UserError: the input is wrong; nothing was written. A reward that fails later leaves a resumable state.
        RunError: the numbers or the disk failed midway; the last checkpoint is kept.
    """
    with process_group() as group:
        return _run(config, group)


def _run(config: AlignConfig, group: Group) -> AlignResult:
    began = time.monotonic()
    if config.batch_size % group.size:
        raise ConfigError(f"--batch-size {config.batch_size} is not a multiple of the {group.size} processes.")
    with group.main_first():  # a finished OUT.partial is renamed by one of them
        job = _job(config)
        output = CheckpointOutput(config.out, "align", config, job.inputs, force=config.force, resumable=True)
    source = _source(config)
    if output.result is not None:
        if output.result["reward_source"] != source:
            raise OutputError(
                f"{config.out} was made with another version of {config.reward}; choose another --out, or remove it."
            )
        say(f"{config.out} is up to date.")
        return AlignResult(**output.result)
    plan, params = job.plan, job.policy.shape.params
    state = params * (12 + 4 * config.moving_anchor)
    require_disk(config.out, state * (config.keep + 1) + job.policy.nbytes, "The training state")
    advice = "try a smaller --sample-batch, --micro-batch or --max-new-tokens, or --checkpoint-activations"
    require_memory(plan.memory, job.device, advice)
    say(describe(plan))
    reward = open_reward(config, job.device, job.dtype)
    failed: RewardFailed | None = None
    group.wait()  # all have looked at OUT before one of them changes it
    with output if group.main else nullcontext():
        group.wait()
        run = _open_run(job, reward, output.partial, group)
        try:
            with closing(run):
                run.restore()
                result = _finish(run, job, run.finish(), source, began)
            if group.main:
                output.commit(result.to_json())
            group.wait()
        except RewardFailed as error:
            if not run.step:
                raise
            failed = error
    if failed is not None:  # outside: a state is left to be resumed, though the input is at fault
        raise failed
    return result


def _job(config: AlignConfig) -> Job:
    """Check everything that can be checked before a model is loaded."""
    require_log(config.log)
    policy = Checkpoint(resolve(config.policy))
    policy.require_unquantised()
    tokenizer = load_tokenizer(config.policy)
    teacher, words = _teacher(config, tokenizer), policy.shape["vocab"]
    for each in (policy, teacher):
        if each is not None and (why := each.shape.unpadded):
            raise FamilyError(f"{each.path} cannot be sampled from in batches of prompts of several lengths: {why}.")
    inputs = {"policy": fingerprint(policy.path)}
    contexts = [context_length(dict(each.config)) for each in (policy, teacher) if each is not None]
    limits = [context - config.max_new_tokens for context in contexts if context is not None]
    if limits and min(limits) < 1:
        raise InputError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in a context of "
            f"{min(limits) + config.max_new_tokens} tokens; use less."
        )
    reader = PromptReader(tokenizer, config.policy, min(limits) if limits else None, config.prompt_tokens)
    prompts, kept, held_out = reader.training_and_kept(config.prompts, config.eval_prompts)
    for prompt in (*prompts, *kept):
        if max(prompt.ids) >= words:
            raise InputError(f"Prompts use the token id {max(prompt.ids)} and {config.policy} knows {words} words.")
    inputs["prompts"] = fingerprint(config.prompts)
    if config.eval_prompts is not None:
        inputs["eval prompts"] = fingerprint(config.eval_prompts)
    if teacher is not None:
        inputs["teacher"] = fingerprint(teacher.path)
        words = min(words, teacher.shape["vocab"])
    if config.reward_spec.kind in ("model", "likelihood"):
        inputs["reward"] = fingerprint(resolve(config.reward_spec.value))
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    return Job(config, policy, teacher, tokenizer, prompts, kept, held_out, words, inputs, device, dtype)


def _teacher(config: AlignConfig, tokenizer: Any) -> Checkpoint | None:
    if config.teacher is None:
        return None
    teacher = Checkpoint(resolve(config.teacher))
    teacher.require_unquantised()
    if tokenizer_identity(load_tokenizer(config.teacher)) != tokenizer_identity(tokenizer):
        raise InputError(
            f"--teacher {config.teacher} has another tokenizer than {config.policy}; its samples would be other tokens."
        )
    return teacher


def _source(config: AlignConfig) -> str | None:
    """SHA-256 of the file of a reward function: a result made with another one is not up to date."""
    if config.reward_spec.kind != "function":
        return None
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = find_spec(config.reward_spec.value.partition(":")[0])
    except (ImportError, ValueError):
        return None  # opening the reward says what is wrong
    file = Path(found.origin) if found is not None and found.origin else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else None


def _open_run(job: Job, reward: Checked, partial: Path, group: Group) -> Run:
    """Load the models: three of the policy where the anchor moves, two where it stays."""
    config, device = job.config, job.device

    def load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
        return load_model(checkpoint.path, device=device, dtype=dtype).requires_grad_(False)

    reference = load(job.policy, torch.float32)
    anchor = reference
    if job.teacher is not None:
        anchor = load(job.teacher, job.dtype)
    elif config.moving_anchor:
        anchor = load(job.policy, torch.float32)
    model = load_model(job.policy.path, device=device, dtype=torch.float32)
    learner = PolicyLearner(model, config, config.steps, job.dtype, group=group)
    cast = Cast(learner, reference, anchor, job.words, config.micro_batch)
    stops = stop_tokens(job.tokenizer, model, config.stop_text, job.words)
    sampler = Sampler(stops, job.words, config.max_new_tokens, config.sample_batch, job.dtype)
    writer = Writer(sampler, job.tokenizer, config.stop_text, reward)
    yardstick = Yardstick(job.kept, cast, writer, config.eval_samples, config.n, config.seed)
    return Run(config, job.prompts, Teaching(config, cast, writer, group), yardstick, partial)


def _finish(run: Run, job: Job, stop: Stop | None, source: str | None, began: float) -> AlignResult:
    """Write the model, measure it as written, and say how it compares."""
    config, yardstick, partial = job.config, run.yardstick, run.partial
    main = run.group.main
    for solved in partial.glob(BAD_BATCH.format("*")) if main else ():
        solved.unlink()
    save_model(run.cast.learner.model, job.policy, partial, run.group)
    if main:
        check_structure(partial, expected_params=job.policy.shape.params)
        check_contents(partial, source=job.policy.path)
    if run.measurements and run.measurements[-1].step == run.step:
        run.measurements.pop()  # weights on disk are rounded to their type there
    run.measure()
    last = run.measurements[-1]
    best_of = [each.to_json() for each in yardstick.best_of(config.best_of())]
    curve = {"measurements": [each.to_json() for each in run.measurements], "steps": run.figures, "best_of": best_of}
    if main:
        (partial / CURVE).write_text(json.dumps(curve))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in yardstick.examples(EXAMPLES)]
        (partial / SAMPLES).write_text("".join(lines), "utf-8")
    before = best_of[0]
    return AlignResult(
        out=str(config.out),
        method=config.method,
        steps=run.step,
        reward_before=before["reward"],
        reward_before_error=before["reward_error"],
        reward_after=last.reward,
        reward_after_error=last.reward_error,
        kl=last.kl,
        kl_error=last.kl_error,
        win_rate=last.win_rate,
        best_of=best_of,
        ties=yardstick.ties(),
        eval_prompts=len(yardstick.prompts),
        eval_samples=len(yardstick.prompts) * yardstick.count,
        stopped=stop.name if stop else None,
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=peak_rss_bytes(),
        reward_source=source,
    )
