"""Patterns: one exporter idiom a file."""
