"""Decide whether an encoder's layers can run on packed rows: every module must treat each token alone, without hooks.

Needs transformers.
"""

import sys

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2CLS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertEncoder

from ..guards import class_is_patched, is_defined_in, original_of, touched, watch_reason
from .attention import FusedAttention, FusedSelfAttention

# The children of the two attentions that ours can stand in for.
_SELF_ATTENTION_PARTS = {"query", "key", "value", "dropout"}
_ATTENTION_PARTS = {"self", "output"}

# Classes of torch that act on each row independently, with any number of dimensions in front: what Hugging Face builds
# layers and heads of, and users' adapters. nn.PReLU takes the second dimension for channels.
_ROWWISE = {nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleDict, nn.ParameterDict, nn.GELU}
_ROWWISE |= {kind for kind in ACT2CLS.values() if isinstance(kind, type)} - {nn.PReLU}
# So do all classes of these packages.
_ROWWISE_HOMES = ("transformers.", "bert_fused.", "peft.")


def layers_reason(encoder: BertEncoder, *, swapped: bool) -> str | None:
    """Return why the layers must run dense, or None: a part of another kind, one that may mix rows, or a user's hook.

    encoder: of any of the five families, fused or not. swapped: whether the attentions must have classes of ours, as
    they have after ``fuse``. Every call with padding asks this, since users replace modules and add hooks at any time.
    """
    layers = list(encoder.layer)
    if not layers:
        return "it has no layers"
    home, implementation = original_of(encoder).__module__, encoder.config._attn_implementation
    if _attention_is_replaced(home, implementation):
        return f"its attention under the name of {implementation} is not transformers' own"
    known: set[tuple[str, type]] = set()
    for i, layer in enumerate(layers):
        attention = getattr(layer, "attention", layer)
        self_attention = getattr(attention, "self", attention)
        for name, module in (("Layer", layer), ("Attention", attention), ("SelfAttention", self_attention)):
            kind: type = getattr(type(module), "original", type(module))
            if (name, kind) in known:
                continue
            if kind.__module__ != home or not kind.__name__.endswith(name) or class_is_patched(kind):
                return f"layer {i} has a {kind.__qualname__} of another kind"
            known.add((name, kind))
        if self_attention._modules.keys() != _SELF_ATTENTION_PARTS or attention._modules.keys() != _ATTENTION_PARTS:
            return f"layer {i} has an attention of other parts"
        fused = isinstance(self_attention, FusedSelfAttention)
        if swapped and not (fused and isinstance(attention, FusedAttention) == (i == len(layers) - 1)):
            return f"layer {i} is not where it was when the encoder was fused"
        if layer.chunk_size_feed_forward:
            return "chunk_size_feed_forward is set"
        reason = rows_reason(layer)
        if reason is not None:
            return f"layer {i} has {reason}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _attention_is_replaced(home: str, implementation: str) -> bool:
    """Tell whether the SDPA or eager attention that layers of the module ``home`` call is not transformers' own."""
    eager = vars(sys.modules[home]).get("eager_attention_forward")
    if implementation == "eager":
        return not is_defined_in(ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager), home)
    if implementation == "sdpa":
        function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
        return not is_defined_in(function, "transformers.integrations.sdpa_attention")
    return False


def rows_reason(root: nn.Module) -> str | None:
    """Return why a module may mix rows, or that it has a user's hook; else None."""
    if _has_any_global_hook():
        return "hooks"
    # nn.Module.modules() takes five times as long.
    tree: list[nn.Module] = []
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        kind = type(module)
        if kind not in _ROWWISE and not kind.__module__.startswith(_ROWWISE_HOMES):
            return f"a {kind.__module__}.{kind.__qualname__}"
        tree.append(module)
        waiting.extend(module._modules.values())
    for module in touched(tree):
        reason = watch_reason(module)
        if reason is not None:
            return reason
    return None
