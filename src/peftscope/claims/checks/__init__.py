"""The checks of the ledger, with one module per family.

A check is a function that returns a ``Measurement`` and decides nothing. The ledger holds its keyword parameters. The
modules import the libraries that they measure with; a reader of the ledger that needs no check imports none of them.
"""
