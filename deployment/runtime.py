"""Load an exported folder and run it with ONNX Runtime, ExecuTorch or PyTorch.

`open_artefact` is the entry point: it reads artefact.json and picks the runtime. Causal
models implement `Decoder` (`step`); classifiers have `logits(ids_BT, mask_BT)`, with
rows padded on the right as in training. A runtime that cannot run a target raises
`Unavailable`; none falls back to another one silently, since a benchmark would then
report the wrong device.

Shapes: B rows, T tokens, S tokens so far, C classes, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafleet.deployment.decoding import Decoder, RowByRowDecoder, pad_left
from lorafleet.deployment.extras import Unavailable, import_onnxruntime, require
from lorafleet.jobs.data.answer_frame import PROMPT_TAIL, AnswerFrame
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.export_result import Artefact, read_record

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ARTEFACT_FILE = "artefact.json"
ONNX_FILE = "model.onnx"
PTE_FILE = "model.pte"


@dataclass
class LoadedModel:
    """An exported folder with its model in memory.

    `open_artefact` creates it. The tokenizer is loaded when it is first needed.
    """

    folder: Path
    artefact: Artefact
    model: Any
    """A Decoder or a classifier."""

    @property
    def generates(self) -> bool:
        """Return True for a model that writes text, False for a classifier."""
        return self.artefact.task != "classification"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer without transformers."""
        from tokenizers import Tokenizer

        tokenizer: Tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt in its frame, as in training before an answer.

        Args:
            text: What the user asks, without a frame. It may itself begin with the start
                token's text, which is then not added again.
        """
        artefact = self.artefact
        framed_text = f"{artefact.before}{text.strip() if artefact.strip else text}{artefact.after}"
        ids: list[int] = self.tokenizer.encode(framed_text, add_special_tokens=False).ids
        has_start = bool(artefact.start) and ids[: len(artefact.start)] == artefact.start
        return ids if has_start else [*artefact.start, *ids]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def make_answer_frame(self, prompt: Sequence[int]) -> AnswerFrame | None:
        """Return the frame that the model writes around its answer to a prompt.

        None if the model was trained on plain texts.
        """
        if self.artefact.answer_frame is None:
            return None
        return AnswerFrame.from_dict(self.artefact.answer_frame).adapt_to_prompt(
            self.decode(prompt[-PROMPT_TAIL:], False)
        )

    def compute_probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Return the class probabilities of texts: one row per text, one column per class.

        Texts longer than in training are truncated as there.

        Raises:
            UserError: A text is empty.
        """
        # The tokenizer's truncation keeps the closing token, as in training. Cutting the ids would
        # drop it.
        self.tokenizer.enable_truncation(self.artefact.max_length)
        rows = [self.tokenizer.encode(text).ids for text in texts]
        if not all(rows):
            raise UserError("a text is empty: it must have at least one token")
        logits_BC = self.model.logits(*pad_right(rows, self.artefact.pad_id))
        exp_BC = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
        probabilities: np.ndarray = exp_BC / exp_BC.sum(axis=1, keepdims=True)
        return probabilities


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids_BT, mask_BT) of rows padded on the right to one width."""
    # Padding on the right is padding of the reversed rows on the left.
    ids_BT, mask_BT = pad_left([list(reversed(row)) for row in rows], pad_id)
    return np.ascontiguousarray(ids_BT[:, ::-1]), np.ascontiguousarray(mask_BT[:, ::-1])


def open_artefact(folder: Path, threads: int = 0) -> LoadedModel:
    """Load an exported folder.

    Args:
        folder: Folder of a target.
        threads: CPU threads. 0: the runtime decides.

    Raises:
        UserError: The folder is not from an export.
        Unavailable: This machine cannot run the target.
    """
    artefact = read_artefact(folder)
    loaders = {"merged": open_merged, "tensorrt": open_tensorrt, "executorch": open_executorch}
    return LoadedModel(
        folder, artefact, loaders.get(artefact.target, open_onnx)(folder, artefact, threads)
    )


def read_artefact(folder: Path) -> Artefact:
    """Read artefact.json of an exported folder. Raises UserError if there is none."""
    path = folder / ARTEFACT_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} has no {ARTEFACT_FILE}: name a folder that `lorafleet export` wrote"
        )
    return read_record(path, Artefact)


def open_onnx(folder: Path, artefact: Artefact, threads: int) -> Decoder | OnnxClassifier:
    """Open an ONNX model in ONNX Runtime on the CPU.

    Args:
        folder: Folder of the target.
        artefact: Its description.
        threads: CPU threads. 0: the runtime decides.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    session = create_onnx_session(folder / ONNX_FILE, threads)
    if artefact.task == "classification":
        return OnnxClassifier(session)
    decoder = OnnxDecoder(session, artefact)
    # Its attention derives positions from the sum of the mask, which is only right for right-padded
    # rows.
    return RowByRowDecoder(decoder, together=True) if artefact.target == "onnx-int4" else decoder


def open_tensorrt(folder: Path, artefact: Artefact, threads: int) -> Decoder | OnnxClassifier:
    """Open an ONNX model in ONNX Runtime on TensorRT, building engines or reading cached ones.

    Args:
        folder: Folder of the target; engines are cached in it.
        artefact: Its description, for the sizes that engines are built for.
        threads: CPU threads. 0: the runtime decides.

    Raises:
        Unavailable: TensorRT is missing or does not run the model.
    """
    from lorafleet.deployment.tensorrt import (
        build_providers,
        check_engines,
        find_missing_requirement,
    )

    if reason := find_missing_requirement():
        raise Unavailable(reason)
    session = create_onnx_session(folder / ONNX_FILE, threads, build_providers(folder, artefact))
    check_engines(folder)
    return (
        OnnxClassifier(session)
        if artefact.task == "classification"
        else OnnxDecoder(session, artefact)
    )


def open_executorch(folder: Path, artefact: Artefact, threads: int) -> Decoder | EdgeClassifier:
    """Open an ExecuTorch program in ExecuTorch's runtime."""
    require("executorch", "running an ExecuTorch model")
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    # The thread pool belongs to the process, so it is set before a program is loaded.
    if threads:
        _unsafe_reset_threadpool(threads)

    program = Runtime.get().load_program(folder / PTE_FILE)
    method = program.load_method("forward")
    return (
        EdgeClassifier(method)
        if artefact.task == "classification"
        else RowByRowDecoder(EdgeDecoder(method))
    )


def create_onnx_session(
    path: Path, threads: int, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> Any:
    """Create an ONNX Runtime session that runs on the first of the requested providers.

    Args:
        path: The graph.
        threads: CPU threads. 0: the runtime decides.
        providers: Execution providers, as ONNX Runtime takes them. The first one must be
            used; further ones run the nodes that it does not support.

    Raises:
        Unavailable: ONNX Runtime fell back to another provider: otherwise CPU timings would
            be reported as GPU timings.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    # Errors only: warnings about optimisations would be printed for every model.
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    # Without this, ONNX Runtime silently retries a failed run on other providers.
    session = onnxruntime.InferenceSession(
        str(path), options, providers=list(providers), enable_fallback=0
    )
    check_provider(session, providers)
    return session


def check_provider(session: Any, providers: Sequence[Any]) -> None:
    """Check that a session runs on the requested provider.

    onnxruntime-gpu without its libraries prints errors and uses the CPU.

    Args:
        session: An ONNX Runtime session.
        providers: The requested providers, the required one first.

    Raises:
        Unavailable: The session's first provider is another one.
    """
    requested = providers[0] if isinstance(providers[0], str) else providers[0][0]
    active = session.get_providers()
    if active[0] != requested:
        raise Unavailable(
            f"ONNX Runtime cannot use {requested} and fell back to {active[0]}: its libraries "
            "cannot be loaded on this machine, or it does not support the model"
        )


class OnnxClassifier:
    """A classifier in ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def logits(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        """Return logits_BC in float32."""
        (output,) = self.session.run(["logits"], {"input_ids": ids_BT, "attention_mask": mask_BT})
        logits: np.ndarray = output.astype(np.float32, copy=False)
        return logits


class EdgeClassifier:
    """A classifier in ExecuTorch. It runs one row at a time."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def logits(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        """Return logits_BC in float32."""
        rows = [ids_T[mask_T == 1][None] for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
        return np.concatenate([_run_edge(self.method, ids_1T) for ids_1T in rows])


class EdgeDecoder:
    """A causal model in ExecuTorch, for one row.

    It has no cache: each step reads the whole text again.
    """

    def __init__(self, method: Any) -> None:
        self.method = method

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """Return (logits_BTV, token ids so far)."""
        so_far_BS = ids_BT if cache is None else np.concatenate([cache, ids_BT], axis=1)
        return _run_edge(self.method, so_far_BS)[:, -ids_BT.shape[1] :], so_far_BS


def _run_edge(method: Any, ids_1T: np.ndarray) -> np.ndarray:
    """Run an ExecuTorch method on one row of token ids."""
    import torch

    output: np.ndarray = (
        method.execute([torch.from_numpy(np.ascontiguousarray(ids_1T))])[0].float().numpy().copy()
    )
    return output


class OnnxDecoder:
    """A causal model in ONNX Runtime.

    One graph serves prompts and single tokens, with the cache as input and output.
    """

    def __init__(self, session: Any, artefact: Artefact) -> None:
        self.session = session
        inputs = {node.name: node for node in session.get_inputs()}
        self.past = [name for name in inputs if name.startswith("past_key_values.")]
        self.present = [name.replace("past_key_values.", "present.") for name in self.past]
        self.wants_positions = "position_ids" in inputs
        # Graphs differ in the type of their cache, and the builder of onnxruntime-genai leaves out
        # `position_ids`: both are read from the graph.
        is_half = bool(self.past) and inputs[self.past[0]].type == "tensor(float16)"
        self.kind = np.float16 if is_half else np.float32
        self.shape = (artefact.heads, 0, artefact.head_size)

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """Return (logits_BTV, cache with the new tokens added)."""
        # One graph serves prompts and single tokens, so the first step gets a cache of length 0.
        if cache is None:
            cache = [np.zeros((len(ids_BT), *self.shape), self.kind)] * len(self.past)
        feeds = {
            "input_ids": ids_BT,
            "attention_mask": mask_BS,
            **dict(zip(self.past, cache, strict=True)),
        }
        if self.wants_positions:
            feeds["position_ids"] = positions_BT
        logits, *present = self.session.run(["logits", *self.present], feeds)
        return logits.astype(np.float32, copy=False), present


def open_merged(folder: Path, artefact: Artefact, threads: int) -> Decoder | TorchClassifier:
    """Open a merged model with transformers on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging as told

    told.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    is_classifier = artefact.task == "classification"
    model_class = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model = model_class.from_pretrained(
        str(folder), use_safetensors=True, trust_remote_code=False
    ).eval()
    return TorchClassifier(model) if is_classifier else TorchDecoder(model)


class TorchClassifier:
    """A classifier in PyTorch, with its adapter if it has one."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        """Return logits_BC in float32."""
        import torch

        device = next(self.model.parameters()).device
        with torch.inference_mode():
            ids, mask = (torch.from_numpy(array).to(device) for array in (ids_BT, mask_BT))
            output: np.ndarray = (
                self.model(input_ids=ids, attention_mask=mask).logits.float().cpu().numpy()
            )
        return output


class TorchDecoder:
    """A causal model in PyTorch, with its adapter if it has one.

    It is the source of a comparison, or the target `merged`.
    """

    def __init__(self, model: Any) -> None:
        # PEFT's forward hides the position_ids parameter from transformers (see
        # evaluation/generate.py).
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.word = get_cache_argument(self.model)

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """Return (logits_BTV, cache with the new tokens added)."""
        import torch
        from transformers import DynamicCache

        device = next(self.model.parameters()).device
        ids, mask, positions = (
            torch.from_numpy(array).to(device) for array in (ids_BT, mask_BS, positions_BT)
        )
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        with torch.inference_mode():
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{self.word: cache},
            )
        return output.logits.float().cpu().numpy(), cache  # updated in place


def get_cache_argument(model: Any) -> str:
    """Return the name of a causal model's cache argument.

    Newer versions of transformers changed it.
    """
    return (
        "cache"
        if "cache" in inspect.signature(type(model).forward).parameters
        else "past_key_values"
    )


def compute_files_mb(folder: Path) -> float:
    """Return the size in MB of the files needed to run a model: weights, graph and tokenizer.

    Cards and records are left out, so that a target's size does not depend on its
    description.
    """
    suffixes = (".onnx", ".data", ".safetensors", ".pte", ".engine")
    needed = [
        path
        for path in folder.rglob("*")
        if path.suffix in suffixes or path.name == "tokenizer.json"
    ]
    return sum(path.stat().st_size for path in needed) / 1e6
