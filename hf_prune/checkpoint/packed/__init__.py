"""The packed format: weights without their zeros, and back.

``format`` defines the bytes, ``pack`` writes and ``unpack`` reads them, ``files`` puts them into safetensors files with
a checksum, and ``quantizer`` makes plain ``from_pretrained`` load them. ``remote_code`` also writes the reader into
checkpoints, so the modules that it names import nothing else from hf_prune. ``docs/format.md`` is the specification.
"""
