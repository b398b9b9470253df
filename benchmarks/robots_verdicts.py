"""robots.txt verdicts per second on files already parsed, against Protego where it is installed.

python -m benchmarks.robots_verdicts [FOLDER]

FOLDER holds files named HOST.robots.txt (default: the development data beside the checkout); without one, files with
as many rules as real ones have are made up.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import heading, interleaved
from minitron_cli.data.robots import RobotsTxt, target

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "robots" / "sites_2025_06" / "bodies"
URLS, AGENTS = 20_000, ("GPTBot", "CCBot", "ClaudeBot", "Google-Extended")
WORDS = ("news", "article", "2024", "sport", "index", "search", "page", "view", "item", "product", "media", "user")


def bodies(folder: Path) -> dict[str, bytes]:
    """Host to body: real files, or made-up ones."""
    if folder.is_dir():
        return {
            file.name.removesuffix(".robots.txt"): file.read_bytes() for file in sorted(folder.glob("*.robots.txt"))
        }
    rng = random.Random(0)
    return {f"host{number}.example": made_up(rng) for number in range(200)}


def made_up(rng: random.Random) -> bytes:
    """A few groups with some ninety rules, a sixth of them with wildcards: the means of real files."""
    lines = []
    for agents in (["GPTBot", "CCBot"], ["Googlebot"], ["*"]):
        lines += [f"User-agent: {agent}" for agent in agents]
        for _ in range(30):
            path = "/" + "/".join(rng.choices(WORDS, k=rng.randint(1, 3)))
            lines.append(f"Disallow: {rng.choice(('', '', '', '', '', '/*'))}{path}{rng.choice(('', '', '$', '?*q='))}")
        lines.append("")
    return "\n".join(lines).encode()


def requests(hosts: list[str]) -> list[tuple[str, str]]:
    """(host, URL), at random but the same in every run."""
    rng = random.Random(1)
    drawn = []
    for _ in range(URLS):
        path = "/".join(rng.choices(WORDS, k=rng.randint(1, 5))) + rng.choice(("", ".html", "?q=a&page=3"))
        drawn.append((host := rng.choice(hosts), f"https://{host}/{path}"))
    return drawn


def main() -> None:
    """Print seconds, verdicts per second and ratios."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    heading(f"robots.txt verdicts, {URLS:,} URLs on cached hosts, one core")
    found = bodies(folder)
    began = time.perf_counter()
    parsed = {host: RobotsTxt.parse(body) for host, body in found.items()}
    milliseconds = (time.perf_counter() - began) * 1000 / len(parsed)
    print(f"{len(parsed)} {'real' if folder.is_dir() else 'made-up'} files, {milliseconds:.2f} ms to parse one\n")
    drawn = requests([host for host, robots in parsed.items() if robots.rejected is None])

    def one_agent() -> None:
        for host, url in drawn:
            parsed[host].verdict(url, "GPTBot")

    def four_agents() -> None:
        for host, url in drawn:
            robots, path = parsed[host], target(url)
            for group in {robots.group_of(agent) for agent in AGENTS}:
                robots.decide(path, group)

    runs: dict[str, tuple[Callable[[], None], int]] = {
        "verdict, one agent": (one_agent, 1),
        "four agents by group": (four_agents, len(AGENTS)),
    }
    if importlib.util.find_spec("protego"):
        from protego import Protego

        others = {host: Protego.parse(body.decode("utf-8", "replace")) for host, body in found.items()}

        def protego() -> None:
            for host, url in drawn:
                others[host].can_fetch(url, "GPTBot")

        runs["protego, one agent"] = (protego, 1)
    medians = interleaved({name: run for name, (run, _) in runs.items()})
    for name, seconds in medians.items():
        rate = URLS * runs[name][1] / seconds
        print(f"{name:<22}{seconds:8.2f} s{rate:12,.0f} verdicts/s{URLS / seconds:12,.0f} URLs/s")


if __name__ == "__main__":
    main()
