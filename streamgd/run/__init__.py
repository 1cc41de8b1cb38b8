"""The loop that joins data and learning, and what surrounds it.

``config`` says what defines a run; ``survey`` looks at the data before the first update; ``runs`` makes a run, anew or
from a checkpoint, and ``loop`` is the only training loop; ``checkpoint``, ``folder`` and ``session`` keep it on disk;
``continuing`` is what partial_fit and warm starts do; ``progress`` and ``inspection`` are what a person sees;
``scoring`` and ``predictions`` run a fitted model over a source.
"""
