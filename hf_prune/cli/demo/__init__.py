"""What ``hf-prune demo`` and ``make demo`` run: a small classifier, trained on this machine from packages on PyPI.

``assets`` prepares and caches the model and its data, ``sentences`` reads the reviews, ``training`` trains, and
``sources`` lists the files that are needed from these packages, with their checksums.
"""
