"""Which models of transformers ``fuse`` serves: writes ``docs/models.md``.

``PYTHONPATH=. python tests/families.py`` builds, tiny, the models of every folder with a class that can be fused, and
compares each such class in fp32 with Hugging Face's, forward and backward, its kernels interpreted. Exits with 1 if one
differs.
"""

import argparse
import ast
import copy
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    # Triton reads this when a kernel is decorated, transformers when it is imported.
    os.environ |= {"TRITON_INTERPRET": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import transformers
from models import drawn
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from bert_fused import fuse
from bert_fused.blocks import Block, block_in, read_chain
from bert_fused.modules import original_class
from bert_fused.verification import _tensors

PAGE = Path(__file__).resolve().parent.parent / "docs/models.md"
MODELS = Path(transformers.__file__).parent / "models"

# What the names of a configuration's integers end with -> what they are in a tiny model. The first that fits counts.
SIZES = {
    r"head_dim|dim_head|d_kv": 8,
    r"heads|n_head": 4,
    r"(?<!extract_)layers|n_layer|depth": 2,
    r"intermediate_size|ffn_dim|mlp_dim|d_ff|feedforward_dim|hidden_dim": 40,
    r"hidden_size|d_model|embed_dim|embedding_size|projection_dim|n_embd|emb_dim|[^_]dim|^dim": 32,
    r"image_size": 32,
    r"patch_size": 8,
}


class Differs(Exception):
    """Fused is not what unfused is."""


def methods_of(definition: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {statement.name: statement for statement in definition.body if isinstance(statement, ast.FunctionDef)}


def classes_of(folder: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Every class in a folder's files of models, with the file's name. Nothing is imported."""
    for path in sorted((MODELS / folder).glob("modeling_*.py")):
        for definition in ast.parse(path.read_text()).body:
            if isinstance(definition, ast.ClassDef):
                yield path.stem, definition


def known() -> dict[str, dict[str, Block]]:
    """Folder -> class -> block, of every class of transformers that can be fused."""
    table: dict[str, dict[str, Block]] = {}
    for folder in sorted(path.name for path in MODELS.iterdir() if path.is_dir()):
        for _, definition in classes_of(folder):
            block = block_in({name: read_chain(method) for name, method in methods_of(definition).items()})
            if block is not None:
                table.setdefault(folder, {})[definition.name] = block
    return table


def tiny(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small configuration: the class's default, with the integers of ``SIZES``."""

    def shrunk(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shrunk(key, item) for key, item in value.items()}
        if isinstance(value, int) and not isinstance(value, bool):
            small = (size for ending, size in SIZES.items() if re.search(f"({ending})$", name))
            return min(value, next(small, value))
        return value

    return kind.from_dict({name: shrunk(name, value) for name, value in kind().to_dict().items()})


def check(folder: str, classes: dict[str, Block]) -> dict[str, str]:
    """Class -> how it was checked: inside a "model", or as a "module", or why it was not."""
    homes = [
        importlib.import_module(f"transformers.models.{folder}.{p.stem}")
        for p in (MODELS / folder).glob("modeling_*.py")
    ]
    kinds = {name: vars(home)[name] for home in homes for name in classes if name in vars(home)}
    verdicts: dict[str, str] = {}
    configs = []
    for model_class in model_classes(homes):
        waiting = [name for name in kinds if verdicts.get(name) != "model"]
        if not waiting:
            break
        try:
            config = tiny(model_class.config_class)
            configs.append(config)
            torch.manual_seed(0)
            model = drawn(model_class(config)).eval()
        except Exception as e:
            print("   build", model_class.__name__, type(e).__name__, str(e)[:150])
            continue
        instances = {name: next((m for m in model.modules() if type(m) is kinds[name]), None) for name in waiting}
        instances = {name: module for name, module in instances.items() if module is not None}
        if not instances:
            continue
        for name, module in instances.items():
            if name not in verdicts:
                verdicts[name] = check_module(module, classes[name])
        try:
            called = check_model(model)
        except Differs as e:
            print("  DIFFERS", model_class.__name__, e)
            continue
        except Exception as e:
            print("   run", model_class.__name__, type(e).__name__, str(e)[:150])
            continue
        verdicts |= {name: "model" for name in instances if kinds[name] in called}
    for home in homes:
        for k in vars(home).values():
            if isinstance(k, type) and issubclass(k, PreTrainedConfig) and k is not PreTrainedConfig:
                for make in (tiny, lambda k: k()):
                    try:
                        configs.append(make(k))
                    except Exception:
                        pass
    configs += [sub for config in configs for sub in vars(config).values() if isinstance(sub, PreTrainedConfig)]
    for name in kinds.keys() - verdicts.keys():
        for config in configs:
            try:
                module = kinds[name](config).eval()
            except Exception as e:
                verdicts.setdefault(name, f"not built: {type(e).__name__}: {e}"[:100])
                continue
            verdicts[name] = check_module(module, classes[name])
            break
    return verdicts


def model_classes(homes: list[ModuleType]) -> list[type[PreTrainedModel]]:
    """The models of some files, those without a head first."""
    kinds = [
        value
        for home in homes
        for value in vars(home).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == home.__name__
    ]
    concrete = [
        kind for kind in kinds if kind.config_class is not None and not kind.__name__.endswith("PreTrainedModel")
    ]
    return sorted(concrete, key=lambda kind: not kind.__name__.endswith("Model"))


def check_module(module: nn.Module, block: Block) -> str:
    """Compare one module on random hidden states."""
    ours, theirs = copy.deepcopy(module), copy.deepcopy(module)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    theirs.load_state_dict(ours.state_dict())
    report = fuse(ours)
    if "" not in report.fused:
        return report.skipped[""]
    width = getattr(ours, block.linear).in_features
    hidden = torch.randn(2, 5, width)
    compare(ours, theirs, lambda m: getattr(m, block.method)(hidden))
    return "module"


def check_model(model: nn.Module) -> set[type[nn.Module]]:
    """Compare a whole model, and return the classes of the fused modules that were called."""
    batch = inputs(model)
    theirs = model(**batch)
    ours = copy.deepcopy(model)
    fuse(ours)
    called: set[type[nn.Module]] = set()
    handles = [
        m.register_forward_hook(lambda m, *_: called.add(original_class(m)))
        for m in ours.modules()
        if original_class(m)
    ]
    compare(ours, model, lambda m: m(**batch))
    return called


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    names = inspect.signature(model.forward).parameters
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    size = (size, size) if isinstance(size, int) else tuple(size)
    text = torch.randint(3, 20, (2, 7))
    everything = {
        "input_ids": text,
        "decoder_input_ids": text,
        "bbox": torch.zeros(2, 7, 4, dtype=torch.long),
        "pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), *size),
        "input_values": torch.randn(2, 4000),
    }
    return {name: value for name, value in everything.items() if name in names}


def compare(ours: nn.Module, theirs: nn.Module, call: Callable[[nn.Module], Any]) -> None:
    results, gradients = [], []
    for module in (ours, theirs):
        module.zero_grad()
        torch.manual_seed(0)
        outputs = [t for _, t in _tensors(call(module))]
        results.append(outputs)
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in outputs if t.requires_grad)
        loss.backward()
        gradients.append([p.grad for p in module.parameters()])
    for mine, other in zip(*results, strict=True):
        if not close(mine, other, 1e-4, 0):
            raise Differs(f"out {float((mine - other).abs().max())} {float(other.abs().max())}")
    largest = max(float(g.abs().max()) for g in gradients[1] if g is not None)
    for (name, p), mine, other in zip(theirs.named_parameters(), *gradients, strict=True):
        if (mine is None) != (other is None):
            raise Differs(name)
        if other is not None and not close(mine, other, 1e-3, 1e-4 * largest):
            raise Differs(f"{name} {float((mine - other).abs().max())} {float(other.abs().max())} {largest}")


def close(mine: Tensor, other: Tensor, relative: float, absolute: float) -> bool:
    error = (mine - other).abs()
    error = error.masked_fill((mine == other) | (mine.isnan() & other.isnan()), 0.0)
    return float(error.max()) <= relative * float(other.abs().nan_to_num(0, 0, 0).max()) + absolute


def main(argv):
    import time, collections

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count = collections.Counter()
    for folder, classes in known().items():
        if argv and folder not in argv:
            continue
        t = time.time()
        try:
            v = check(folder, classes)
        except Exception as e:
            v = {"": f"{type(e).__name__} {e}"[:300]}
        count.update(x if x in ("model", "module") else "other" for x in v.values())
        print(folder, v, f"{time.time() - t:.1f}", flush=True)
    print(count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
