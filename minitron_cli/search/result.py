"""What a search found, as it is printed and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_cli.config.search import SearchConfig
from minitron_cli.manifest import write_json
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.search.commands import chain_commands, prune_command, search_command
from minitron_cli.search.course import Course
from minitron_cli.search.enumerate import Candidate
from minitron_cli.search.family import cut_sizes, origins
from minitron_cli.search.funnel import Funnel, Rung
from minitron_cli.search.listing import SearchResult, row
from minitron_cli.search.pareto import pareto_chart
from minitron_cli.search.tau import kendall_tau
from minitron_cli.shape import Shape

SEARCH = "search.json"
CURVES = "curves.json"
PICTURE = "pareto.svg"

Row = dict[str, Any]


def plan_file(size: str | None) -> str:
    """Where the plan of a size lies; None where only one was searched for."""
    return "plan.json" if size is None else f"plans/{size}.json"


@dataclass(frozen=True)
class Findings:
    """Everything measured; `found` are all feasible candidates by size, `measured` those of them that took part."""

    config: SearchConfig
    original: Shape
    found: Mapping[str | None, Sequence[Candidate]]
    measured: Mapping[str | None, Sequence[Candidate]]
    plans: Mapping[str, PrunePlan]
    course: Course | None
    funnel: Funnel
    rungs: Sequence[Rung]
    seconds: Mapping[str, float]

    def result(self, took: float) -> SearchResult:
        """Rows, largest size first, each size best first; the choice of each size."""
        rows = [each for size in self.measured for each in self._rows(size)]
        best = {each["size"]: each for each in reversed(rows) if each["rank"] == 1}
        return SearchResult(
            out=str(self.config.out),
            feasible=sum(map(len, self.found.values())),
            candidates=rows,
            chosen=rows[0] if len(self.measured) == 1 else None,
            seconds=round(took, 3),
            rank=self.config.rank,
            sizes=self._sizes({size: best[size] for size in self.measured}),
            rungs=[entry for rung in self.rungs for entry in self._rung(rung)],
            command=search_command(self.config),
        )

    def _rows(self, size: str | None) -> list[Row]:
        candidates = {candidate.name: candidate for candidate in self.measured[size]}
        zero_shot = self.funnel.entrants(list(candidates), len(candidates))
        order = self._order(size, zero_shot)
        return [
            {**row(candidates[name], self.config, size), **self._measured(name), "rank": place}
            | {"rank_zero_shot": zero_shot.index(name) + 1}
            for place, name in enumerate(order, 1)
        ]

    def _order(self, size: str | None, zero_shot: Sequence[str]) -> list[str]:
        """Those of the last rung first, best first; then those of the rung before; failed ones after all others."""
        rungs = [name for rung in reversed(self.rungs) for name in rung.field.get(size, ())]
        order = list(dict.fromkeys([*rungs, *zero_shot]))
        curves = self.funnel.journal.curves
        return sorted(order, key=lambda name: name in curves and curves[name].failed is not None)

    def _measured(self, name: str) -> Row:
        journal, per_step = self.funnel.journal, self.course.schedule.tokens_per_step if self.course else 0
        curve = journal.curves.get(name)
        points = [] if curve is None else curve.points
        last = points[-1] if points else None
        start = {"step": 0, "tokens": 0, "loss": journal.zero_shot[name]}
        found: Row = {
            "loss_zero_shot": journal.zero_shot[name],
            "loss_retrained": last["loss"] if last else None,
            "score": self.funnel.score(name, int(last["step"])) if last and last["step"] in self._ends else None,
            "steps": curve.step if curve else 0,
            "failed_at": curve.failed if curve else None,
            "curve": [start, *({**point, "tokens": int(point["step"]) * per_step} for point in points)],
        }
        return found | ({"seconds_per_token": self.seconds.get(name)} if self.seconds else {})

    @property
    def _ends(self) -> set[int]:
        return {rung.step for rung in self.rungs}

    def _rung(self, rung: Rung) -> list[Row]:
        """What one rung compared, size by size, and how its order agrees with those before."""
        assert self.course is not None
        place = [each.step for each in self.rungs].index(rung.step)
        found = []
        for size, names in rung.field.items():
            now = [self._value(name, rung.step) for name in names]
            zero_shot = [self.funnel.journal.start(name) for name in names]
            before = [self._value(name, self.rungs[place - 1].step) for name in names] if place else None
            found.append({
                "step": rung.step, "tokens": rung.step * self.course.schedule.tokens_per_step, "size": size,
                "candidates": list(names), "tau_zero_shot": kendall_tau(now, zero_shot),
                "tau_before": kendall_tau(now, before) if before is not None else None,
            })  # fmt: skip
        return found

    def _value(self, name: str, step: int) -> float:
        score = self.funnel.score(name, step)
        return math.inf if score is None else score

    def _sizes(self, best: Mapping[str | None, Row]) -> list[Row]:
        """The choice of every size, what it is cut from, and the commands."""
        candidates = {each.name: each for group in self.measured.values() for each in group}
        chosen = {size: candidates[each["name"]] for size, each in best.items()}
        family = {size: each.shape for size, each in chosen.items() if size is not None} if len(best) > 1 else {}
        sources = origins(family)
        found = []
        for size, candidate in chosen.items():
            plan, source = self.plans[candidate.name], sources.get(size or "")
            if size is None or size not in family:
                cut = prune_command(self.config, plan, candidate.target)
                commands = [cut or f"minitron prune {self.config.checkpoint} --search DIR --out DIR"]
            else:
                target = candidate.target if source is None else cut_sizes(candidate.shape, family[source])
                commands = chain_commands(self.config, size, source, plan, target)
            found.append({
                "size": size, "feasible": len(self.found[size]), "chosen": candidate.name,
                "params": candidate.shape.params, "from": source or "original",
                "plan": plan_file(size if family else None), "commands": commands,
            })  # fmt: skip
        return found


def write_findings(findings: Findings, result: SearchResult, directory: Path) -> None:
    """search.json without anything that another run would not repeat, the plans, the training curves, the picture."""
    timed = {"seconds_per_token"}
    lasting = result.to_json()
    del lasting["out"], lasting["seconds"]
    for each in (*lasting["candidates"], lasting["chosen"] or {}):
        for name in timed & each.keys():
            del each[name]
    write_json(directory / SEARCH, lasting)
    for size in result.sizes:
        path = directory / size["plan"]
        path.parent.mkdir(exist_ok=True)
        write_json(path, findings.plans[size["chosen"]].to_json())
    write_json(directory / CURVES, _curves(findings))
    (directory / PICTURE).write_text(pareto_chart(result.to_json()), "utf-8")


def _curves(findings: Findings) -> dict[str, Any]:
    """Every distilled candidate's losses, as `distill` writes them in curve.json."""
    per_step = findings.course.schedule.tokens_per_step if findings.course else 0
    curves = findings.funnel.journal.curves
    return {
        name: {
            "loss": curves[name].losses,
            "validation": [[point["step"], point["loss"]] for point in curves[name].points],
            "tokens_per_step": per_step,
        }
        for name in findings.plans
        if name in curves
    }
