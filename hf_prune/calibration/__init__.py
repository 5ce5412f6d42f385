"""What criteria and repairs learn from data.

Takes a model, targets and batches, and gives statistics for each weight: gradients, products of inputs, sensitivities,
the outputs of the dense model. The model is run as its author wrote it; ``replay`` saves the computation of finished
blocks where trials have shown that nothing else changes. A new statistic is a field of ``WeightStats`` and its
collection here.
"""
