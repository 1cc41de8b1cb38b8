"""All compiled code of reading: rows in memory or in files, decoded, scaled, and put at random places.

======================  ====================================================================================
``compiling``           compilation and its cache, by Numba
``memory``              numbers at addresses: read, written, copied, and rows of any dtype as float64
``shuffle``             random places
``slices``              the order of slices: blocks dealt to lanes, and the walk through them
``checksums``           sums that tell whether every row came once, and whether any word changed
``scaling``             eight values at a time, as vector instructions
``placing``             rows to their places in a window
``combining``           rows to sums: predictions
``classes``, ``arrow``  classes to codes; where the columns of an Arrow batch lie
``flat``                windows from rows that lie as they are, a window a call
``hdf5``                chunks: filters undone, and their bytes put in rows
``parquet_pages``       pages, by their headers (``parquet_headers``) and values (``parquet_values``), ``snappy``
======================  ====================================================================================

Everything runs without the interpreter lock, so that readers work beside one another and beside whoever consumes. No
fast-math: the same values give the same bits from every source and on every CPU. Each module is imported by those who
need it, when they do, because that imports Numba.
"""
