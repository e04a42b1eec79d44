"""Showing that a rewritten model computes what the original computes, by running both."""
