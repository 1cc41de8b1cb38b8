"""Rows in, coefficients out. Arrays only: no files, no threads, no Dask.

``losses``, ``penalties``, ``schedules`` and ``optimizers`` say what there is; ``recipe`` is one checked choice of them;
``scaling`` holds the features' units; ``state`` is everything training carries from one row to the next; ``kernels``
is the compiled code that consumes rows and updates the state; ``model`` is what comes out: coefficients that predict.
"""
