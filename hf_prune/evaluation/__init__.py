"""What pruning cost and what it brought, measured and counted.

Takes a model and data or masks, and gives accuracies, perplexities, comparisons of dense and pruned on the same
examples, sweeps over sparsities, reports of what is zero, and plots. A new measure is a file with a result that says
n and its error.
"""
