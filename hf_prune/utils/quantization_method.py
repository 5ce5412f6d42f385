"""The name by which transformers finds our quantizer, in a checkpoint's ``quantization_config``.

A module of its own, since it also becomes a part of the code in checkpoints, see ``checkpoint/packed/remote_code.py``.
"""

from __future__ import annotations

METHOD = "hf_prune"
