"""The settings: one definition for C, Python and the documentation.

``settings`` is the definition and its reader; ``python3 -m config`` writes what is generated from it.
"""
