"""Backends: what compiles parts of a model and runs them again, behind one interface."""
