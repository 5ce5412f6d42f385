"""Where the units of each family of architectures are: one file for each.

A file calls ``register_architecture`` for the model types of its family, and is found without a central list. It takes
nothing but the entry classes of ``architectures.base``. See ``architectures/ADDING.md`` for how to add one.
"""
