"""Shared by the commands: their error, their parser, optional packages, and loading a model without a network."""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

import bert_fused

T = TypeVar("T")
Json = dict[str, Any]
Tokenizer = Callable[..., Any]

DTYPES = ("float32", "float16", "bfloat16")
# A folder without any of these has no vocabulary; transformers would make up an empty one.
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model")


class CommandError(Exception):
    """A command cannot start or go on; the message is one sentence for the user."""


class Parser(argparse.ArgumentParser):
    """Prints wrong arguments as one line, and keeps the line breaks of its help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")


def print_json(result: Json) -> None:
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def first_sentence(error: BaseException) -> str:
    """Return an error's first sentence in one line: other libraries go on with advice that does not fit here."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"\. (?=[A-Z])", text)[0].rstrip(".")


def require(*packages: str, extra: str) -> None:
    """Check that packages are installed.

    Raises:
        CommandError: a package is not installed; the message names the extra that installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"{package} is not installed; try: pip install 'bert-fused[{extra}]'")


def version(package: str) -> str:
    """Return an installed package's version, or that of a module imported from elsewhere, such as a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(package.replace("-", "_"))
        return str(getattr(module, "__version__", "not installed"))


def with_bar(items: Iterable[T], total: int) -> Iterable[T]:
    """Return the items, with a progress bar and the time left if rich is installed."""
    try:
        from rich.progress import track
    except ImportError:
        return items
    return track(items, total=total, transient=True)


def device_of(name: str | None) -> torch.device:
    """Return the device of this name; by default a GPU if there is one.

    Raises:
        CommandError: PyTorch cannot use the device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"cannot use the device {name}: {first_sentence(error)}") from error
    if device.type == "meta":
        raise CommandError("cannot use the device meta: it computes nothing")
    return device


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; by default float16 on a GPU, else float32."""
    dtype: torch.dtype = getattr(torch, name or ("float16" if device.type == "cuda" else "float32"))
    return dtype


def load(
    folder: Path, device: torch.device, dtype: torch.dtype, *, head: bool
) -> tuple[nn.Module, Tokenizer | None, list[str]]:
    """Return a folder's model in eval mode, its tokenizer or None, and the names of parameters drawn at random.

    head: load the class that the folder's configuration names; else the model without a head. Parameters are drawn at
    random if the folder's files lack them.

    Raises:
        CommandError: model or tokenizer cannot be loaded, or nothing in the model can be fused.
    """
    if not folder.exists():
        raise CommandError(f"{folder} does not exist")
    if not (folder / "config.json").is_file():
        raise CommandError(f"{folder} is not a model folder: it has no config.json")
    import transformers  # here, since --help and info need no transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # A folder's own code is not run.
    options = {"local_files_only": True, "trust_remote_code": False}
    what = "model"
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        named = getattr(transformers, (config.architectures or ["AutoModel"])[0], None) if head else None
        is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        kind: Any = named if is_model else transformers.AutoModel
        loaded, loading = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
        model: nn.Module = loaded.eval().to(device)
        what, tokenizer = "tokenizer", None
        if any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        # Whatever a broken folder makes transformers raise, the user needs the folder and the first sentence.
        raise CommandError(f"cannot load a {what} from {folder}: {first_sentence(error)}") from error
    with bert_fused.fused(model) as report:
        if not report.fused:
            reasons = "; ".join(dict.fromkeys(report.skipped.values()))
            raise CommandError(f"nothing in {folder} can be fused: {reasons}")
    return model, tokenizer, sorted(loading["missing_keys"])


def load_classifier(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """Return a folder's model in eval mode under a head that gives each row one score, the same one in each process.

    The head is drawn at random. None if transformers has no such class for the model.
    """
    import transformers  # here, since --help and info need no transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, num_labels=1)
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind: Any = transformers.AutoModelForSequenceClassification
        model: nn.Module = kind.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
    return model.eval().to(device)


@contextlib.contextmanager
def blame_model(model: nn.Module) -> Iterator[None]:
    """Report an error in the block as the model's, not this package's, since nothing is fused there.

    Raises:
        CommandError: the block raised an error.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"cannot run {type(model).__name__} on the sample: {first_sentence(error)}") from error
