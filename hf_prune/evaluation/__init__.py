"""Measure what pruning costs and gains.

Takes a model and data, and returns accuracies, perplexities, comparisons of the dense and the pruned model on the same
examples, sweeps over sparsities, reports of what is zero or was removed, and plots. A new measure is a file with a
function and a result that states n and its error.
"""
