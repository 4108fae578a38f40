"""A helper (helpers.py) from within: import, wait for the job, compile a share of the update.

python -m dreamer_isaac.precompile SHARE    # a pickled helpers.Job comes in, "done" goes out
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from typing import Any

import torch
from tensordict import TensorDict

from dreamer_isaac import compiling
from dreamer_isaac.helpers import SHARES, Job
from dreamer_isaac.learner import Given
from dreamer_isaac.learner_v1 import learner_class
from dreamer_isaac.models import Agent
from dreamer_isaac.models.gaussian import GaussianRecurrence
from dreamer_isaac.models.recurrence import Recurrence


def main(share: str) -> None:
    """Compile `share`, if there is a job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to handle
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no answer
    compiling.import_compiler()
    try:
        job = pickle.load(sys.stdin.buffer)
    except EOFError:  # nobody needs it
        os._exit(0)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        compile_share(share, job)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    answer.write(b"done\n")
    answer.flush()
    os._exit(0)  # nothing here is worth an orderly end, for which the other process would wait


def leave_with_parent() -> None:
    """The other end of stdin closes when its process ends, however it does."""
    os.read(0, 1)
    os._exit(1)


def compile_share(share: str, job: Job) -> None:
    """One update on `records`, of which only this share's functions are compiled."""
    device = torch.device(job.device)
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(job.memory / total, device)
    if job.precision:
        torch.backends.cuda.matmul.fp32_precision = job.precision
    compiling.only = frozenset(SHARES[share])
    with device:  # where numbers are drawn faster
        agent = Agent(job.observation, job.action, job.model, job.algo, job.pixels)
    learner = learner_class(job.algo)(
        agent, job.algo, job.optimization, torch.Generator(device), job.reward_multiplier
    )
    # Without kernels of our own, which would have to be compiled here as well.
    plain: Any = GaussianRecurrence if job.model.latent == "gaussian" else Recurrence
    learner.recurrence = plain(learner.net.rssm)
    learner._update(Given(records(job, device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def records(job: Job, device: torch.device) -> TensorDict:
    """A batch of nothing in particular, laid out as `replay.Replay.sample` returns it."""
    model, both = job.model, (job.slices, job.length + 1)
    zeros = torch.zeros(both, device=device)
    gaussian = model.latent == "gaussian"
    batch = TensorDict(
        obs=zeros.new_zeros(*both, job.observation), is_first=zeros > 0,
        action=zeros.new_zeros(*both, job.action), reward=zeros, terminated=zeros > 0,
        belief=zeros.new_zeros(job.slices, model.belief),
        state=zeros.new_zeros(
            job.slices, model.gaussian if gaussian else model.categoricals,
            dtype=torch.float32 if gaussian else torch.uint8,
        ),
        batch_size=[job.slices],
    )  # fmt: skip
    if job.pixels:
        batch["pixels"] = zeros.new_zeros(*both, *job.pixels, dtype=torch.uint8)
    return batch


if __name__ == "__main__":
    main(sys.argv[1])
