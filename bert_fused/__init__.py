"""BERT's dense blocks as single Triton kernels, exact and differentiable: linear + GELU, CLS slice + linear + tanh."""

import importlib
from typing import TYPE_CHECKING, Any

from .ops import cls_pool, linear_act, linear_glu

if TYPE_CHECKING:
    from .hf.fuse import FuseReport, fuse, fused, unfuse
    from .hf.modules import FusedBertIntermediate, FusedBertPooler
    from .hf.verify import Verification, verify

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
    "linear_glu",
    "unfuse",
    "verify",
]

# The names that need transformers, each with the module of ``hf`` that defines it. Importing bert_fused must not need
# transformers.
_LAZY = {
    "FuseReport": "fuse",
    "FusedBertIntermediate": "modules",
    "FusedBertPooler": "modules",
    "Verification": "verify",
    "fuse": "fuse",
    "fused": "fuse",
    "unfuse": "fuse",
    "verify": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.hf.{_LAZY[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        message = f"bert_fused.{name} needs transformers, which is not installed: pip install 'bert-fused[hf]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    return getattr(module, name)
