"""Floating-point operations that torch's `FlopCounterMode` leaves uncounted, by their formulas.

As in torch's own formulas, shapes stand for tensors, and a multiplication with an addition counts
as two.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import sdpa_flop_count

_aten = torch.ops.aten

UNCOUNTED = {
    # on the CPU; two products for each step and item: (4h, i) by the input, (4h, h) by the state
    _aten.mkldnn_rnn_layer: lambda x, w, r, *_, **__: (
        2 * x[0] * x[1] * (math.prod(w) + math.prod(r))
    ),
    # on a GPU; all matrices of all layers for each step and item, or for each item of packed ones
    _aten._cudnn_rnn: lambda x, weights, *_, **__: (
        2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    _aten._scaled_dot_product_fused_attention_overrideable: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    # of nn.Bilinear: a term for each item and weight
    _aten._trilinear: lambda x, weight, *_, **__: 2 * x[0] * math.prod(weight),
    _aten.addbmm: lambda _, x, y, *__, **___: 2 * math.prod(x) * y[2],
    _aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
    _aten.addmv: lambda _, matrix, *__, **___: 2 * math.prod(matrix),
    _aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
}
"""For `FlopCounterMode(custom_mapping=UNCOUNTED)`."""
