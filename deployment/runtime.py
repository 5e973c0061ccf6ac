"""An exported folder, ready to be asked: by ONNX Runtime, or by PyTorch. B rows, T tokens, S tokens so far."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lorafleet.deployment.availability import Unavailable
from lorafleet.deployment.decoding import Decoder, RowByRow, left_padded
from lorafleet.deployment.extras import onnxruntime_here, require
from lorafleet.jobs.data.answer_frame import PROMPT_TAIL, AnswerFrame
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.export_result import Artefact, read_record

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ARTEFACT_FILE = "artefact.json"
ONNX_FILE = "model.onnx"
PTE_FILE = "model.pte"


@dataclass
class Loaded:
    """An exported folder with its model in memory."""

    folder: Path
    artefact: Artefact
    model: Any
    """A Decoder, or a Classifier."""

    @property
    def generates(self) -> bool:
        """Whether it writes text, and does not name a class."""
        return self.artefact.task != "classification"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back, without transformers."""
        from tokenizers import Tokenizer

        made: Tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        made.no_padding()
        made.no_truncation()
        return made

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of what is asked, as training had them before an answer."""
        about = self.artefact
        whole = f"{about.before}{text.strip() if about.strip else text}{about.after}"
        ids: list[int] = self.tokenizer.encode(whole, add_special_tokens=False).ids
        brings_start = bool(about.start) and ids[: len(about.start)] == about.start
        return ids if brings_start else [*about.start, *ids]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def frame_after(self, prompt: Sequence[int]) -> AnswerFrame | None:
        """Return what the model writes before its answer to a prompt; None: it was trained on texts alone."""
        if self.artefact.answer_frame is None:
            return None
        return AnswerFrame.from_dict(self.artefact.answer_frame).after(self.decode(prompt[-PROMPT_TAIL:], False))

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Of a classifier: the probability of each class (columns) of each text (rows)."""
        # It keeps the token that closes a text, as in training; cutting the ids would not.
        self.tokenizer.enable_truncation(self.artefact.max_length)
        rows = [self.tokenizer.encode(text).ids for text in texts]
        if not all(rows):
            raise UserError("a text is empty: it must have at least one token")
        logits_BC = self.model.logits(*right_padded(rows, self.artefact.pad_id))
        exp_BC = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
        shares: np.ndarray = exp_BC / exp_BC.sum(axis=1, keepdims=True)
        return shares


def right_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids_BT, mask_BT) of rows of one width, the padding last."""
    ids_BT, mask_BT = left_padded([list(reversed(row)) for row in rows], pad_id)
    return np.ascontiguousarray(ids_BT[:, ::-1]), np.ascontiguousarray(mask_BT[:, ::-1])


def open_artefact(folder: Path, threads: int = 0) -> Loaded:
    """Load what `export` made. `threads` 0 leaves their number to the runtime. Raises UserError for another folder."""
    artefact = read_artefact(folder)
    others = {"merged": open_merged, "tensorrt": open_tensorrt, "executorch": open_executorch}
    return Loaded(folder, artefact, others.get(artefact.target, open_onnx)(folder, artefact, threads))


def read_artefact(folder: Path) -> Artefact:
    """What a folder says of itself."""
    path = folder / ARTEFACT_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {ARTEFACT_FILE}: `lorafleet export` makes such folders")
    return read_record(path, Artefact)


def open_onnx(folder: Path, artefact: Artefact, threads: int) -> Decoder | OnnxClassifier:
    """A model of ONNX Runtime on the CPU."""
    session = onnx_session(folder / ONNX_FILE, threads)
    if artefact.task == "classification":
        return OnnxClassifier(session)
    decoder = OnnxDecoder(session, artefact)
    # Its attention counts positions by the mask's sum, as for rows that are padded last.
    return RowByRow(decoder, together=True) if artefact.target == "onnx-int4" else decoder


def open_tensorrt(folder: Path, artefact: Artefact, threads: int) -> Decoder | OnnxClassifier:
    """A model of ONNX Runtime on TensorRT, which builds or reads its engines. Raises Unavailable where it is not."""
    from lorafleet.deployment.tensorrt import check_engines, missing, providers

    if reason := missing():
        raise Unavailable(reason)
    session = onnx_session(folder / ONNX_FILE, threads, providers(folder, artefact))
    check_engines(folder)
    return OnnxClassifier(session) if artefact.task == "classification" else OnnxDecoder(session, artefact)


def open_executorch(folder: Path, artefact: Artefact, threads: int) -> Decoder | EdgeClassifier:
    """A model of ExecuTorch's own runtime."""
    require("executorch", "running an ExecuTorch model")
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    if threads:
        _unsafe_reset_threadpool(threads)

    program = Runtime.get().load_program(folder / PTE_FILE)
    method = program.load_method("forward")
    return EdgeClassifier(method) if artefact.task == "classification" else RowByRow(EdgeDecoder(method))


def onnx_session(path: Path, threads: int, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> Any:
    """A session that runs on the provider that was asked for, or is none.

    Raises Unavailable where ONNX Runtime has quietly taken another: a CPU's time would pass for a GPU's.
    """
    onnxruntime = onnxruntime_here()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    # Else a run that fails is quietly tried again on other providers, under the name of the first.
    session = onnxruntime.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    check_provider(session, providers)
    return session


def check_provider(session: Any, providers: Sequence[Any]) -> None:
    """Raises Unavailable unless a session's first provider is the one that was asked for."""
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    found = session.get_providers()
    if found[0] != wanted:
        raise Unavailable(
            f"ONNX Runtime was asked for {wanted} and fell back to {found[0]}: its libraries cannot be loaded here, or "
            "it refused the model"
        )


class OnnxClassifier:
    """Texts to classes."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def logits(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        """logits_BC in float32."""
        (found,) = self.session.run(["logits"], {"input_ids": ids_BT, "attention_mask": mask_BT})
        logits: np.ndarray = found.astype(np.float32, copy=False)
        return logits


class EdgeClassifier:
    """Texts to classes by ExecuTorch, one by one."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def logits(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        """logits_BC in float32."""
        rows = [ids_T[mask_T == 1][None] for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
        return np.concatenate([_edge(self.method, ids_1T) for ids_1T in rows])


class EdgeDecoder:
    """A causal model of ExecuTorch, which keeps nothing: the whole text is read again for each token. One row."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """(logits_BTV, the tokens so far)."""
        so_far_BS = ids_BT if cache is None else np.concatenate([cache, ids_BT], axis=1)
        return _edge(self.method, so_far_BS)[:, -ids_BT.shape[1] :], so_far_BS


def _edge(method: Any, ids_1T: np.ndarray) -> np.ndarray:
    import torch

    found: np.ndarray = method.execute([torch.from_numpy(np.ascontiguousarray(ids_1T))])[0].float().numpy().copy()
    return found


class OnnxDecoder:
    """One graph for prompts and for single tokens, with keys and values in and out."""

    def __init__(self, session: Any, artefact: Artefact) -> None:
        self.session = session
        inputs = {given.name: given for given in session.get_inputs()}
        self.past = [name for name in inputs if name.startswith("past_key_values.")]
        self.present = [name.replace("past_key_values.", "present.") for name in self.past]
        self.wants_positions = "position_ids" in inputs
        half = bool(self.past) and inputs[self.past[0]].type == "tensor(float16)"
        self.kind = np.float16 if half else np.float32
        self.shape = (artefact.heads, 0, artefact.head_size)

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """(logits_BTV, the cache with the new tokens in it)."""
        if cache is None:
            cache = [np.zeros((len(ids_BT), *self.shape), self.kind)] * len(self.past)
        given = {"input_ids": ids_BT, "attention_mask": mask_BS, **dict(zip(self.past, cache, strict=True))}
        if self.wants_positions:
            given["position_ids"] = positions_BT
        logits, *present = self.session.run(["logits", *self.present], given)
        return logits.astype(np.float32, copy=False), present


def open_merged(folder: Path, artefact: Artefact, threads: int) -> Decoder | TorchClassifier:
    """A model folder by plain transformers, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging as told

    told.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    classifies = artefact.task == "classification"
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = kind.from_pretrained(str(folder), use_safetensors=True, trust_remote_code=False).eval()
    return TorchClassifier(model) if classifies else TorchDecoder(model)


class TorchClassifier:
    """A classifier of PyTorch, with whatever adapter it has."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        """logits_BC in float32."""
        import torch

        device = next(self.model.parameters()).device
        with torch.inference_mode():
            ids, mask = (torch.from_numpy(array).to(device) for array in (ids_BT, mask_BT))
            found: np.ndarray = self.model(input_ids=ids, attention_mask=mask).logits.float().cpu().numpy()
        return found


class TorchDecoder:
    """A causal model of PyTorch, with whatever adapter it has."""

    def __init__(self, model: Any) -> None:
        # PEFT's own forward hides from transformers that the model takes positions (evaluation/generate.py).
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.word = cache_word(self.model)

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """(logits_BTV, the cache with the new tokens in it)."""
        import torch
        from transformers import DynamicCache

        device = next(self.model.parameters()).device
        ids, mask, places = (torch.from_numpy(array).to(device) for array in (ids_BT, mask_BS, positions_BT))
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        with torch.inference_mode():
            found = self.model(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, **{self.word: cache}
            )
        return found.logits.float().cpu().numpy(), cache  # it has grown


def cache_word(model: Any) -> str:
    """What a causal model calls its keys and values: transformers has a new word for them."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def files_mb(folder: Path) -> float:
    """Size on disk of what a model needs where it runs: weights, graph and tokenizer, not its card."""
    kept = (".onnx", ".data", ".safetensors", ".pte", ".engine")
    needed = [path for path in folder.rglob("*") if path.suffix in kept or path.name == "tokenizer.json"]
    return sum(path.stat().st_size for path in needed) / 1e6
