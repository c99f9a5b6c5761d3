"""Stand-ins for a GPU's times: the tuner is rehearsed on the CPU, where kernels are interpreted."""

from collections.abc import Callable, Sequence

import torch

from bert_fused.kernels.configs import Config
from bert_fused.timing import Call, Sampler
from bert_fused.tune.search import EAGER, Shape

CPU = torch.device("cpu")
NAME = "NVIDIA Stub GPU"
SHAPE = Shape(24, 64, 32, "float16")
LIBRARY = Config("library", "float16")
SMALL, MIDDLE, LARGE = (Config("pointer", "float16", m, 32, 32, 1, 1) for m in (16, 32, 64))
UNHURRIED = 1e9


class Stub:
    """In place of ``graph_sampler``: made-up times by candidate, and a record of who was sampled."""

    def __init__(self, times: dict[str, float], noise: Callable[[int], float] = lambda i: 0.0) -> None:
        self.times = times
        self.noise = noise
        self.samples: dict[str, int] = {}

    def __call__(self, calls: Sequence[Call]) -> Sampler:
        config = calls[0].keywords.get("config")
        name = EAGER if config is None else str(config)
        self.samples[name] = 0
        assert len(calls) >= 20
        assert calls[0]().shape == (calls[0].args[0].shape[0], calls[0].args[1].shape[0])

        def sample() -> float:
            self.samples[name] += 1
            return self.times.get(name, 100.0) * (1 + self.noise(self.samples[name]))

        return sample


def times(**known: float) -> dict[str, float]:
    names = {"eager": EAGER, "library": LIBRARY, "small": SMALL, "middle": MIDDLE, "large": LARGE}
    return {str(names[name]): us for name, us in known.items()}
