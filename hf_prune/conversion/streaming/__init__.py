"""Prune a checkpoint without ever holding its model.

Takes a folder of safetensors and a config, runs the model block by block on the meta device with weights read when
they are needed, and writes pruned files tensor by tensor; a journal lets a killed run continue.
"""
