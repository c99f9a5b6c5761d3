"""Gated activations: functions of a pre-activation ``[..., 2N]``, whose halves are a and b, with a result ``[..., N]``.

``"gelu(a)*b"`` and ``"a*gelu(b)"`` are the names of the two that GELU makes, as kernels, plans and the operator are
asked for them; every activation has such a pair. Pure Python: needs neither Triton nor a GPU.
"""

import dataclasses
from collections.abc import Iterator

from .configs import Config, default_config
from .lookup import shipped_configs

HALVES = ("first", "second")


def gated(activation: str, half: str) -> str:
    """Return the name of the product of both halves of which ``half``, one of ``HALVES``, is activated."""
    return f"{activation}(a)*b" if half == "first" else f"a*{activation}(b)"


def parse(name: str) -> tuple[str, str]:
    """Return the name of an activation and the half that it is applied to; "" if the name is no gated activation's."""
    if name.endswith("(a)*b"):
        return name.removesuffix("(a)*b"), "first"
    if name.startswith("a*"):
        return name.removeprefix("a*").removesuffix("(b)"), "second"
    return name, ""


def gated_config(config: Config, M: int, N: int, arch: int) -> Config:
    """Return the configuration of a gated call with N columns in each half, given that of the product ``[M, 2N]``.

    A tile has ``block_n`` columns of each half. With half as many as the product's tile has, it needs the same
    registers and the same shared memory, and adds up in the same order. TMA stores whole tiles, and one that goes past
    the end of the first half would write into the second, so tiles that do not divide N are stored through pointers.
    So are those of the Hopper kernel, which has no gated form.
    """
    if config.kernel == "library":
        return config
    block_n = max(config.block_n // 2, 16)
    if config.kernel == "hopper" or (config.kernel == "tma" and N % block_n):
        config = default_config(M, config.dtype, arch)
        block_n = config.block_n // 2
    return dataclasses.replace(config, block_n=block_n, subtiles=min(config.subtiles, block_n // 16))


def gated_configs(arch: int) -> Iterator[Config]:
    """Yield once each Triton configuration that gated calls get on an architecture from shipped tables."""
    shapes = ((1, 4096), (8192, 4096), (1, 8), (8192, 8))
    configs = (gated_config(config, M, N, arch) for config in shipped_configs(arch) for M, N in shapes)
    yield from dict.fromkeys(configs)
