"""Recognise the modules of transformers that can be fused: those whose class's own code is a known chain of steps.

A chain is the steps that a method applies to its one argument, in order, under any names of variables: ``x[:, 0]`` is
the step "[:,0]", ``self.dense(x)`` is "dense", ``torch.tanh(x)`` is "torch.tanh()". With ``a, b = x.chunk(2, dim=-1)``
the step ``self.act(a) * b`` is "act(a)*b"; ``self.act(self.gate(x)) * self.up(x)`` is "gate act *up". Code that does
anything else is no chain, and its class is left alone. Nothing here runs when a module is called.
"""

import ast
import functools
import inspect
import re
import sys
import textwrap
import tokenize
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..guards import class_is_patched, is_defined_in
from ..kernels.gated import gated, parse

# The known chains, by the method that has them. Fusing joins linear layer and activation; later steps stay unchanged.
_CHAINS = {
    "forward": (
        "dense intermediate_act_fn",  # BertIntermediate and 63 others
        "dense gelu()",  # EsmIntermediate
        "[:,0] dense activation",  # BertPooler and 46 others
        "fc1 activation_fn fc2",  # ViT, CLIP, SigLIP
        "intermediate_dense intermediate_act_fn intermediate_dropout output_dense output_dropout",  # Wav2Vec2
        "dense transform_act_fn LayerNorm",  # BERT's head for masked words
        "dense activation LayerNorm",  # ELECTRA's
        "dense activation LayerNorm decoder",  # ALBERT's
        "dense gelu() layer_norm decoder",  # RoBERTa's
        "[:,0] dropout dense torch.tanh() dropout out_proj",  # RoBERTa's classification head
        "[:,0] dropout dense activation dropout out_proj",  # ELECTRA's
        "dropout dense torch.tanh() dropout out_proj",  # BART's
        "Wi act(a)*b drop Wo",  # ModernBERT
        "gate_up_proj activation_fn(a)*b down_proj",  # Phi-3 and 9 others
        "input_linear activation(a)*b output_linear",  # Granite's shared experts
        "fc1 a*activation_fn(b) fc2",  # Moonshine
        "proj a*activation_fn(b)",  # CLVP
        "gate_proj act_fn *up_proj down_proj",  # NomicBERT, and Llama and its kin
        "gate_proj act_fn *up_proj dropout down_proj",  # GTE
    ),
    "ff_chunk": (
        "lin1 activation lin2 dropout",  # DistilBERT
        "ffn activation ffn_output",  # ALBERT
    ),
}
# Formula of an activation that a model's file defines -> the kernels' name for it.
_FORMULAS = {"x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))": "gelu"}

# Endings of the names of classes that are expected to hold a linear layer and its activation.
_EXPECTED_IN = ("Intermediate", "Pooler", "ClassificationHead", "FeedForward", "FFN")

_FIRST, _DROPOUT = "[:,0]", "dropout"
_HOME = re.compile(r"transformers\.models\.\w+\.modeling_\w+")


class Block(NamedTuple):
    """A known chain.

    method: the name of the method. first: the chain begins with position 0. dropout: the attribute ``dropout`` comes
        next. linear, activation: attributes of the module; a name that ends in "()" is a function of its file. rest:
        attributes that are called one after the other on the result. half: of a gated activation (``kernels/gated.py``)
        the half that is activated. times: the attribute whose result for the same input is multiplied in before rest.
    """

    method: str
    first: bool
    dropout: bool
    linear: str
    activation: str
    rest: tuple[str, ...]
    half: str = ""
    times: str = ""


def _block(method: str, chain: str) -> Block:
    steps = chain.split()
    first = steps[0] == _FIRST
    dropout = steps[first] == _DROPOUT
    linear, step, *rest = steps[first + dropout :]
    activation, half = parse(step)
    times = rest.pop(0)[1:] if rest and rest[0].startswith("*") else ""
    return Block(method, first, dropout, linear, activation, tuple(rest), half, times)


_BLOCKS: dict[tuple[str, tuple[str, ...] | None], Block] = {
    (method, tuple(chain.split())): _block(method, chain) for method, chains in _CHAINS.items() for chain in chains
}
INTERMEDIATE = _BLOCKS["forward", ("dense", "intermediate_act_fn")]
POOLER = _BLOCKS["forward", (_FIRST, "dense", "activation")]


def block_of(kind: type) -> Block | None:
    """Return the block that a class of transformers computes; None for other classes and for subclasses."""
    if not _is_block_class(kind):
        return None
    functions = {method: getattr(kind, method, None) for method in _CHAINS}
    own = {method: function for method, function in functions.items() if is_defined_in(function, kind.__module__)}
    return block_in({method: chain_of(function) for method, function in own.items()})


def block_in(chains: dict[str, tuple[str, ...] | None]) -> Block | None:
    """Return the block of a class with these methods (name -> chain), or None."""
    return next((_BLOCKS[item] for item in chains.items() if item in _BLOCKS), None)


def lookalike_reason(module: nn.Module) -> str | None:
    """Return why a module of transformers that looks fusible is not; None if it does not look fusible."""
    kind = type(module)
    children = module._modules.keys()
    alike = kind.__name__.endswith(_EXPECTED_IN) or any(
        {block.linear, block.activation} <= children for block in _BLOCKS.values()
    )
    if not alike or not _is_block_class(kind):
        return None
    if class_is_patched(kind):
        return "its class's forward was replaced"
    chain = chain_of(kind.forward)
    does = f" ({' > '.join(chain)})" if chain is not None else ""
    return f"{kind.__name__}.forward{does} is not among those that can be fused"


def _is_block_class(kind: type) -> bool:
    """Tell whether a model's file defines a class, other than a whole model, which transformers finds by its class."""
    if not _HOME.fullmatch(kind.__module__) or vars(sys.modules[kind.__module__]).get(kind.__name__) is not kind:
        return False
    return not issubclass(kind, PreTrainedModel)


@functools.cache
def chain_of(function: Callable[..., object]) -> tuple[str, ...] | None:
    """Read a method's code as a chain of steps; None if it is no chain or has no source."""
    definition = _definition(function)
    return read_chain(definition) if definition is not None else None


def read_chain(definition: ast.FunctionDef) -> tuple[str, ...] | None:
    """Read a parsed method as a chain. Types and docstrings are ignored; any other code makes it no chain: None."""
    arguments = definition.args
    if definition.decorator_list or arguments.vararg or arguments.kwonlyargs or arguments.defaults:
        return None
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if len(names) != 2:
        return None
    statements = _statements(definition)
    if not statements:
        return None
    *assignments, last = statements
    owner = names[0]
    current: tuple[str, ...] = (names[1],)
    chain: list[str] = []
    for statement in assignments:
        match statement:
            case ast.Assign([ast.Name() | ast.Tuple() as target], value) if owner not in _names(target):
                halved = _halved(value)
                steps = _steps(halved or value, owner, current)
            case _:
                return None
        current = _names(target)
        if halved is not None and len(current) == 1:  # both halves under one name
            current = (f"{current[0]}[0]", f"{current[0]}[1]")
        if steps is None or len(set(current)) != (2 if halved is not None else 1):
            return None
        chain += steps
    steps = _steps(last.value, owner, current) if isinstance(last, ast.Return) else None
    return (*chain, *steps) if steps is not None else None


def _names(target: ast.expr) -> tuple[str, ...]:
    """Return the names of the variables that are assigned; none if anything else is."""
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    names = tuple(part.id for part in parts if isinstance(part, ast.Name))
    return names if len(names) == len(parts) else ()


def _halved(value: ast.expr) -> ast.expr | None:
    """Return what an expression splits in two along the last dimension; None if it does something else."""
    match value:
        case ast.Call(ast.Attribute(inner, "chunk"), arguments, keywords):
            given = [ast.unparse(argument) for argument in (*arguments, *keywords)]
            return inner if given in (["2", "dim=-1"], ["2", "-1"]) else None
    return None


def _gate(left: ast.expr, right: ast.expr, owner: str, halves: tuple[str, ...]) -> str | None:
    """Return the step that multiplies two halves, one of them activated; None if the factors are anything else."""
    for activated, factor in ((left, right), (right, left)):
        match activated:
            case ast.Call(ast.Attribute(ast.Name(name), activation), [argument], []) if name == owner:
                found = (ast.unparse(argument), ast.unparse(factor))
                if found in (halves, halves[::-1]):
                    return gated(activation, "first" if found == halves else "second")
    return None


def _steps(value: ast.expr | None, owner: str, current: tuple[str, ...]) -> list[str] | None:
    """Return the steps that an expression applies to the variable ``current``, the first one first, or None.

    current: its name, or those of both halves that it was split into.
    """
    steps: list[str] = []
    while True:
        match value:
            case ast.Name(name) if (name,) == current:
                return steps[::-1]
            case ast.BinOp(left, ast.Mult(), right) if len(current) == 2:
                step = _gate(left, right, owner, current)
                return [step, *steps[::-1]] if step is not None else None
            case ast.BinOp(left, ast.Mult(), right):
                match _steps(left, owner, current), _steps(right, owner, current):
                    case [linear, activation], [other] if other.isidentifier():
                        return [linear, activation, f"*{other}", *steps[::-1]]
                return None
            case ast.Subscript(inner, index) if ast.unparse(index).strip("()") in (":, 0", ":, 0, :"):
                steps.append(_FIRST)
            case ast.Call(ast.Attribute(ast.Name(name), attribute), [inner], []) if name == owner:
                steps.append(attribute)
            case ast.Call(ast.Name() | ast.Attribute() as function, [inner], []):
                steps.append(f"{ast.unparse(function)}()")
            case _:
                return None
        value = inner


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def formula_of(function: object) -> str | None:
    """Return the kernels' name for an activation that a model's file defines, by its code; None if unknown."""
    return _formula(function)


@functools.cache
def _formula(function: object) -> str | None:
    if not _HOME.fullmatch(str(getattr(function, "__module__", ""))):
        return None
    match _definition(function):
        case ast.FunctionDef(args=ast.arguments(args=[ast.arg("x")])) as definition:
            match _statements(definition):
                case [ast.Return(ast.expr() as value)]:
                    return _FORMULAS.get(ast.unparse(value))
    return None


def _definition(function: object) -> ast.FunctionDef | None:
    try:
        # inspect skips the decorators of a function, but not of its ``__code__``.
        code: CodeType = getattr(function, "__code__")  # noqa: B009
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (AttributeError, OSError, TypeError, SyntaxError, tokenize.TokenError):
        return None
    (definition,) = tree.body
    return definition if isinstance(definition, ast.FunctionDef) else None


def _statements(definition: ast.FunctionDef) -> list[ast.stmt]:
    return definition.body[ast.get_docstring(definition) is not None :]
