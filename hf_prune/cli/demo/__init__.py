"""What ``hf-prune demo`` and ``make demo`` run: a small classifier, trained on this machine from packages on PyPI.

``demo`` prepares and caches the model, ``sentences`` reads the reviews, ``training`` trains, and ``sources`` says
which files of which packages are needed, with their checksums.
"""
