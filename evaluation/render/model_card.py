"""The model card and manifest beside the recommended weights.

They describe the training, the metrics, the files and how to load them. `manifest.json`
is for programs; `README.md` is rendered from it and has no facts of its own. They are
written again whenever the report is, because another trial may be recommended then.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from lorafleet.evaluation.render.loading_code import LoadingMetadata, build_loading_code
from lorafleet.evaluation.render.manifest import Manifest, PromptMetadata, WeightsMetadata
from lorafleet.evaluation.report.format import escape_markdown, format_number
from lorafleet.jobs import files
from lorafleet.jobs.data.adapters import read_config
from lorafleet.jobs.data.hub import resolve_public_base
from lorafleet.jobs.data.weight_names import read_weight_dtypes
from lorafleet.jobs.errors import AssetError, RunError
from lorafleet.jobs.runs.records import DamagedFile, parse_record, read_typed
from lorafleet.jobs.runs.report import Report, Row
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.precision import parse_weights_format
from lorafleet.jobs.text import format_count

_TITLES = {
    "lora": "LoRA adapter for {}",
    "qlora": "LoRA adapter for a quantised {} (QLoRA)",
    "prompt_tuning": "Soft prompt (prompt tuning) for {}",
    "full": "{} with every weight fine-tuned",
}
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def find_recommended_weights(run: Run, report: Report) -> Path | None:
    """Return the folder of the recommended weights.

    Returns None if nothing is recommended or the weights are not on this machine. A path
    that leads out of the run is ignored: files are written into that folder, and a report
    may come from elsewhere.
    """
    name = report.recommendation.adapter
    if report.recommendation.trial_id is None or not name:
        return None
    weights = run.path / name
    inside = weights != run.path and weights.is_relative_to(run.path)
    return weights if inside and weights.is_dir() else None


def write_card(run: Run, report: Report, prompt: PromptMetadata | None = None) -> None:
    """Write README.md and manifest.json beside the recommended weights, if they are on disk.

    Args:
        run: The run.
        report: Its report.
        prompt: What `save_inference_files` returned. None keeps what an earlier card of
            these weights has.
    """
    weights = find_recommended_weights(run, report)
    trial_id = report.recommendation.trial_id
    if weights is None or trial_id is None:
        return
    trial = Trial(weights.parent)
    if prompt is None:
        prompt = _read_earlier_prompt(weights)
    manifest = build_manifest(run, report, trial, prompt)
    files.write_json(weights / "manifest.json", manifest.to_dict())
    files.write_text(weights / "README.md", render_card(manifest, report))


def _read_earlier_prompt(weights: Path) -> PromptMetadata:
    """Return the prompt of the manifest beside weights, also if its other values are damaged."""
    path = weights / "manifest.json"
    with contextlib.suppress(RunError):
        prompt = files.read_json(path).get("prompt")
        if isinstance(prompt, dict):
            return parse_record(path, PromptMetadata, prompt)
    return PromptMetadata()


def read_manifest(weights: Path) -> Manifest | None:
    """Return the manifest beside weights; None if there is none, or a damaged one."""
    with contextlib.suppress(DamagedFile):
        return read_typed(weights / "manifest.json", Manifest)
    return None


def build_manifest(run: Run, report: Report, trial: Trial, prompt: PromptMetadata) -> Manifest:
    """Return the contents of manifest.json: everything that the card says, for programs.

    Args:
        run: The run.
        report: Its report.
        trial: The recommended trial.
        prompt: What `save_inference_files` returned.
    """
    row = _get_row_with_held_out_metrics(report, str(report.recommendation.trial_id))
    resolved = trial.read_params().resolved
    name = str(resolved.get("model", {}).get("model_name_or_path") or report.model)
    try:
        # Readers of the card do not have lorafleet's cache: the base is named by its public id.
        base, revision = resolve_public_base(name, resolved.get("model", {}).get("revision"))
    except AssetError:  # an asset that this version does not have
        base, revision = name, None
    held_out = {"test": row.test_metrics}
    if report.held_out == "validation":
        held_out = {"validation": row.test_metrics}
    return Manifest(
        run=run.id,
        trial_id=trial.id,
        base_model=base,
        base_model_revision=revision,
        base_model_in_job=name,
        model_revisions=report.facts.get("model_revisions", {}),
        data=report.data,
        data_sha256=report.facts.get("data_sha256", {}),
        rows=report.rows_count,
        labels=report.facts.get("labels") or [],
        weights=describe_weights(trial, row, resolved),
        prompt=prompt,
        resolved=resolved,
        recommendation=report.recommendation.sentence,
        versions=report.versions,
        **{"validation": row.metrics, **held_out},
    )


def describe_weights(trial: Trial, row: Row, resolved: dict[str, Any]) -> WeightsMetadata:
    """Return metadata of the saved weights.

    Args:
        trial: The trial that saved them.
        row: Its row of the report.
        resolved: The fields that it was trained with.
    """
    dtypes = [_DTYPE_NAMES.get(dtype, dtype) for dtype in read_weight_dtypes(trial.weights)]
    samples = [
        point.samples
        for point in trial.read_metrics()
        if point.step == row.weights_step and point.samples is not None
    ]
    values: dict[str, Any] = {
        "step": row.weights_step,
        "samples": samples[-1] if samples else None,
        "trained_steps": row.step,
        "trained_samples": row.samples,
        "trainable_parameters": row.trainable_parameters,
        "number_formats": row.number_formats,
        "dtypes": dtypes,
    }
    config = read_config(trial.weights) or {}
    if config.get("peft_type") == "LORA":
        values["modules_to_save"] = config.get("modules_to_save") or []
        values["lora_r"] = resolved.get("lora", {}).get("lora_r")
        values["stored_lora_r"] = config.get("r")
    # The adapter's config may be anybody's.
    return parse_record(trial.weights / "adapter_config.json", WeightsMetadata, values)


def _get_row_with_held_out_metrics(report: Report, trial_id: str) -> Row:
    """Return the recommended row; for a comparison, with the arm's metrics on the held-out rows."""
    row = report.get_row(trial_id)
    arm = next((arm for arm in report.arms or [] if arm.arm == report.recommendation.arm), None)
    return row if arm is None else row.model_copy(update={"test_metrics": arm.metrics})


def render_card(manifest: Manifest, report: Report) -> str:
    """Return README.md."""
    method = manifest.method
    lines = [
        *_render_front_matter(manifest),
        f"# {'Model' if method == 'full' else 'Adapter'} {manifest.trial_id}",
        "",
        f"{_TITLES[method].format(escape_markdown(manifest.base_model))}, trained for "
        f"{report.task} on {escape_markdown(report.data)} by lorafleet run `{report.run}`.",
        "",
        escape_markdown(report.recommendation.sentence),
        *(f"\n{escape_markdown(caution)}" for caution in report.cautions),
        "",
        *_render_metric_table(manifest, report.held_out),
        "",
        "## Weights",
        "",
        *_render_weights_section(manifest),
        "",
        *_render_loading_section(manifest, report.task),
        "## Data",
        "",
        *_render_data_section(manifest),
        "",
        "## Configuration",
        "",
        *(f"    {line}" for line in json.dumps(manifest.resolved, indent=2).splitlines()),
        "",
        "## Versions",
        "",
        *(
            f"- {escape_markdown(name)} {escape_markdown(version)}"
            for name, version in report.versions.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _render_front_matter(manifest: Manifest) -> list[str]:
    """Return the metadata that the Hugging Face Hub reads.

    The Hub accepts only Hub ids as `base_model`, so a folder is left out.
    """
    lines = ["---", f"library_name: {'transformers' if manifest.method == 'full' else 'peft'}"]
    if not Path(manifest.base_model).is_absolute():
        lines.append(f"base_model: {json.dumps(manifest.base_model)}")
    return [*lines, f"tags: [{manifest.method}, lorafleet]", "---", ""]


def _render_metric_table(manifest: Manifest, held_out: str) -> list[str]:
    validation, test = manifest.validation or {}, manifest.get_held_out_metrics(held_out)
    names = dict.fromkeys([*validation, *test])
    return [
        f"| metric | validation | {held_out} |",
        "|---|---|---|",
        *(
            f"| {escape_markdown(name)} | {format_number(validation.get(name))} | "
            f"{format_number(test.get(name))} |"
            for name in names
        ),
    ]


def _render_weights_section(manifest: Manifest) -> list[str]:
    weights, name = manifest.weights, escape_markdown(manifest.base_model_in_job)
    base_line = f"- Base model: {escape_markdown(manifest.base_model)}"
    if manifest.base_model_revision:
        base_line += f", revision `{escape_markdown(manifest.base_model_revision)}`"
    lines = [base_line]
    if manifest.base_model_in_job != manifest.base_model:
        digest = manifest.model_revisions.get(manifest.base_model_in_job, "")[:12]
        pinned = f" (SHA-256 {digest}...)" if digest else ""
        lines.append(
            f"- Trained on `{name}`{pinned}, lorafleet's copy of the base model. Its weights may "
            "be rounded differently from those on the hub, so metrics on the hub's copy can differ "
            f"slightly. `lorafleet fetch {name}` prints the folder of the copy"
        )
    if weights.step is not None:
        rows = ""
        if weights.samples is not None:
            rows = f" ({format_count(weights.samples, 'training row')} seen)"
        lines.append(
            f"- Saved at step {weights.step:,} of {weights.trained_steps or 0:,}{rows}, the step "
            "with the best evaluation on the validation rows. The metrics above are those of these "
            "weights"
        )
    if weights.dtypes:
        lines.append(f"- Stored as {', '.join(weights.dtypes)}")
    if weights.number_formats:
        lines.append(f"- Trained with {escape_markdown(weights.number_formats)}")
    if weights.trainable_parameters is not None:
        lines.append(f"- Trained parameters: {weights.trainable_parameters:,}")
    rank, stored = weights.lora_r, weights.stored_lora_r
    if rank is not None and stored == rank:
        lines.append(f"- LoRA rank: {rank}")
    elif rank is not None:
        lines.append(
            f"- LoRA rank: {rank} as trained, stored as an equivalent adapter of rank {stored}, "
            "because the initialisation changed the base's weights and the stored form fits the "
            "unchanged base"
        )
    return lines


def _render_loading_section(manifest: Manifest, task: str) -> list[str]:
    """Return the section on loading the weights.

    Empty for weights of earlier versions, which have no tokenizer beside them.

    Args:
        manifest: What `build_manifest` returned.
        task: Task of the run.
    """
    metadata, method = build_loading_metadata(manifest, task), manifest.method
    if metadata is None:
        return []
    code = build_loading_code(metadata)
    fence = "```"
    # Labels of the data are part of the code. One with three backticks would end the code block.
    while any(fence in line for line in code):
        fence += "`"
    packages = ["torch", "transformers", *(["peft"] if method != "full" else [])]
    if method == "qlora":
        packages.append("bitsandbytes")
    tokenizer = "The tokenizer is in this folder."
    if manifest.prompt.chat_template:
        tokenizer = "The tokenizer in this folder has the chat template of training."
    return [
        "## How to load it",
        "",
        f"Needs {', '.join(packages)}. {tokenizer}",
        "",
        f"{fence}python",
        *code,
        fence,
        "",
    ]


def build_loading_metadata(manifest: Manifest, task: str) -> LoadingMetadata | None:
    """Return what the loading code depends on; None if no tokenizer was saved with the weights."""
    resolved = manifest.resolved
    if not manifest.prompt.tokenizer:
        return None
    formats = manifest.weights.number_formats or ""
    return LoadingMetadata(
        method=manifest.method,
        task=task,
        base=manifest.base_model,
        revision=manifest.base_model_revision,
        dtype=parse_weights_format(formats) or "float32",
        trust_remote_code=bool(resolved.get("model", {}).get("trust_remote_code")),
        labels=[str(label) for label in manifest.labels],
        max_length=int(resolved.get("model", {}).get("max_length") or 512),
        quantization=resolved.get("qlora") or {},
        saved_modules=manifest.weights.modules_to_save or [],
        template_kwargs=resolved.get("data", {}).get("chat_template_kwargs") or {},
        prompt=manifest.prompt,
    )


def _render_data_section(manifest: Manifest) -> list[str]:
    lines = []
    for split, digest in manifest.data_sha256.items():
        rows = manifest.rows.get(split)
        count = f"{format_count(rows, 'row')}, " if rows is not None else ""
        lines.append(
            f"- {escape_markdown(split)}: {count}file SHA-256 `{escape_markdown(str(digest))}`"
        )
    if manifest.labels:
        labels = (
            f"{index} = {escape_markdown(json.dumps(label))}"
            for index, label in enumerate(manifest.labels)
        )
        lines.append(f"- labels: {', '.join(labels)}")
    return lines
