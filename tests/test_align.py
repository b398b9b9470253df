"""`minitron align`: methods, rails, teachers, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_align import make_place, make_prompts, options
from helpers_chain import SMALL, make_checkpoint, make_data
from helpers_tokenizer import CHATML, make_tokenizer
from transformers import AutoModelForCausalLM

from minitron_cli.align.bond import expected_best
from minitron_cli.align.lessons import Lesson, Teaching, stop_tokens
from minitron_cli.align.loop import SILENT, Run
from minitron_cli.align.measure import mean_and_error
from minitron_cli.align.policy import Cast, PolicyLearner
from minitron_cli.align.prompts import PromptReader
from minitron_cli.align.sampling import Responses, log_probs
from minitron_cli.align.stage import plan_align, run_align
from minitron_cli.config.align import AlignConfig, parse_reward
from minitron_cli.errors import ConfigError, InputError, OutputError, RunError, UserError
from minitron_cli.manifest import read_manifest
from minitron_cli.models.load import load_model
from minitron_cli.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_place(tmp_path_factory.mktemp("align"))


def weights_of(path: Path | str) -> dict[str, torch.Tensor]:
    return dict(load_model(path, device=CPU, dtype=torch.float32).named_parameters())


METHODS: dict[str, dict[str, Any]] = {
    "bond": {},
    "bond forward": {"beta": 0.0},
    "bond backward": {"beta": 1.0},
    "bond iterated": {"n": 2, "anchor_every": 2},
    "jbond": {"method": "jbond", "gamma": 0.5},
    "reinforce": {"method": "reinforce"},
    "sft": {"method": "sft"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_writes_a_plain_checkpoint(name: str, place: dict[str, Any], tmp_path: Path) -> None:
    config = options(place, tmp_path / "out", **METHODS[name])
    result = run_align(config)
    assert result.steps == 4 and result.stopped is None and result.method == config.method
    assert result.kl > 0 or abs(result.kl) < result.kl_error
    assert result.best_of[0]["reward"] == result.reward_before
    rewards = [each["reward"] for each in result.best_of]
    assert rewards == sorted(rewards) and [each["n"] for each in result.best_of] == config.best_of()
    assert (result.eval_prompts, result.eval_samples) == (4, 32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = weights_of(place["policy"])
    assert any(not torch.equal(p, before[key]) for key, p in model.named_parameters())
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [each["step"] for each in curve["measurements"]] == [0, 2, 4] and len(curve["steps"]) == 4
    assert curve["measurements"][0]["kl"] == 0 and curve["steps"][0]["kl"] == 0
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 4
    assert not list((tmp_path / "out").glob("state.*"))
    assert run_align(config) == result  # up to date
    with pytest.raises(OutputError, match="already holds"):
        run_align(options(place, tmp_path / "out", **METHODS[name], seed=1))


@pytest.mark.parametrize(
    "changes", [{}, {"method": "jbond", "eta": 0.2, "steps": 40}, {"method": "reinforce", "kl_weight": 0.02}]
)
def test_reward_rises(changes: dict[str, Any], place: dict[str, Any], tmp_path: Path) -> None:
    """Length is easy to learn: a few steps must leave the interval of where it began."""
    long: dict[str, Any] = {"steps": 20, "batch_size": 16, "lr": 1e-2, "eval_samples": 256, "eval_every": 100}
    result = run_align(options(place, tmp_path / "out", **{**long, **changes}))
    assert result.reward_after - result.reward_after_error > result.reward_before + result.reward_before_error
    assert result.kl > 0.1 and result.win_rate > 0.55


def test_the_plan(place: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_align(options(place, tmp_path / "out"))
    assert (plan.responses, plan.trained) == (4 * (1 + 4), 4 * 2)
    assert (plan.prompts, plan.eval_prompts, plan.held_out) == (36, 4, True)
    assert all(size >= 0 for size in plan.memory.values()) and not (tmp_path / "out").exists()
    only = plan_align(options(place, tmp_path / "out", method="sft"))
    assert (only.responses, only.trained) == (4 * 5, 4)


def opened(place: dict[str, Any], tmp_path: Path, **changes: Any) -> Run:
    """A run before its first step."""
    from minitron_cli.align.reward_models import open_reward
    from minitron_cli.align.stage import _job, _open_run
    from minitron_cli.runtime.group import Group

    config = options(place, tmp_path / "out", **changes)
    (tmp_path / "out.partial").mkdir()
    return _open_run(_job(config), open_reward(config, CPU, torch.float32), tmp_path / "out.partial", Group())


def test_bond_imitates_the_best_anchor_sample_and_ranks_its_own(place: dict[str, Any], tmp_path: Path) -> None:
    """A step's lesson, told again from its samples and the definitions."""
    run = opened(place, tmp_path, beta=0.25, n=3, k=5)
    config, teaching, prompts = run.config, run.teaching, run.prompts[:4]
    writer = teaching.writer
    lesson = teaching.lesson(prompts, 7)
    own = writer.write(run.cast.reference, prompts, 1, 0, 7, 0)
    others = writer.write(run.cast.reference, prompts, 5, 0, 7, 1)
    rewards = writer.rewards(prompts, writer.texts(others))
    mine = writer.rewards(prompts, writer.texts(own))
    best = [5 * row + max(range(3), key=lambda place: rewards[row, place].item()) for row in range(4)]
    assert lesson.responses.tokens() == own.tokens() + [others.tokens()[row] for row in best]
    values = [math.log(((rewards[row] <= mine[row]).sum().item() + 1) / 6) for row in range(4)]
    backward = [0.25 * 2 * (value - (sum(values) - value) / 3) for value in values]  # ratio 0: policy is the anchor
    assert lesson.weights.tolist() == pytest.approx([*backward, *[0.75] * 4], abs=1e-5)
    assert config.backward == 0.25 and lesson.figures["kl"] == pytest.approx(0, abs=1e-4)


def test_the_update_is_the_gradient_of_the_weighted_likelihood(place: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the micro-batch, and without the samples of weight 0."""
    run = opened(place, tmp_path)
    learner, lesson = run.cast.learner, run.teaching.lesson(run.prompts[:4], 0)
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1.0, 1.0, 1.0])
    learner.begin(0)
    whole = log_probs(learner.model, lesson.responses, run.cast.words)
    (-(whole * weights).sum() / 4).backward()
    expected = {name: p.grad.clone() for name, p in learner.parameters.items()}
    for size in (3, 8):
        seen: dict[str, torch.Tensor] = {}

        def finish(loss: float, step: int) -> tuple[float, float]:
            seen.update({name: p.grad.clone() for name, p in learner.parameters.items()})  # noqa: B023
            return 0.0, 0.0

        learner.finish = finish  # type: ignore[method-assign]
        update = learner.update(lesson.responses, weights, 4, 0, words=run.cast.words, size=size)
        assert update.loss == pytest.approx(-(whole.detach() * weights).sum().item() / 4, rel=1e-4)
        for name, gradient in expected.items():
            assert torch.allclose(seen[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-7), name


def test_the_anchor_follows(place: dict[str, Any], tmp_path: Path) -> None:
    run = opened(place, tmp_path, method="jbond")
    cast = run.cast
    assert cast.anchor is not cast.reference and next(cast.anchor.parameters()).dtype == torch.float32
    with torch.no_grad():
        for parameter in cast.learner.model.parameters():
            parameter.add_(1.0)
    before = {name: tensor.clone() for name, tensor in cast.anchor_tensors().items()}
    cast.follow(0.25)
    for name, tensor in cast.anchor_tensors().items():
        assert torch.allclose(tensor, before[name] + 0.25, atol=1e-5)
    cast.restore_anchor(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cast.anchor_tensors().items())
    cast.copy_policy()
    pairs = zip(cast.anchor.parameters(), cast.learner.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_kl_budget_stops(place: dict[str, Any], tmp_path: Path) -> None:
    result = run_align(options(place, tmp_path / "out", steps=40, lr=2e-2, kl_budget=0.3))
    assert result.stopped == "kl budget" and result.steps < 40
    assert run_align(options(place, tmp_path / "out", steps=40, lr=2e-2, kl_budget=0.3)) == result


def test_a_plateau_stops(place: dict[str, Any], tmp_path: Path) -> None:
    result = run_align(options(place, tmp_path / "out", steps=40, lr=1e-9, patience=2, eval_every=1))
    assert result.stopped == "plateau" and result.steps < 40


def test_a_signal_that_ends_stops(place: dict[str, Any], tmp_path: Path) -> None:
    run = opened(place, tmp_path)
    run.figures = [{"kl": 0.0, "ties": 1.0}] * SILENT
    stop = run.stopped()
    assert stop is not None and stop.name == "no signal"
    run.figures[-1] = {"kl": 0.0, "ties": 0.9}
    assert run.stopped() is None


def test_numbers_that_stop_being_finite_keep_the_batch(
    place: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Teaching.lesson

    def broken(self: Teaching, prompts: Any, step: int) -> Lesson:
        lesson = real(self, prompts, step)
        return Lesson(lesson.responses, lesson.weights * (math.nan if step == 3 else 1), lesson.figures)

    monkeypatch.setattr(Teaching, "lesson", broken)
    with pytest.raises(RunError, match=r"step 4\. Its batch is in .*state\.step-000000002"):
        run_align(options(place, tmp_path / "out", save_every=2))
    assert (tmp_path / "out.partial" / "not-finite.step-4.safetensors").exists()
    monkeypatch.undo()
    run_align(options(place, tmp_path / "out", save_every=2))
    assert not list((tmp_path / "out").glob("not-finite*"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("teacher") / "teacher", seed=5, num_hidden_layers=2)


def test_a_teachers_best_of_n(place: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    """The student nears the teacher, whose samples it imitates and is ranked among."""
    long = {"steps": 25, "batch_size": 8, "lr": 1e-2, "teacher": str(teacher), "n": 2, "eval_every": 100}
    result = run_align(options(place, tmp_path / "out", **long))
    steps = json.loads((tmp_path / "out" / "curve.json").read_text())["steps"]
    first, last = (sum(each["kl_anchor"] for each in part) / 5 for part in (steps[:5], steps[-5:]))
    assert last < 0.8 * first and result.kl > 1
    assert steps[0]["kl"] == 0 and steps[0]["kl_anchor"] > 1


def test_a_teacher_with_another_tokenizer_is_refused(place: dict[str, Any], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other")
    make_tokenizer(other, vocab=300)
    with pytest.raises(InputError, match="another tokenizer"):
        run_align(options(place, tmp_path / "out", teacher=str(other)))


def test_a_prepared_data_set_gives_prompts(place: dict[str, Any], tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", Path(place["policy"]))
    config = options(place, tmp_path / "out", prompts=data, prompt_tokens=5)
    plan = plan_align(config)
    assert (plan.prompts, plan.eval_prompts, plan.held_out, plan.longest_prompt) == (64, 8, True, 5)
    other = make_checkpoint(tmp_path / "other")
    make_tokenizer(other, vocab=300)
    with pytest.raises(InputError, match="another tokenizer"):
        plan_align(options(place, tmp_path / "out", policy=str(other), prompts=data))


def test_conversations(tmp_path: Path) -> None:
    """The template's text up to the assistant's turn, without a second start token."""
    tokenizer = make_tokenizer(tmp_path, template=CHATML)
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "what is the answer?"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    (prompt,) = PromptReader(tokenizer, "m", None, 8).read(path)
    text = "<|im_start|>user\nwhat is the answer?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.text == text and prompt.messages == tuple(turns)
    assert list(prompt.ids) == tokenizer(text, add_special_tokens=False).input_ids
    with pytest.raises(InputError, match="chat template"):
        PromptReader(make_tokenizer(tmp_path / "plain"), "m", None, 8).read(path)


BAD_ROWS = {
    '{"text": "x"}': "has text \\(str\\)",
    '{"prompt": 3}': "needs `prompt`",
    '{"prompt": "a", "messages": []}': "needs `prompt`",
    '{"messages": []}': "before the assistant's turn",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "before the assistant's turn",
    '{"messages": ["x"]}': "object with `role`",
    "[1]": "JSON list",
    '{"prompt"': "broken JSON",
    "": "holds no prompts",
    json.dumps({"prompt": "the quick brown fox " * 40}): "has room for 56 beside",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_prompts(row: str, place: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(row + "\n" if row else "")
    with pytest.raises(InputError, match=BAD_ROWS[row]) as caught:
        run_align(options(place, tmp_path / "out", prompts=path))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert [item.name for item in tmp_path.iterdir()] == ["bad.jsonl"]


def test_missing_prompts(place: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        run_align(options(place, tmp_path / "out", prompts=tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match="no prepared data set"):
        run_align(options(place, tmp_path / "out", prompts=tmp_path))
    with pytest.raises(InputError, match="leaves no room"):
        run_align(options(place, tmp_path / "out", max_new_tokens=64))


def test_few_prompts_serve_both(place: dict[str, Any], tmp_path: Path) -> None:
    path = make_prompts(tmp_path / "few.jsonl", 3)
    plan = plan_align(options(place, tmp_path / "out", prompts=path))
    assert (plan.prompts, plan.eval_prompts, plan.held_out) == (3, 3, False)
    other = make_prompts(tmp_path / "other.jsonl", 5)
    plan = plan_align(options(place, tmp_path / "out", prompts=path, eval_prompts=other))
    assert (plan.prompts, plan.eval_prompts, plan.held_out) == (3, 5, True)


def test_stop_tokens(place: dict[str, Any]) -> None:
    model = load_model(place["policy"], device=CPU, dtype=torch.float32)
    tokenizer = load_tokenizer(place["policy"])
    stops = stop_tokens(tokenizer, model, "n", model.config.vocab_size)
    ends = {model.config.eos_token_id, tokenizer.eos_token_id}
    for word in range(len(tokenizer)):
        assert bool(stops[word]) == ("n" in tokenizer.decode([word]) or word in ends), word
    with pytest.raises(ConfigError, match="no single token"):
        stop_tokens(tokenizer, model, "n\n\n\nq", model.config.vocab_size)


def test_mean_and_error_count_prompts() -> None:
    values = torch.tensor([[1.0, 3.0], [4.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    mean, error = mean_and_error(values)
    means = torch.tensor([2.0, 4.0, 0.0])
    assert mean == 2.0 and error == pytest.approx(1.96 * means.std().item() / math.sqrt(3))


def test_best_of_beside_the_last_measurement(place: dict[str, Any], tmp_path: Path) -> None:
    run = opened(place, tmp_path)
    run.restore()
    run.measure()
    before = run.yardstick.reference()
    assert before.shape == (4, 8)
    for each in run.yardstick.best_of([1, 2, 4]):
        assert each.reward == pytest.approx(expected_best(before, each.n).mean().item())
        assert run.yardstick.after is not None
        assert each.difference == pytest.approx(run.yardstick.after.mean().item() - each.reward)
    run.close()


REFUSED = {
    "--reward": {"reward": "lenght:3"},
    "did you mean length:N": {"reward": "lenght:3"},
    "length needs": {"reward": "length:many"},
    "words needs": {"reward": "words:,"},
    "likelihood needs": {"reward": "likelihood:"},
    "name a reward": {"reward": " "},
    "--anchor-every belongs": {"method": "jbond", "anchor_every": 3},
    "--teacher is an anchor": {"method": "jbond", "teacher": "t"},
    "--anchor-every replaces": {"anchor_every": 3, "teacher": "t"},
    "--stop is empty": {"stop": ""},
    "--policy-samples 2": {"method": "reinforce", "policy_samples": 1},
    "--eval-samples": {"eval_samples": 3},
    "--n": {"n": 1},
    "--beta": {"beta": 1.5},
    "--warmup": {"warmup": 1.5},
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_options(words: str, place: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        options(place, tmp_path / "out", **REFUSED[words])


def test_rewards_as_written() -> None:
    kinds = {
        "length:40": "length", "words:a, b": "words", "likelihood:builtin:tiny-py": "likelihood", "mine:f": "function",
        "a.b:f": "function", "owner/name": "model", "./dir:x": "model", "/a/b": "model", "builtin:tiny-py": "model",
    }  # fmt: skip
    for spec, kind in kinds.items():
        assert parse_reward(spec).kind == kind, spec


def test_best_of_sizes() -> None:
    common = {"policy": "p", "reward": "length:4", "prompts": Path("p"), "steps": 1, "out": Path("o")}
    for n, sizes in {2: [1, 2], 6: [1, 2, 4, 6], 8: [1, 2, 4, 8]}.items():
        assert AlignConfig(**common, n=n).best_of() == sizes


FUNCTION = "calls = 0\ndef score(prompts, responses):\n    {body}\n"


def reward_module(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / f"{name}.py").write_text(FUNCTION.format(body=body.replace("\n", "\n    ")))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return f"{name}:score"


BODIES = {
    "raises": ("raise ValueError('no such word.')", r"raised ValueError \(no such word\)"),
    "nan": ("return [float('nan')] * len(responses)", "is nan for the response"),
    "infinite": ("return [1.0] * (len(responses) - 1) + [float('inf')]", "is inf for the response"),
    "short": ("return [1.0]", r"gave 1 numbers for \d+ responses"),
    "none": ("return None", "raised TypeError"),
    "constant": ("return [2.0] * len(responses)", r"is 2 in all \d+ responses, so no response is better"),
    "by_prompt": ("return [float(len(p)) for p in prompts]", "the same for each prompt in all"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_rewards_leave_nothing(
    name: str, place: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = reward_module(tmp_path, f"bad_{name}", BODIES[name][0], monkeypatch)
    with pytest.raises(UserError, match=BODIES[name][1]) as caught:
        run_align(options(place, tmp_path / "out", reward=spec))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not list(tmp_path.glob("out*"))


def test_a_function_that_is_not_there(place: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward_module(tmp_path, "present", "return 1", monkeypatch)
    (tmp_path / "damaged.py").write_text("import nothing_like_it\n")
    for spec, words in {
        "absent_module:f": "cannot be imported",
        "damaged:f": "cannot be imported .*nothing_like_it",
        "present:other": "has no function other",
        "present:calls": "has no function calls",
    }.items():
        with pytest.raises(ConfigError, match=words):
            run_align(options(place, tmp_path / "out", reward=spec))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("after", [3, 13])
def test_a_reward_that_fails_midway_loses_nothing(
    after: int, place: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call 3 belongs to the first step's lesson, where nothing is done yet; 13 comes with the last measurement."""
    good = "return [float(len(each)) for each in responses]"
    body = f"global calls\ncalls += 1\nif calls > {after}:\n    raise KeyError('x')\n{good}"
    spec = reward_module(tmp_path, f"midway{after}", body, monkeypatch)
    config = options(place, tmp_path / "out", reward=spec, method="jbond")
    with pytest.raises(UserError, match="raised KeyError"):
        run_align(config)
    states = [item.name for item in (tmp_path / "out.partial").glob("state.step*")] if after > 3 else []
    assert states == (["state.step-000000004.safetensors"] if after > 3 else [])
    assert (tmp_path / "out.partial").exists() == bool(states)
    corrected = reward_module(tmp_path, f"midway{after}", good, monkeypatch)
    import importlib
    import sys

    importlib.invalidate_caches()
    sys.modules.pop(f"midway{after}")
    run_align(config)
    run_align(options(place, tmp_path / "undisturbed", reward=corrected, method="jbond"))
    for name in ("model.safetensors", "curve.json", "samples.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_another_version_of_a_function_is_another_result(
    place: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = reward_module(tmp_path, "versioned", "return [float(len(each)) for each in responses]", monkeypatch)
    config = options(place, tmp_path / "out", reward=spec, steps=1)
    run_align(config)
    assert read_manifest(tmp_path / "out") is not None
    reward_module(tmp_path, "versioned", "return [float(-len(each)) for each in responses]", monkeypatch)
    with pytest.raises(OutputError, match="another version"):
        run_align(config)


def test_learner_refuses_what_cannot_recompute(place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(place["policy"], device=CPU, dtype=torch.float32)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    config = options(place, Path("o"), checkpoint_activations=True)
    with pytest.raises(ConfigError, match="checkpoint-activations"):
        PolicyLearner(model, config, 1, torch.float32)


def test_recomputed_activations_give_the_same_gradient(place: dict[str, Any], tmp_path: Path) -> None:
    plain = run_align(options(place, tmp_path / "plain", steps=2))
    again = run_align(options(place, tmp_path / "again", steps=2, checkpoint_activations=True))
    assert again.reward_after == pytest.approx(plain.reward_after, abs=1e-6)
    for name, tensor in weights_of(tmp_path / "plain").items():
        assert torch.allclose(tensor, weights_of(tmp_path / "again")[name], atol=1e-5)


def test_cast_reads_in_parts(place: dict[str, Any]) -> None:
    model = load_model(place["policy"], device=CPU, dtype=torch.float32)
    learner = PolicyLearner(model, options(place, Path("o")), 1, torch.float32)
    ids = torch.randint(100, (7, 9), generator=torch.Generator().manual_seed(0))
    responses = Responses(ids, torch.ones_like(ids, dtype=torch.bool), 4)
    found = [Cast(learner, model, model, 100, size).likelihoods(model, responses) for size in (2, 7)]
    assert torch.allclose(*found, atol=1e-5) and not found[0].requires_grad
    assert SMALL["tie_word_embeddings"]
