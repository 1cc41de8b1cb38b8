"""Blocks of storage in, shuffled windows of rows out. Nothing here learns.

The way through: ``sources`` open what the user has, ``plan`` decides which rows go where, ``window`` reads and places
them, ``window_stream`` does so ahead of whoever consumes, ``stream`` hands the batches to somebody else's model.
"""
