"""The manifest.json beside recommended weights: what the model card says, for programs."""

from __future__ import annotations

from typing import Any

from lorafleet.jobs.runs.records import Record


class PromptMetadata(Record):
    """Data with which plain transformers builds a prompt as in training."""

    tokenizer: bool = False
    """True if the tokenizer was saved beside the weights. Earlier versions did not save it."""
    conversation: bool = False
    """True if rows are messages."""
    chat_template: bool = False
    """True if a chat template renders them."""
    content_as_parts: bool = False
    """True if the template takes lists of parts, not texts."""
    start: str = ""
    """Text of the token that a prompt begins with, unless the template writes it."""
    system_message: dict[str, str] | None = None
    """Role and content of the system message, if all rows have the same."""
    answer_marker: str | None = None
    """Text after which the answer begins, if the model writes something before it."""


class WeightsMetadata(Record):
    """The saved weights: those of the best evaluation, not of the last step."""

    step: int | None = None
    """Step at which they were saved."""
    samples: int | None = None
    """Training rows until then."""
    trained_steps: int | None = None
    trained_samples: int | None = None
    trainable_parameters: int | None = None
    number_formats: str | None = None
    """Number formats of training."""
    dtypes: list[str] = []
    """Number formats of the files."""
    modules_to_save: list[str] | None = None
    """Modules that are saved whole beside a LoRA adapter."""
    lora_r: int | None = None
    """LoRA rank as trained."""
    stored_lora_r: int | None = None
    """LoRA rank as saved: twice as large for initialisations that change the base (PiSSA,
    OLoRA).
    """


class Manifest(Record):
    """Contents of manifest.json."""

    run: str = ""
    trial_id: str = ""
    base_model: str
    """Hub id or folder of the base model."""
    base_model_revision: str | None = None
    base_model_in_job: str = ""
    """The base model as the job names it."""
    model_revisions: dict[str, str] = {}
    """Model of the job -> what identifies its weights."""
    data: str = ""
    data_sha256: dict[str, str] = {}
    """Split -> SHA-256 of its file."""
    rows: dict[str, int] = {}
    """Split -> rows."""
    labels: list[Any] = []
    """Class names in the order of the model's outputs."""
    weights: WeightsMetadata = WeightsMetadata()
    prompt: PromptMetadata = PromptMetadata()
    resolved: dict[str, Any] = {}
    """All fields of the job that affect training, with the values of the trial."""
    validation: dict[str, float | None] | None = None
    """Metrics on the validation rows."""
    test: dict[str, float | None] | None = None
    """Metrics on the test rows; None if the run has none."""
    recommendation: str = ""
    """Sentence of the recommendation."""
    versions: dict[str, str] = {}
    """Package -> version."""

    @property
    def method(self) -> str:
        """Return the training method."""
        return str(self.resolved.get("method", "lora"))

    def get_held_out_metrics(self, split: str) -> dict[str, float | None]:
        """Return the metrics on the held-out rows; empty if they were not evaluated."""
        return (self.test if split == "test" else self.validation) or {}
