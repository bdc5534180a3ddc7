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
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hbp.core.guards import is_count, require_floats
from hbp.core.jacobians import Batch, Chain, Jacobian, as_batch
from hbp.core.operators import (
    DenseOperator,
    KroneckerBlock,
    SampleBlocks,
    SymmetricOperator,
    eigh_of_gram,
)
from hbp.fast import FastBatch, RowsBlock

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


class JointOperator(SymmetricOperator):
    """The mean over processes of an operator that each of them has.

    The exact block of a batch in parts, [in one sum][eq-parts-exact]. Every answer that
    is computed from the operator is an exchange: all processes have to ask.
    """

    def __init__(self, own: SymmetricOperator, process_group: ProcessGroup) -> None:
        super().__init__(own.shape[0], own, own.reads)
        self._own, self._process_group = own, process_group

    def product(self, rows: Tensor) -> Tensor:
        return self._mean(self._own.product(rows))

    @staticmethod
    def products(pairs: Sequence[tuple[SymmetricOperator, Tensor]]) -> list[Tensor]:
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


class _Sum(NamedTuple):
    """A statistic that adds up: a mean over samples, or over processes."""

    own: Tensor
    over_samples: bool


class _Samples(NamedTuple):
    """Samples of a layer, [N, ...], and δ, if only w FᵀF = E[xxᵀ] is asked for."""

    own: Tensor
    delta: Tensor | None
    is_factor: bool


class JointBatch(FastBatch):
    """The batch of all processes of a group.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
    """

    def __init__(self, process_group: ProcessGroup) -> None:
        _require_initialised()
        self._group = process_group
        self._size = dist.get_world_size(process_group)
        self._asked: list[_Sum | _Samples] = []
        self._answers: Iterator[Any] | None = None
        self._count, self._is_exact, self._blocks = 0, False, 0

    def read(self, passage: Callable[[Batch], Any]) -> Any:
        """The passage, twice: to ask, and with the answers of all processes."""
        with self._together():
            result = passage(self)
        if self._is_exact:
            return result
        self._answers = iter(self._exchanged())
        return passage(self)

    def mean_of_sum(self, own: Tensor, count: int) -> Tensor:
        self._count = count
        return self._ask(_Sum(own, True), own / count)

    def total(self, values: Tensor) -> Tensor:
        own = super().total(values)
        return self._ask(_Sum(own, False), own)

    def of_all(self, J: Jacobian) -> Jacobian:
        if isinstance(J, Chain):
            steps = [self.of_all(step) for step in J.steps]
            most = max(step.samples for step in steps)
            return Chain([step.with_data(step.data, most) for step in steps])
        if J.data is None:
            return J
        self._count = len(J.data)
        data = self._ask(_Samples(J.data, None, False), J.data)
        return J.with_data(data, len(data))

    def output_hessian(self, H: SymmetricOperator) -> SymmetricOperator:
        self._is_exact = isinstance(H, SampleBlocks)
        if self._is_exact:
            return H
        own = H.to_dense()
        return DenseOperator(self._ask(_Sum(own, False), own))

    def exact_block(self, block: SymmetricOperator) -> SymmetricOperator:
        self._blocks += block.shape[0]
        return JointOperator(block, self._group)

    def weight_block(
        self, H: SymmetricOperator, x: Tensor, delta: Tensor | None
    ) -> SymmetricOperator:
        self._count = len(x)
        own = super().weight_block(H, x, delta)
        rows, weight, delta = self._ask(_Samples(x, delta, True), (x, 1.0, None))
        if self._answers is None:
            return own
        if delta is None:
            return KroneckerBlock(H, rows, weight)
        return RowsBlock(H, rows, weight, delta)

    def _ask(self, statistic: _Sum | _Samples, own: Any) -> Any:
        """The answer; in the first passage, what this process alone would say."""
        if self._answers is None:
            self._asked.append(statistic)
            return own
        return next(self._answers)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """If the block raises in one process, raise in all of them.

        Otherwise the others would wait for ever for the one that gave up.
        """
        error = None
        try:
            yield
        except Exception as problem:
            error = problem
        entries = self._blocks
        for asked in self._asked:
            own = asked.own if isinstance(asked, _Sum) else asked.own[:1]
            entries += own.numel()
        header = torch.tensor([error is not None, self._count, entries])
        headers = self._gathered(header.to(_device_of(self._group))).tolist()
        if error is not None:
            raise error
        for rank, (has_failed, _, _) in enumerate(headers):
            if has_failed:
                raise RuntimeError(
                    f"backward_hessian() failed in process {rank} of the group, whose "
                    "own message says why. No p.hessian was set in any."
                )
        if len({others for _, _, others in headers}) > 1:
            raise RuntimeError(
                "The processes do not have the same model with the same options: they "
                f"would exchange {[others for _, _, others in headers]} numbers."
            )
        self._counts = [count for _, count, _ in headers]

    def _exchanged(self) -> Iterator[Any]:
        """The answers, in the order of the questions; see eq-parts.

        E[xxᵀ] has features² numbers, and N x's have N · features: the fewer travel.
        """
        total, sums = sum(self._counts), []
        for asked in self._asked:
            if isinstance(asked, _Sum):
                divisor = total if asked.over_samples else self._size
                sums.append(asked.own / divisor)
            elif self._sends_moments(asked):
                sums.append(asked.own.T @ asked.own / total)
        _sum_over_processes(sums, self._group)
        summed = iter(sums)
        for asked in self._asked:
            if isinstance(asked, _Sum):
                yield next(summed)
            elif self._sends_moments(asked):
                values, vectors = eigh_of_gram(next(summed))
                # F = √Λ Qᵀ of E[xxᵀ] = QΛQᵀ.
                yield (vectors * values.sqrt()).T.contiguous(), 1.0, None
            else:
                everybody = self._all_samples(asked.own)
                delta = asked.delta
                if delta is not None:
                    # The joint loss is a mean over processes, and so is its gradient.
                    delta = self._all_samples(delta) / self._size
                yield (everybody, 1 / total, delta) if asked.is_factor else everybody

    def _sends_moments(self, asked: _Samples) -> bool:
        return asked.is_factor and asked.own.shape[1] <= sum(self._counts)

    def _all_samples(self, own: Tensor) -> Tensor:
        """[N_r, ...] → [N, ...], in the order of the processes."""
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
    on_gpu = dist.get_backend(process_group) == "nccl"
    index = torch.cuda.current_device() if on_gpu else None
    return torch.device("cuda" if on_gpu else "cpu", index)


def _require_initialised() -> None:
    """Raise RuntimeError unless there are processes to talk to."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "There is no process group. Start the script with torchrun and call "
            "torch.distributed.init_process_group() first."
        )


if dist.is_available():
    as_batch.register(dist.ProcessGroup, JointBatch)
