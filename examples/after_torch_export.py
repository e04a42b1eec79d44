"""Fuse what torch.onnx.export returns, in three lines.

python examples/after_torch_export.py            # needs torch
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import onnxgen


class Attention(nn.Module):
    """Attention over x [B,S,H] with a cache: past keys and values [B,K,P,D]."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, s, -1)), k, v


def main() -> None:
    x, past = torch.randn(2, 5, 48), torch.randn(2, 4, 7, 12)
    mask = torch.ones(2, 1, 5, 12, dtype=torch.bool).tril(7)
    axes = {"x": {0: "b", 1: "s"}, "past_key": {0: "b", 2: "p"}, "past_value": {0: "b", 2: "p"}}
    axes["mask"] = {0: "b", 2: "s", 3: "t"}

    # The three lines.
    program = torch.onnx.export(
        Attention().eval(), (x, past, past, mask), dynamo=True, dynamic_shapes=axes
    )
    result = onnxgen.fuse(program)
    result.save("attention.onnx")

    print(result)
    for site in result.report.sites:
        print(
            f"{site.rule} {site.kind}: {site.status}", site.decline.reason if site.decline else ""
        )


if __name__ == "__main__":
    main()
