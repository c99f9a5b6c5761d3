"""Candidates run for the first time in a child process: one that hangs or breaks the GPU costs itself, not the tuner.

One child tries candidates one after another. After one that killed, hung or broke it another child goes on, and that
candidate is tried no more.
"""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from ..kernels.configs import Config
from .search import GpuUnusable, Refused, Shape, first_run, in_one_line

# Seconds for a candidate, which compiles for some, and for a child to import torch and find the GPU.
LIMIT = 30.0
STARTING = 120.0
# Seconds until the system has ended a child: a kernel that hangs has to be stopped first.
ENDING = 10.0

Work = Callable[[Shape, Config, bool, torch.device], None]


class Trials:
    """A context manager, and in it a function of a shape, a candidate and whether the pre-activation is kept.

    The function raises ``Refused`` where the candidate must not be run here, and ``GpuUnusable`` where no child can try
    any more. work: what the child does; it raises if the candidate fails.
    """

    def __init__(self, device: torch.device, work: Work = first_run) -> None:
        self._device, self._work = device, work
        self._child: Any = None
        self._pipe: Connection
        self._fatal: dict[Config, str] = {}  # who ended a child, and how

    def __enter__(self) -> "Trials":
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, shape: Shape, config: Config, training: bool) -> None:
        if config in self._fatal:
            raise Refused(self._fatal[config])
        if self._child is None:
            self._start()
        try:
            self._pipe.send((shape, config, training))
            error, is_usable = self._answer(LIMIT)
        except TimeoutError:
            error, is_usable = f"no result within {LIMIT:g} s", False
        except (EOFError, OSError):
            self._child.join(ENDING)
            error, is_usable = f"it ended the process that tried it (exit code {self._child.exitcode})", False
        if not is_usable:
            self._fatal[config] = str(error)
            self._end()
        if error is not None:
            raise Refused(error)

    def _start(self) -> None:
        # A fork would share the parent's CUDA context, which does not survive it.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_try, args=(theirs, self._device, self._work), daemon=True)
        self._child.start()
        theirs.close()
        try:
            error, _ = self._answer(STARTING)
        except (TimeoutError, EOFError, OSError):
            error = "it did not start"
        if error is not None:
            self._end()
            raise GpuUnusable(f"the process that tries candidates cannot use the GPU: {error}")

    def _answer(self, seconds: float) -> tuple[str | None, bool]:
        if not self._pipe.poll(seconds):
            raise TimeoutError
        error, is_usable = self._pipe.recv()
        return error, is_usable

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join(ENDING)
            self._pipe.close()
            self._child = None


def _try(pipe: Connection, device: torch.device, work: Work) -> None:
    """What a child does: for each candidate it is sent, answer with its error or None, and whether it can go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this
    try:
        torch.zeros(1, device=device)
    except Exception as error:
        pipe.send((in_one_line(error), False))
        return
    pipe.send((None, True))
    while True:
        try:
            shape, config, training = pipe.recv()
        except EOFError:
            return
        reason = None
        is_usable = True
        try:
            work(shape, config, training, device)
        except Exception as error:
            reason = in_one_line(error)
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()  # the parent needs it
            except RuntimeError as fatal:
                reason = reason or in_one_line(fatal)
                is_usable = False
        pipe.send((reason, is_usable))
        if not is_usable:
            return
