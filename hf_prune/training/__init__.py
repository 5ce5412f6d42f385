"""Prune while a model is trained: schedules, movement, distillation, lottery tickets, LoRA.

Takes a ``Trainer`` or a training loop of your own, keeps removed weights at zero after every step, and changes the
masks as a schedule says, in one process or many; a training resumes bit for bit. ``pruner`` does the steps,
``callback`` and ``trainer`` connect it to transformers. A new schedule is one call of ``register_schedule``.
"""
