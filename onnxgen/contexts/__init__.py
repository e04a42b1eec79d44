"""Backend contexts: what a model file holds for backends. docs/contexts.md states the format."""
