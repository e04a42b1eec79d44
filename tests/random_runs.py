"""How drawn models are tried: in shards that run side by side, on one ONNX Runtime.

    ONNXGEN_EXAMPLES=50000 ONNXGEN_SEED=1 pytest tests/test_random_architectures.py -n 2

Where a check fails, hypothesis prints the nearest plain spec that fails too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from onnxgen.twin import Types
from tests.graphs import runtime
from tests.random_spec import Spec, specs

SEED = int(os.environ.get("ONNXGEN_SEED", "0"))


class Shared:
    """The tests' ONNX Runtime in the place of one that is started for each model."""

    def __init__(self, twins: Types) -> None:
        runtime().twins = twins

    def __enter__(self) -> Any:
        return runtime()

    def __exit__(self, *_: object) -> None:
        pass


def check_drawn(check: Callable[[Spec], None], shard: int, shards: int, usual: int) -> None:
    """Check one shard of the drawn specs.

    Args:
        usual: how many specs are drawn by all shards, unless ONNXGEN_EXAMPLES says it.
    """
    examples = int(os.environ.get("ONNXGEN_EXAMPLES", str(usual)))

    @seed(SEED * shards + shard)
    @settings(
        max_examples=examples // shards,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def drawn(spec: Spec) -> None:
        check(spec)

    drawn()
