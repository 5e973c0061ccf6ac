"""What lies beside an exported model: a card for people, and a script of thirty lines that runs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml
from lorafleet.deployment.runtime import files_mb
from lorafleet.evaluation.render.trial_table import number, plain
from lorafleet.evaluation.report.model_of_run import Shipped
from lorafleet.jobs import files
from lorafleet.jobs.data import answer_frame
from lorafleet.jobs.data.assets import ASSETS, PREFIX
from lorafleet.jobs.data.hub import model_folder
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.runs.export_result import Artefact, Judged, Parity
from lorafleet.jobs.runs.report import Inference
from lorafleet.jobs.runs.run import Trial
from lorafleet.jobs.schema.export import WHAT
from lorafleet.jobs.text import counted

_RUNNERS = Path(__file__).parent / "runners"


def write_card(
    folder: Path, artefact: Artefact, parity: Parity, given: Shipped, speed: Inference | None = None
) -> None:
    """Write README.md."""
    files.write_text(folder / "README.md", _card(folder, artefact, parity, given, speed))


def write_runner(folder: Path, artefact: Artefact) -> None:
    """Write run.py where ONNX Runtime alone runs the model, and the module beside it that finds the answer."""
    if not artefact.target.startswith("onnx"):
        return
    if artefact.task == "classification":
        shutil.copy(_RUNNERS / "classify.py", folder / "run.py")
        return
    shutil.copy(_RUNNERS / "write.py", folder / "run.py")
    shutil.copy(Path(str(answer_frame.__file__)), folder / "answer_frame.py")


def _card(folder: Path, artefact: Artefact, parity: Parity, given: Shipped, speed: Inference | None) -> str:
    source, judged = artefact.source, parity.judged
    base, data = str(source["base"]), str(given.job.data.dataset_name or given.job.data.train_file)
    lines = [
        f"# {plain(base)}, {plain(given.job.name)}: {plain(artefact.target)}",
        "",
        f"{WHAT[artefact.target]}. Made from run {plain(str(source['run']))}, trial {plain(str(source['trial_id']))} "
        f"({plain(str(source['method']))}, {artefact.task}).",
        "",
        f"- base: {plain(base)} (revision {plain(str(source['revision']))}), licence: {_licence_of_base(given)}",
        f"- data: {plain(data)}, licence: {licence(data, Path(data) if Path(data).is_absolute() else None)}",
        f"- weights, graph and tokenizer: {files_mb(folder):.1f} MB",
        *_formats(given),
        *_speed(speed),
        "",
        "## Compared with its source",
        "",
        f"| on {judged.rows} held-out rows | source | this |",
        "|---|---|---|",
        f"| {plain(judged.metric)} | {_with(judged.before, judged.before_interval)} | "
        f"{_with(judged.after, judged.after_interval)} |",
        f"| largest logit difference | | {number(judged.max_logit_difference)} |",
        *_called(judged),
        f"| same {'class' if judged.metric == 'accuracy' else 'likeliest token'} | | {judged.agreement:.3f} |",
        "",
        f"{'Accepted' if parity.accepted else 'REJECTED: ' + plain('; '.join(parity.reasons))}.",
        *(f"\n{plain(remark[0].upper() + remark[1:])}." for remark in parity.remarks),
        "",
        "## How to run it",
        "",
        *_how(artefact),
    ]
    return "\n".join(lines) + "\n"


def _called(judged: Judged) -> list[str]:
    """Rows on what a user who asks a prompt alone gets."""
    if judged.called_prompts is None or judged.called_answers is None:
        return []
    rows = counted(judged.called_rows, "row")
    return [
        f"| prompts framed as in training, of {rows} that were asked as you ask | | {judged.called_prompts:.3f} |",
        f"| answers to them that are the source's | | {judged.called_answers:.3f} |",
    ]


def _speed(speed: Inference | None) -> list[str]:
    """What it took where it was exported."""
    if speed is None:
        return []
    threads = f"{speed.threads} CPU thread{'' if speed.threads == 1 else 's'} of {plain(speed.cpu or 'an unknown CPU')}"
    if speed.tokens_per_second:
        took = f"{1000 / speed.tokens_per_second:.1f} ms a token, {number(speed.ttft_ms, 1)} ms to the first"
    else:
        took = f"{number(speed.latency_ms, 1)} ms a row"
    return [f"- speed: {took}; {number(speed.peak_memory_gib, 2)} GiB at most, on {threads}"]


def _formats(given: Shipped) -> list[str]:
    """Return a line on the number formats of the training."""
    rows = Trial(given.weights.parent).metrics() if given.weights is not None else []
    formats = rows[-1].get("number_formats") if rows else None
    return [f"- trained with {plain(str(formats))}"] if formats else []


def _writes(artefact: Artefact) -> bool:
    return artefact.task != "classification"


def _how(artefact: Artefact) -> list[str]:
    if artefact.target in _BY_LORAFLEET:
        extra, more = _BY_LORAFLEET[artefact.target]
        return [f"    pip install 'lorafleet[{extra}]'", "    lorafleet chat FOLDER", "", more]
    if artefact.target != "merged":
        return [
            "    pip install onnxruntime numpy tokenizers",
            f'    python run.py "{"a text" if artefact.task == "classification" else "a prompt"}"',
            "",
            "`run.py` is all there is to it: copy from it. `artefact.json` says what it needs to know"
            + (", and `answer_frame.py` finds the answer in what the model writes." if _writes(artefact) else "."),
        ]
    kind = "SequenceClassification" if artefact.task == "classification" else "CausalLM"
    return [
        "    from transformers import AutoTokenizer, AutoModelFor" + kind,
        f"    model = AutoModelFor{kind}.from_pretrained('FOLDER')",
        "    tokenizer = AutoTokenizer.from_pretrained('FOLDER')",
    ]


_BY_LORAFLEET = {
    "tensorrt": (
        "tensorrt",
        "`engines/` was built for one kind of GPU and one version of TensorRT; on another it is built anew from "
        "`model.onnx`.",
    ),
    "executorch": (
        "executorch",
        "`model.pte` has one method, `forward`: token ids (int64, 1 x T) to logits (float32), of each token or of the "
        "classes. There is no cache: a text is read again for each token. `artefact.json` says what else an app needs: "
        "end tokens, and what stands around a prompt. Its C++, Kotlin and Swift runtimes: docs.pytorch.org/executorch.",
    ),
}


def _licence_of_base(given: Shipped) -> str:
    spec = given.job.model
    try:
        return licence(spec.model_name_or_path, model_folder(spec.model_name_or_path, spec.revision))
    except AssetError:
        return licence(spec.model_name_or_path)


def licence(name: str, folder: Path | None = None) -> str:
    """Of an asset its licence; of what has a card in its folder, what that says; of anything else, whom to ask."""
    asset = ASSETS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if asset:
        return asset.licence
    declared = _declared(folder / "README.md") if folder is not None else None
    return f"{plain(declared)} (says its card)" if declared else "not known here: see its own page"


def _declared(card: Path) -> str | None:
    """The licence in the head of a card, as the hub has them: YAML between two lines of dashes."""
    try:
        parts = card.read_text(errors="replace").split("---\n", 2)
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError):  # a date that is none is a ValueError
        return None
    found = head.get("license_name") or head.get("license") if isinstance(head, dict) else None
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found) if found else None


def _with(value: float | None, ends: tuple[float, float] | None) -> str:
    return f"{number(value)} [{number(ends[0])}, {number(ends[1])}]" if ends else number(value)
