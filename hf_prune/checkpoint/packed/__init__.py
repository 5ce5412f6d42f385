"""The packed format: one weight as bytes without its zeros, and back.

``format`` says what the bytes are, ``pack`` writes and ``unpack`` reads them, ``files`` seals them in safetensors,
and ``quantizer`` has plain ``from_pretrained`` load them. The reader is also written into checkpoints by
``remote_code``, so the modules named there import nothing else of this package. ``docs/format.md`` is the
specification.
"""
