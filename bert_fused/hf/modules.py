"""Drop-in subclasses of Hugging Face's modules that call the fused kernels. Needs transformers.

``FusedBertIntermediate(config)`` and ``FusedBertPooler(config)`` take Hugging Face's arguments and have its parameters.
Every other class that ``recognize.py`` knows gets a ``Fused...`` counterpart when it is first asked for.
"""

import functools
from collections.abc import Callable

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertIntermediate, BertPooler

from ..guards import is_defined_in, original_of
from ..kernels.gated import gated
from ..ops import cls_pool, linear_act
from ..unpad.attention import FusedAttention, FusedOutput, FusedSelfAttention
from ..unpad.encoder import PREFIXES, FusedEncoder
from .checks import activation_now, activation_of, dropout_is_active
from .recognize import INTERMEDIATE, POOLER, Block, block_of

# The classes that ``fuse`` swaps in an encoder: name without the family's prefix -> our class to mix in.
_ENCODER_MIXINS: dict[str, type[nn.Module]] = {
    "Encoder": FusedEncoder,
    "SelfAttention": FusedSelfAttention,
    "Attention": FusedAttention,
    "SelfOutput": FusedOutput,
    "Output": FusedOutput,
}


class FusedBlock(nn.Module):
    """The base of all fused modules with a linear layer and its activation."""

    original: type[nn.Module]
    block: Block
    # ``fuse`` sets these on the instance: an argument of ``linear_act``, and whether a pooler returns None.
    recompute_preact = False
    skip = False


def _fused_method(original: type[nn.Module], block: Block) -> Callable[..., object]:
    """Make a block's method with linear layer and activation in one kernel; it calls the other steps unchanged.

    A method that a user puts on the class instead runs as it is, whether put there before or after this one was made.
    """
    read: Callable[..., object] = getattr(original, block.method)
    if not is_defined_in(read, original.__module__):
        return read
    name, first, dropout = block.method, block.first, block.dropout
    linear_name, function_name, half = block.linear, block.activation, block.half

    @functools.wraps(read)  # Hugging Face looks at the signature
    def method(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> object:
        attributes = self.__dict__
        if attributes.get("skip"):
            return None
        now = getattr(original, name)
        if now is not read or len(args) != 1 or kwargs or (dropout and dropout_is_active(self)):
            return now(self, *args, **kwargs)
        given = hidden = args[0]
        children = attributes["_modules"]  # getattr would take ten times as long
        linear, function = children.get(linear_name), children.get(function_name)
        if function is None:
            function = activation_of(self, original, block)
        activation = activation_now(function, linear, hidden, first, half)
        if activation is None or (first and hidden.dim() != 3):
            return now(self, hidden)
        parameters = linear._parameters
        if "weight" in parameters:
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # a replica of DataParallel
            weight, bias = linear.weight, linear.bias
        if half:
            activation = gated(activation, half)
        product = cls_pool if first else linear_act
        if attributes.get("recompute_preact"):
            hidden = product(hidden, weight, bias, activation, recompute_preact=True)
        else:
            hidden = product(hidden, weight, bias, activation)
        if block.times:
            hidden = hidden * getattr(self, block.times)(given)
        for step in block.rest:
            hidden = getattr(self, step)(hidden)
        return hidden

    return method


class FusedBertIntermediate(FusedBlock, BertIntermediate):  # type: ignore[misc]
    """``BertIntermediate``, ``act(dense(hidden_states))``, in one kernel: ``[..., H]`` to ``[..., I]``."""

    original, block = BertIntermediate, INTERMEDIATE
    forward = _fused_method(original, block)


class FusedBertPooler(FusedBlock, BertPooler):  # type: ignore[misc]
    """``BertPooler``, ``tanh(dense(hidden_states[:, 0]))``, in one kernel: ``[B, S, H]`` to ``[B, H]``."""

    original, block = BertPooler, POOLER
    forward = _fused_method(original, block)


# Hugging Face's class -> its fused counterpart; others are added when they are first asked for.
_counterparts: dict[type, type[nn.Module]] = {BertIntermediate: FusedBertIntermediate, BertPooler: FusedBertPooler}


def fused_class(original: type[nn.Module]) -> type[FusedBlock] | None:
    """Return the fused counterpart of a block of transformers; None if there is none."""
    if original not in _counterparts:
        block = block_of(original)
        if block is None:
            return None
        doc = f"``{original.__name__}`` in one kernel."
        own = {"block": block, "__doc__": doc, block.method: _fused_method(original, block)}
        _make(original, FusedBlock, own)
    made = _counterparts[original]
    return made if issubclass(made, FusedBlock) else None


def fused_encoder_class(original: type[nn.Module]) -> type[nn.Module] | None:
    """Return the fused counterpart of an encoder of the five families or of a part of its layers; None if none."""
    prefix = PREFIXES.get(original.__module__)
    mixin = _ENCODER_MIXINS.get(original.__name__.removeprefix(prefix)) if prefix is not None else None
    if mixin is None:
        return None
    if original not in _counterparts:
        doc = f"``{original.__name__}`` of a fused encoder."
        _make(original, mixin, {"__doc__": doc})
    return _counterparts[original]


def _make(original: type[nn.Module], mixin: type[nn.Module], attributes: dict[str, object]) -> None:
    attributes = attributes | {"__module__": __name__, "original": original, "__reduce_ex__": _reduce}
    made = type(f"Fused{original.__name__}", (mixin, original), attributes)
    # Two threads may both get here; all must see the class that came first.
    _counterparts.setdefault(original, made)


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a fused module had before, also if ``fully_shard`` made it a unit; None if not fused."""
    kind = wrapped_class(module) or type(module)
    original: type[nn.Module] | None = vars(kind).get("original")
    return original if original is not None and _counterparts.get(original) is kind else None


def wrapped_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of a module before ``fully_shard`` made it a unit; None if it is no unit.

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
    """Make an empty module of the fused counterpart of a class, for pickle to fill."""
    kind = fused_class(original) or fused_encoder_class(original) or original
    return kind.__new__(kind)
