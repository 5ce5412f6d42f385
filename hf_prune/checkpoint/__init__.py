"""Models in folders and on the Hub, with their masks.

Saves a pruned model so that the old checkpoint stays whole until the new one is, loads it with its masks, and finds
the files, companions and native class of any checkpoint. A new file that belongs to a checkpoint is named in
``files`` or ``companions``.
"""
