"""Curvature of a batch that is spread over processes, by ``torch.distributed``.

Each process sends curvature through its own copy of the model, for its own part of the
batch. Blocks of parts do not add up to the block of the whole: the mean of products is
not the product of means. What adds up are the *statistics* that the blocks are made
of: mean inputs, mean derivatives, second-order terms, the output Hessian. These are all
that a Hessian pass asks its ``Batch`` for. So a pass runs twice: once to learn what it
asks for, all of which is then exchanged at once; and again with the answers.

The loss of the whole is the *mean over processes* of their losses. This is what
``torch.nn.parallel.DistributedDataParallel`` takes it to be; see ``joint_weight`` for
parts of different sizes.

Exact products are sums over samples. There nothing but the products is exchanged.

``model.backward_hessian(..., process_group=...)`` does all of it; the equations are
eq-parts and eq-parts-exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from hbp.core.guards import is_count, require_floats
from hbp.core.jacobians import Batch, Chain, Jacobian, as_batch
from hbp.core.operators import DenseOperator, KroneckerBlock, SampleBlocks, eigh_of_gram
from hbp.core.operators import SymmetricOperator as Operator
from hbp.fast import FastBatch

if TYPE_CHECKING:  # A torch without torch.distributed has no such name.
    from torch.distributed import ProcessGroup

__all__ = ["average", "joint_weight"]

ALONE: Final = 2**20
"""A tensor of more bytes than 1 MiB travels alone; smaller ones share a message."""


def joint_weight(count: int, process_group: ProcessGroup | None = None) -> float:
    """The factor that makes a mean loss count by samples, not by processes.

    The mean over processes of ``joint_weight(len(inputs)) * loss`` is the mean over
    all samples, if ``loss`` is the mean over those of this process. With parts of equal
    size it is 1.

    Args:
        count: N_r, how many samples this process has.
        process_group: Those that share the batch; ``None`` for all processes.

    Returns:
        k N_r / N, for k processes with N samples in all.

    Raises:
        ValueError: ``count`` is no positive integer.
        RuntimeError: ``torch.distributed`` is not initialised.
    """
    _require_initialised()
    if not is_count(count):
        raise ValueError(f"count={count!r} must be a positive number of samples.")
    total = torch.tensor(count, device=_device_of(process_group))
    dist.all_reduce(total, group=process_group)
    return dist.get_world_size(process_group) * count / int(total)


@torch.no_grad()
def average(
    tensors: Iterable[Tensor], process_group: ProcessGroup | None = None
) -> None:
    """Replace tensors by their means over processes, all at once and in place.

    For the gradients, where ``DistributedDataParallel`` does not do it already, and for
    a loss that shall be reported:

        average(p.grad for p in model.parameters() if p.grad is not None)

    Args:
        tensors: The same shapes and dtypes, in the same order, on every process.
        process_group: Those that share the batch; ``None`` for all processes.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        TypeError: one of them is no tensor.
        ValueError: one of them is not of floating-point numbers, or sparse.
    """
    _require_initialised()
    own = list(tensors)
    for index, tensor in enumerate(own):
        require_floats(f"tensors[{index}]", tensor)
    size = dist.get_world_size(process_group)
    _sum_over_processes([tensor.div_(size) for tensor in own], process_group)


class JointOperator(Operator):
    """The mean over processes of an operator that each of them has.

    The exact block of a batch in parts, [in one sum][eq-parts-exact]. Every answer that
    is computed from the operator is an exchange: all processes have to ask.
    """

    def __init__(self, own: Operator, process_group: ProcessGroup) -> None:
        super().__init__(own.shape[0], own, own.reads)
        self._own, self._process_group = own, process_group

    def product(self, rows: Tensor) -> Tensor:
        return self._mean(self._own.product(rows))

    @staticmethod
    def products(pairs: Sequence[tuple[Operator, Tensor]]) -> list[Tensor]:
        """As of any operators, but exchanged in one message."""
        groups: dict[ProcessGroup, list[Tensor]] = {}
        found = []
        for operator, rows in pairs:
            if isinstance(operator, JointOperator):
                found.append(operator._own.product(rows).clone())
                groups.setdefault(operator._process_group, []).append(found[-1])
            else:
                found.append(operator.product(rows))
        for process_group, together in groups.items():
            average(together, process_group)
        return found

    def _dense(self) -> Tensor:
        return self._mean(self._own.to_dense())

    def _diagonal(self) -> Tensor:
        return self._mean(self._own.diagonal())

    def _mean(self, values: Tensor) -> Tensor:
        values = values.clone()  # It may be what the operator itself stores.
        average([values], self._process_group)
        return values

    def __reduce__(self) -> Any:
        """A process group is no more than a handle of this run."""
        raise TypeError(
            "The curvature of a joint batch belongs to its processes and cannot be "
            "copied or saved. Call optimizer.zero_grad() first, or save "
            "model.state_dict()."
        )


class JointBatch(FastBatch):
    """The batch of all processes of a group.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
    """

    def __init__(self, process_group: ProcessGroup) -> None:
        _require_initialised()
        self._group = process_group
        self._size = dist.get_world_size(process_group)
        self._count = self._entries = self._total = 0
        self._counts: list[int] = []
        self._is_exact = False
        # What processes add up, and the sums, once they are known.
        self._summands: list[Callable[[], Tensor | None]] = []
        self._sums: Iterator[Tensor] | None = None

    def read(self, passage: Callable[[Batch], Any]) -> Any:
        """The passage, twice: to ask, and with the answers of all processes."""
        result, error = None, None
        try:
            result = passage(self)
        except Exception as problem:
            error = problem
        self._agree(error)
        if self._is_exact:
            return result
        sums = [own for summand in self._summands if (own := summand()) is not None]
        _sum_over_processes(sums, self._group)
        self._sums = iter(sums)
        return passage(self)

    def _agree(self, error: Exception | None) -> None:
        """If there is an error in one process, raise in all of them.

        Otherwise the others would wait for ever for the one that gave up.
        """
        header = torch.tensor([error is not None, self._count, self._entries])
        headers = self._gathered(header.to(_device_of(self._group)))
        if error is not None:
            raise error
        failed, self._counts, entries = headers.T.tolist()
        if any(failed):
            raise RuntimeError(
                f"backward_hessian() failed in process {failed.index(1)} of the group, "
                "whose own message says why. No p.hessian was set in any."
            )
        if len(set(entries)) > 1:
            raise RuntimeError(
                "The processes do not have the same model with the same options: they "
                f"would exchange {entries} numbers."
            )
        self._total = sum(self._counts)

    def mean_of_sum(self, own: Tensor, count: int) -> Tensor:
        self._count = count
        return self._sum(own / count, lambda: own / self._total)

    def total(self, values: Tensor) -> Tensor:
        own = super().total(values)
        return self._sum(own, lambda: own / self._size)

    def of_all(self, J: Jacobian) -> Jacobian:
        if isinstance(J, Chain):
            steps = [self.of_all(step) for step in J.steps]
            most = max(step.samples for step in steps)
            return Chain([step.with_data(step.data, most) for step in steps])
        if J.data is None:
            return J
        data = self._all_samples(J.data)
        return J.with_data(data, len(data))

    def output_hessian(self, H: Operator) -> Operator:
        self._is_exact = isinstance(H, SampleBlocks)
        if self._is_exact:
            return H
        own = H.to_dense()
        return DenseOperator(self._sum(own, lambda: own / self._size))

    def exact_block(self, block: Operator) -> Operator:
        self._entries += block.shape[0]
        return JointOperator(block, self._group)

    def weight_block(self, H: Operator, x: Tensor, delta: Tensor | None) -> Operator:
        """From E[xxᵀ] or from all samples; see eq-parts.

        E[xxᵀ] has features² numbers, and N x's have N · features: the fewer travel.
        """

        def moments() -> Tensor | None:
            return x.T @ x / self._total if x.shape[1] <= self._total else None

        if self._sums is None:
            self._summands.append(moments)
            return super().weight_block(H, self._all_samples(x), delta)
        if x.shape[1] <= self._total:
            values, vectors = eigh_of_gram(next(self._sums))
            # F = √Λ Qᵀ of E[xxᵀ] = QΛQᵀ.
            return KroneckerBlock(H, (vectors * values.sqrt()).T.contiguous())
        everybody = self._all_samples(x)
        if delta is not None:
            delta = self._all_samples(delta)  # The block finds the factor, 1/k.
        return super().weight_block(H, everybody, delta)

    def _sum(self, alone: Tensor, summand: Callable[[], Tensor]) -> Tensor:
        """Σ over processes; in the first passage, what this one alone would say."""
        if self._sums is not None:
            return next(self._sums)
        self._entries += alone.numel()
        self._summands.append(summand)
        return alone

    def _all_samples(self, own: Tensor) -> Tensor:
        """[N_r, ...] → [N, ...], in the order of the processes; likewise."""
        if self._sums is None:
            self._count, self._entries = len(own), self._entries + own[:1].numel()
            return own
        # A process with fewer samples fills up its message.
        message = own.new_zeros(max(self._counts), *own.shape[1:])
        message[: len(own)] = own
        parts = zip(self._gathered(message), self._counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def _gathered(self, own: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, [processes, ...]."""
        everyone = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(everyone, own, group=self._group)
        return torch.stack(everyone)


def _sum_over_processes(
    tensors: Sequence[Tensor], process_group: ProcessGroup | None
) -> None:
    """Replace each tensor by its sum over processes, in place."""
    together: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes > ALONE and tensor.is_contiguous():
            dist.all_reduce(tensor, group=process_group)
        else:
            together.setdefault(tensor.dtype, []).append(tensor)
    for small in together.values():
        message = torch.cat([tensor.flatten() for tensor in small])
        dist.all_reduce(message, group=process_group)
        parts = message.split([tensor.numel() for tensor in small])
        for tensor, part in zip(small, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def _device_of(process_group: ProcessGroup | None) -> torch.device:
    """A device whose tensors the group can exchange."""
    if dist.get_backend(process_group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _require_initialised() -> None:
    """Raise RuntimeError unless there are processes to talk to."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "There is no process group. Start the script with torchrun and call "
            "torch.distributed.init_process_group() first."
        )


if dist.is_available():
    as_batch.register(dist.ProcessGroup, JointBatch)
