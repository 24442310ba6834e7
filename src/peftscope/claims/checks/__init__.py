"""What the ledger's checks measure, one module a family.

A check is a function whose keyword parameters stand in the ledger and that returns a ``Measurement``; it never decides
anything. Heavy libraries are imported inside the functions, so that the ledger is read and validated without them.
"""
