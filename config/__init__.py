"""The settings: one definition, from which the C code and the documentation are generated."""
