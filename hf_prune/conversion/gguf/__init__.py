"""GGUF files, for llama.cpp and what is built on it: sizes, tensors, tokenizer, and the comparison with PyTorch.

``layout`` says which of llama.cpp's architectures fits a model, ``tensors`` what its weights are called there, and
``vocabulary`` how it reads text. A new family needs a line in each of the tables of ``layout``.
"""
