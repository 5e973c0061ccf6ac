"""Name the class of each text: python run.py "first text" "second text" """

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

here = Path(__file__).parent
about = json.loads((here / "artefact.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.enable_truncation(about["max_length"])
session = onnxruntime.InferenceSession(str(here / "model.onnx"), providers=["CPUExecutionProvider"])

for text in sys.argv[1:]:
    ids = np.array([tokenizer.encode(text).ids], dtype=np.int64)
    (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    shares = np.exp(logits[0] - logits[0].max())
    shares /= shares.sum()
    print(f"{about['labels'][int(shares.argmax())]}\t{shares.max():.3f}\t{text}")
