"""Save and load models with their masks, in folders and on the Hub.

``save`` takes a pruned model and writes a folder, so that the old checkpoint stays complete until the new one is;
``load`` takes a folder or Hub id and returns the model with its masks. Other modules find the files, companions and
native class of any checkpoint. A new file that belongs to a checkpoint is named in ``files`` or ``companions``.
"""
