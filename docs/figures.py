"""Puts the figures of `examples/results/` among the pages, as `assets/results/NAME.png`. A hook of mkdocs."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "examples" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs when it has collected what there is."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"assets/results/{path.name}", abs_src_path=str(path)))
    return files
