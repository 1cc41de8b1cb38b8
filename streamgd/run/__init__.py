"""The loop that joins data and learning, and what surrounds it.

``config`` says what defines a run; ``survey`` looks at the data before the first update; ``loop`` is the only training
loop; ``checkpoint`` and ``folder`` keep it on disk; ``progress`` is what a person sees; ``scoring`` runs a fitted model
over a source.
"""
