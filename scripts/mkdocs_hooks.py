"""Give mkdocs every page at its path in the repository.

The pages link to each other with relative paths, also to README.md and other files outside docs/.
With `docs/` in front of the pages and those files beside it, all links are valid on the site and
in the repository.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE_DOCS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "examples/**/*.md",
    "examples/**/*.yaml",
)
"""Files that pages link to, as patterns below the repository."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files with the pages moved below docs/, and with the files outside of it."""
    moved = Files([file for file in files if file.src_dir != config.docs_dir])
    for file in files:
        if file.src_dir == config.docs_dir:
            moved.append(
                File.generated(config, f"docs/{file.src_uri}", abs_src_path=file.abs_src_path)
            )
    for pattern in OUTSIDE_DOCS:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            moved.append(File.generated(config, uri, abs_src_path=str(path)))
    return moved
