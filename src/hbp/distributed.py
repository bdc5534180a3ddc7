"""Curvature of a batch that is spread over processes, by ``torch.distributed``.

Each process sends curvature through its own copy of the model, for its own part of the
batch. Blocks of parts do not add up to the block of the whole: the mean of products is
not the product of means. What adds up are the *statistics* that the blocks are made
of: mean inputs, mean derivatives, second-order terms, the output Hessian. So these are
exchanged, all at once, and then every process makes the blocks of the whole batch.

The loss of the whole is the *mean over processes* of their losses. This is what
``torch.nn.parallel.DistributedDataParallel`` takes it to be; see ``joint_weight`` for
parts of different sizes.

Exact products are sums over samples. There nothing but the products is exchanged.

``model.backward_hessian(..., process_group=...)`` does all of it; the equations are
eq-parts and eq-parts-exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hbp.checks import require_floats
from hbp.operators import SymmetricOperator, eigh_of_gram

if TYPE_CHECKING:  # A torch without torch.distributed has no such name.
    from torch.distributed import ProcessGroup

__all__ = ["average", "joint_weight"]

BUCKET_BYTES: Final = 2**25
"""Tensors travel together up to this size, 32 MiB; a larger one travels alone.

Together they are copied, which is what a message of its own would cost or less.
"""


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
    require_initialised()
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
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
    require_initialised()
    own = list(tensors)
    for index, tensor in enumerate(own):
        require_floats(f"tensors[{index}]", tensor)
    size = dist.get_world_size(process_group)
    _sum_over_processes([(tensor, 1 / size) for tensor in own], process_group)


class JointOperator(SymmetricOperator):
    """The mean over processes of an operator that each of them has.

    The exact block of a batch in parts, [in one sum][eq-parts-exact]. Every answer that
    is computed from the operator is an exchange: all processes have to ask.

    Args:
        own: This process's operator.
        process_group: Those that share the batch.
    """

    def __init__(self, own: SymmetricOperator, process_group: ProcessGroup) -> None:
        super().__init__(own.shape[0], own.dtype, own.device)
        self.own = own
        self.process_group = process_group

    def _product(self, columns: Tensor) -> Tensor:
        return self._mean(self.own._product(columns))

    def _dense(self) -> Tensor:
        return self._mean(self.own.to_dense())

    def diagonal(self) -> Tensor:
        return self._mean(self.own.diagonal())

    def diagonal_blocks(self, sizes: Sequence[int]) -> list[SymmetricOperator]:
        blocks = self.own.diagonal_blocks(sizes)
        return [JointOperator(block, self.process_group) for block in blocks]

    def require_fresh(self) -> None:
        self.own.require_fresh()

    def _mean(self, values: Tensor) -> Tensor:
        values = values.clone()  # It may be what the operator itself stores.
        average([values], self.process_group)
        return values

    def __reduce__(self) -> Any:
        """A process group is no more than a handle of this run."""
        raise TypeError(
            "The curvature of a joint batch belongs to its processes and cannot be "
            "copied or saved. Call optimizer.zero_grad() first, or save "
            "model.state_dict()."
        )


def add_joint_products(
    products: Sequence[tuple[JointOperator, Tensor, Tensor, float]],
) -> None:
    """target += scale · A · columns, of several (A, target, columns, scale) at once."""
    own = [operator.own._product(columns) for operator, _, columns, _ in products]
    groups: dict[ProcessGroup, list[Tensor]] = {}
    for (operator, *_), product in zip(products, own, strict=True):
        groups.setdefault(operator.process_group, []).append(product)
    for process_group, together in groups.items():
        average(together, process_group)
    for product, (_, target, _, scale) in zip(own, products, strict=True):
        target.add_(product, alpha=scale)


class Factor(NamedTuple):
    """w FᵀF = E[xxᵀ], as ``KroneckerBlock`` takes it.

    Attributes:
        rows: F, [m, features].
        weight: w.
        output_gradient: δ, [m, out], if the rows are the samples.
    """

    rows: Tensor
    weight: float
    output_gradient: Tensor | None


class Samples(NamedTuple):
    """What a layer keeps of a batch.

    Attributes:
        kept: x or z, [N, ...].
        output_gradient: δ, [N, ...], if there is one.
    """

    kept: Tensor
    output_gradient: Tensor | None


class JointBatch:
    """What the rules of all layers need to know of a batch that is in parts.

    It is used in three steps. Every layer is asked for its statistics, of the own
    samples; ``exchange`` makes them those of the joint batch; and the layers, asked
    again, find them here. Keys say which is which.

    Args:
        process_group: Those that share the batch.
        device: Where the statistics are.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        TypeError: ``process_group`` is none, or this process does not belong to it.

    Attributes:
        count: N_r, how many samples this process has; the layers set it.
        product_entries: How many numbers the products of all parameters have, where
            these are to be exchanged.
    """

    def __init__(self, process_group: ProcessGroup, device: torch.device) -> None:
        require_initialised()
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group={process_group!r} is no group of which this process "
                "is a member. Use torch.distributed.group.WORLD, or let only its "
                "members call."
            )
        self.process_group = process_group
        self.count = 0
        self.product_entries = 0
        self._device = device
        self._size = dist.get_world_size(process_group)
        self._counts: list[int] = []
        self._means: dict[Hashable, Tensor] = {}
        self._totals: dict[Hashable, Tensor] = {}
        self._factors: dict[Hashable, Samples] = {}
        self._samples: dict[Hashable, Samples] = {}
        self._found: dict[Hashable, Any] | None = None

    def mean(self, key: Hashable, sums: Tensor, count: int) -> Tensor:
        """E over the joint batch, from Σ over the own samples."""
        if self._found is None:
            self._means[key] = sums
            return sums / count
        return self._find(key).clone()  # Who asks may change the answer.

    def total(self, key: Hashable, sums: Tensor) -> Tensor:
        """What belongs to the joint loss, from what belongs to the own loss."""
        if self._found is None:
            self._totals[key] = sums
            return sums
        return self._find(key).clone()

    def factor(self, key: Hashable, x: Tensor, delta: Tensor | None) -> Factor:
        """A factor of E[xxᵀ] over the joint batch, from the own x, [N, features]."""
        if self._found is None:
            self._factors[key] = Samples(x, delta)
            return Factor(x, 1 / len(x), delta)
        return self._find(key)

    def samples(self, key: Hashable, own: Samples) -> Samples:
        """The joint batch itself, for a rule that needs each sample's derivative."""
        if self._found is None:
            self._samples[key] = own
            return own
        return self._find(key)

    def _find(self, key: Hashable) -> Any:
        assert self._found is not None
        if key not in self._found:
            raise RuntimeError(
                f"A rule asks for a statistic that it did not ask for before: {key}. "
                "What a rule asks of hessian_pass must not depend on the answers."
            )
        return self._found[key]

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises in one process, raise in all of them.

        Otherwise the others would wait for ever for the one that gave up.
        """
        error = None
        try:
            yield
        except Exception as problem:
            error = problem
        own = [error is not None, self.count, self._entries()]
        header = torch.tensor(own, dtype=torch.long, device=self._device)
        headers = torch.stack(self._gather(header)).tolist()
        if error is not None:
            raise error
        failed = [rank for rank, (has_failed, _, _) in enumerate(headers) if has_failed]
        if failed:
            raise RuntimeError(
                f"backward_hessian() failed in process {failed[0]} of the group, whose "
                "own message says why. No p.hessian was set in any."
            )
        entries = {others for _, _, others in headers}
        if len(entries) > 1:
            raise RuntimeError(
                "The processes do not have the same model with the same options: they "
                f"would exchange {sorted(entries)} numbers."
            )
        self._counts = [count for _, count, _ in headers]

    def _entries(self) -> int:
        """What must be the same in all processes: how much there is to exchange."""
        sums = [*self._means.values(), *self._totals.values()]
        samples = [*self._factors.values(), *self._samples.values()]
        features = [own.kept.shape[1:].numel() for own in samples]
        statistics = sum(features) + sum(tensor.numel() for tensor in sums)
        return statistics + self.product_entries

    def exchange(self) -> None:
        """Make all statistics those of the joint batch; see eq-parts.

        E[xxᵀ] has features² numbers, and N x's have N · features: the fewer travel.
        """
        total = sum(self._counts)
        moments, samples = {}, dict(self._samples)
        for key, own in self._factors.items():
            if own.kept.shape[1] > total:
                samples[key] = own
            else:
                moments[key] = own.kept.T @ own.kept
        counted = [*self._means.values(), *moments.values()]
        weighted = [(values, 1 / total) for values in counted]
        weighted += [(values, 1 / self._size) for values in self._totals.values()]
        _sum_over_processes(weighted, self.process_group)
        joint = self._gathered(samples)
        self._found = {**self._means, **self._totals, **joint}
        for key in self._factors:
            if key in moments:
                self._found[key] = _factor_of(moments[key])
            else:
                self._found[key] = Factor(joint[key].kept, 1 / total, joint[key][1])

    def _gathered(self, samples: dict[Hashable, Samples]) -> dict[Hashable, Samples]:
        """The samples of all processes, in the order of the processes."""
        own = [tensor for pair in samples.values() for tensor in pair]
        gathered = iter(self._gather_samples([t for t in own if t is not None]))
        joint = {}
        for key, (_, delta) in samples.items():
            kept = next(gathered)
            # The joint loss is a mean over processes, and so is its gradient.
            whole = None if delta is None else next(gathered) / self._size
            joint[key] = Samples(kept, whole)
        return joint

    def _gather_samples(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors [N_r, ...] → [N, ...], all of one dtype in one exchange."""
        joint: dict[int, Tensor] = {}
        for indices in _by_dtype(tensors).values():
            group = [tensors[i].flatten(1) for i in indices]
            rows = torch.cat(group, dim=1)
            # A process with fewer samples fills up its message.
            message = rows.new_zeros(max(self._counts), rows.shape[1])
            message[: len(rows)] = rows
            parts = zip(self._gather(message), self._counts, strict=True)
            whole = torch.cat([part[:count] for part, count in parts])
            columns = whole.split([t.shape[1] for t in group], dim=1)
            for i, part in zip(indices, columns, strict=True):
                joint[i] = part.reshape(-1, *tensors[i].shape[1:])
        return [joint[i] for i in range(len(tensors))]

    def _gather(self, own: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape."""
        everyone = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(everyone, own, group=self.process_group)
        return everyone


def _factor_of(moments: Tensor) -> Factor:
    """F = √Λ Qᵀ of E[xxᵀ] = QΛQᵀ, [features, features]."""
    values, vectors = eigh_of_gram(moments)
    return Factor((vectors * values.sqrt()).T.contiguous(), 1.0, None)


def _sum_over_processes(
    weighted: Sequence[tuple[Tensor, float]], process_group: ProcessGroup | None
) -> None:
    """Replace each tensor by the sum of weight · tensor over processes, in place."""
    tensors = [tensor.mul_(weight) for tensor, weight in weighted]
    for indices in _by_dtype(tensors).values():
        for bucket in _buckets([tensors[i] for i in indices]):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0], group=process_group)
                continue
            message = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(message, group=process_group)
            parts = message.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors, together up to BUCKET_BYTES."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """Indices of the tensors of each dtype."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(i)
    return groups


def _device_of(process_group: ProcessGroup | None) -> torch.device:
    """A device whose tensors the group can exchange."""
    on_gpu = dist.get_backend(process_group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else _CPU


_CPU: Final = torch.device("cpu")


def require_initialised() -> None:
    """Raise RuntimeError unless there are processes to talk to."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "There is no process group. Start the script with torchrun and call "
            "torch.distributed.init_process_group() first."
        )
