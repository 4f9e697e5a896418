r"""Several processes that train one network: what each does alone, and what they settle together.

Every process walks through the same batches in the same order and takes its share of each, so that an epoch is the same
whatever their number, and a run may be resumed by more or fewer of them.  With :math:`b_r` of the B rows of a batch on
process r, whose loss is :math:`L_r = T\,\mathrm{KL} - \frac{N}{b_r}\sum_{n \in r}\ln p(y_n|\cdot)`,

.. math:: \sum_r \frac{b_r}{B} L_r = T\,\mathrm{KL} - \frac NB \sum_n \ln p(y_n|\cdot) = L

is the loss of the whole batch (nats), and so are the gradients summed with these weights, however uneven the shares.
Each process draws noise of its own.  The gradient is summed by one ``all_reduce`` of all parameters, not by PyTorch's
``DistributedDataParallel``: that hooks into the ``forward`` of one module with a fixed set of parameters, while a step
here runs a guide, a model and their priors together, and a cut between two epochs changes every shape.

Decisions and numbers that steer training are those of the first process; it alone writes and shows anything.  Batch
normalisation sees a process's share of a batch; its running statistics are averaged after each epoch.  Nothing here
happens unless a process group of more than one was set up, by ``torchrun`` or by the caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pyrobc.batches import seeded
from pyrobc.errors import ConfigError, DataError, FitError, PyrobcError

__all__ = ["Team", "find_team", "joined"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Team:
    """This process among those that train together; alone, every method leaves things as they are."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and shows things."""
        return self.rank == 0

    def share(self, inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
        """This process's rows of a batch; none, where there are fewer rows than processes before it."""
        if self.size == 1:
            return inputs, targets

        def take(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part.tensor_split(self.size)[self.rank]
            if isinstance(part, Mapping):
                return {key: take(value) for key, value in part.items()}
            return tuple(take(value) for value in part)

        return take(inputs), take(targets)

    def noise(self, *seeds: int) -> AbstractContextManager[None]:
        """Randomness of this process's own; alone, whatever there is."""
        return nullcontext() if self.size == 1 else seeded(*seeds, self.rank)

    def sum_(self, parameters: Iterable[nn.Parameter], value: Tensor, weight: float) -> Tensor:
        """Weighted sum over processes of ``value``, which is returned, and of all gradients, in place.

        Raises:
            FitError: another process ended.
        """
        if self.size == 1:
            return value
        trained = [p for p in parameters if p.requires_grad]
        parts = [value.new_zeros(p.shape) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([value.detach().reshape(1), *(part.reshape(-1) for part in parts)]).mul_(weight)
        self._talk(partial(distributed.all_reduce, flat))
        start = 1
        for p in trained:
            found = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
            p.grad = found.clone() if p.grad is None else p.grad.copy_(found)
        return flat[0]

    def average_norms_(self, model: nn.Module) -> None:
        """Mean over processes of the running statistics of batch normalisation, in place."""
        if self.size > 1:
            norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
            for statistic in (s for m in norms for s in (m.running_mean, m.running_var) if s is not None):
                self._talk(partial(distributed.all_reduce, statistic.div_(self.size)))

    def align_(self, *modules: nn.Module) -> None:
        """The first process's parameters and buffers for all, in place."""
        if self.size > 1:
            for tensor in (t for module in modules for t in (*module.parameters(), *module.buffers())):
                self._talk(partial(distributed.broadcast, tensor.data, 0))

    def agree(self, value: _T) -> _T:
        """The first process's value for all."""
        return self.ask_first(lambda: value)

    def ask_first(self, question: Callable[[], _T]) -> _T:
        """What the first process answers; where it raises one of our errors, every process does."""
        if self.size == 1:
            return question()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = question()
            except PyrobcError as error:
                answer[1] = error
        self._talk(partial(distributed.broadcast_object_list, answer, 0))
        if answer[1] is not None:
            raise answer[1]
        result: _T = answer[0]
        return result

    def check_loader(self, loader: Any) -> None:
        """Refuse a loader that has divided the rows among processes already.

        Raises:
            DataError: it has; every process must see all batches.
        """
        sampler = getattr(loader, "sampler", None)
        if self.size > 1 and isinstance(sampler, torch.utils.data.DistributedSampler):
            raise DataError(
                "data of several processes", got="a loader with a DistributedSampler",
                allowed="the same batches on every process, which takes its share of each",
                fix="pass the loader that one process would get, DataLoader(dataset, batch_size=128, shuffle=True)",
            )  # fmt: skip

    def _talk(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise FitError(
                f"process {self.rank} of {self.size}", got=f"no answer from another ({_first_line(error)})",
                allowed="all processes alive to the end",
                fix="look above for what ended it; the same command goes on from the last checkpoint",
            ) from error  # fmt: skip


def find_team() -> Team:
    """Of the process group that was set up, if any was."""
    if not distributed.is_available() or not distributed.is_initialized():
        return Team()
    return Team(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def joined(device: str | torch.device | None = None) -> Iterator[Team]:
    """The team that ``torchrun`` started this process in, taken leave of at the end; alone without ``torchrun``.

    Talks by NCCL where ``device`` is a GPU, which is then the process's own, and by gloo elsewhere.

    Raises:
        ConfigError: fewer GPUs than processes, or PyTorch was built without what this needs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or find_team().size > 1:
        yield find_team()
        return
    if not distributed.is_available():
        raise ConfigError(
            "several processes", got="a PyTorch without torch.distributed", allowed="one that was built with it",
            fix="run without torchrun",
        )  # fmt: skip
    is_cuda = device is not None and torch.device(device).type == "cuda"
    if device is not None and is_cuda:
        if torch.device(device).index is not None:
            raise ConfigError(
                "device of several processes", got=str(device), allowed="cuda, of which each takes its own",
                fix="pass --device=cuda, and choose GPUs by CUDA_VISIBLE_DEVICES",
            )  # fmt: skip
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ConfigError(
                "device of several processes", got=f"{there} GPUs for process {local + 1} of this machine",
                allowed="a GPU for each process", fix=f"pass --nproc-per-node={max(1, there)}",
            )  # fmt: skip
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if is_cuda else "gloo")
    try:
        yield find_team()
    finally:
        distributed.destroy_process_group()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
