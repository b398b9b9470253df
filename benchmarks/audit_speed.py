"""Speed of the consent audit on a URL-only corpus whose hosts repeat as on the web (Zipf), over mixed robots.txt files.

python -m benchmarks.audit_speed [--documents N] [--workers N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minitron_cli.config.audit import AuditConfig
from minitron_cli.data.consent.agents import Agents
from minitron_cli.data.consent.stage import run_audit
from minitron_cli.data.consent.store import Capture, StoreWriter
from minitron_cli.runtime.progress import set_quiet

DOCUMENTS_PER_HOST = 23
"""C4 has 365 million documents of 15.9 million hosts."""

WORDPRESS = (
    "User-agent: *\nDisallow: /wp-admin/\nAllow: /wp-admin/admin-ajax.php\n\nSitemap: https://{host}/sitemap.xml\n"
)


def robots_txt(host: str, kind: int, generator: np.random.Generator, agents: list[str]) -> tuple[int, str]:
    """Status and body of one site: of ten, two have none, one cannot be read, three are stock files, four their own."""
    if kind in (0, 1):
        return 404, ""
    if kind == 2:
        return 503, ""
    if kind in (3, 4, 5):
        return 200, WORDPRESS.format(host=host)
    lines = []
    if kind in (6, 7):  # some AI agents by name, as news sites have it
        chosen = generator.choice(len(agents), int(generator.integers(1, 12)), replace=False)
        lines += [f"User-agent: {agents[number]}" for number in chosen] + ["Disallow: /", ""]
    lines.append("User-agent: *")
    for number in range(int(generator.integers(3, 60))):
        stem = f"/{'search' if number % 3 else 'private'}/{generator.integers(1000)}"
        lines.append(f"Disallow: {stem}{'/*.php$' if number % 7 == 0 else '/'}")
    return 200, "\n".join([*lines, f"Sitemap: https://{host}/sitemap.xml", ""])


def main() -> None:
    """Build corpus and store, audit with one process and with all, print documents per second and core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    set_quiet(True)
    generator = np.random.default_rng(0)
    hosts = max(options.documents // DOCUMENTS_PER_HOST, 1)
    agents = [agent.name for agent in Agents.shipped().all()]
    folder = Path(tempfile.mkdtemp())
    try:
        kinds = generator.integers(0, 10, hosts)
        with StoreWriter(folder / "store") as store:
            for number in range(hosts):
                host = f"host{number}.example"
                status, body = robots_txt(host, int(kinds[number]), generator, agents)
                store.add(Capture(f"https://{host}", 1_750_000_000, status, body.encode()))
        shares = 1 / np.arange(1, hosts + 1)
        chosen = generator.choice(hosts, options.documents, p=shares / shares.sum())
        paths = generator.integers(0, 10**6, options.documents)
        urls = [
            f"https://host{h}.example/blog/{p % 1000}/an-article-{p}.html?page=2"
            for h, p in zip(chosen, paths, strict=True)
        ]
        (folder / "corpus").mkdir()
        for piece in range(4):
            table = pa.table({"url": urls[piece::4], "tokens": (paths[piece::4] % 900 + 100).tolist()})
            pq.write_table(table, folder / "corpus" / f"{piece}.parquet")
        print(f"{options.documents:,} documents of {len(np.unique(chosen)):,} hosts, {hosts:,} in the store")
        for workers in dict.fromkeys((1, options.workers)):
            config = AuditConfig(
                source=str(folder / "corpus"), robots=folder / "store", out=folder / f"out{workers}",
                tokens_column="tokens", workers=workers,
            )  # fmt: skip
            began = time.perf_counter()
            result = run_audit(config).to_json()
            seconds = time.perf_counter() - began
            assert result["documents"] == options.documents
            rate = options.documents / seconds
            print(
                f"{workers:3} processes  {seconds:7.1f} s  {rate:10,.0f} documents/s  {rate / workers:10,.0f} per core"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
