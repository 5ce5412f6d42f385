"""Prune a checkpoint that is larger than the memory.

Takes a folder of safetensors files and a config, runs the model block by block on the meta device with weights that are
read when they are needed, and writes pruned files tensor by tensor. A journal lets an interrupted run continue.
"""
