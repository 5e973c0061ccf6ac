"""Write the generated pages of docs/ from the schemas. `--check` reports stale pages instead."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def main() -> int:
    """Write the pages, or with --check print the stale ones; return 1 if there are any, else 0."""
    sys.path.insert(0, str(ROOT))
    from lorafleet.jobs.schema.aliases import FIELD_ALIASES

    pages = {
        "job-file.md": [*_render_head(), *_render_blocks(), *_render_aliases(FIELD_ALIASES)],
        "methods.md": _render_methods(),
        "site-file.md": _render_site_file(),
        "kubernetes-site-file.md": _render_kubernetes_site_file(),
        "ray-site-file.md": _render_ray_site_file(),
        "report-json.md": _render_report_json(),
    }
    stale = 0
    for name, lines in pages.items():
        text = "\n".join(lines) + "\n"
        if "--check" not in sys.argv:
            (DOCS / name).write_text(text)
        elif not (DOCS / name).is_file() or (DOCS / name).read_text() != text:
            print(f"docs/{name} is out of date: python scripts/make_docs.py")
            stale = 1
    return stale


def _render_methods() -> list[str]:
    from lorafleet.jobs.schema.compatibility import build_support_table
    from lorafleet.jobs.schema.types import METHODS, STRATEGIES

    cells = {(cell.method, cell.strategy): cell for cell in build_support_table()}
    notes: dict[str, int] = {}
    lines = [
        "# Methods and strategies",
        "",
        "Written by `python scripts/make_docs.py` from the table that validation enforces "
        "(`lorafleet methods` prints",
        "it). Every cell runs in the tests with two real Ray Train processes on CPU and gives "
        "what one process gives;",
        "[gpu-status.md](gpu-status.md) says what has not run on a GPU.",
        "",
        "| method | " + " | ".join(STRATEGIES) + " |",
        "|---" * (1 + len(STRATEGIES)) + "|",
    ]
    for method in METHODS:
        row = []
        for strategy in STRATEGIES:
            cell = cells[method, strategy]
            note_numbers = sorted(notes.setdefault(limit, len(notes) + 1) for limit in cell.limits)
            numbers = "".join(f" [{number}]" for number in note_numbers)
            row.append(("yes" if cell.supported else "no") + numbers)
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return [*lines, "", *(f"{number}. {limit}" for limit, number in notes.items())]


def _render_head() -> list[str]:
    return [
        "# The job file",
        "",
        "Written by `python scripts/make_docs.py` from the schema. Every key is checked: an "
        "unknown one is an error",
        "that names the closest right one. Numbers may be arithmetic on other fields "
        "(`lora_alpha: \"2*lora_r\"`),",
        "evaluated anew for each trial. YAML is read by its 1.2 rules: `2e-4` is a number, `no` a "
        "text. Relative paths",
        "start at the job file's folder.",
    ]  # fmt: skip


def _render_site_file() -> list[str]:
    from lorafleet.jobs.sites.slurm import NodeType, SlurmSite

    head = [
        "# The site file of a Slurm cluster",
        "",
        "Written by `python scripts/make_docs.py` from the schema; how it is used is in "
        "[slurm.md](slurm.md). Beside",
        "these keys a file may say `extends:` (the file that it is laid over) and `locked:` (keys "
        "that files laid over",
        "it must not set).",
    ]  # fmt: skip
    return [*head, *_render_block(SlurmSite, ""), *_render_block(NodeType, "node_types.NAME")]


def _render_kubernetes_site_file() -> list[str]:
    from lorafleet.jobs.sites.kubernetes import (
        Kai,
        KubernetesSite,
        Kueue,
        SecretRef,
        Toleration,
        Volcano,
        YuniKorn,
    )

    head = [
        "# The site file of a Kubernetes cluster",
        "",
        "Written by `python scripts/make_docs.py` from the schema; [kubernetes.md](kubernetes.md) "
        "says how it is used.",
        "A file may also say `extends:` (the file that it is laid over) and `locked:` (keys that "
        "files laid over it",
        "must not set).",
    ]  # fmt: skip
    kinds = (Kueue, Volcano, YuniKorn, Kai)
    queues = [
        line
        for model in kinds
        for line in _render_block(model, f"scheduler: {model.__name__.lower()}")
    ]
    parts = [*_render_block(SecretRef, "secrets.NAME"), *_render_block(Toleration, "tolerations[]")]
    return [*head, *_render_block(KubernetesSite, ""), *queues, *parts]


def _render_ray_site_file() -> list[str]:
    from lorafleet.jobs.sites.ray import RayClusterSite

    head = [
        "# The site file of a Ray cluster",
        "",
        "Written by `python scripts/make_docs.py` from the schema; [ray.md](ray.md) says how it "
        "is used.",
    ]
    return [*head, *_render_block(RayClusterSite, "")]


def _render_report_json() -> list[str]:
    """Return the page on the files below report/ and on the model card."""
    from lorafleet.jobs.runs import report

    models = (
        report.Report,
        report.Row,
        report.Failure,
        report.Baseline,
        report.Recommendation,
        report.FoldScores,
        report.Arm,
        report.Inference,
        report.BatchSpeed,
        report.Pair,
        report.Sample,
        report.Answer,
        report.Ratings,
        report.Judgement,
    )
    lines = [
        "# report.json",
        "",
        "Written by `python scripts/make_docs.py` from the schema. `lorafleet report --format "
        "json` prints this file;",
        "`report.csv` has its trials as a table, `arms.csv` the arms of a comparison. Fields may "
        "be added in any",
        "release; a field that changes its meaning raises `schema_version`. Values that are NaN "
        "or infinite are null.",
    ]
    for model in models:
        lines += [
            "",
            f"## {model.__name__}",
            "",
            model.__doc__ or "",
            "",
            "| field | type | meaning |",
            "|---|---|---|",
        ]
        schema = model.model_json_schema()
        for name, field in model.model_fields.items():
            meaning = " ".join((field.description or "").split()).replace("|", "/")
            kind = _describe_type(schema["properties"][name])
            lines.append(f"| `{name}` | {kind} | {meaning} |")
    return lines


def _describe_type(schema: dict[str, Any]) -> str:
    """Return a JSON type as text, with the names of this page's objects."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_describe_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        return f"[{', '.join(_describe_type(part) for part in schema['prefixItems'])}]"
    if kind == "array":
        return f"list of {_describe_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        values = _describe_type(schema["additionalProperties"])
        return f"object of ({values})" if " or " in values else f"object of {values}"
    names = {
        "integer": "integer",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "number": "number",
    }
    return names.get(str(kind), "object" if kind == "object" else "any value")


def _render_blocks() -> list[str]:
    from lorafleet.jobs.schema.job import JobSpec

    return _render_block(JobSpec, "")


def _render_block(model: Any, path: str) -> list[str]:
    from lorafleet.jobs.schema.field_paths import _find_block as block_of

    title = f"`{path}`" if path else "At the top"
    lines = [
        "",
        f"## {title}",
        "",
        " ".join((model.__doc__ or "").split()),
        "",
        "| key | allowed | default | meaning |",
        "|---|---|---|---|",
    ]
    inner = []
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        block = block_of(field.annotation)
        if block:
            inner.append((block, f"{path}.{name}" if path else name))
        default = (
            "required" if field.is_required() else "see below" if block else _format_default(field)
        )
        meaning = " ".join((field.description or "").split()).replace("|", "/")
        allowed = (
            "a block"
            if block
            else _describe_allowed(schema["properties"][name], schema.get("$defs", {}))
        )
        lines.append(f"| `{name}` | {allowed} | {default} | {meaning} |")
    for block, inner_path in inner:
        lines += _render_block(block, inner_path)
    for block_path, named_block in _list_named_blocks().get(path, ()):
        lines += _render_block(named_block, block_path)
    return lines


def _list_named_blocks() -> dict[str, list[tuple[str, Any]]]:
    """Return the blocks whose keys are user-chosen names, by the block that contains them."""
    from lorafleet.jobs.schema.comparison import ArmSpec
    from lorafleet.jobs.schema.export import Gate
    from lorafleet.jobs.schema.job import CustomMetric
    from lorafleet.jobs.schema.search import Parameter

    return {
        "search": [("search.parameters.FIELD", Parameter)],
        "compare": [("compare.arms.NAME", ArmSpec)],
        "evaluate": [("evaluate.custom_metrics.NAME", CustomMetric)],
        "export": [("export.parity.TARGET", Gate)],
    }


def _describe_allowed(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the values that a part of a JSON Schema allows, as text."""
    if "$ref" in schema:
        return _describe_allowed(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema or "oneOf" in schema:
        parts = [
            _describe_allowed(part, definitions) for part in schema.get("anyOf") or schema["oneOf"]
        ]
        return " or ".join(dict.fromkeys(part for part in parts if part))
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if values:
        return ", ".join(f"`{value}`" for value in values)
    kind = schema.get("type")
    if kind == "array":
        inner = _describe_allowed(schema.get("items", {}), definitions)
        return f"a list: {inner}" if inner else "a list"
    if kind in ("integer", "number"):
        return _describe_number("whole number" if kind == "integer" else "number", schema)
    if kind == "object" and schema.get("propertyNames", {}).get("enum"):
        return f"a block of {', '.join(f'`{value}`' for value in schema['propertyNames']['enum'])}"
    return {"boolean": "`true`, `false`", "string": "text", "object": "a block", "null": ""}.get(
        kind, ""
    )


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
"""Keys of JSON Schema -> the text for them."""


def _describe_number(kind: str, schema: dict[str, Any]) -> str:
    bounds = [f"{text} {schema[key]:,g}" for key, text in _BOUNDS.items() if key in schema]
    return f"{kind}, {' and '.join(bounds)}" if bounds else kind


def _format_default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _render_aliases(aliases: dict[str, str]) -> list[str]:
    lines = [
        "",
        "## Other tools' words",
        "",
        "Understood, and reported.",
        "",
        "| theirs | ours |",
        "|---|---|",
    ]
    return lines + [f"| `{alias}` | `{field}` |" for alias, field in sorted(aliases.items())]


if __name__ == "__main__":
    sys.exit(main())
