"""Model cards whose numbers were counted, and pushes to the Hub in one commit.

Takes a checkpoint folder, collects its facts (``card_data``), renders them into a card (``card``), verifies a card
against the files (``verify``), and uploads folder and card (``push``). A new fact is a field of ``PruningCardData``, a
line of the template, and a comparison in ``compare_card``.
"""
