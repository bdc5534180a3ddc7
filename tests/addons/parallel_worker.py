"""What each of three processes does for test_parallel.py: train, break, and count.

Run by torchrun with a folder to write to. First all three processes share a batch, then
the first two, so that a group that is not the world is used as well.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hbp
from hbp.distributed import average, joint_weight

STEPS = 2
SAMPLES = 11
SCHEMES = {
    "averaged Jacobians": (True, True),
    "averaged products of inputs": (False, True),
    "averaged products of parameters": (True, False),
    "averaged products": (False, False),
    "exact": None,
}
TREATMENTS = ["none", "zero", "abs", "clip"]


def dense() -> hbp.HBPSequential:
    """The first layer has more inputs than there are samples, the others fewer."""
    return hbp.HBPSequential(
        hbp.HBPLinear(15, 6),
        hbp.HBPSigmoid(),
        hbp.HBPLinear(6, 5),
        hbp.HBPReLU(),
        hbp.HBPLinear(5, 4),
    )


def sub_blocks() -> hbp.HBPSequential:
    model = dense()
    model.set_hbp_blocks(sub_blocks=2)
    return model


def convolutional() -> hbp.HBPSequential:
    return hbp.HBPSequential(
        hbp.HBPConv2d(1, 3, 3, padding=1),
        hbp.HBPTanh(),
        hbp.HBPMaxPool2d(2, stride=1),
        hbp.HBPBatchNorm2d(3).eval(),
        hbp.HBPConv2d(3, 2, 2),
        hbp.HBPFlatten(),
        hbp.HBPLinear(2 * 1 * 3, 4),
    )


def with_shortcuts() -> hbp.HBPSequential:
    """Shortcuts, layers whose rules autograd finds, and a frozen weight below."""
    branch = hbp.HBPSequential(
        hbp.HBPLinear(6, 6), hbp.HBPTanh(), hbp.HBPResidual(hbp.HBPLinear(6, 6))
    )
    model = hbp.HBPSequential(
        hbp.HBPLinear(15, 6),
        hbp.HBPLayerNorm(6),
        hbp.HBPResidual(branch, hbp.HBPLinear(6, 6)),
        hbp.HBPSoftplus(),
        hbp.HBPLinear(6, 4),
    )
    model[0].weight.requires_grad_(False)
    return model


NETS: dict[str, tuple[Callable[[], hbp.HBPSequential], tuple[int, ...]]] = {
    "dense": (dense, (15,)),
    "sub-blocks": (sub_blocks, (15,)),
    "convolutional": (convolutional, (1, 3, 5)),
    "with shortcuts": (with_shortcuts, (15,)),
}


class Task(NamedTuple):
    """A training that is done by one process, and again by several."""

    net: str
    scheme: str
    treatment: str


def tasks() -> Iterator[Task]:
    return itertools.starmap(Task, itertools.product(NETS, SCHEMES, TREATMENTS))


def new_model(task: Task) -> hbp.HBPSequential:
    torch.manual_seed(0)
    model = NETS[task.net][0]()
    if (scheme := SCHEMES[task.scheme]) is not None:
        model.set_hbp_approximation(*scheme)
    return model


def new_batch(task: Task) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, *NETS[task.net][1]), torch.randint(4, (SAMPLES,))


def placed(
    task: Task, part: slice, group: dist.ProcessGroup | None, wrapped: bool
) -> tuple[hbp.HBPSequential, nn.Module, Tensor, Tensor]:
    """The model, what is called in its place, and this process's part of the batch."""
    model = new_model(task)
    called: nn.Module = model
    if wrapped:
        called = DistributedDataParallel(model, process_group=group)
    inputs, labels = (tensor[part] for tensor in new_batch(task))
    return model, called, inputs, labels


def train(
    task: Task,
    part: slice,
    group: dist.ProcessGroup | None = None,
    wrapped: bool = False,
) -> hbp.HBPSequential:
    """Train on a part of the batch, with the others of the group if there is one."""
    model, called, inputs, labels = placed(task, part, group, wrapped)
    optimizer = hbp.CGNewton(model.parameters(), lr=0.3, alpha=0.2)
    hessian_of_outputs = hbp.batch_summed_hessian
    if task.scheme == "exact":
        hessian_of_outputs = hbp.per_sample_hessian
    for _ in range(STEPS):
        outputs = called(inputs)
        loss = cross_entropy(outputs, labels)
        if group is not None:
            loss = joint_weight(len(inputs), group) * loss
        optimizer.zero_grad()
        output_hessian = hessian_of_outputs(loss, outputs)
        loss.backward()
        if group is not None and not wrapped:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            average(gradients, group)
        model.backward_hessian(
            output_hessian,
            modify_2nd_order_terms=task.treatment,
            process_group=group,
        )
        optimizer.step()
    return model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def part_of(rank: int, size: int) -> slice:
    """11 samples are 5 and 6, or 3, 4 and 4."""
    bounds = [SAMPLES * r // size for r in range(size + 1)]
    return slice(bounds[rank], bounds[rank + 1])


def train_alone() -> dict[Task, Tensor]:
    """What one process finds with the whole batch."""
    return {task: flat(train(task, slice(SAMPLES))) for task in tasks()}


def compare(
    group: dist.ProcessGroup, size: int, alone: dict[Task, Tensor]
) -> list[dict[str, Any]]:
    """Each task by all of the group; process 0 compares."""
    rank = dist.get_rank()
    rows = []
    for i, task in enumerate(tasks()):
        started = flat(new_model(task))
        # Every scheme and every treatment is met both ways.
        wrapped = (i + i // len(TREATMENTS)) % 2 == 0
        together = flat(train(task, part_of(rank, size), group, wrapped))
        everyone = [torch.empty_like(together) for _ in range(size)]
        dist.all_gather(everyone, together, group=group)
        rows.append(
            {
                **task._asdict(),
                "size": size,
                "wrapped": wrapped,
                "error": (together - alone.get(task, together)).abs().max().item(),
                "moved": (together - started).abs().max().item(),
                "same": all(torch.equal(other, everyone[0]) for other in everyone),
            }
        )
    return rows


@contextmanager
def messages() -> Iterator[list[tuple[str, int]]]:
    """What is sent: the kind of exchange, and the bytes that one process brings."""
    sent: list[tuple[str, int]] = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def counted_reduce(tensor: Tensor, **options: Any) -> Any:
        sent.append(("reduce", tensor.nbytes))
        return all_reduce(tensor, **options)

    def counted_gather(everyone: list[Tensor], tensor: Tensor, **options: Any) -> Any:
        sent.append(("gather", tensor.nbytes))
        return all_gather(everyone, tensor, **options)

    dist.all_reduce, dist.all_gather = counted_reduce, counted_gather
    try:
        yield sent
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather


def ready(task: Task, rank: int, size: int) -> tuple[hbp.HBPSequential, Tensor]:
    """A model after backward(), and its output Hessian."""
    model = new_model(task)
    inputs, labels = (tensor[part_of(rank, size)] for tensor in new_batch(task))
    outputs = model(inputs)
    loss = cross_entropy(outputs, labels)
    exact = task.scheme == "exact"
    hessian = (hbp.per_sample_hessian if exact else hbp.batch_summed_hessian)(
        loss, outputs
    )
    loss.backward()
    return model, hessian


def count_messages(group: dist.ProcessGroup, size: int) -> dict[str, Any]:
    """The messages of one Hessian pass, and of one exact step."""
    found: dict[str, Any] = {}
    for scheme in SCHEMES:
        task = Task("dense", scheme, "abs")
        model, hessian = ready(task, dist.get_rank(), size)
        with messages() as sent:
            model.backward_hessian(hessian, False, "abs", process_group=group)
        found[scheme] = sent
    optimizer = hbp.CGNewton(model.parameters(), lr=0.3, alpha=0.2)
    average([p.grad for p in model.parameters()], group)
    with messages() as sent:
        optimizer.step()
    found["step"] = sent
    found["products"] = [info.iterations for info in optimizer.last_step.values()]
    return found


def count_for_tutorial(group: dist.ProcessGroup) -> dict[str, list[tuple[str, int]]]:
    """The messages of tutorial 02, whose network has 250 samples in each process."""
    sizes = [3072, 1024, 512, 256, 128, 10]
    layers: list[hbp.HBPModule] = []
    for entering, leaving in itertools.pairwise(sizes):
        layers += [hbp.HBPLinear(entering, leaving), hbp.HBPSigmoid()]
    model = hbp.HBPSequential(*layers[:-1]).float()
    outputs = model(torch.randn(250, sizes[0], dtype=torch.float32))
    loss = cross_entropy(outputs, torch.zeros(250, dtype=torch.long))
    hessian = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    found = {}
    for name, scheme in SCHEMES.items():
        if scheme is not None:
            model.set_hbp_approximation(*scheme)
            with messages() as sent:
                model.backward_hessian(hessian, False, "abs", process_group=group)
            found[name] = sent
    return found


def run_page(folder: Path, size: int) -> dict[str, Any]:
    """The script of docs/parallel.md, in a world of its own of some processes."""
    start = dist.init_process_group

    def start_some(backend: str) -> None:
        store = f"file://{folder}/world-of-{size}"
        rank = int(os.environ["RANK"])
        start(backend, store, rank=rank, world_size=size)

    dist.init_process_group = start_some
    try:
        script = runpy.run_path(str(folder / "train.py"), run_name="__main__")
    finally:
        dist.init_process_group = start
    return {
        "samples": len(script["inputs"]),
        "parameters": flat(script["model"]).tolist(),
        "loss": script["loss"],
        "group left": dist.is_initialized(),
    }


def outcome(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ArithmeticError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def break_things(group: dist.ProcessGroup, size: int) -> dict[str, Any]:
    """Process 1 alone meets trouble. What the processes say, and keep."""
    rank = dist.get_rank()
    said: dict[str, Any] = {}
    for scheme in ["averaged Jacobians", "exact"]:
        task = Task("dense", scheme, "abs")
        for fault in ["statistic", "output Hessian", "no backward", "frozen"]:
            model, hessian = ready(task, rank, size)
            if rank == 1 and fault == "statistic":
                model[2].last_record.kept.data[0, 0] = torch.nan
            if rank == 1 and fault == "output Hessian":
                hessian = hessian * torch.nan
            if rank == 1 and fault == "no backward":
                model(torch.randn(3, 15))
            if rank == 1 and fault == "frozen":
                model[0].weight.requires_grad_(False)
            said[f"{scheme}, {fault}"] = [
                outcome(
                    lambda model=model, hessian=hessian: model.backward_hessian(
                        hessian, False, "abs", process_group=group
                    )
                ),
                sum(p.hessian is not None for p in model.parameters()),
            ]
    # And then all goes on as if nothing had been.
    task = Task("dense", "averaged Jacobians", "abs")
    alone = flat(train(task, slice(SAMPLES)))
    together = flat(train(task, part_of(rank, size), group))
    said["afterwards"] = (together - alone).abs().max().item()
    return said


def send_twice(group: dist.ProcessGroup, size: int) -> dict[str, Any]:
    """Whether a second Hessian pass finds what the first one found, bit for bit."""
    found = {}
    for scheme in SCHEMES:
        task = Task("dense", scheme, "none")
        model, hessian = ready(task, dist.get_rank(), size)
        layers = [layer for layer in model if hasattr(layer, "last_record")]
        records = [layer.last_record for layer in layers]

        def reads(hessian: Tensor = hessian, records: list[Any] = records) -> Any:
            kept = [r.kept for r in records if r.keeps is not None]
            return [hessian, *kept, *(r.output_gradient for r in records)]

        before, passes = [tensor.clone() for tensor in reads()], []
        for _ in range(2):
            model.backward_hessian(hessian, False, "none", process_group=group)
            passes.append([p.hessian.to_dense().clone() for p in model.parameters()])
        found[scheme] = {
            "same records": [layer.last_record for layer in layers] == records,
            "same tensors": all(map(torch.equal, before, reads())),
            "same bits": all(map(torch.equal, *passes)),
        }
    return found


def answers(group: dist.ProcessGroup, size: int) -> dict[str, Any]:
    """The joint operator of exact products against that of one process."""
    task = Task("dense", "exact", "abs")
    model, hessian = ready(task, dist.get_rank(), size)
    weight = joint_weight(len(hessian), group)
    model.backward_hessian(hessian * weight, False, "abs", process_group=group)
    whole, whole_hessian = ready(task, 0, 1)
    whole.backward_hessian(whole_hessian, False, "abs")
    joint, alone = model[2].weight.hessian, whole[2].weight.hessian
    b = torch.linspace(-1, 1, alone.shape[0])
    return {
        "product": (joint @ b - alone @ b).abs().max().item(),
        "dense": (joint.to_dense() - alone.to_dense()).abs().max().item(),
        "diagonal": (joint.diagonal() - alone.diagonal()).abs().max().item(),
        "trace": (joint.trace() - alone.trace()).abs().item(),
        "eigvalsh": (joint.eigvalsh() - alone.eigvalsh()).abs().max().item(),
        "solve": (joint.solve(b, 0.1) - alone.solve(b, 0.1)).abs().max().item(),
        "copied": outcome(lambda: copy.deepcopy(joint)),
    }


def find_lengths(
    task: Task,
    part: slice,
    group: dist.ProcessGroup | None = None,
    wrapped: bool = False,
) -> tuple[list[float], Tensor]:
    """Of steps without a learning rate, and where they lead."""
    model, called, inputs, labels = placed(task, part, group, wrapped)
    optimizer = hbp.CGNewton(model.parameters(), cg_tol=1e-13, cg_atol=0.0)
    lengths = []
    for _ in range(STEPS):
        outputs = called(inputs)
        loss = cross_entropy(outputs, labels)
        if group is not None:
            loss = joint_weight(len(inputs), group) * loss
        optimizer.zero_grad()
        exact = task.scheme == "exact"
        hbp.backward(model, outputs, loss, exact=exact, process_group=group)
        if group is not None and not wrapped:
            average([p.grad for p in model.parameters() if p.grad is not None], group)
        optimizer.step()
        assert optimizer.last_line is not None
        lengths.append(optimizer.last_line.length)
    return lengths, flat(model)


def compare_lengths(group: dist.ProcessGroup, size: int) -> list[dict[str, Any]]:
    """Those of the group beside those of one process with the whole batch."""
    rows = []
    for scheme, wrapped in itertools.product(["averaged Jacobians", "exact"], [0, 1]):
        task = Task("convolutional", scheme, "abs")
        part = part_of(dist.get_rank(), size)
        together, found = find_lengths(task, part, group, bool(wrapped))
        alone, expected = find_lengths(task, slice(SAMPLES))
        rows.append(
            {
                "together": together,
                "alone": alone,
                "error": (found - expected).abs().max().item(),
            }
        )
    return rows


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    pages = {size: run_page(folder, size) for size in (2, 3) if rank < size}
    dist.init_process_group("gloo")
    world = dist.group.WORLD
    assert world is not None
    pair = dist.new_group([0, 1])
    found: dict[str, Any] = {}
    alone = train_alone() if rank == 0 else {}
    for size, group in [(3, world), (2, pair)]:
        if rank < size:
            found[f"{size}"] = {
                "page": pages[size],
                "trained": compare(group, size, alone),
                "messages": count_messages(group, size),
                "said": break_things(group, size),
                "twice": send_twice(group, size),
                "answers": answers(group, size),
                "lengths": compare_lengths(group, size),
            }
    if rank < 2:
        found["tutorial"] = count_for_tutorial(pair)
    (folder / f"{rank}.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
