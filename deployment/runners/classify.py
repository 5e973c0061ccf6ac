"""Name the class of each text: python run.py "first text" "second text" """

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path(__file__).parent
settings = json.loads((folder / "artefact.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.enable_truncation(settings["max_length"])
session = onnxruntime.InferenceSession(
    str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
)

# One text at a time, so that no padding is needed.
for text in sys.argv[1:]:
    ids = np.array([tokenizer.encode(text).ids], dtype=np.int64)
    (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    probabilities = np.exp(logits[0] - logits[0].max())
    probabilities /= probabilities.sum()
    print(f"{settings['labels'][int(probabilities.argmax())]}\t{probabilities.max():.3f}\t{text}")
