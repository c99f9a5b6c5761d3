"""Run candidates for the first time in a child process, so that one that hangs or breaks the GPU spares the tuner.

One child tries candidates one after another. A candidate that kills, hangs or breaks it is tried no more, and another
child goes on.
"""

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection

import torch

from ..kernels.configs import Config
from .search import GpuUnusable, Refused, Shape, first_run, in_one_line

# Seconds that a candidate may take, most of them to compile, and a child to import torch and find the GPU.
LIMIT = 30.0
STARTING = 120.0
# Seconds that the system may take to end a child: it must first stop a kernel that hangs.
ENDING = 10.0

Work = Callable[[Shape, Config, bool, torch.device], None]


class Trials(AbstractContextManager["Trials"]):
    """A context manager to call with a shape, a candidate and whether to keep the pre-activation.

    A call raises ``Refused`` if the candidate failed in the child, and ``GpuUnusable`` if no child can use the GPU.
    work: called in the child; it raises if the candidate fails.
    """

    def __init__(self, device: torch.device, work: Work = first_run) -> None:
        self._device, self._work = device, work
        self._fatal: dict[Config, str] = {}  # how a candidate ended its child

    def __enter__(self) -> "Trials":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, shape: Shape, config: Config, training: bool) -> None:
        if config in self._fatal:
            raise Refused(self._fatal[config])
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
            self._start()
        if error is not None:
            raise Refused(error)

    def _start(self) -> None:
        # A fork would share the parent's CUDA context, which does not survive it.
        context = multiprocessing.get_context("spawn")
        self._pipe, childs_end = context.Pipe()
        self._child = context.Process(target=_try, args=(childs_end, self._device, self._work), daemon=True)
        self._child.start()
        childs_end.close()
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
        self._child.kill()
        self._child.join(ENDING)
        self._pipe.close()


def _try(pipe: Connection, device: torch.device, work: Work) -> None:
    """Run in a child: answer each candidate with its error or None, and whether the GPU still works."""
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
                torch.cuda.empty_cache()  # the parent needs this memory
            except RuntimeError as fatal:
                reason = reason or in_one_line(fatal)
                is_usable = False
        pipe.send((reason, is_usable))
        if not is_usable:
            return
