"""The checks of the ledger, with one module per family.

A check is a function that returns a ``Measurement`` and decides nothing. The ledger holds its keyword parameters. Heavy
libraries are imported inside the functions, so that the ledger can be read and validated without them.
"""
