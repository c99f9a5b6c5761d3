"""BERT's two dense blocks as layers for Hugging Face's Kernel Hub; ``build.py`` copies this file.

A layer has no state: ``kernelize`` puts its ``forward`` onto a module of transformers. Only plain linear layers with
exact GELU or tanh run fused; all others compute what the module itself would.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .guards import hook_reason
from .ops import cls_pool, linear_act


def _is_plain(dense: Any) -> bool:
    return type(dense) is nn.Linear and hook_reason(dense) is None


def _is_exact_gelu(function: Any) -> bool:
    """True for torch's ``GELU`` and for transformers' ``GELUActivation`` over torch's function."""
    if type(function) is nn.GELU:
        return bool(function.approximate == "none") and hook_reason(function) is None
    return type(function).__name__ == "GELUActivation" and function.act is F.gelu and hook_reason(function) is None


class BertIntermediate(nn.Module):
    """``gelu(dense(hidden_states))``: ``[..., H]`` to ``[..., I]``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        dense: Any = self.dense
        function: Any = self.intermediate_act_fn
        if not (_is_plain(dense) and _is_exact_gelu(function)):
            return function(dense(hidden_states))  # type: ignore[no-any-return]
        return linear_act(hidden_states, dense.weight, dense.bias, "gelu")


class BertPooler(nn.Module):
    """``tanh(dense(hidden_states[:, 0]))``: ``[B, S, H]`` to ``[B, H]``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        dense: Any = self.dense
        function: Any = self.activation
        if not (_is_plain(dense) and type(function) is nn.Tanh and hook_reason(function) is None):
            return function(dense(hidden_states[:, 0]))  # type: ignore[no-any-return]
        return cls_pool(hidden_states, dense.weight, dense.bias, "tanh")
