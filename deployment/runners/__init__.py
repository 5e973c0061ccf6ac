"""Scripts that are copied beside an exported model: they need onnxruntime, numpy and tokenizers alone."""
