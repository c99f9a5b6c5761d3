"""The cases that are measured, in order of rank: a budget is spent on the first ones first."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from bert_fused.tune.shapes import MODELS

SUITES = ("modules", "pooler", "models", "training")
RIVALS = ("standard", "compilers", "max-autotune")

NAMES = ("BERT-base", "MiniLM", "BERT-large")
HEADLINE_ROWS = (8192, 512, 2048, 32, 32768)
OTHER_ROWS = (128, 1, 4096, 16384, 8, 77, 1000, 5003)
BATCHES = (32, 1, 128, 1024, 2, 4, 8, 16, 64, 256, 512)
# Batch, the longest sequence, and whether the batch is ragged: lengths are log-normal then.
RAGGED_SHAPES = ((32, 128, True), (256, 128, True), (32, 512, True))
MODEL_SHAPES = ((32, 128, False), *RAGGED_SHAPES, (1, 128, False), (8, 128, False), (256, 128, False))
MODEL_SHAPES += ((32, 512, False),)

# Gated MLPs: K, and N, the rows of the weight that has both halves.
GATED = {"ModernBERT-base": (768, 2304), "ModernBERT-large": (1024, 5248)}

# The shapes of tritonbench's operator inductor_fused_linear_gelu: batch 4 of sequence 2048, N = 4 K.
TRITONBENCH = tuple((8192, 4 * K, K) for K in (1024, 2048, 4096, 8192))


# Lengths of a ragged batch are log-normal and cut off at the longest. The medians give fills of about 0.5, 0.2 and 0.9.
# With the last one every length is cut off, so that the mask keeps every token.
RAGGED_MEDIAN, OTHER_MEDIANS, CUT_OFF = 0.35, (0.15, 1.8), 100.0


CPU_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One line of the report. ``M``, ``N`` and ``K`` are those of ``[M, K] @ [N, K].T``.

    model: the model with this shape. activation: the module's, as the operator names it, for a gated one as in
    ``kernels/gated.py``. dtype: a torch dtype, or "tf32" for float32 with TF32 products. batch and sequence: of a
    pooler's or a model's input. ragged: the sequences of a model's batch differ in length. median: of those lengths, as
    a share of the longest; a record has the fill that results. head: the model is a sequence classifier, such as a
    cross-encoder, and its logits are the output.
    rivals: "standard"; "compilers" on a CPU, where torch.compile and ONNX Runtime are not among the standard ones; or
    "max-autotune" for the few cases that can afford to compile it.
    """

    suite: str
    model: str
    dtype: str
    activation: str
    M: int
    N: int
    K: int
    batch: int | None = None
    sequence: int | None = None
    ragged: bool = False
    rivals: str = "standard"
    median: float = RAGGED_MEDIAN
    head: bool = False

    def __str__(self) -> str:
        return describe(dataclasses.asdict(self))


def describe(case: dict[str, Any]) -> str:
    """Describe a case, as a record holds it, in one line."""
    shape = f"M={case['M']} K={case['K']} N={case['N']}"
    if case["batch"] is not None:
        shape = f"B={case['batch']} S={case['sequence']}" + (_lengths(case) if case["ragged"] else "")
    rivals = f" ({case['rivals']})" if case["rivals"] == "max-autotune" else ""
    head = " classifier" if case.get("head") else ""
    return f"{case['suite']} {case['model']}{head} {shape} {case['dtype']} {case['activation']}{rivals}"


def _lengths(case: dict[str, Any]) -> str:
    median = case.get("median", RAGGED_MEDIAN)
    return " ragged" + (f" median {median:g}" if median != RAGGED_MEDIAN else "")


def cases(suites: tuple[str, ...], device: str, quick: bool) -> list[Case]:
    """Return the cases of some suites, each once, most important first."""
    ranked = _on_cpu(quick) if device == "cpu" else _quick() if quick else _on_gpu()
    return [case for case in dict.fromkeys(ranked) if case.suite in suites]


def _module(model: str, M: int, dtype: str = "bfloat16", activation: str = "gelu", suite: str = "modules") -> Case:
    K, N = MODELS[model]
    return Case(suite, model, dtype, activation, M, N, K)


def _gated(model: str, M: int, dtype: str = "bfloat16", suite: str = "modules") -> Case:
    K, N = GATED[model]
    return Case(suite, model, dtype, "gelu(a)*b", M, N, K)


def _gated_model(model: str, batch: int, sequence: int, dtype: str = "bfloat16") -> Case:
    return dataclasses.replace(_gated(model, batch * sequence, dtype, "models"), batch=batch, sequence=sequence)


def _pooler(model: str, batch: int, sequence: int = 128, dtype: str = "bfloat16") -> Case:
    K, _ = MODELS[model]
    return Case("pooler", model, dtype, "tanh", batch, K, K, batch, sequence)


def _model(model: str, batch: int, sequence: int, ragged: bool = False, dtype: str = "bfloat16") -> Case:
    K, N = MODELS[model]
    return Case("models", model, dtype, "gelu", batch * sequence, N, K, batch, sequence, ragged)


def _on_gpu() -> Iterator[Case]:
    for M, model in product(HEADLINE_ROWS, NAMES):
        yield _module(model, M)
    for model in NAMES:
        yield _pooler(model, 32)
    for model in NAMES:
        yield _model(model, 32, 128)
    # One case of each kind comes before a second of any, since a budget of eight minutes may end here.
    yield _module("BERT-base", 8192, suite="training")
    yield _gated("ModernBERT-base", 8192)
    yield _model("BERT-base", 32, 128, ragged=True)
    yield dataclasses.replace(_model("MiniLM", 32, 512, ragged=True), head=True)  # as a cross-encoder reranks
    for shape in RAGGED_SHAPES:
        yield _model("BERT-base", *shape)
    for M, model in product((8192, 512, 2048, 32768), NAMES):
        yield _module(model, M, suite="training")
    for suite, M, model in product(("modules", "training"), (8192, 512, 2048, 32), GATED):
        yield _gated(model, M, suite=suite)
    for shape, model in product(MODEL_SHAPES, NAMES):
        yield _model(model, *shape)
    for shape, model in product(((32, 128), (1, 128), (32, 512), (8, 128)), GATED):
        yield _gated_model(model, *shape)
    for median, model in product(OTHER_MEDIANS, NAMES):
        yield dataclasses.replace(_model(model, 32, 128, True), median=median)
    for median, model in product((RAGGED_MEDIAN, CUT_OFF), NAMES):
        yield dataclasses.replace(_model(model, 32, 128, True), median=median, head=True)
    for shape, model in product(RAGGED_SHAPES[1:], NAMES):
        yield dataclasses.replace(_model(model, *shape), head=True)
    for M, model in product(OTHER_ROWS, NAMES):
        yield _module(model, M)
    for sequence, batch, model in product((128, 512), BATCHES, NAMES):
        yield _pooler(model, batch, sequence)
    for M, N, K in TRITONBENCH:
        yield Case("modules", "tritonbench", "bfloat16", "gelu", M, N, K)
    for dtype, shape, model in product(("float16",), MODEL_SHAPES, NAMES):
        yield _model(model, *shape, dtype=dtype)
    # The rest fills whatever time is left: every dtype, GELU, tanh GELU and ReLU, in both directions.
    rows = HEADLINE_ROWS + OTHER_ROWS
    for suite, dtype, activation, M, model in product(
        ("modules", "training"), ("bfloat16", "float16", "tf32", "float32"), ("gelu", "gelu_tanh", "relu"), rows, NAMES
    ):
        yield _module(model, M, dtype, activation, suite)
    for dtype, sequence, batch, model in product(("float16", "tf32", "float32"), (128, 512), BATCHES, NAMES):
        yield _pooler(model, batch, sequence, dtype)
    # Each takes minutes, so these come last: --rivals max-autotune measures them alone.
    costly = [_module(model, 8192) for model in NAMES] + [_module("BERT-base", 512), _pooler("BERT-base", 32)]
    for case in (*costly, _model("BERT-base", 32, 128)):
        yield dataclasses.replace(case, rivals="max-autotune")


def _quick() -> Iterator[Case]:
    yield from (_module("BERT-base", 8192), _module("BERT-base", 512), _pooler("BERT-base", 32))
    yield from (_model("MiniLM", 8, 128), _module("BERT-base", 2048, suite="training"))


def _on_cpu(quick: bool) -> Iterator[Case]:
    """Sizes that one thread finishes in seconds, at most."""
    if quick:
        yield from (_module("MiniLM", M, "float32") for M in (8, 32))
        yield _pooler("MiniLM", 8, 16, "float32")
        yield from (_model("MiniLM", 2, 16, ragged, "float32") for ragged in (False, True))
        yield _module("MiniLM", 32, "float32", suite="training")
    else:
        yield from _on_idle_cpu()


def _on_idle_cpu() -> Iterator[Case]:
    # A compiler's time hardly depends on the fill, and compiling takes most of the run, so few ragged cases have it.
    def compiled(case: Case) -> Case:
        return dataclasses.replace(case, rivals="compilers")

    for dtype, shape in product(CPU_DTYPES, ((8, 128), (1, 16), (1, 128))):
        yield compiled(_model("MiniLM", *shape, dtype=dtype))
    for dtype in CPU_DTYPES:
        encoder = _model("MiniLM", 32, 128, True, dtype)
        yield compiled(encoder)
        yield compiled(dataclasses.replace(encoder, ragged=False))
        yield from (dataclasses.replace(encoder, median=median) for median in OTHER_MEDIANS)
        for median in (RAGGED_MEDIAN, *OTHER_MEDIANS, CUT_OFF):
            yield dataclasses.replace(encoder, median=median, head=True)
    for M, dtype in product((32, 512, 1, 8, 128, 2048), CPU_DTYPES[::-1]):
        yield compiled(_module("MiniLM", M, dtype))
    for model, dtype in product(("MiniLM", "BERT-base"), CPU_DTYPES[::-1]):
        yield compiled(_pooler(model, 32, dtype=dtype))
    for M, dtype in product((1, 32, 512), CPU_DTYPES[::-1]):
        yield compiled(_module("BERT-base", M, dtype))
    for M in (32, 512):
        yield _module("MiniLM", M, "float32", suite="training")
    for dtype, M in product(CPU_DTYPES[::-1], (512, 32, 2048)):
        yield compiled(_gated("ModernBERT-base", M, dtype))
    yield compiled(_gated("ModernBERT-large", 512))
    yield _gated("ModernBERT-base", 512, "float32", "training")
    for shape in ((1, 128), (8, 128), (16, 128)):
        yield _gated_model("ModernBERT-base", *shape)
    yield from (_gated_model("ModernBERT-base", batch, 128, "float32") for batch in (1, 8))
    for dtype, shape in product(CPU_DTYPES[::-1], ((1, 16), (1, 128), (8, 128))):
        yield compiled(_model("BERT-base", *shape, dtype=dtype))
    for dtype, median in product(CPU_DTYPES[::-1], (RAGGED_MEDIAN, *OTHER_MEDIANS)):
        yield dataclasses.replace(_model("BERT-base", 32, 128, True, dtype), median=median)
    yield from (_model("BERT-base", 32, 128, dtype=dtype) for dtype in CPU_DTYPES[::-1])
