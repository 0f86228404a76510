"""Faults injected into a real cluster under load: ``make faults`` prints them as a table, the tests run each once."""
