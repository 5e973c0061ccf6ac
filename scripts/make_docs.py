"""Write the generated pages of docs/ from the schemas. `--check` reports stale pages instead."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from lorafleet.jobs.loading.aliases import FIELD_ALIASES

    pages = {
        "job-file.md": [*_head(), *_blocks(), *_aliases(FIELD_ALIASES)],
        "methods.md": _methods(),
        "site-file.md": _site_file(),
        "kubernetes-site-file.md": _kubernetes_site_file(),
        "ray-site-file.md": _ray_site_file(),
        "report-json.md": _report_json(),
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


def _methods() -> list[str]:
    from lorafleet.jobs.schema.compatibility import METHODS, STRATEGIES, table

    cells = {(cell.method, cell.strategy): cell for cell in table()}
    notes: dict[str, int] = {}
    lines = [
        "# Methods and strategies",
        "",
        "Written by `python scripts/make_docs.py` from the table that validation enforces (`lorafleet methods` prints",
        "it). Every cell runs in the tests with two real Ray Train processes on CPU and gives what one process gives;",
        "[gpu-status.md](gpu-status.md) says what has not run on a GPU.",
        "",
        "| method | " + " | ".join(STRATEGIES) + " |",
        "|---" * (1 + len(STRATEGIES)) + "|",
    ]
    for method in METHODS:
        row = []
        for strategy in STRATEGIES:
            cell = cells[method, strategy]
            found = sorted(notes.setdefault(limit, len(notes) + 1) for limit in cell.limits)
            numbers = "".join(f" [{number}]" for number in found)
            row.append(("yes" if cell.supported else "no") + numbers)
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return [*lines, "", *(f"{number}. {limit}" for limit, number in notes.items())]


def _head() -> list[str]:
    return [
        "# The job file",
        "",
        "Written by `python scripts/make_docs.py` from the schema. Every key is checked: an unknown one is an error",
        "that names the closest right one. Numbers may be arithmetic on other fields (`lora_alpha: \"2*lora_r\"`),",
        "evaluated anew for each trial. YAML is read by its 1.2 rules: `2e-4` is a number, `no` a text. Relative paths",
        "start at the job file's folder.",
    ]  # fmt: skip


def _site_file() -> list[str]:
    from lorafleet.jobs.sites.slurm import NodeType, SlurmSite

    head = [
        "# The site file of a Slurm cluster",
        "",
        "Written by `python scripts/make_docs.py` from the schema; how it is used is in [slurm.md](slurm.md). Beside",
        "these keys a file may say `extends:` (the file that it is laid over) and `locked:` (keys that files laid over",
        "it must not set).",
    ]  # fmt: skip
    return [*head, *_block(SlurmSite, ""), *_block(NodeType, "node_types.NAME")]


def _kubernetes_site_file() -> list[str]:
    from lorafleet.jobs.sites.kubernetes import Kai, KubernetesSite, Kueue, SecretRef, Toleration, Volcano, YuniKorn

    head = [
        "# The site file of a Kubernetes cluster",
        "",
        "Written by `python scripts/make_docs.py` from the schema; [kubernetes.md](kubernetes.md) says how it is used.",
        "A file may also say `extends:` (the file that it is laid over) and `locked:` (keys that files laid over it",
        "must not set).",
    ]  # fmt: skip
    kinds = (Kueue, Volcano, YuniKorn, Kai)
    queues = [line for model in kinds for line in _block(model, f"scheduler: {model.__name__.lower()}")]
    parts = [*_block(SecretRef, "secrets.NAME"), *_block(Toleration, "tolerations[]")]
    return [*head, *_block(KubernetesSite, ""), *queues, *parts]


def _ray_site_file() -> list[str]:
    from lorafleet.jobs.sites.ray import RayClusterSite

    head = [
        "# The site file of a Ray cluster",
        "",
        "Written by `python scripts/make_docs.py` from the schema; [ray.md](ray.md) says how it is used.",
    ]
    return [*head, *_block(RayClusterSite, "")]


def _report_json() -> list[str]:
    """Return the page on the files below report/ and on the model card."""
    from lorafleet.jobs.runs import report

    models = (
        report.Report, report.Row, report.Failure, report.Baseline, report.Recommendation, report.OverFolds,
        report.Arm, report.Inference, report.BatchSpeed, report.Pair, report.Sample, report.Answer, report.Ratings,
        report.Judgement,
    )  # fmt: skip
    lines = [
        "# report.json",
        "",
        "Written by `python scripts/make_docs.py` from the schema. `lorafleet report --format json` prints this file;",
        "`report.csv` has its trials as a table, `arms.csv` the arms of a comparison. Fields may be added in any",
        "release; a field that changes its meaning raises `schema_version`. Values that are NaN or infinite are null.",
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
            kind = _field_type(schema["properties"][name])
            lines.append(f"| `{name}` | {kind} | {meaning} |")
    return lines


def _field_type(schema: dict[str, Any]) -> str:
    """Return a JSON type as words, with the names of the objects of this page."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_field_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{word}`" for word in schema["enum"])
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        return f"[{', '.join(_field_type(part) for part in schema['prefixItems'])}]"
    if kind == "array":
        return f"list of {_field_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        values = _field_type(schema["additionalProperties"])
        return f"object of ({values})" if " or " in values else f"object of {values}"
    names = {"integer": "integer", "string": "text", "boolean": "true or false", "null": "null", "number": "number"}
    return names.get(str(kind), "object" if kind == "object" else "any value")


def _blocks() -> list[str]:
    from lorafleet.jobs.schema.job import JobSpec

    return _block(JobSpec, "")


def _block(model: Any, path: str) -> list[str]:
    from lorafleet.jobs.schema.field_paths import _block as block_of

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
        default = "required" if field.is_required() else "see below" if block else _default(field)
        meaning = " ".join((field.description or "").split()).replace("|", "/")
        allowed = "a block" if block else _allowed(schema["properties"][name], schema.get("$defs", {}))
        lines.append(f"| `{name}` | {allowed} | {default} | {meaning} |")
    for block, inner_path in inner:
        lines += _block(block, inner_path)
    for named, of_name in _named_blocks().get(path, ()):
        lines += _block(of_name, named)
    return lines


def _named_blocks() -> dict[str, list[tuple[str, Any]]]:
    """Return the blocks whose keys are names of the user's own, by the block that they are in."""
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


def _allowed(schema: dict[str, Any], named: dict[str, Any]) -> str:
    """Say which values a part of a JSON Schema allows."""
    if "$ref" in schema:
        return _allowed(named[schema["$ref"].rpartition("/")[2]], named)
    if "anyOf" in schema or "oneOf" in schema:
        parts = [_allowed(part, named) for part in schema.get("anyOf") or schema["oneOf"]]
        return " or ".join(dict.fromkeys(part for part in parts if part))
    words = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if words:
        return ", ".join(f"`{word}`" for word in words)
    kind = schema.get("type")
    if kind == "array":
        inner = _allowed(schema.get("items", {}), named)
        return f"a list: {inner}" if inner else "a list"
    if kind in ("integer", "number"):
        return _number("whole number" if kind == "integer" else "number", schema)
    if kind == "object" and schema.get("propertyNames", {}).get("enum"):
        return f"a block of {', '.join(f'`{word}`' for word in schema['propertyNames']['enum'])}"
    return {"boolean": "`true`, `false`", "string": "text", "object": "a block", "null": ""}.get(kind, "")


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
"""Keys of JSON Schema, as words."""


def _number(kind: str, schema: dict[str, Any]) -> str:
    bounds = [f"{words} {schema[key]:,g}" for key, words in _BOUNDS.items() if key in schema]
    return f"{kind}, {' and '.join(bounds)}" if bounds else kind


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
