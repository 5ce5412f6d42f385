"""The name of our method in a checkpoint's ``quantization_config``."""

from __future__ import annotations

METHOD = "hf_prune"  # by which transformers finds our quantizer, see quantizer.py
