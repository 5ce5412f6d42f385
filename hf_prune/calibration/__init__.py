"""What criteria and repairs learn from data.

Takes a model, a plan and batches, and gives statistics for each weight: gradients, products of inputs, sensitivities,
the outputs of the dense model. The model is run as its author wrote it; ``replay`` spares finished blocks where it
has been shown that nothing else can tell. A new statistic is a field of ``WeightStats`` and its collection here.
"""
