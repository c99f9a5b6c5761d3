"""Which models of transformers ``fuse`` serves: writes ``docs/models.md``.

``PYTHONPATH=. python tests/support/families.py`` builds, tiny, the models of every folder with a class that can be
fused, and compares each such class in fp32 with Hugging Face's, forward and backward, its kernels interpreted. Exits
with 1 if one differs.
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
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    # Triton reads this when a kernel is decorated, transformers when it is imported.
    os.environ |= {"TRITON_INTERPRET": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import transformers
from models import drawn
from numerics import prepared
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from bert_fused import fuse
from bert_fused.hf.modules import original_class
from bert_fused.hf.recognize import Block, block_in, read_chain
from bert_fused.hf.verify import _tensors

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"
MODELS = Path(transformers.__file__).parent / "models"

# Ending of the name of a configuration's integer -> its value in a tiny model. The first that fits counts.
SIZES = {
    r"head_dim|dim_head|d_kv": 8,
    r"heads|n_head": 4,
    r"(?<!extract_)layers|n_layer|depth": 2,
    r"intermediate_size|ffn_dim|mlp_dim|d_ff|feedforward_dim|hidden_dim": 40,
    r"hidden_size|d_model|embed_dim|embedding_size|projection_dim|n_embd|emb_dim|[^_]dim|^dim": 32,
    r"image_size": 32,
    r"patch_size": 8,
}
# Settings of the folders whose models cannot be built from the defaults.
SETTINGS = {"esm": {"vocab_size": 40, "pad_token_id": 1, "mask_token_id": 2}}
# Arguments of classes that take more than a configuration.
ARGUMENTS = {"dim": 32, "input_dim": 32, "inner_dim": 32, "num_classes": 3, "pooler_dropout": 0.0}
# The largest difference allowed between fp32 results, relative to the largest of them.
TOLERANCE = 1e-5
# Names of classes that a user may expect to be fused.
_EXPECTED = re.compile("(Intermediate|Pooler|MLP|Mlp|FFN|FeedForward|PredictionHeadTransform|ClassificationHead)$")


@dataclass
class Folder:
    """A folder of transformers' models.

    types: the types of its models. blocks: class -> block, for classes that can be fused. others: class -> why not, for
        classes that a user may expect to be fused.
    """

    name: str
    types: list[str]
    blocks: dict[str, Block] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def folders() -> Iterator[Folder]:
    """Read every folder that has models."""
    for name in sorted({model_type_to_module_name(model_type) for model_type in CONFIG_MAPPING_NAMES}):
        if any((MODELS / name).glob("modeling_*.py")):
            yield read(name)


def read(name: str) -> Folder:
    """Read a folder's files as text; nothing is imported."""
    folder = Folder(name, [kind for kind in CONFIG_MAPPING_NAMES if model_type_to_module_name(kind) == name])
    for file in sorted((MODELS / name).glob("modeling_*.py")):
        for definition in ast.parse(file.read_text()).body:
            if isinstance(definition, ast.ClassDef):
                _put(folder, definition)
    return folder


def _put(folder: Folder, definition: ast.ClassDef) -> None:
    methods = {method.name: method for method in definition.body if isinstance(method, ast.FunctionDef)}
    block = block_in({name: read_chain(method) for name, method in methods.items()})
    if block is not None:
        folder.blocks[definition.name] = block
    elif _EXPECTED.search(definition.name) and "forward" in methods:
        chain = read_chain(methods["forward"])
        products = [n for n in ast.walk(methods["forward"]) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult)]
        gated = any(isinstance(product.left, ast.Call) or isinstance(product.right, ast.Call) for product in products)
        folder.others[definition.name] = " > ".join(chain) if chain else "gated" if gated else "other code"


def check(folder: Folder) -> dict[str, str]:
    """Return class -> how it was checked: "model" (inside one), "alone", or a sentence that says why it was not."""
    files = sorted((MODELS / folder.name).glob("modeling_*.py"))
    homes = [importlib.import_module(f"transformers.models.{folder.name}.{file.stem}") for file in files]
    kinds = {name: vars(home)[name] for home in homes for name in folder.blocks if name in vars(home)}
    verdicts: dict[str, str] = {}
    for model in models(homes, SETTINGS.get(folder.name, {})):
        inside = {name: module for module in model.modules() for name, kind in kinds.items() if type(module) is kind}
        for name in inside.keys() - verdicts.keys():
            verdicts[name] = check_alone(inside[name], folder.blocks[name])
        if any(verdicts[name] == "alone" for name in inside):
            called, difference = check_model(model)
            verdicts |= {name: difference or "model" for name in inside if kinds[name] in called}
        if set(verdicts.values()) == {"model"} and verdicts.keys() == kinds.keys():
            break
    for name in kinds.keys() - verdicts.keys():
        module = built(kinds[name], homes)
        verdicts[name] = "fused, but not compared: no configuration was found"
        if module is not None:
            verdicts[name] = check_alone(module, folder.blocks[name])
    return verdicts


def models(homes: list[ModuleType], settings: dict[str, Any]) -> Iterator[PreTrainedModel]:
    """Yield the models of some files that can be built tiny, those without a head first."""
    own = [item for home in homes for item in vars(home).values() if getattr(item, "__module__", "") == home.__name__]
    kinds = [item for item in own if isinstance(item, type) and issubclass(item, PreTrainedModel)]
    for kind in sorted(kinds, key=lambda kind: not kind.__name__.endswith("Model")):
        if kind.config_class is not None and not kind.__name__.endswith("PreTrainedModel"):
            model = _tried(lambda kind=kind: kind(tiny(kind.config_class, settings)))
            if model is not None:
                yield drawn(model).eval()


def built(kind: type[nn.Module], homes: list[ModuleType]) -> nn.Module | None:
    """A module by itself, from the first configuration that it takes: a tiny one, or a default one."""
    values = [value for home in homes for value in vars(home).values() if isinstance(value, type)]
    classes = [value for value in values if issubclass(value, PreTrainedConfig) and value is not PreTrainedConfig]
    names = inspect.signature(kind).parameters
    for make in (tiny, lambda config_class: config_class()):
        configs = [config for config in (_tried(make, config_class) for config_class in classes) if config is not None]
        parts = [part for config in configs for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
        for config in (*configs, *parts):
            given = ARGUMENTS | {"config": config}
            module = _tried(lambda given=given: kind(**{name: given[name] for name in names if name in given}))
            if module is not None:
                return module.eval()
    return None


def tiny(kind: type[PreTrainedConfig], settings: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration: the class's default with the numbers of ``SIZES``."""

    def shrunk(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shrunk(key, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):  # the types of layers: of as many as there are
            return [shrunk(name, item) for item in (value[:2] if name.endswith("layer_types") else value)]
        if isinstance(value, int) and not isinstance(value, bool):
            return min(value, next((size for ending, size in SIZES.items() if re.search(f"({ending})$", name)), value))
        return value

    return kind.from_dict({name: shrunk(name, value) for name, value in kind().to_dict().items()} | (settings or {}))


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Make the inputs that this model has arguments for."""
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    ids = torch.arange(3, 17).view(2, 7)
    batch = {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "bbox": torch.zeros(2, 7, 4, dtype=torch.long),
        "pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), height, width),
        "input_values": torch.randn(2, 4000),
    }
    return {name: value for name, value in batch.items() if name in inspect.signature(model.forward).parameters}


def check_alone(module: nn.Module, block: Block) -> str:
    """Compare a module on random hidden states: "alone", or why it was not fused."""
    theirs = copy.deepcopy(module)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter.requires_grad_(), std=max(parameter.shape[-1], 1) ** -0.5)  # also what is frozen
    ours = copy.deepcopy(theirs)
    report = fuse(ours)
    if "" not in report.fused:
        return report.skipped[""]
    hidden = torch.randn(2, 5, getattr(ours, block.linear).in_features)
    return _difference(*(run(getattr(m, block.method), m, hidden) for m in (ours, theirs))) or "alone"


def check_model(model: PreTrainedModel) -> tuple[set[type[nn.Module] | None], str | None]:
    """Compare a whole model: the classes of the fused modules that it called, none if it wants other inputs."""
    ours, batch = _tried(copy.deepcopy, model), _tried(inputs, model)
    theirs = _tried(lambda: run(model, model, **batch))
    if ours is None or theirs is None:
        return set(), None
    fuse(ours)
    called: set[type[nn.Module] | None] = set()
    for module in ours.modules():
        module.register_forward_hook(lambda module, *_: called.add(original_class(module)))
    return called, _difference(run(ours, ours, **batch), theirs)


def run(call: Callable[..., Any], module: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[list[Tensor | None]]:
    """The output tensors, and the gradient of each parameter or None."""
    torch.manual_seed(0)
    outputs = [tensor for _, tensor in _tensors(call(*args, **kwargs))]
    losses = [(out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs if out.requires_grad]
    torch.stack(losses).sum().backward()
    return [[out.detach() for out in outputs], [parameter.grad for parameter in module.parameters()]]


def _difference(ours: list[list[Tensor | None]], theirs: list[list[Tensor | None]]) -> str | None:
    """Say what differs; None if outputs and gradients are the same up to fp32's rounding."""
    for what, mine, other in zip(("outputs", "gradients"), ours, theirs, strict=True):
        if [tensor is None for tensor in mine] != [tensor is None for tensor in other]:
            return f"DIFFERS: other {what}"
        pairs = [(m, o) for m, o in zip(mine, other, strict=True) if m is not None and o is not None and o.numel()]
        sizes = [float(o.abs().nan_to_num(0, 0, 0).max()) for _, o in pairs]
        for (m, o), size in zip(pairs, sizes, strict=True):
            error = float((m - o).abs().masked_fill((m == o) | (m.isnan() & o.isnan()), 0).max())
            # A gradient that is zero on paper, such as that of the keys' bias, is the rounding noise of its summands.
            if not error <= TOLERANCE * (size + max(sizes)):
                return f"DIFFERS: {what} by {error:.2g} of {size:.2g}"
    return None


def _tried(make: Callable[..., Any], *args: Any) -> Any:
    """Return a call's result, or None if it raises: some models want settings or libraries that cannot be guessed."""
    try:
        torch.manual_seed(0)
        return make(*args)
    except Exception:
        return None


def page(rows: list[tuple[Folder, dict[str, str]]]) -> str:
    """The page, from every folder with the verdicts on its classes."""
    passed = [verdicts for _, verdicts in rows if {"model", "alone"} & set(verdicts.values())]
    whole = [verdicts for verdicts in passed if "model" in verdicts.values()]
    lines = [f"| {' | '.join(_cells(folder, verdicts))} |\n" for folder, verdicts in rows]
    return f"""\
# Models

What `fuse` takes of transformers {transformers.__version__}. Written by `make models`; do not edit.

**{len(passed)} of {len(rows)} model folders have classes that are fused.** Each of these was compared
with Hugging Face's in fp32, outputs and all gradients, on a CPU with the kernels interpreted; in
{len(whole)} folders inside a whole model, tiny and with random weights. An element may differ by
{TOLERANCE:g} of its tensor's largest plus {TOLERANCE:g} of the largest of all outputs or gradients.

A class is fused if its own code is one of the chains of steps in `bert_fused/hf/recognize.py`. The rest
are left alone, and the table says what their code is: another chain, gated (a product of two layers), or
more than a chain. A module with an adapter, a hook or an activation without a kernel is left alone
wherever it is.

| folder | model types | fused, checked inside a model | fused, checked alone | the rest |
|---|---|---|---|---|
{"".join(lines)}"""


def _cells(folder: Folder, verdicts: dict[str, str]) -> Iterator[str]:
    yield folder.name
    yield ", ".join(folder.types)
    for how in ("model", "alone"):
        yield ", ".join(name for name in folder.blocks if verdicts.get(name) == how)
    reasons = {name: verdicts[name] for name in folder.blocks if verdicts[name] not in ("model", "alone")}
    yield "; ".join(f"{name}: {reason}" for name, reason in (reasons | folder.others).items())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/support/families.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE.md", help="default: %(default)s")
    parser.add_argument("folders", nargs="*", help="default: all")
    arguments = parser.parse_args(argv)
    rows = []
    for folder in folders():
        if not arguments.folders or folder.name in arguments.folders:
            rows.append((folder, check(folder) if folder.blocks else {}))
            print(f"\r{folder.name}".ljust(40), end="", file=sys.stderr, flush=True)
    arguments.out.write_text(page(rows))
    named = [f"{folder.name}.{name} {verdict}" for folder, verdicts in rows for name, verdict in verdicts.items()]
    wrong = [line for line in named if " DIFFERS" in line]
    print("", *wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with prepared():
        sys.exit(main(sys.argv[1:]))
