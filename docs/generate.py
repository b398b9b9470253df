"""Write what the docs say of the code from the code: `python -m docs.generate` (`--check` compares).

Generated are the pages of commands, the list of recipes, the table of families, and the pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docs.command_pages import command_pages, navigation
from docs.families import between_marks, matrix
from docs.pictures import pictures
from docs.recipe_list import recipe_list

HERE = Path(__file__).parent
COMMANDS, IMAGES = HERE / "commands", HERE / "images"


def pages() -> dict[Path, str]:
    """Every generated file and its text; of some pages only what is between two marks."""
    found = {COMMANDS / name: text for name, text in command_pages().items()}
    found |= {IMAGES / f"{name}.svg": text for name, text in pictures().items()}
    for path, mark, inside in (
        (HERE.parent / "README.md", "families", matrix()),
        (HERE / "families.md", "families", matrix()),
        (HERE / "recipes.md", "recipes", recipe_list()),
        (HERE.parent / "mkdocs.yml", "commands", navigation()),
    ):
        found[path] = between_marks(path.read_text("utf-8"), mark, inside)
    return found


def main() -> None:
    """Write the files, or with --check fail where one on disk differs or is of a command that is gone."""
    found, check = pages(), "--check" in sys.argv[1:]
    for path, text in found.items():
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            raise SystemExit(f"{path.relative_to(HERE.parent)} is out of date; run `python -m docs.generate`.")
    for path in set(COMMANDS.glob("*.md")) - found.keys():
        if check:
            raise SystemExit(f"{path.relative_to(HERE.parent)} is of no command; run `python -m docs.generate`.")
        path.unlink()


if __name__ == "__main__":
    main()
