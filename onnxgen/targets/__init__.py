"""Targets: what each runtime can run, and how canonical operators are spelled for it."""
