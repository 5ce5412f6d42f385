"""Remove tokens that no text uses, from the embeddings and from the tokenizer.

Takes a model, its tokenizer and texts, and gives both with fewer tokens. ``tokenizer`` rebuilds the tokenizer so that
texts are split as before, ``rows`` cuts the embeddings, ``trim`` decides which tokens stay. A new kind of tokenizer is
a case in ``tokenizer``.
"""
