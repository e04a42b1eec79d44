"""Showing that a rewritten model computes what the original computes, by running both.

The package can be called: `onnxgen.verify(original, rewritten)` is `onnxgen.api.verify`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that bears the name of the function that users know it by."""

    def __call__(self, *models: Any, **options: Any) -> Any:
        from onnxgen import api

        return api.verify(*models, **options)


sys.modules[__name__].__class__ = _Callable
