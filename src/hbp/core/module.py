"""A layer: what it remembers of a forward pass, and how curvature passes through it.

A layer z = f(x, θ) states three rules, for every sample of the batch: ∂z/∂x, ∂z/∂θ and
the diagonal of Σ_k ∇²z_k δ_k, δ = ∂loss/∂z. Hessian backpropagation is then, for every
layer, eq-hbp of Dangel, Harmeling & Hennig 2020 (arXiv 1902.01813),

    H_θ = J_θᵀ H_z J_θ        H_x = J_xᵀ H_z J_x + mod(diag(Σ_k ∇²z_k δ_k)),

and what mod does decides which curvature matrix travels backward:

| treatment | mod(r) | curvature matrix |
|---|---|---|
| ``None``, ``"none"`` | r | Hessian; can be indefinite |
| ``"ggn"``, ``"zero"`` | 0 | generalized Gauss-Newton (GGN) |
| ``"abs"`` | absolute value of r | positive-curvature Hessian (PCH) |
| ``"clip"`` | max(r, 0) | the other PCH |

It acts on eigenvalues (eq-mod), of which a diagonal matrix has its entries. Where the
batch is averaged, r is *summed first and modified after* ("abs of the mean",
eq-sum-then-modify), which is not the sum of the samples' PCHs (eq-two-pchs).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm as norm

from .guards import full_precision, is_narrow, is_number
from .jacobians import Batch, Jacobian, Term, as_batch
from .operators import DiagonalOperator, SampleBlocks, ZeroOperator, as_operator
from .operators import SymmetricOperator as Operator

Modify = Callable[[Tensor], Tensor]
"""mod: the eigenvalues of a second-order term, modified."""

TREATMENTS: Final[dict[str | None, Modify | None]] = {
    None: lambda r: r,
    "none": lambda r: r,
    "zero": None,
    "ggn": None,
    "abs": torch.abs,
    "clip": lambda r: r.clamp(min=0),
}


TRANSIENT: Final = ("hessian", "hessian_of", "line", "__getstate__")
"""Attributes of a parameter that belong to one batch, or to this very object."""

NO_RULE: Final = (
    "Undo weight norm or pruning by parametrize.remove_parametrizations() or "
    "prune.remove(); write a rule in parameter_jacobians(); or freeze it."
)
"""What to do about a parameter without curvature."""


@dataclass
class Reading:
    """One Hessian pass: how it reads the batch, and the blocks it collects.

    Attributes:
        modify: mod, or None to drop second-order terms.
        nonnegative: Whether mod leaves nothing negative.
        samples: N if nothing is averaged, and None for averaged curvature.
        batch: Where means come from.
        blocks: The curvature that will be left on each parameter.
        statistics: What has to be finite: the largest entry of a tensor, in absolute
            value, its name, and whose it is. Not the tensor, which holds all samples.
        at: The layer that is looked at, so that an error can say where it is.
    """

    modify: Any
    nonnegative: bool
    samples: int | None
    batch: Batch
    blocks: dict[Tensor, Operator] = field(default_factory=dict)
    statistics: list[tuple[Tensor, str, nn.Module]] = field(default_factory=list)
    at: list[nn.Module] = field(default_factory=list)

    def through(
        self, H: Operator, J: Jacobian, of: HBPModule, average: bool, R: Term
    ) -> Operator:
        """JᵀHJ + R as the batch is read: exact, E[J]ᵀ H E[J] + R, or E[JᵀHJ] + R."""
        if isinstance(H, ZeroOperator):
            features = J.in_size if self.samples else J.in_shape.numel()
            return ZeroOperator(features, H) if R is None else R
        averaged = average and not self.samples
        if averaged:
            J = J.mean(self.batch)
        for part in J.parts or (J,):
            if part.data is not None and part.data.is_floating_point():
                what = "input" if part.of_parameter else "derivative"
                self.statistics.append((norm(part.data, math.inf), what, of))
        if averaged:
            return self.batch.congruence(J, H, R)
        if self.samples:
            return J.congruence(H, R)
        return J.mean_congruence(H, R, self.batch)

    def totalled(self, second_order: Tensor, layer: HBPModule) -> Tensor:
        """What mod gets: the samples' terms, [N, ...], or their sum, [1, ...]."""
        total = second_order if self.samples else self.batch.total(second_order)
        self.statistics.append((norm(total, math.inf), "second-order term", layer))
        return total

    def require_finite(self) -> None:
        """Raise ArithmeticError if a statistic contains NaN or infinity.

        On a GPU a look waits for all that was launched before it, so there is only one.
        """
        if not self.statistics:
            return
        sizes = torch.stack([size for size, _, _ in self.statistics]).tolist()
        for size, (_, what, layer) in zip(sizes, self.statistics, strict=True):
            if not math.isfinite(size):
                self.at[:] = [layer]
                raise ArithmeticError(
                    f"The {what} of {layer} contains NaN or infinity. Check the "
                    "inputs, the weights and the loss of the last forward pass."
                )


class Record:
    """What a forward and a backward pass leave behind for the Hessian pass.

    Tensors are kept by reference, without their graph. Half precision is widened.

    Args:
        layer: Whose parameters and buffers are to stay as they are.
        x: [N, ...].
        z: [N, ...].
        keep: What the layer's rules need, as a rule one of the two; or None.
        delta: Whether to keep δ, and to insist on it.

    Attributes:
        input_shape: [N, ...] of x.
        output_shape: [N, ...] of z.
        kind: dtype of the curvature w.r.t. z, at least float32, and its device.
        output_gradient: δ = ∂loss/∂z, [N, ...], once ``loss.backward()`` has run. It
            carries the 1/N of a mean loss.
        keeps: What is kept, and its version; or None.
        awaits_gradient: Whether ``loss.backward()`` has still to come.
    """

    def __init__(
        self, layer: nn.Module, x: Tensor, z: Tensor, keep: Tensor | None, delta: bool
    ) -> None:
        self.input_shape, self.output_shape = x.shape, z.shape
        self.kind = torch.promote_types(z.dtype, torch.float32), z.device
        self.output_gradient: Tensor | None = None
        self.keeps: Any = None if keep is None else (keep.detach(), keep._version)
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        self._state = [(tensor, tensor._version) for tensor in own]
        self._accumulated = False
        # The layer's next forward pass is told if the gradient of this one comes late.
        self.successor: weakref.ref[Record] | None = None
        self.awaits_gradient = delta and z.requires_grad
        if self.awaits_gradient:
            z.register_hook(self._save_output_gradient)

    def _save_output_gradient(self, gradient: Tensor) -> None:
        """Tensor hook on z. Only a plain ``loss.backward()`` counts.

        An output Hessian too differentiates w.r.t. z, but with gradients enabled.
        """
        if torch.is_grad_enabled():
            return
        self.output_gradient = gradient.detach().to(self.kind[0])
        self.awaits_gradient = False
        # The hook runs before this backward pass adds to p.grad: what is there already
        # comes from another one. (In torch.func.functional_call p may be no leaf.)
        gradients = [p.grad for p, _ in self._state if p.is_leaf and p.grad is not None]
        self._accumulated = any(bool(g.any()) for g in gradients)
        if self.successor and (after := self.successor()):
            after._accumulated |= after.output_gradient is not None

    @property
    def kept(self) -> Tensor:
        """x or z, [N, ...], as the layer chose.

        Raises:
            RuntimeError: it was overwritten, and its curvature would be wrong.
        """
        kept, version = self.keeps
        if kept._version != version:
            raise RuntimeError(
                f"An input or output of shape {list(kept.shape)} was changed in "
                "place after the forward pass, and its curvature with it. Call "
                "backward_hessian() before overwriting it, or use an out-of-place "
                "operation."
            )
        return kept.float() if is_narrow(kept.dtype) else kept

    def delta_of(self, layer: nn.Module) -> Tensor:
        """δ, [N, ...], for a second-order term.

        Raises:
            RuntimeError: nothing in front of the layer requires a gradient.
        """
        if self.output_gradient is None:
            raise RuntimeError(
                f"The second-order term of {layer} needs the gradient w.r.t. its "
                "output, but nothing before it requires one. Call "
                "inputs.requires_grad_() before the forward pass, or choose 'zero'."
            )
        return self.output_gradient

    def require_usable(self, layer: nn.Module) -> None:
        """Raise unless a forward and a backward pass have left what a pass needs."""
        before, after = self.input_shape, self.output_shape
        if len(before) < 2 or len(after) < 2 or before[0] != after[0]:
            raise ValueError(
                f"{layer} mapped {list(before)} to {list(after)}. The Hessian pass "
                "needs [N, features...] on both sides: samples first."
            )
        if after[0] == 0:
            raise ValueError(f"The batch that went through {layer} is empty.")
        if self.awaits_gradient:
            raise RuntimeError(
                f"backward_hessian() of {layer} before loss.backward(). Call "
                "loss.backward() first (without create_graph)."
            )
        for tensor, version in self._state:
            if tensor.dtype.itemsize < 4 and is_narrow(tensor.dtype):
                raise TypeError(
                    f"{layer} has parameters or buffers in {tensor.dtype}, too coarse "
                    "for curvature and for the steps it gives. Keep the model in "
                    "float32, as by model.float(), and compute outputs and loss under "
                    f"torch.autocast(device_type, dtype={tensor.dtype})."
                )
            if tensor._version != version:
                raise RuntimeError(
                    f"A parameter or buffer of {layer} has changed since the forward "
                    "pass, and its curvature with it. Call backward_hessian() before "
                    "optimizer.step()."
                )
        if self._accumulated:
            raise RuntimeError(
                f"The gradients of {layer} are a sum over several passes, but "
                "curvature is known for the last one only. Call zero_grad() before "
                "each loss.backward(); for a larger batch, use one forward pass."
            )


class HBPModule(nn.Module):
    """Base of every layer that sends curvature backward.

    A layer inherits from this class first and from its ``torch.nn`` counterpart
    second. It gives a ``forward`` that ends in ``return self.record(x, z, keep=...)``,
    the rule ``jacobian`` and, where they apply, ``second_order`` and
    ``parameter_jacobians``. ``ElementwiseRule``, ``LinearRule``, ``BilinearRule`` and
    ``GeneralRule`` give all of these for layers of their kind.

    Nothing else of the ``torch.nn`` counterpart changes. The record is no buffer, is in
    no ``state_dict``, and is left out of copies and pickles.

    Attributes:
        last_record: What the latest forward pass with gradients enabled has left.
        schemes: Which of the two choices of ``set_hbp_approximation`` matter here.
        input_dimensions: How many x must have, samples included; None for any.
        structure: What becomes of a parameter's block; ``hbp.blocks`` splits it.
    """

    last_record: Record
    average_input_jacobian = True
    average_parameter_jacobian = True
    schemes: Sequence[str] = ()
    input_dimensions: int | None = None
    structure: Callable[[Operator, Tensor], Operator] | None = None
    set_hbp_blocks: Callable[..., None]  # hbp.blocks gives it.

    # --- The rules of a layer, for every sample. --------------------------------------

    def jacobian(self) -> Jacobian:
        """J = ∂z/∂x of every sample; every layer has one."""
        raise TypeError(f"{type(self).__name__} defines no rule jacobian.")

    def second_order(self, J: Jacobian) -> Tensor | None:
        """The diagonal of Σ_k ∇²z_k δ_k of every sample, [N, ...] as x; None for 0.

        Args:
            J: What ``jacobian`` returned.
        """
        return None

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        """Each parameter θ and ∂z/∂θ of every sample; z is linear in each θ."""
        return ()

    def check_record(self) -> None:
        """Raise unless the rules can read what was recorded; a layer may ask more."""
        if "last_record" not in vars(self):
            raise RuntimeError(
                f"backward_hessian() before a forward pass through {self}. Run "
                "outputs = model(inputs) with gradients enabled first."
            )
        self.last_record.require_usable(self)
        if hasattr(self, "parametrizations"):  # To read one may change its state.
            raise TypeError(f"No rule knows the parametrizations of {self}. {NO_RULE}")
        shape, wanted = self.last_record.input_shape, self.input_dimensions
        if wanted not in (None, len(shape)):
            raise ValueError(
                f"{self} got an input of shape {list(shape)}. Its curvature rules need "
                f"a batch dimension, and {wanted} dimensions in all: unsqueeze(0) one "
                "sample, flatten what is between into the batch."
            )

    # --- The pass. --------------------------------------------------------------------

    def backward_hessian(
        self,
        output_hessian: Tensor | Operator,
        compute_input_hessian: bool = False,
        modify_2nd_order_terms: str | None = None,
        process_group: object = None,
        loss_scale: float = 1.0,
    ) -> Operator | None:
        """Send curvature backward through this module.

        Call it after ``loss.backward()``. It sets ``p.hessian`` on every parameter
        that requires a gradient; if it raises, on none. It belongs to the latest
        forward pass that ran with gradients enabled, and can be called again for that
        pass, say with another treatment.

        Args:
            output_hessian: H_z, the curvature w.r.t. the output: [features,
                features], summed over the batch as by ``batch_summed_hessian``, for
                averaged curvature; or [N, features, features], one matrix for each
                sample as by ``per_sample_hessian``, for [exact products][eq-exact].
                If z is a sequence, [N, T, C], and the loss a sum over positions, those
                of ``z.flatten(0, 1)`` will do, in that order: [N · T, C, C].
            compute_input_hessian: Whether to return the curvature w.r.t. the input.
            modify_2nd_order_terms: ``None`` or ``"none"`` (Hessian), ``"ggn"`` or
                ``"zero"``, which is the same (generalized Gauss-Newton), ``"abs"`` or
                ``"clip"`` (positive-curvature Hessians); see ``hbp.core.module``.
            process_group: Processes that each have a part of the batch, as
                ``torch.distributed.group.WORLD``: the curvature is that of the whole,
                whose loss is the [mean of their losses][eq-parts]. All of them have to
                call. ``None`` for curvature of the samples of this process. See
                ``hbp.distributed``.
            loss_scale: What ``loss`` was multiplied by for ``backward()`` alone, as
                ``scaler.get_scale()`` of a ``torch.amp.GradScaler``. The second-order
                terms are divided by it; ``output_hessian`` is that of ``loss`` itself.

        Returns:
            H_x, an operator of shape [features, features] over the flattened input
            features (exact: [N · features, N · features]), or ``None``.

        Raises:
            ValueError: ``output_hessian`` has the wrong shape, dtype or device, is not
                symmetric or finite; the treatment is unknown; the batch is empty;
                ``loss_scale`` is not positive and finite, or not what the gradient of
                the loss was multiplied by.
            TypeError: a parameter is in half precision; no rule gives one its
                curvature, as with weight norm or pruning; ``process_group`` is none.
            RuntimeError: no forward pass, or no ``loss.backward()``, came before;
                gradients were accumulated over several passes; another process of the
                group failed.
            ArithmeticError: what was recorded contains NaN or infinity.
        """
        if not isinstance(further := compute_input_hessian, bool):
            raise TypeError(f"compute_input_hessian={further!r} must be True or False.")
        modify = _treatment(modify_2nd_order_terms, loss_scale)

        def passage(batch: Batch) -> tuple[Operator | None, Reading]:
            H = batch.output_hessian(as_operator(output_hessian, loss_scale))
            samples = len(H.matrices) if isinstance(H, SampleBlocks) else None
            nonnegative = modify_2nd_order_terms not in (None, "none")
            reading = Reading(modify, nonnegative, samples, batch)
            try:
                input_hessian = self.pull_back(H, reading, further)
                reading.require_finite()
            except Exception as error:
                names = [n for n, m in self.named_modules() if n and m in reading.at]
                for name in names:
                    error.add_note(f"It is layer {name!r} of the model.")
                raise
            for name, p in self.named_parameters():
                if p.requires_grad and p not in reading.blocks:
                    raise TypeError(f"No rule gives {name} its curvature. {NO_RULE}")
            return input_hessian, reading

        with torch.no_grad(), full_precision():
            input_hessian, reading = as_batch(process_group).read(passage)
        # The optimizer tells the model when its step has used the curvature up.
        for p, block in reading.blocks.items():
            vars(p).update(hessian=block, hessian_of=weakref.ref(self), line=None)
        return input_hessian

    def pull_back(
        self, H: Operator, reading: Reading, further: bool
    ) -> Operator | None:
        """H_x if it goes ``further``; the parameters' blocks go to ``reading``."""
        self._require_usable(H, reading)
        for parameter, J in list(self.parameter_jacobians()):
            self._require_fit("parameter_jacobians", J, parameter.numel())
            if parameter.requires_grad:
                average = self.average_parameter_jacobian
                block = reading.through(H, J, self, average, None)
                if reading.samples:
                    block = reading.batch.exact_block(block)
                if self.structure is not None:
                    block = self.structure(block, parameter)
                reading.blocks[parameter] = block
        return self.input_hessian(H, reading) if further else None

    def input_hessian(self, H: Operator, reading: Reading) -> Operator:
        """H_x = JᵀH_z J + mod(…), as the batch is read."""
        J = self.jacobian()
        self._require_fit("jacobian", J, self.last_record.input_shape.numel())
        R = None if reading.modify is None else self.second_order_term(J, reading)
        return reading.through(H, J, self, self.average_input_jacobian, R)

    def second_order_term(self, J: Jacobian, reading: Reading) -> Operator | None:
        """mod(Σ_k ∇²z_k δ_k), as the batch is read; None for 0."""
        second_order = self.second_order(J)
        if second_order is None:
            return None
        r = reading.modify(reading.totalled(second_order, self)).flatten()
        return DiagonalOperator(r, reading.nonnegative)

    def _require_usable(self, H: Operator, reading: Reading) -> None:
        """Raise unless there is a record that ``H`` fits."""
        reading.at[:] = [self]
        self.check_record()
        record = self.last_record
        count, features = record.output_shape[0], record.output_shape[1:].numel()
        # Of z = [N, ..., C] every position may have a matrix: [N · positions, C, C].
        is_sequence = len(record.output_shape) > 2 and H.shape[0] == count * features
        if is_sequence and reading.samples == H.shape[0] // record.output_shape[-1]:
            reading.samples = count
        if reading.samples not in (None, count):
            raise ValueError(
                f"output_hessian has matrices for {reading.samples} samples, but "
                f"{count} went through {self}. Use per_sample_hessian(loss, outputs) "
                "of the latest forward pass."
            )
        features *= reading.samples or 1
        if H.shape[0] != features:
            raise ValueError(
                f"output_hessian has shape {list(H.shape)}, but {self} has {features} "
                f"output features: [{features}, {features}] is needed."
            )
        dtype, device = record.kind
        if (H.dtype, H.device) != (dtype, device):
            raise ValueError(
                f"output_hessian is {H.dtype} on {H.device}, but that of {self} must "
                f"be {dtype} on {device}. Convert it with .to(...)."
            )
        reading.at.clear()

    def _require_fit(self, rule: str, J: Jacobian, entering: int) -> None:
        """Raise unless a rule's map fits; matrices would broadcast, or fail far off."""
        after = self.last_record.output_shape
        sizes = getattr(J, "out_size", None), getattr(J, "in_size", None)
        if sizes != (after.numel(), entering):
            raise ValueError(
                f"{rule} of {type(self).__name__} is a {type(J).__name__} of shape "
                f"{list(sizes)}, but it has to be the Jacobian of all {after[0]} "
                f"samples: [{after.numel()}, {entering}]."
            )

    # --- What is remembered. ----------------------------------------------------------

    def record(
        self, x: Tensor, z: Tensor, keep: Tensor | None, with_gradient: bool = True
    ) -> Tensor:
        """Remember this forward pass and return z.

        Nothing is remembered without gradients, nor where the tensors mean nothing
        outside: in ``torch.func``, ``torch.fx`` and ``torch.export``. In a model under
        ``torch.compile`` a layer's graph ends here, so that what is remembered are the
        tensors of this very pass.

        Args:
            x: The input, [N, ...].
            z: The output, [N, ...].
            keep: What the layer's rules need, as a rule one of the two; or None.
            with_gradient: ``False`` for a layer whose z is a view of x. It has no use
                for δ, and autograd drops the hook if z is then changed in place.
        """
        if torch.is_grad_enabled():
            remember = self._remember
            if torch.compiler.is_compiling():
                remember = torch.compiler.disable(remember)
            remember(x, z, keep, with_gradient)
        return z

    def _remember(
        self, x: Tensor, z: Tensor, keep: Tensor | None, with_gradient: bool
    ) -> None:
        # torch.fx passes proxies, torch.export tensors without values (it runs this
        # function itself; in a compiled model nobody compiles it). What torch.func
        # wraps is known by no public test.
        stand_in = not isinstance(z, Tensor) or torch.compiler.is_compiling()
        if stand_in or torch._C._functorch.is_functorch_wrapped_tensor(z):
            return
        record = Record(self, x, z, keep, with_gradient)
        if "last_record" in vars(self):
            self.last_record.successor = weakref.ref(record)
        self.last_record = record

    # --- Choices, and life as an nn.Module. -------------------------------------------

    def set_hbp_approximation(
        self,
        average_input_jacobian: bool | None = None,
        average_parameter_jacobian: bool | None = None,
    ) -> None:
        """Choose [the batch scheme][eq-averaging], here and in every HBP module inside.

        Args:
            average_input_jacobian: ``True`` averages the Jacobian of a nonlinear layer
                over the batch, E[J]ᵀ H E[J] (Chen et al. 2018). ``False`` averages the
                product, E[Jᵀ H J] (Botev et al. 2017), for which the dense matrix is
                formed.
            average_parameter_jacobian: The same choice for a weight: ``True`` gives
                H ⊗ x̄x̄ᵀ, ``False`` H ⊗ E[xxᵀ].

        ``None`` leaves a choice as it is; a new layer averages both Jacobians. Layers
        to which a choice does not apply ignore it.

        Raises:
            TypeError: an argument is neither a bool nor None.
        """
        choices = {"average_input_jacobian": average_input_jacobian}
        choices["average_parameter_jacobian"] = average_parameter_jacobian
        for name, value in choices.items():
            if not isinstance(value, bool | None):
                raise TypeError(f"{name}={value!r} must be True, False or None.")
        for module in self.modules():
            if isinstance(module, HBPModule):
                own = {n: choices[n] for n in module.schemes if choices[n] is not None}
                vars(module).update(own)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and, with them, ``p.hessian``."""
        super().zero_grad(set_to_none)
        drop_curvature(self.parameters())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; its ``hessian`` is None, as its ``grad`` is."""
        super().register_parameter(name, param)
        if param is not None:
            _prepare(param)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the record, which belongs to one forward pass."""
        return {k: v for k, v in vars(self).items() if k not in ("last_record", "line")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of parameters come without attributes."""
        nn.Module.__setstate__(self, state)
        for parameter in self.parameters(recurse=False):
            _prepare(parameter)

    def extra_repr(self) -> str:
        """The options of the layer, and how it reads a batch."""
        parts = [super().extra_repr()]
        for name in self.schemes:
            short = name.replace("average", "avg").replace("parameter", "param")
            parts.append(f"{short.removesuffix('obian')}: {getattr(self, name)}")
        if self.structure is not None:
            parts.append(str(self.structure))
        return ", ".join(filter(None, parts))


def drop_curvature(parameters: Iterable[Tensor]) -> None:
    """Clear ``p.hessian``, and what its pass has kept of the batch."""
    models: set[Any] = set()
    for parameter in parameters:
        models.add((owner := vars(parameter).pop("hessian_of", None)) and owner())
        vars(parameter).update(hessian=None, line=None)
    for model in models - {None}:
        vars(model).pop("line", None)
        layers = [m for m in model.modules() if "last_record" in vars(m)]
        # A forward pass of which the backward pass has still to come is another one.
        if not any(layer.last_record.awaits_gradient for layer in layers):
            for layer in layers:
                del layer.last_record


def _prepare(parameter: nn.Parameter) -> None:
    """Give it a ``hessian``; pickles leave it out, for it holds a batch."""
    own = weakref.ref(parameter)
    vars(parameter).setdefault("hessian", None)
    vars(parameter)["__getstate__"] = lambda: {
        name: value for name, value in vars(own()).items() if name not in TRANSIENT
    }


def _treatment(name: str | None, loss_scale: float) -> Modify | None:
    """mod by its name, for terms that are too large by ``loss_scale``."""
    # A list or dict is no key; a lookup must not answer with its own TypeError.
    if not isinstance(name, str | None) or name not in TREATMENTS:
        raise ValueError(
            f"modify_2nd_order_terms={name!r} is unknown. Choose None or 'none' "
            "(Hessian), 'ggn' or 'zero' (generalized Gauss-Newton), 'abs' or 'clip' "
            "(positive-curvature Hessians)."
        )
    if not (is_number(loss_scale) and 0 < loss_scale < math.inf):
        raise ValueError(
            f"loss_scale={loss_scale!r} must be a positive finite number: what the "
            "loss was multiplied by before backward(), as scaler.get_scale()."
        )
    modify, scale = TREATMENTS[name], float(loss_scale)
    return modify if modify is None or scale == 1 else lambda r: modify(r) / scale
