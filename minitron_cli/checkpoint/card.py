"""The model card of a checkpoint: README.md with the Hub's metadata, written from what the stages recorded.

What is not known is left out; nothing is claimed that no stage measured. Local paths are shown by their last part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_cli import __version__
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.multimodal import open_shape
from minitron_cli.checkpoint.push import push, push_file, require_hub
from minitron_cli.config.base import ExportingConfig, StageConfig, command_line
from minitron_cli.manifest import StageOutput, read_manifest, write_text
from minitron_cli.shape import Shape

CARD = "README.md"
SOURCE = {"prune": "checkpoint", "distill": "student", "correct": "teacher", "align": "policy"}
"""Option that names the checkpoint a stage starts from."""
MADE = {"prune": "pruned", "distill": "distilled", "correct": "fine-tuned", "align": "aligned"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TERMS = re.compile(r"(licen[cs]e|use_policy|notice).*", re.IGNORECASE)


class CheckpointOutput(StageOutput):
    """The output of a stage that writes a checkpoint: its manifest tells what came before, and it has a model card.

    With --push-to-hub it is uploaded when it is complete; what would prevent that is an error of construction.
    """

    def __init__(
        self, out: Path, stage: str, config: StageConfig, inputs: Mapping[str, str], *, force: bool = False,
        resumable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(out, stage, config, inputs, force=force, resumable=resumable)
        if isinstance(config, ExportingConfig) and config.push_to_hub is not None:
            require_hub(config.push_to_hub)
            if self.result is not None:  # complete since an earlier run, whose upload may have failed
                self._push(config)

    def _push(self, config: ExportingConfig) -> None:
        if config.push_to_hub is not None:
            push(self.out, config.push_to_hub, public=config.hub_public, message=f"minitron {self.stage}")

    def commit(self, result: Mapping[str, Any], **more: Any) -> None:
        """Write the card and the history, then what every stage writes."""
        config = self.config.to_json()
        history = history_of(str(config[SOURCE[self.stage]]))
        history["steps"].append({
            "stage": self.stage, "command": command_line(self.stage, self.config, shown=_public),
            "teacher": shown(str(config["teacher"])) if config.get("teacher") and self.stage == "distill" else None,
            "data": _data_of(config), "result": dict(result), "minitron": __version__,
        })  # fmt: skip
        write_text(self.partial / CARD, card(self.out.name, self.partial, history))
        super().commit(result, **more, history=history)
        if isinstance(self.config, ExportingConfig):
            self._push(self.config)


def history_of(name: str) -> dict[str, Any]:
    """What is known of a checkpoint, as JSON: `base`, the first of the chain, and the `steps` since then."""
    path = resolve(name)
    recorded = (read_manifest(path) or {}).get("history")
    if recorded is not None:
        return {"base": recorded["base"], "steps": list(recorded["steps"])}
    shape = open_shape(path)
    base = {"name": shown(name), "licence": front_matter(path).get("license")}
    return {"base": {**base, "params": shape.params, "shape": shape.shown()}, "steps": []}


def evaluated(directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Write (and upload, where the checkpoint was) the card of a complete output anew, with what `eval` measured, and
    of the original under `original`.
    """
    manifest = read_manifest(directory) or {}
    history = manifest.get("history")
    if history is None:
        return
    text, path = card(directory.name, directory, history, evaluation), directory / CARD
    if not path.exists() or path.read_text("utf-8") != text:
        write_text(path, text)
        repository = (manifest.get("config") or {}).get("push_to_hub")
        if repository is not None:
            push_file(path, repository)


def card(title: str, directory: Path, history: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """The card as Markdown.

    Args:
        directory: holds the checkpoint's config.json.
        history: of the checkpoint itself, as `history_of` gives it.
        evaluation: as `evaluated` takes it.
    """
    base, steps = history["base"], history["steps"]
    shape = open_shape(directory)
    parts = [
        _metadata(base, steps, _results(title, evaluation)),
        f"# {title}\n\n{_summary(base, shape, steps)}",
        _sizes(base, shape),
        _steps(steps),
        _data(steps),
        _evaluation(evaluation),
        _terms(directory, base),
        _USE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(title: str, evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What was measured, as the Hub's metadata has it (`model-index`): a result per task, a metric per number."""
    results = []
    for task, metrics in ((evaluation or {}).get("tasks") or {}).items():
        found = [
            {"type": metric, "value": round(value, 6)}
            for metric, value in metrics.items()
            if metric != "samples" and "_stderr" not in metric
        ]
        if found:
            told = {"task": {"type": "text-generation"}, "dataset": {"name": task, "type": task}, "metrics": found}
            results.append(told)
    return [{"name": title, "results": results}] if results else []


def _metadata(base: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> str:
    import yaml

    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _is_hub_id(base["name"]):
        values |= {"base_model": base["name"], "base_model_relation": "finetune"}
    if base["licence"]:
        values["license"] = base["licence"]
    values["tags"] = ["minitron", *dict.fromkeys(MADE[step["stage"]] for step in steps)]
    sets = [name for step in steps for name in step["data"].get("sources", []) if _is_hub_id(name)]
    values |= {"datasets": list(dict.fromkeys(sets))} if sets else {}
    values |= {"model-index": list(results)} if results else {}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def front_matter(place: Path) -> dict[str, Any]:
    """Metadata of the card beside a local checkpoint, in its directory."""
    import yaml

    try:
        text = (place / CARD).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _data_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sources and tokens of what a stage was trained on; empty where it was not."""
    name = config.get("data")
    if not isinstance(name, str):
        return {}
    if config.get("seq_len"):  # text that was tokenised on the way
        return {"sources": [shown(name)]}
    prepared = read_manifest(Path(name)) or {}
    sources = [shown(str(source)) for source in prepared.get("config", {}).get("sources", [])]
    return {"sources": sources, "tokens": prepared.get("result", {}).get("tokens")}


def shown(name: str) -> str:
    """A name as others may read it: of a local path only the last part."""
    return name if _is_hub_id(name) or name.startswith("builtin:") else Path(name).name or name


def _public(value: str) -> str:
    return shown(value) if "/" in value else value


def _summary(base: Mapping[str, Any], shape: Shape, steps: Sequence[Mapping[str, Any]]) -> str:
    how = _listed(list(dict.fromkeys(MADE[step["stage"]] for step in steps)))
    share = f"{_count(shape.params)} of its {_count(base['params'])} parameters"
    return f"**{base['name']}**, {how} with minitron: {share} ({100 * shape.params / base['params']:.0f} %)."


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _count(value: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,}"


def _sizes(base: Mapping[str, Any], shape: Shape) -> str:
    now = shape.shown()
    rows = [
        f"| {axis.replace('_', ' ')} | {size:,} | {now[axis]:,} |"
        for axis, size in base["shape"].items()
        if axis in now
    ]
    rows.append(f"| parameters | {base['params']:,} | {shape.params:,} |")
    return "\n".join(["| | original | this model |", "|---|---|---|", *rows])


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    lines = ["## How it was made", ""]
    for number, step in enumerate(steps, 1):
        lines += [f"{number}. {_told(step)}", "", "   ```", f"   {step['command']}", "   ```", ""]
    return "\n".join([*lines, f"minitron {steps[-1]['minitron']}."])


def _told(step: Mapping[str, Any]) -> str:
    """One sentence about what a stage did."""
    result = step["result"]
    if step["stage"] == "prune":
        return f"Cut from {_count(result['params_before'])} to {_count(result['params_after'])} parameters."
    if "tokens" not in result:
        return f"{MADE[str(step['stage'])].capitalize()}."
    text = f"{MADE[str(step['stage'])].capitalize()}"
    text += f" from {step['teacher']}" if step["teacher"] else ""
    text += f": {result['steps']:,} steps, {result['tokens']:,} tokens"
    if result.get("val_loss_after") is not None:
        before, after = result["val_loss_before"], result["val_loss_after"]
        text += f"; validation loss {before:.3f} to {after:.3f} nats per token"
    return f"{text}."


def _data(steps: Sequence[Mapping[str, Any]]) -> str:
    """What it was trained on, and what the audit of that corpus said."""
    lines = []
    for step in steps:
        sources, tokens = step["data"].get("sources"), step["data"].get("tokens")
        if not sources or step["stage"] == "prune":
            continue
        lines.append(f"- {', '.join(sources)}" + (f" ({tokens:,} tokens prepared)" if tokens else ""))
        for name, audit in (step["result"].get("consent") or {}).items():
            told = ", ".join(f"{key} {value['tokens']:,}" for key, value in audit["status"].items())
            lines.append(f"  - consent audit of {shown(name)}, tokens by status: {told}")
    return "\n".join(["## Training data", "", *dict.fromkeys(lines)]) if lines else ""


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return ""
    original = evaluation.get("original") or {}
    rows = []
    for name, label in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        if evaluation.get(name) is not None:
            rows.append((label, original.get(name), evaluation[name]))
    for task, metrics in (evaluation.get("tasks") or {}).items():
        for metric, value in metrics.items():
            if metric != "samples" and "_stderr" not in metric:
                theirs = (original.get("tasks") or {}).get(task, {}).get(metric)
                rows.append((f"{task}, {metric}", theirs, value))
    if not rows:
        return ""
    lines = [f"| {label} | {'' if theirs is None else f'{theirs:.4f}'} | {ours:.4f} |" for label, theirs, ours in rows]
    return "\n".join(["## Evaluation", "", "| | original | this model |", "|---|---|---|", *lines])


def _terms(directory: Path, base: Mapping[str, Any]) -> str:
    files = sorted(item.name for item in directory.iterdir() if TERMS.fullmatch(item.name))
    if base["licence"]:
        text = f"The licence of {base['name']}, `{base['licence']}`, holds for this model too."
    elif files:
        text = f"The terms of {base['name']} hold for this model too."
    else:
        text = f"The files of {base['name']} name no licence; find its terms out before you share this model."
    return f"## Licence\n\n{text}" + (f" See {', '.join(files)}." if files else "")


_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OR HUB ID OF THIS MODEL")
tokenizer = AutoTokenizer.from_pretrained("PATH OR HUB ID OF THIS MODEL")
```"""
