"""Answer each prompt, greedily: python run.py "first prompt" "second prompt" """

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from answer_frame import AnswerFrame  # stored next to this file
from tokenizers import Tokenizer

parser = argparse.ArgumentParser(description="Answer each prompt, greedily.")
parser.add_argument("prompts", nargs="+")
parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens of an answer")
parser.add_argument(
    "--json", action="store_true", help="print one line of JSON per prompt: token ids and text"
)
arguments = parser.parse_args()

folder = Path(__file__).parent
settings = json.loads((folder / "artefact.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.no_truncation()
session = onnxruntime.InferenceSession(
    str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
)
inputs = {one.name: one for one in session.get_inputs()}
past_names = [name for name in inputs if name.startswith("past_key_values.")]
# Graphs differ in the number format of their cache.
cache_dtype = np.float16 if inputs[past_names[0]].type == "tensor(float16)" else np.float32

for prompt in arguments.prompts:
    framed_text = (
        settings["before"] + (prompt.strip() if settings["strip"] else prompt) + settings["after"]
    )
    ids, start = tokenizer.encode(framed_text, add_special_tokens=False).ids, settings["start"]
    ids = ids if start and ids[: len(start)] == start else start + ids  # may already be in the text
    cache = [np.zeros((1, settings["heads"], 0, settings["head_size"]), cache_dtype)] * len(
        past_names
    )
    answer_ids: list[int] = []
    # The first step reads the whole prompt with an empty cache, every further one a single token.
    new_ids, length, end_id = ids, 0, None
    while len(answer_ids) < arguments.max_new_tokens and length + len(new_ids) <= (
        settings["positions"] or sys.maxsize
    ):
        length += len(new_ids)
        feeds = {
            "input_ids": np.array([new_ids], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
        }
        # Graphs of onnxruntime-genai derive positions from the mask and have no such input.
        if "position_ids" in inputs:
            feeds["position_ids"] = np.arange(length - len(new_ids), length, dtype=np.int64)[None]
        logits, *cache = session.run(None, feeds | dict(zip(past_names, cache, strict=True)))
        token = int(logits[0, -1].argmax())
        if token in settings["ends"]:
            end_id = token
            break
        answer_ids, new_ids = [*answer_ids, token], [token]
    text = tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
    if settings["answer_frame"]:
        frame = AnswerFrame.from_dict(settings["answer_frame"]).adapt_to_prompt(framed_text)
        text = frame.decode_answer(
            answer_ids,
            lambda some, skip: tokenizer.decode(list(some), skip_special_tokens=skip),
            end_id,
        )
    print(
        json.dumps({"prompt_ids": ids, "ids": answer_ids, "text": text}) if arguments.json else text
    )
