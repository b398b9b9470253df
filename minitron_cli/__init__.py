"""minitron: turn one trained Hugging Face causal LM into smaller ones.

The Python API mirrors the command line: `run_<stage>(config) -> Result`. Names load on first use, so that
`import minitron_cli` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
