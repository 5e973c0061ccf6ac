"""Answer each prompt, greedily: python run.py "first prompt" "second prompt" """

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from answer_frame import AnswerFrame  # beside this file: it takes off what the model writes before its answer
from tokenizers import Tokenizer

options = argparse.ArgumentParser(description="Answer each prompt, greedily.")
options.add_argument("prompts", nargs="+")
options.add_argument("--max-new-tokens", type=int, default=128, help="tokens of an answer")
options.add_argument("--json", action="store_true", help="print a line of JSON for each: token ids and text")
asked = options.parse_args()

here = Path(__file__).parent
about = json.loads((here / "artefact.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.no_truncation()
session = onnxruntime.InferenceSession(str(here / "model.onnx"), providers=["CPUExecutionProvider"])
inputs = {one.name: one for one in session.get_inputs()}
past_names = [name for name in inputs if name.startswith("past_key_values.")]
kind = np.float16 if inputs[past_names[0]].type == "tensor(float16)" else np.float32

for prompt in asked.prompts:
    whole = about["before"] + (prompt.strip() if about["strip"] else prompt) + about["after"]
    ids, start = tokenizer.encode(whole, add_special_tokens=False).ids, about["start"]
    ids = ids if start and ids[: len(start)] == start else start + ids  # a text may bring its own start token
    past = [np.zeros((1, about["heads"], 0, about["head_size"]), kind)] * len(past_names)
    written: list[int] = []
    new, seen, end = ids, 0, None
    while len(written) < asked.max_new_tokens and seen + len(new) <= (about["positions"] or sys.maxsize):
        seen += len(new)
        given = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, seen), np.int64)}
        if "position_ids" in inputs:
            given["position_ids"] = np.arange(seen - len(new), seen, dtype=np.int64)[None]
        logits, *past = session.run(None, given | dict(zip(past_names, past, strict=True)))
        token = int(logits[0, -1].argmax())
        if token in about["ends"]:
            end = token
            break
        written, new = [*written, token], [token]
    text = tokenizer.decode(written, skip_special_tokens=True).strip()
    if about["answer_frame"]:
        frame = AnswerFrame.from_dict(about["answer_frame"]).after(whole)
        text = frame.answer(written, lambda some, skip: tokenizer.decode(list(some), skip_special_tokens=skip), end)
    print(json.dumps({"prompt_ids": ids, "ids": written, "text": text}) if asked.json else text)
