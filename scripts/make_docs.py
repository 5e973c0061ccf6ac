"""Writes docs/job-file.md from the job file's own schema. `--check` says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "job-file.md"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from jobs.aliases import FIELD_ALIASES

    text = "\n".join([*_head(), *_blocks(), *_aliases(FIELD_ALIASES)]) + "\n"
    if "--check" in sys.argv:
        if TARGET.read_text() != text:
            print("docs/job-file.md is out of date: python scripts/make_docs.py")
            return 1
        return 0
    TARGET.write_text(text)
    return 0


def _head() -> list[str]:
    return [
        "# The job file",
        "",
        "Written by `python scripts/make_docs.py` from the schema. Every key is checked: an unknown one is an error",
        "that names the closest right one. Numbers may be arithmetic on other fields (`lora_alpha: \"2*lora_r\"`),",
        "evaluated anew for each trial. YAML is read by its 1.2 rules: `2e-4` is a number, `no` a text. Relative paths",
        "start at the job file's folder.",
    ]  # fmt: skip


def _blocks() -> list[str]:
    from jobs.spec import JobSpec

    return _block(JobSpec, "")


def _block(model: Any, path: str) -> list[str]:
    from jobs.fields import _block as block_of

    title = f"`{path}`" if path else "At the top"
    lines = [
        "",
        f"## {title}",
        "",
        " ".join((model.__doc__ or "").split()),
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    inner = []
    for name, field in model.model_fields.items():
        block = block_of(field.annotation)
        if block:
            inner.append((block, f"{path}.{name}" if path else name))
        default = "required" if field.is_required() else "see below" if block else _default(field)
        lines.append(f"| `{name}` | {default} | {' '.join((field.description or '').split()).replace('|', '/')} |")
    for block, inner_path in inner:
        lines += _block(block, inner_path)
    if path == "search":
        from jobs.spec import Parameter

        lines += _block(Parameter, "search.parameters.FIELD")
    return lines


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _aliases(aliases: dict[str, str]) -> list[str]:
    lines = ["", "## Other tools' words", "", "Understood, and reported.", "", "| theirs | ours |", "|---|---|"]
    return lines + [f"| `{theirs}` | `{ours}` |" for theirs, ours in sorted(aliases.items())]


if __name__ == "__main__":
    sys.exit(main())
