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
        "commands.md": _render_commands(),
    }
    stale = 0
    for name, lines in pages.items():
        text = "\n".join(lines) + "\n"
        if "--check" not in sys.argv:
            (DOCS / name).write_text(text)
        elif not (DOCS / name).is_file() or (DOCS / name).read_text() != text:
            print(f"docs/{name} is out of date: run `python scripts/make_docs.py`")
            stale = 1
    return stale


def _render_commands() -> list[str]:
    import typer.main

    from lorafleet.commands.cli import build_app

    commands = {
        name: command
        for name, command in typer.main.get_command(build_app()).commands.items()
        if not command.hidden
    }
    lines = [
        "# Commands",
        "",
        "This page lists every command with its arguments and options, as",
        "`lorafleet COMMAND --help` prints them. `python scripts/make_docs.py` generates it.",
        "",
        "Every command takes `--verbose` (`-v`), which prints what the command does, request by",
        "request, and `--help` (`-h`). A command that changes a run also writes these lines to the",
        "run's `logs/client.log`. `lorafleet --version` prints the version. Messages go to",
        "standard error and results to standard output. The exit codes are in",
        "[concepts.md](concepts.md#exit-codes).",
    ]
    panel = None
    for name, command in commands.items():
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            lines += ["", f"## {panel}"]
        lines += ["", f"### lorafleet {name}", "", *_render_help(command.help or "")]
        arguments = [param for param in command.params if param.param_type_name == "argument"]
        usage = " ".join(_render_metavar(argument) for argument in arguments)
        lines += ["", "```text", f"lorafleet {name} [OPTIONS] {usage}".rstrip(), "```", ""]
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        lines += [
            _render_param(param)
            for param in command.params
            if not param.hidden and param.name not in ("help", "verbose")
        ]
    return lines


def _render_help(text: str) -> list[str]:
    import textwrap

    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join(textwrap.fill(part, width=100) for part in paragraphs).split("\n")


def _render_metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _render_param(param: Any) -> str:
    if param.param_type_name == "argument":
        name = _render_metavar(param)
    else:
        value = "" if param.is_flag else f" {param.metavar or _render_choices(param)}"
        name = ", ".join([*param.opts[:-1], f"{param.opts[-1]}{value}"])
        if param.secondary_opts:
            name += f" / {', '.join(param.secondary_opts)}"
    default = param.default
    shown_default = "" if default is None or default is False else f"`{default}`"
    if isinstance(param.show_default, str):
        shown_default = param.show_default
    if param.required:
        shown_default = "required"
    meaning = (param.help or "").strip()
    if param.envvar:
        meaning += f" Environment variable: `{param.envvar}`."
    cells = (f"`{name}`", shown_default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _render_choices(param: Any) -> str:
    from enum import Enum

    kind = param.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "{" + ",".join(str(choice.value) for choice in kind) + "}"
    return getattr(kind, "__name__", "value").upper()


def _render_methods() -> list[str]:
    from lorafleet.jobs.schema.compatibility import build_support_table
    from lorafleet.jobs.schema.types import METHODS, STRATEGIES

    cells = {(cell.method, cell.strategy): cell for cell in build_support_table()}
    notes: dict[str, int] = {}
    lines = [
        "# Methods and strategies",
        "",
        "This page shows which training method runs with which strategy, and with which limits.",
        "It is for users who set `method` and `resources.strategy` in a job file. Numbers in",
        "brackets refer to the limits below the table. `lorafleet methods` prints the same table.",
        "",
        "The tests run every cell with two real Ray Train processes on CPU and compare the result",
        "with that of one process. [gpu-status.md](gpu-status.md) lists what has not run on a",
        "GPU. This page is generated by `python scripts/make_docs.py` from the table that",
        "validation enforces.",
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
        "This page lists every key of a job file, with its allowed values, its default and its",
        "meaning. It is for everyone who writes job files.",
        "",
        "- lorafleet checks every key. An unknown key is an error, and the message suggests the",
        "  closest valid key.",
        '- A number may be arithmetic on other fields (`lora_alpha: "2*lora_r"`). lorafleet',
        "  evaluates it for each trial.",
        "- YAML is read by the rules of YAML 1.2: `2e-4` is a number, and `no` is a text.",
        "- Relative paths start at the folder of the job file.",
        "",
        "This page is generated by `python scripts/make_docs.py` from the schema.",
    ]


_SITE_PAGE_END = [
    "A site file may also have these two keys:",
    "",
    "- `extends`: path of another site file. This file is merged over it.",
    "- `locked`: list of keys that a file which extends this one must not change.",
    "",
    "This page is generated by `python scripts/make_docs.py` from the schema.",
]
"""Last lines of the introduction of each page about a kind of site file."""


def _render_site_file() -> list[str]:
    from lorafleet.jobs.sites.slurm import NodeType, SlurmSite

    head = [
        "# Slurm site file",
        "",
        "This page lists every key of a site file for a Slurm cluster. It is for users and",
        "administrators who write such files. [slurm.md](slurm.md) shows how to use them.",
        "",
        *_SITE_PAGE_END,
    ]
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
        "# Kubernetes site file",
        "",
        "This page lists every key of a site file for a namespace of a Kubernetes cluster. It is",
        "for users and administrators who write such files. [kubernetes.md](kubernetes.md) shows",
        "how to use them.",
        "",
        *_SITE_PAGE_END,
    ]
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
        "# Ray site file",
        "",
        "This page lists every key of a site file for an existing Ray cluster. It is for users who",
        "submit jobs to such a cluster. [ray.md](ray.md) shows how to use the file.",
        "",
        *_SITE_PAGE_END,
    ]
    return [*head, *_render_block(RayClusterSite, "")]


def _render_report_json() -> list[str]:
    """Return the page on report.json."""
    from lorafleet.jobs.runs import report
    from lorafleet.jobs.schema.base import describe_fields

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
        "This page describes every field of `report.json`, the report of a run in JSON. It is for",
        "developers of programs that read reports.",
        "",
        "`lorafleet report --format json` prints this file. `report.csv` has its trials as a",
        "table, and `arms.csv` has the arms of a comparison. Any release may add fields. If the",
        "meaning of a field changes, `schema_version` increases. Values that are NaN or infinite",
        "are null.",
        "",
        "This page is generated by `python scripts/make_docs.py` from the schema.",
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
        for name in model.model_fields:
            meaning = " ".join(describe_fields(model).get(name, "").split()).replace("|", "/")
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
    from lorafleet.jobs.schema.base import describe_fields
    from lorafleet.jobs.schema.field_paths import _find_block as block_of

    title = f"`{path}`" if path else "Top-level keys"
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
        if name == "name" and not path and model.__name__.endswith("Site"):
            default = "the file's name"  # the loader fills it in
        elif field.is_required():
            default = "required"
        else:
            default = "see below" if block else _format_default(field)
        meaning = " ".join(describe_fields(model).get(name, "").split()).replace("|", "/")
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
        "## Names from other tools",
        "",
        "lorafleet also accepts these names from other tools, and prints a note for each.",
        "",
        "| name in other tools | field of the job file |",
        "|---|---|",
    ]
    return lines + [f"| `{alias}` | `{field}` |" for alias, field in sorted(aliases.items())]


if __name__ == "__main__":
    sys.exit(main())
