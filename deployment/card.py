"""Write the files next to an exported model: a model card and a short script that runs it.

Whoever takes the folder away has nothing else: the card names licences, the comparison
with the source and how to run the model. Texts from elsewhere are escaped.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from lorafleet.deployment.runtime import compute_files_mb
from lorafleet.evaluation.report.format import escape_markdown, format_number
from lorafleet.evaluation.report.model_of_run import SelectedModel
from lorafleet.jobs import files
from lorafleet.jobs.data import answer_frame
from lorafleet.jobs.data.assets import ASSETS, PREFIX
from lorafleet.jobs.data.hub import get_model_folder
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.runs.export_result import Artefact, Parity, ParityMeasurement
from lorafleet.jobs.runs.report import Inference
from lorafleet.jobs.runs.run import Trial
from lorafleet.jobs.schema.export import TARGET_DESCRIPTIONS
from lorafleet.jobs.text import format_count

_RUNNERS = Path(__file__).parent / "runners"


def write_card(
    folder: Path,
    artefact: Artefact,
    parity: Parity,
    selected: SelectedModel,
    inference: Inference | None = None,
) -> None:
    """Write the model card, README.md.

    Args:
        folder: Folder of the target, with its final files: their size is part of the card.
        artefact: Description of the target.
        parity: The comparison with its source. A rejected target gets a card that says so.
        selected: The model that it was made from.
        inference: Speed on this machine; None if it was not measured.
    """
    files.write_text(
        folder / "README.md", _render_card(folder, artefact, parity, selected, inference)
    )


def write_runner(folder: Path, artefact: Artefact) -> None:
    """Write run.py for ONNX targets.

    Targets that generate text also get answer_frame.py, which finds the answer in the
    output.
    """
    if not artefact.target.startswith("onnx"):
        return
    if artefact.task == "classification":
        shutil.copy(_RUNNERS / "classify.py", folder / "run.py")
        return
    shutil.copy(_RUNNERS / "write.py", folder / "run.py")
    shutil.copy(Path(str(answer_frame.__file__)), folder / "answer_frame.py")


def _render_card(
    folder: Path,
    artefact: Artefact,
    parity: Parity,
    selected: SelectedModel,
    inference: Inference | None,
) -> str:
    """Return the text of the model card."""
    source, judged = artefact.source, parity.judged
    base, data = (
        str(source["base"]),
        str(selected.job.data.dataset_name or selected.job.data.train_file),
    )
    verdict = "Accepted"
    if not parity.accepted:
        verdict = f"REJECTED: {escape_markdown('; '.join(parity.reasons))}"
    lines = [
        f"# {escape_markdown(base)}, {escape_markdown(selected.job.name)}: "
        f"{escape_markdown(artefact.target)}",
        "",
        f"{TARGET_DESCRIPTIONS[artefact.target]}. Made from run "
        f"{escape_markdown(str(source['run']))}, trial {escape_markdown(str(source['trial_id']))} "
        f"({escape_markdown(str(source['method']))}, {artefact.task}).",
        "",
        f"- base: {escape_markdown(base)} (revision {escape_markdown(str(source['revision']))}), "
        f"licence: {_find_base_licence(selected)}",
        f"- data: {escape_markdown(data)}, licence: "
        f"{find_licence(data, Path(data) if Path(data).is_absolute() else None)}",
        f"- weights, graph and tokenizer: {compute_files_mb(folder):.1f} MB",
        *_format_number_formats(selected),
        *_format_speed(inference),
        "",
        "## Compared with its source",
        "",
        f"| on {judged.rows} held-out rows | source | this |",
        "|---|---|---|",
        f"| {escape_markdown(judged.metric)} | "
        f"{_format_interval(judged.before, judged.before_interval)} | "
        f"{_format_interval(judged.after, judged.after_interval)} |",
        f"| largest logit difference | | {format_number(judged.max_logit_difference)} |",
        *_format_prompt_checks(judged),
        f"| same {'class' if judged.metric == 'accuracy' else 'likeliest token'} | | "
        f"{judged.agreement:.3f} |",
        "",
        f"{verdict}.",
        *(f"\n{escape_markdown(remark[0].upper() + remark[1:])}." for remark in parity.remarks),
        "",
        "## How to run it",
        "",
        *_format_instructions(artefact),
    ]
    return "\n".join(lines) + "\n"


def _format_prompt_checks(judged: ParityMeasurement) -> list[str]:
    """Return the table rows on prompts that were asked as a user asks them."""
    if judged.called_prompts is None or judged.called_answers is None:
        return []
    rows = format_count(judged.called_rows, "row")
    return [
        f"| prompts formatted as in training, of {rows} sent as a user would | | "
        f"{judged.called_prompts:.3f} |",
        f"| answers to them that equal the source's | | {judged.called_answers:.3f} |",
    ]


def _format_speed(inference: Inference | None) -> list[str]:
    """Return a line on the speed that was measured after the export."""
    if inference is None:
        return []
    threads = (
        f"{inference.threads} CPU thread{'' if inference.threads == 1 else 's'} of "
        f"{escape_markdown(inference.cpu or 'an unknown CPU')}"
    )
    if inference.tokens_per_second:
        timing = (
            f"{1000 / inference.tokens_per_second:.1f} ms per token, "
            f"{format_number(inference.ttft_ms, 1)} ms to the first"
        )
    else:
        timing = f"{format_number(inference.latency_ms, 1)} ms per row"
    return [
        f"- speed: {timing}; at most {format_number(inference.peak_memory_gib, 2)} GiB, on "
        f"{threads}"
    ]


def _format_number_formats(selected: SelectedModel) -> list[str]:
    """Return a line on the number formats of the training."""
    rows = Trial(selected.weights.parent).read_metrics() if selected.weights is not None else []
    formats = rows[-1].number_formats if rows else None
    return [f"- trained with {escape_markdown(str(formats))}"] if formats else []


def _is_generative(artefact: Artefact) -> bool:
    """Return whether a target generates text."""
    return artefact.task != "classification"


def _format_instructions(artefact: Artefact) -> list[str]:
    """Return the lines that say how to run a target."""
    if artefact.target in _LORAFLEET_TARGETS:
        extra, details = _LORAFLEET_TARGETS[artefact.target]
        return [f"    pip install 'lorafleet[{extra}]'", "    lorafleet chat FOLDER", "", details]
    if artefact.target != "merged":
        return [
            "    pip install onnxruntime numpy tokenizers",
            f'    python run.py "{"a text" if artefact.task == "classification" else "a prompt"}"',
            "",
            "`run.py` is a complete example to copy from. `artefact.json` has the settings that it "
            "needs"
            + (
                ", and `answer_frame.py` extracts the answer from the generated text."
                if _is_generative(artefact)
                else "."
            ),
        ]
    head_class = "SequenceClassification" if artefact.task == "classification" else "CausalLM"
    return [
        "    from transformers import AutoTokenizer, AutoModelFor" + head_class,
        f"    model = AutoModelFor{head_class}.from_pretrained('FOLDER')",
        "    tokenizer = AutoTokenizer.from_pretrained('FOLDER')",
    ]


_LORAFLEET_TARGETS = {
    "tensorrt": (
        "tensorrt",
        "`engines/` was built for one kind of GPU and one version of TensorRT; elsewhere it is "
        "rebuilt from `model.onnx`.",
    ),
    "executorch": (
        "executorch",
        "`model.pte` has one method, `forward`: token ids (int64, 1 x T) to logits (float32), per "
        "token or per class. It has no cache: the whole text is processed again for each token. "
        "`artefact.json` has the other settings that an app needs: end tokens, and the text around "
        "a prompt. C++, Kotlin and Swift runtimes: docs.pytorch.org/executorch.",
    ),
}


def _find_base_licence(selected: SelectedModel) -> str:
    """Return the licence of the base model."""
    spec = selected.job.model
    try:
        return find_licence(
            spec.model_name_or_path, get_model_folder(spec.model_name_or_path, spec.revision)
        )
    except AssetError:
        return find_licence(spec.model_name_or_path)


def find_licence(name: str, folder: Path | None = None) -> str:
    """Return the licence of an asset, or the one that the card in `folder` declares.

    Returns a hint to the model's or data set's own page if neither is known: a guessed
    licence would be worse than none.

    Args:
        name: Name of the model or data set in the job.
        folder: Folder that may hold its hub card; None if there is none.
    """
    asset = ASSETS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if asset:
        return asset.licence
    declared = _read_declared_licence(folder / "README.md") if folder is not None else None
    return (
        f"{escape_markdown(declared)} (according to its card)"
        if declared
        else "unknown: see its own page"
    )


def _read_declared_licence(card: Path) -> str | None:
    """Return the licence in the YAML header of a hub card, or None.

    The header stands between two lines of dashes.
    """
    try:
        parts = card.read_text(errors="replace").split("---\n", 2)
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError):  # an invalid date raises ValueError
        return None
    declared = (
        header.get("license_name") or header.get("license") if isinstance(header, dict) else None
    )
    return (
        ", ".join(map(str, declared))
        if isinstance(declared, list)
        else str(declared)
        if declared
        else None
    )


def _format_interval(value: float | None, bounds: tuple[float, float] | None) -> str:
    """Format a value with its interval, if it has one."""
    return (
        f"{format_number(value)} [{format_number(bounds[0])}, {format_number(bounds[1])}]"
        if bounds
        else format_number(value)
    )
