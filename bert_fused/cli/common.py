"""What the subcommands share: one kind of error, and loading a model from a folder without a network."""

import argparse
import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import nn

Tokenizer = Callable[..., Any]

DTYPES = ("float32", "float16", "bfloat16")
# A folder without any of these has no vocabulary; transformers would make up an empty one.
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model")


class CommandError(Exception):
    """A command cannot start or go on; the message is one sentence for the user."""


class Parser(argparse.ArgumentParser):
    """One line where arguments are wrong, and help that keeps its line breaks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")


def print_json(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def reasons(skipped: dict[str, str]) -> str:
    """Why modules were left alone, each reason once."""
    return "; ".join(dict.fromkeys(skipped.values()))


def first_sentence(error: BaseException) -> str:
    """An error's message in one line: other libraries go on with advice that does not fit here."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"\. (?=[A-Z])", text)[0].rstrip(".")


def require(*packages: str, extra: str) -> None:
    """
    Raises:
        CommandError: a package is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"{package} is not installed; try: pip install 'bert-fused[{extra}]'")


def device_of(name: str | None) -> torch.device:
    """The device of this name; by default a GPU if there is one.

    Raises:
        CommandError: it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"cannot use the device {name}: {first_sentence(error)}") from error
    if device.type == "meta":
        raise CommandError("cannot use the device meta: it computes nothing")
    return device


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, *, head: bool) -> tuple[nn.Module, list[str]]:
    """A folder's model in eval mode, and the names of parameters that its files lack, which are random numbers.

    head: of the class that its configuration names; else the model without a head.

    Raises:
        CommandError: it cannot be loaded.
    """
    if not folder.exists():
        raise CommandError(f"{folder} does not exist")
    if not (folder / "config.json").is_file():
        raise CommandError(f"{folder} is not a model folder: it has no config.json")
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # A folder's own code is not run.
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        kind: Any = transformers.AutoModel
        named = getattr(transformers, (config.architectures or ["AutoModel"])[0], None) if head else None
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            kind = named
        model, loading = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
        model = cast(nn.Module, model).eval().to(device)
    except Exception as error:
        # Whatever a broken folder makes transformers raise, the user needs the folder and the first sentence.
        raise CommandError(f"cannot load a model from {folder}: {first_sentence(error)}") from error
    return model, sorted(loading["missing_keys"])


@contextlib.contextmanager
def its_fault(model: nn.Module) -> Iterator[None]:
    """What fails here fails without us: the model is not fused.

    Raises:
        CommandError: something failed.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"cannot run {type(model).__name__} on the sample: {first_sentence(error)}") from error


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """A folder's tokenizer; None if it has none.

    Raises:
        CommandError: it cannot be loaded.
    """
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        return None
    from transformers import AutoTokenizer

    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:
        raise CommandError(f"cannot load a tokenizer from {folder}: {first_sentence(error)}") from error
