"""Scripts that are copied next to an exported model.

They need only onnxruntime, numpy and tokenizers.
"""
