"""Prune while a model is trained: schedules, movement, distillation, lottery tickets, LoRA.

Takes a ``Trainer`` or a loop of one's own, keeps removed weights at zero after every step and changes the masks when
it is time, in one process or many, and resumes bit for bit. A new schedule is one call of ``register_schedule``.
"""
