"""Answer each prompt, greedily: python run.py "first prompt" "second prompt" """

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

MOST = 128  # tokens of an answer
here = Path(__file__).parent
about = json.loads((here / "artefact.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.no_truncation()
session = onnxruntime.InferenceSession(str(here / "model.onnx"), providers=["CPUExecutionProvider"])
inputs = {one.name: one for one in session.get_inputs()}
past_names = [name for name in inputs if name.startswith("past_key_values.")]
kind = np.float16 if inputs[past_names[0]].type == "tensor(float16)" else np.float32

for prompt in sys.argv[1:]:
    whole = about["before"] + prompt + about["after"]
    ids = about["start"] + tokenizer.encode(whole, add_special_tokens=False).ids
    past = [np.zeros((1, about["heads"], 0, about["head_size"]), kind)] * len(past_names)
    said: list[int] = []
    new, seen = ids, 0
    while len(said) < MOST and seen + len(new) <= (about["positions"] or sys.maxsize):
        seen += len(new)
        given = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, seen), np.int64)}
        if "position_ids" in inputs:
            given["position_ids"] = np.arange(seen - len(new), seen, dtype=np.int64)[None]
        logits, *past = session.run(None, given | dict(zip(past_names, past, strict=True)))
        token = int(logits[0, -1].argmax())
        if token in about["ends"]:
            break
        said, new = [*said, token], [token]
    print(tokenizer.decode(said, skip_special_tokens=True).strip())
