"""Drop-in subclasses of Hugging Face's modules that call the fused kernels. Needs transformers.

``FusedBertIntermediate(config)`` and ``FusedBertPooler(config)`` take Hugging Face's arguments and have its parameters.
Every other class that ``recognize.py`` knows gets a ``Fused...`` counterpart when it is first asked for.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

from ..guards import original_of
from ..ops import cls_pool, linear_act
from ..unpad.attention import FusedAttention, FusedSelfAttention
from ..unpad.encoder import PREFIXES, FusedEncoder
from .activations import activation_of
from .checks import activation_now, dropout_is_active
from .recognize import INTERMEDIATE, POOLER, Block, block_of

# The classes of the five families that are swapped with an encoder: name -> module that defines it, class to mix in.
_ENCODER_CLASSES: dict[str, tuple[str, type[nn.Module]]] = {
    f"{prefix}{part}": (home, mixin)
    for home, prefix in PREFIXES.items()
    for part, mixin in (("Encoder", FusedEncoder), ("SelfAttention", FusedSelfAttention), ("Attention", FusedAttention))
}


def _parts(module: nn.Module, function: str) -> tuple[object, object, Any, Any]:
    """A module's activation, dense layer, weight and bias. ``getattr`` would take ten times as long."""
    try:
        children = module.__dict__["_modules"]
        dense = children["dense"]
        parameters = dense._parameters
        return children[function], dense, parameters["weight"], parameters["bias"]
    except (AttributeError, KeyError):  # a function, a layer without parameters, a replica of DataParallel
        dense = module.dense
        return getattr(module, function), dense, getattr(dense, "weight", None), getattr(dense, "bias", None)


class FusedBlock(nn.Module):
    """The base of all fused modules with a linear layer and its activation."""

    original: type[nn.Module]
    block: Block
    # An argument of ``linear_act``. ``fuse`` sets it on the instance if it is true.
    recompute_preact = False


class _FusedIntermediate(FusedBlock):
    def forward(self, hidden_states: Tensor) -> Tensor:
        original = original_of(self)
        function, dense, weight, bias = _parts(self, "intermediate_act_fn")
        activation = activation_now(original, function, dense, hidden_states)
        if activation is None:
            result: Tensor = original.forward(self, hidden_states)
            return result
        recompute = self.__dict__.get("recompute_preact", False)
        return linear_act(hidden_states, weight, bias, activation, recompute_preact=recompute)


class _FusedPooler(FusedBlock):
    # Whether to leave out the pooled output. Set by ``fuse``, like the above.
    skip = False

    def forward(self, hidden_states: Tensor) -> Tensor | None:
        if self.__dict__.get("skip"):
            return None
        original = original_of(self)
        function, dense, weight, bias = _parts(self, "activation")
        activation = activation_now(original, function, dense, hidden_states)
        if activation is None or hidden_states.dim() != 3:
            result: Tensor = original.forward(self, hidden_states)
            return result
        recompute = self.__dict__.get("recompute_preact", False)
        return cls_pool(hidden_states, weight, bias, activation, recompute_preact=recompute)


def _fused_method(original: type[nn.Module], block: Block) -> Callable[..., object]:
    """A block's method with linear layer and activation in one kernel; the other steps are called unchanged."""
    read = getattr(original, block.method)
    product = cls_pool if block.first else linear_act

    @functools.wraps(read)  # Hugging Face looks at the signature
    def method(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> object:
        now = getattr(original, block.method)
        if now is not read or len(args) != 1 or kwargs or (block.dropout and dropout_is_active(self)):
            return now(self, *args, **kwargs)
        (hidden,) = args
        linear = getattr(self, block.linear)
        activation = activation_now(original, activation_of(self, original, block), linear, hidden)
        if activation is None or (block.first and hidden.dim() != 3):
            return now(self, hidden)
        recompute = self.__dict__.get("recompute_preact", False)
        hidden = product(hidden, linear.weight, linear.bias, activation, recompute_preact=recompute)
        for name in block.rest:
            hidden = getattr(self, name)(hidden)
        return hidden

    return method


class FusedBertIntermediate(_FusedIntermediate, BertIntermediate):  # type: ignore[misc]
    """``BertIntermediate``, ``act(dense(hidden_states))``, in one kernel: ``[..., H]`` to ``[..., I]``."""

    original = BertIntermediate
    block = INTERMEDIATE


class FusedBertPooler(_FusedPooler, BertPooler):  # type: ignore[misc]
    """``BertPooler``, ``tanh(dense(hidden_states[:, 0]))``, in one kernel: ``[B, S, H]`` to ``[B, H]``."""

    original = BertPooler
    block = POOLER


# Hugging Face's class -> its fused counterpart; others are added when they are first asked for.
_counterparts: dict[type, type[nn.Module]] = {BertIntermediate: FusedBertIntermediate, BertPooler: FusedBertPooler}


def fused_class(original: type[nn.Module]) -> type[FusedBlock] | None:
    """The fused counterpart of a block of transformers; None if there is none."""
    if original not in _counterparts:
        block = block_of(original)
        if block is None:
            return None
        mixin: type[FusedBlock] | None = None
        if list(inspect.signature(original.forward).parameters) == ["self", "hidden_states"]:
            mixin = {INTERMEDIATE: _FusedIntermediate, POOLER: _FusedPooler}.get(block)
        own: dict[str, object] = {} if mixin is not None else {block.method: _fused_method(original, block)}
        doc = f"``{original.__name__}`` in one kernel."
        _make(original, mixin or FusedBlock, {"block": block, "__doc__": doc} | own)
    made = _counterparts[original]
    return made if issubclass(made, FusedBlock) else None


def fused_encoder_class(original: type[nn.Module]) -> type[nn.Module] | None:
    """The fused counterpart of an encoder of the five families or of its attentions; None if there is none."""
    home, mixin = _ENCODER_CLASSES.get(original.__name__, ("", nn.Module))
    if home != original.__module__:
        return None
    if original not in _counterparts:
        doc = f"``{original.__name__}`` without work on padding, or on positions that are not read."
        _make(original, mixin, {"__doc__": doc})
    return _counterparts[original]


def _make(original: type[nn.Module], mixin: type[nn.Module], attributes: dict[str, object]) -> None:
    attributes = attributes | {"__module__": __name__, "original": original, "__reduce_ex__": _reduce}
    made = type(f"Fused{original.__name__}", (mixin, original), attributes)
    # Two threads may both get here; all must see the class that came first.
    _counterparts.setdefault(original, made)


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """Hugging Face's class of a fused module, also of one that ``fully_shard`` made a unit; None if not fused."""
    kind = wrapped_class(module) or type(module)
    original: type[nn.Module] | None = vars(kind).get("original")
    return original if original is not None and _counterparts.get(original) is kind else None


def wrapped_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of a module before ``fully_shard`` made it a unit; None if it is no unit.

    ``fully_shard`` derives a class from it. torch looks up derived classes by identity, so we never replace one.
    """
    bases = type(module).__bases__
    return bases[1] if len(bases) == 2 and bases[0].__module__.startswith("torch.distributed.") else None


def _reduce(module: nn.Module, protocol: int) -> tuple[object, ...]:
    """Pickle the original class, and fuse again on load.

    Our class itself is never pickled: cloudpickle (Ray, joblib) copies a class that it cannot find by name.
    """
    state = tuple(object.__reduce_ex__(module, protocol))[2:]
    return new_from_original, (original_of(module),), *state


def new_from_original(original: type[nn.Module]) -> nn.Module:
    """An empty module of the fused counterpart of a class, for pickle to fill."""
    kind = fused_class(original) or fused_encoder_class(original) or original
    return kind.__new__(kind)
