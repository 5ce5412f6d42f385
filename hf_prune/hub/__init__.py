"""Model cards whose numbers were counted, and pushes to the Hub in one commit.

Takes a checkpoint folder, counts and collects its facts, renders them into a card, verifies cards against the files,
and uploads. A new fact is a field of ``card_data``, a line of the template, and its recount in ``verify``.
"""
