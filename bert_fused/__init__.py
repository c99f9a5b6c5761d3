"""BERT's dense blocks as single Triton kernels, exact and differentiable: linear + GELU, CLS slice + linear + tanh."""

from typing import TYPE_CHECKING, Any

from .fusion import FuseReport, fuse, fused, unfuse
from .ops import cls_pool, linear_act
from .verification import Verification, verify

if TYPE_CHECKING:
    from .modules import FusedBertIntermediate, FusedBertPooler

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "FusedBertIntermediate",
    "FusedBertPooler",
    "Verification",
    "cls_pool",
    "fuse",
    "fused",
    "linear_act",
    "unfuse",
    "verify",
]


def __getattr__(name: str) -> Any:
    # The modules subclass Hugging Face's, and importing bert_fused must not need transformers.
    if name in ("FusedBertIntermediate", "FusedBertPooler"):
        from . import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
