"""What the recipes that come with the package are for, from their files."""

from __future__ import annotations

from minitron_cli.config.recipe import load_recipe, shipped

FIRST = "quickstart"


def recipe_list() -> str:
    """A section per recipe: its description, the command, its comments on your own models, the file."""
    names = sorted(shipped(), key=lambda name: (name != FIRST, name))
    return "\n".join(_section(name) for name in names)


def _section(name: str) -> str:
    text = shipped()[name]
    lines = text.splitlines()
    comments = [line for line in lines if line.startswith("#")]
    about = [line.lstrip("#").removeprefix(" ") for line in comments]
    body = "\n".join(lines[len(comments) :]).strip()
    parts = [f"### {name}", " ".join(load_recipe(name).description.split()), f"```sh\nminitron run {name}\n```"]
    if about:
        parts.append("```text\n" + "\n".join(about) + "\n```")
    parts.append(f"```yaml\n{body}\n```")
    return "\n\n".join(parts) + "\n"
