"""The contract of a layer: what the forward pass records, what goes backward.

A layer computes ``z = f(x, θ)``. Its Hessian pass receives the curvature H_z w.r.t.
its output as an operator, leaves ``p.hessian`` on each of its parameters, and hands
the curvature H_x w.r.t. its input to the module below.

A layer's rules are its Jacobian ∂z/∂x, the diagonal of its second-order term, and
∂z/∂θ. A pass reads them in one of two ways. *Averaged*, the batch is one virtual
sample: Jacobians are averaged, second-order terms summed, and vectors at a layer's
input or output are one sample's features. *Exact*, nothing is averaged: vectors are
the features of all samples, one after the other. The rules are the same.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hbp.blocks import JointBlock, JointPart
from hbp.checks import require_floats
from hbp.curvature import Treatment, is_nonnegative, second_order_treatment
from hbp.distributed import Factor, JointBatch, JointOperator, Samples
from hbp.maps import ChainMap, JointMap, LinearMap, ReplicateMap
from hbp.operators import (
    Congruence,
    DenseOperator,
    DiagonalOperator,
    DirectSum,
    RepeatedOperator,
    SampleBlocks,
    SymmetricOperator,
    ZeroOperator,
    attach_hessian,
)
from hbp.precision import full_precision, is_narrow, widened

if TYPE_CHECKING:  # A torch without torch.distributed has no such name.
    from torch.distributed import ProcessGroup


class HessianPass:
    """What one Hessian pass collects on its way, before anything is changed.

    Args:
        treatment: How second-order terms are modified.
        batch: N for exact curvature of N samples, ``None`` for averaged curvature.
        joint: The batch of which this process has a part, if it is so.

    Attributes:
        treatment: The same.
        batch: The same.
        joint: The same.
        blocks: The curvature that will be left on parameters; on two, if they share it.
    """

    def __init__(
        self,
        treatment: Treatment,
        batch: int | None = None,
        joint: JointBatch | None = None,
    ) -> None:
        self.treatment = treatment
        self.batch = batch
        self.joint = joint
        self.blocks: list[tuple[Sequence[Tensor], SymmetricOperator]] = []
        self._statistics: list[tuple[Tensor, str, nn.Module]] = []
        self._latest: dict[Record, Tensor] = {}
        self._keys: Iterator[tuple[nn.Module, str, int]] = iter(())

    @property
    def is_exact(self) -> bool:
        """Whether nothing is averaged."""
        return self.batch is not None

    @property
    def samples(self) -> int:
        """How many samples a vector holds: N, or the one virtual sample."""
        return self.batch or 1

    def exactly(self, batch: int) -> HessianPass:
        """This pass, with the rules of the next layer read without averaging."""
        twin = copy.copy(self)
        twin.batch = batch
        twin.joint = None
        return twin

    def reading(self, module: nn.Module, rule: str) -> HessianPass:
        """This pass, as one rule of a layer is to read it.

        In a joint batch a statistic is known by who asks for it.
        """
        if self.joint is None:
            return self
        twin = copy.copy(self)
        twin._keys = ((module, rule, i) for i in count())
        return twin

    def without_blocks(self) -> HessianPass:
        """This pass, for a detour that leaves nothing on the parameters."""
        twin = copy.copy(self)
        twin.blocks = []
        return twin

    def once(self, record: Record, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, if it is not what the owner of ``record`` asked for before.

        Two rules of a layer can share an array of the batch's size, and it is gone
        as soon as the next layer asks.
        """
        if record not in self._latest:
            self._latest.clear()
            self._latest[record] = compute()
        return self._latest[record]

    def mean(self, values: Tensor) -> Tensor:
        """A first derivative as the pass reads it.

        [N, ...] → [features] averaged, [N · features] exact.
        """
        if self.is_exact:
            return values.flatten()
        return self.mean_of_sum(sum_over_batch(values.flatten(1)), len(values))

    def mean_of_sum(self, sums: Tensor, samples: int) -> Tensor:
        """A mean over the batch from a sum over the samples of the record."""
        if self.joint is None:
            return sums / samples
        return self.joint.mean(next(self._keys), sums, samples)

    def total(self, values: Tensor) -> Tensor:
        """A second-order term as the pass reads it; summed, as in eq-sum-then-modify.

        [N, ...] → [features] summed, [N · features] exact.
        """
        if self.is_exact:
            return values.flatten()
        sums = sum_over_batch(values.flatten(1))
        return sums if self.joint is None else self.joint.total(next(self._keys), sums)

    def factor(self, x: Tensor, output_gradient: Tensor | None) -> Factor:
        """w FᵀF = E[xxᵀ] over the batch, from x, [N, features], and δ."""
        if self.joint is None:
            return Factor(x, 1 / len(x), output_gradient)
        return self.joint.factor(next(self._keys), x, output_gradient)

    def finite(self, statistic: Tensor, what: str, module: nn.Module) -> Tensor:
        """Return ``statistic``; ``finish`` will check it."""
        self._statistics.append((statistic, what, module))
        return statistic

    def check(self) -> None:
        """Check every statistic.

        On a GPU a check waits for all that was launched before it, so there is only
        one.

        Raises:
            ArithmeticError: a statistic contains NaN or infinity.
        """
        if self._statistics:
            tensors = [statistic for statistic, _, _ in self._statistics]
            largest = torch.stack(torch._foreach_norm(tensors, math.inf))
            for size, (_, what, module) in zip(
                largest.tolist(), self._statistics, strict=True
            ):
                if not math.isfinite(size):
                    raise ArithmeticError(
                        f"The {what} of {module} contains NaN or infinity. Check the "
                        "inputs, the weights and the loss of the last forward pass."
                    )

    def leave_blocks(self) -> None:
        """Set ``p.hessian`` on the parameters."""
        for parameters, block in self.blocks:
            if len(parameters) == 1:
                attach_hessian(parameters[0], block)
                continue
            sizes = [parameter.numel() for parameter in parameters]
            joint = JointBlock(block, len(parameters[0]))
            for index, parameter in enumerate(parameters):
                attach_hessian(parameter, JointPart(joint, sizes, index))


class Record:
    """What one forward and backward pass leave behind for the Hessian pass.

    Tensors are kept by reference, without their graph. Half precision is widened.

    Args:
        input: x, [N, ...].
        output: z, [N, ...].
        keep: The one of them that the layer's rules need, or None.
        state: The layer's own parameters and buffers.
        with_gradient: Whether to keep δ, and to insist on it.

    Attributes:
        input_shape: [N, ...] of x.
        output_shape: [N, ...] of z.
        kind: dtype of the curvature w.r.t. z, at least float32, and its device.
        output_gradient: δ = ∂loss/∂z, [N, ...], once ``loss.backward()`` has run. It
            carries the 1/N of a mean loss.
        expects_gradient: Whether ``loss.backward()`` will bring δ.
        accumulated: Whether p.grad is a sum over several passes.
        successor: A weak reference to the record of the layer's next forward pass.
    """

    def __init__(
        self,
        input: Tensor,
        output: Tensor,
        keep: Tensor | None,
        state: Iterable[Tensor],
        with_gradient: bool,
    ) -> None:
        self.input_shape, self.output_shape = input.shape, output.shape
        self.kind = widened(output.dtype), output.device
        self.output_gradient: Tensor | None = None
        self.accumulated = False
        self.successor: Callable[[], Record | None] = lambda: None
        self._state = list(state)
        self._versions = [tensor._version for tensor in self._state]
        if keep is not None:
            self._kept = keep.detach()
            self._version = keep._version
        self.expects_gradient = with_gradient and output.requires_grad
        if self.expects_gradient:
            output.register_hook(self._save_output_gradient)

    def _save_output_gradient(self, gradient: Tensor) -> None:
        """Tensor hook on z. Only a plain ``loss.backward()`` counts.

        ``batch_summed_hessian`` too differentiates w.r.t. the outputs, but with
        gradients enabled.
        """
        if torch.is_grad_enabled():
            return
        self.output_gradient = gradient.detach().to(widened(gradient.dtype))
        # The hook runs before this backward pass adds to p.grad: what is there
        # already comes from another one.
        # What replaces a parameter in torch.func.functional_call may be no leaf.
        leaves = [p for p in self._state if p.is_leaf]
        gradients = [p.grad for p in leaves if p.grad is not None]
        self.accumulated |= any(bool(g.any()) for g in gradients)
        if (successor := self.successor()) is not None:
            successor.accumulated = True

    def of_joint_batch(self, joint: Samples) -> Record:
        """This record with the samples of all processes."""
        whole = copy.copy(self)
        whole._kept, whole.output_gradient = joint
        whole._version = joint.kept._version
        samples = len(joint.kept)
        whole.input_shape = torch.Size([samples, *self.input_shape[1:]])
        whole.output_shape = torch.Size([samples, *self.output_shape[1:]])
        return whole

    def require_wide_state(self, module: nn.Module) -> None:
        """Raise TypeError if a parameter or buffer is in half precision."""
        for dtype in {tensor.dtype for tensor in self._state}:
            if is_narrow(dtype):
                raise TypeError(
                    f"{module} has parameters or buffers in {dtype}, too coarse for "
                    "curvature and for the steps it gives. Keep the model in float32, "
                    "as by model.float(), and compute outputs and loss under "
                    f"torch.autocast(device_type, dtype={dtype})."
                )

    def require_same_state(self, module: nn.Module) -> None:
        """Raise RuntimeError if a parameter or buffer has changed since."""
        if [tensor._version for tensor in self._state] != self._versions:
            raise RuntimeError(
                f"A parameter or buffer of {module} has changed since the forward "
                "pass, and its curvature with it. Call backward_hessian() before "
                "optimizer.step()."
            )

    @property
    def keeps(self) -> bool:
        """Whether there is something kept."""
        return hasattr(self, "_kept")

    @property
    def kept(self) -> Tensor:
        """x or z, [N, ...], as the layer chose.

        Raises:
            RuntimeError: it was overwritten, and its curvature would be wrong.
        """
        if self._kept._version != self._version:
            raise RuntimeError(
                f"An input or output of shape {list(self._kept.shape)} was changed in "
                "place after the forward pass, and its curvature with it. Call "
                "backward_hessian() before overwriting it, or use an out-of-place "
                "operation."
            )
        return self._kept.to(widened(self._kept.dtype))


class HBPModule(nn.Module):
    """Base of every layer that sends curvature backward.

    A layer inherits from this class first and from its ``torch.nn`` counterpart
    second. It gives a ``forward`` that ends in ``self.record(...)``, the rule
    ``jacobian`` and, where they apply, ``second_order`` and ``parameter_jacobians``.
    ``_input_hessian`` and ``_parameter_hessians`` follow from them by [the chain rule
    for Hessians][eq-hbp]; a layer overrides these only to be faster.
    ``ElementwiseRule``, ``LinearRule``, ``BilinearRule`` and ``GeneralRule`` give all
    of these for layers of their kind.

    Nothing else of the ``torch.nn`` counterpart changes. The record is no buffer,
    is in no ``state_dict``, and is left out of copies and pickles.
    """

    _record: Record | None = None

    def record(
        self,
        input: Tensor,
        output: Tensor,
        keep: Tensor | None,
        with_gradient: bool = True,
    ) -> Tensor:
        """Remember this forward pass and return ``output``.

        Nothing is remembered without gradients, nor where the tensors mean nothing
        outside: in ``torch.func``, ``torch.fx`` and ``torch.export``. In a model under
        ``torch.compile`` a layer's graph ends here, so that what is remembered
        are the tensors of this very pass.

        Args:
            input: x, [N, ...].
            output: z, [N, ...].
            keep: The one of them that the layer's rules need, or None.
            with_gradient: ``False`` for a layer whose z is a view of x. It has no use
                for δ, and autograd drops the hook if z is then changed in place.
        """
        if torch.is_grad_enabled():
            remember = self._remember
            if torch.compiler.is_compiling():
                remember = torch.compiler.disable(remember)
            remember(input, output, keep, with_gradient)
        return output

    def _remember(
        self, input: Tensor, output: Tensor, keep: Tensor | None, with_gradient: bool
    ) -> None:
        if _is_traced(output):
            return
        own = self.parameters(recurse=False), self.buffers(recurse=False)
        record = Record(input, output, keep, chain(*own), with_gradient)
        if self._record is not None:
            self._record.successor = weakref.ref(record)
        self._record = record

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; its ``hessian`` is None, as its ``grad`` is."""
        super().register_parameter(name, param)
        _give_hessian(param)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the record, which belongs to one forward pass."""
        return {k: v for k, v in self.__dict__.items() if k != "_record"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of parameters come without attributes."""
        nn.Module.__setstate__(self, state)
        for parameter in self.parameters(recurse=False):
            _give_hessian(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and, with them, ``p.hessian``."""
        super().zero_grad(set_to_none)
        for parameter in self.parameters():
            attach_hessian(parameter, None)

    def set_hbp_approximation(
        self,
        average_input_jacobian: bool = True,
        average_parameter_jacobian: bool = True,
    ) -> None:
        """Choose [the batch scheme][eq-averaging], here and in every HBP module inside.

        Args:
            average_input_jacobian: ``True`` averages the Jacobian of a nonlinear
                layer over the batch, E[J]ᵀ H E[J] (Chen et al. 2018). ``False``
                averages the product, E[Jᵀ H J] (Botev et al. 2017), for which the
                dense matrix is formed.
            average_parameter_jacobian: The same choice for a weight: ``True`` gives
                H ⊗ x̄x̄ᵀ, ``False`` H ⊗ E[xxᵀ].

        A call sets both; what it does not name becomes ``True``. Layers to which a
        choice does not apply ignore it.

        Raises:
            TypeError: an argument is no bool.
        """
        choices = {
            "average_input_jacobian": average_input_jacobian,
            "average_parameter_jacobian": average_parameter_jacobian,
        }
        for name, value in choices.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be True or False.")
        for module in self.modules():
            for name, value in choices.items():
                if isinstance(module, HBPModule) and hasattr(module, name):
                    setattr(module, name, value)

    def set_hbp_blocks(self, sub_blocks: int = 1, joint_bias: bool = False) -> None:
        """Choose what makes a parameter's block, here and in every module inside.

        It matters to linear layers and convolutions (not to transposed ones), and can
        be changed at any time; the next Hessian pass goes by it. A call sets both.

        Args:
            sub_blocks: Split a block into that many, of consecutive output features,
                and drop what couples them. Each is solved on its own, all in a batch.
                A layer of fewer output features gets one for each.
            joint_bias: Whether weight and bias share one block, so that
                ``CGNewton`` solves for both at once. Their ``p.hessian`` are its
                parts.

        Raises:
            ValueError: ``sub_blocks`` is no positive integer.
            TypeError: ``joint_bias`` is no bool.
        """
        if not isinstance(sub_blocks, int) or isinstance(sub_blocks, bool):
            raise ValueError(f"sub_blocks={sub_blocks!r} must be a positive integer.")
        if sub_blocks < 1:
            raise ValueError(f"sub_blocks={sub_blocks} must be a positive integer.")
        if not isinstance(joint_bias, bool):
            raise TypeError(f"joint_bias={joint_bias!r} must be True or False.")
        for module in self.modules():
            if isinstance(module, HBPModule) and hasattr(module, "sub_blocks"):
                vars(module).update(sub_blocks=sub_blocks, joint_bias=joint_bias)

    def backward_hessian(
        self,
        output_hessian: Tensor | SymmetricOperator,
        compute_input_hessian: bool = False,
        modify_2nd_order_terms: str | None = None,
        process_group: ProcessGroup | None = None,
        loss_scale: float = 1.0,
    ) -> SymmetricOperator | None:
        """Send curvature backward through this module.

        Call it after ``loss.backward()``. It sets ``p.hessian`` on every parameter
        that requires a gradient; if it raises, on none. It belongs to the latest
        forward pass that ran with gradients enabled, and can be called again for
        that pass, say with another treatment.

        Args:
            output_hessian: H_z, the curvature w.r.t. the output: [features,
                features], summed over the batch as by ``batch_summed_hessian``, for
                averaged curvature; or [N, features, features], one matrix for each
                sample as by ``per_sample_hessian``, for exact products.
            compute_input_hessian: Whether to return the curvature w.r.t. the input.
            modify_2nd_order_terms: ``None`` or ``"none"`` (Hessian), ``"zero"``
                (generalized Gauss-Newton), ``"abs"`` or ``"clip"``
                (positive-curvature Hessians); see ``hbp.curvature``.
            process_group: Processes that each have a part of the batch, as
                ``torch.distributed.group.WORLD``: the curvature is that of the whole,
                whose loss is the [mean of their losses][eq-parts]. All of them have to
                call. ``None`` for curvature of the samples of this process.
            loss_scale: What ``loss`` was multiplied by for ``backward()`` alone, as
                ``scaler.get_scale()`` of a ``torch.amp.GradScaler``. The second-order
                terms are divided by it; ``output_hessian`` is that of ``loss`` itself.

        Returns:
            H_x, an operator of shape [features, features] over the flattened input
            features (exact: [N · features, N · features]), or ``None``.

        Raises:
            ValueError: ``output_hessian`` has the wrong shape, dtype or device, is
                not symmetric or finite; the treatment is unknown; the batch is empty;
                ``loss_scale`` is not positive and finite.
            TypeError: a parameter is in half precision.
            RuntimeError: no forward pass, or no ``loss.backward()``, came before;
                gradients were accumulated over several passes; another process of the
                group failed.
            ArithmeticError: what was recorded contains NaN or infinity.
        """
        if not isinstance(compute_input_hessian, bool):
            raise TypeError(
                f"compute_input_hessian={compute_input_hessian!r} must be True or "
                "False."
            )
        treatment = second_order_treatment(modify_2nd_order_terms, loss_scale)
        with torch.no_grad(), full_precision():
            if process_group is not None:
                _require_hessian(output_hessian)
                joint = JointBatch(process_group, output_hessian.device)
                return self._send_back_jointly(
                    output_hessian, treatment, joint, compute_input_hessian
                )
            operator = as_operator(output_hessian)
            hessian_pass = HessianPass(treatment, _samples_of(operator))
            input_hessian = self._send_back(
                operator, hessian_pass, compute_input_hessian
            )
            hessian_pass.check()
            hessian_pass.leave_blocks()
        return input_hessian

    def _send_back_jointly(
        self,
        output_hessian: Tensor | SymmetricOperator,
        treatment: Treatment,
        joint: JointBatch,
        compute_input_hessian: bool,
    ) -> SymmetricOperator | None:
        """``backward_hessian`` for the batch of all processes."""
        with joint.together():
            operator = as_operator(output_hessian)
            hessian_pass = HessianPass(treatment, _samples_of(operator), joint)
            if hessian_pass.is_exact:
                sent = self._send_back(operator, hessian_pass, compute_input_hessian)
                hessian_pass.check()
                sizes = [block.shape[0] for _, block in hessian_pass.blocks]
                joint.product_entries = sum(sizes)
            else:
                joint.total("output Hessian", operator.to_dense().clone())
                self._collect(hessian_pass, compute_input_hessian)
        if not hessian_pass.is_exact:
            joint.exchange()
            hessian_pass = HessianPass(treatment, None, joint)
            whole = joint.total("output Hessian", operator.to_dense())
            sent = self._send_back(
                DenseOperator(whole), hessian_pass, compute_input_hessian
            )
            hessian_pass.check()
        hessian_pass.leave_blocks()
        return sent

    def _collect(self, hessian_pass: HessianPass, compute_input_hessian: bool) -> None:
        """Ask for every statistic that ``_send_back`` is going to read."""
        self._check_pass()
        assert hessian_pass.joint is not None
        hessian_pass.joint.count = self.last_record.input_shape[0]
        if any(p.requires_grad for p in self.parameters()):
            self._collect_parameters(hessian_pass)
        if compute_input_hessian:
            self._read_second_order(hessian_pass)
            self._collect_jacobian(hessian_pass)

    def _collect_parameters(self, hessian_pass: HessianPass) -> None:
        if getattr(self, "average_parameter_jacobian", True):
            for _ in self._read_parameter_jacobians(hessian_pass):
                pass
        else:
            self._joint_record(hessian_pass)

    def _collect_jacobian(self, hessian_pass: HessianPass) -> None:
        if getattr(self, "average_input_jacobian", True):
            self._jacobian(hessian_pass)
        else:
            self._joint_record(hessian_pass)

    def _read_second_order(self, hessian_pass: HessianPass) -> Tensor | None:
        return self.second_order(hessian_pass.reading(self, "second_order"))

    def _read_parameter_jacobians(
        self, hessian_pass: HessianPass
    ) -> Iterable[tuple[Tensor, LinearMap]]:
        rule = "parameter_jacobians"
        return self.parameter_jacobians(hessian_pass.reading(self, rule))

    def _joint_record(self, hessian_pass: HessianPass) -> Record:
        """The record of all samples, also of those that other processes have."""
        record, joint = self.last_record, hessian_pass.joint
        if joint is None or not record.keeps:
            return record
        samples = Samples(record.kept, record.output_gradient)
        return record.of_joint_batch(joint.samples((self, "record"), samples))

    @contextmanager
    def _sample_by_sample(
        self, hessian_pass: HessianPass
    ) -> Iterator[tuple[HessianPass, int]]:
        """Inside, rules read the samples one by one, those of all processes; N."""
        own = self.last_record
        self._record = self._joint_record(hessian_pass)
        try:
            samples = self._record.input_shape[0]
            yield hessian_pass.exactly(samples), samples
        finally:
            self._record = own

    def _send_back(
        self,
        output_hessian: SymmetricOperator,
        hessian_pass: HessianPass,
        compute_input_hessian: bool,
    ) -> SymmetricOperator | None:
        """H_x, if asked for; the pass collects the parameters' blocks."""
        self._check_pass()
        self._check_hessian(output_hessian, hessian_pass)
        self._parameter_hessians(output_hessian, hessian_pass)
        if not compute_input_hessian:
            return None
        return self._input_hessian(output_hessian, hessian_pass)

    def _input_hessian(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> SymmetricOperator:
        """H_x = JᵀH_z J + mod(Σ_k ∇²z_k δ_k), with the scheme's mean of JᵀH_z J.

        This is eq-hbp, with the means of eq-averaging.
        """
        second_order = self._read_second_order(hessian_pass)
        outer, jacobian = output_hessian, self._jacobian
        if isinstance(outer, ZeroOperator):
            return self._second_order_alone(outer, second_order, hessian_pass)
        positive = is_nonnegative(hessian_pass.treatment)
        if hessian_pass.is_exact or getattr(self, "average_input_jacobian", True):
            return Congruence(outer, jacobian(hessian_pass), second_order, positive)
        # E[JᵀHJ]: every sample gets 1/N of H, and its own J.
        with self._sample_by_sample(hessian_pass) as (exact_pass, count):
            each = jacobian(exact_pass)
        repeated = RepeatedOperator(outer, count, 1 / count)
        spread = ReplicateMap(count, each.in_size // count)
        path = ChainMap([spread, each], spread.in_size)
        return Congruence(repeated, path, second_order, positive)

    def _second_order_alone(
        self, zero: ZeroOperator, diagonal: Tensor | None, hessian_pass: HessianPass
    ) -> SymmetricOperator:
        if diagonal is not None:
            return DiagonalOperator(diagonal)
        features = self.last_record.input_shape[1:].numel()
        return ZeroOperator(features * hessian_pass.samples, zero.dtype, zero.device)

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        """J = ∂z/∂x as the pass reads it; every layer has one.

        Args:
            hessian_pass: ``mean`` takes the samples' derivatives to what it reads;
                ``samples`` says for how many the map is.

        Returns:
            A map from [samples · features of x] to [samples · features of z].
        """
        raise TypeError(f"{type(self).__name__} defines no rule jacobian.")

    def second_order(self, hessian_pass: HessianPass) -> Tensor | None:
        """The diagonal of mod(Σ_k ∇²z_k δ_k) as the pass reads it; None for 0.

        Args:
            hessian_pass: ``total`` takes the samples' terms to what it reads;
                ``treatment`` is mod, or None to drop the term.

        Returns:
            [samples · features of x].
        """
        return None

    def parameter_jacobians(
        self, hessian_pass: HessianPass
    ) -> Iterable[tuple[Tensor, LinearMap]]:
        """Each parameter θ and J = ∂z/∂θ as the pass reads it; z is linear in each θ.

        Args:
            hessian_pass: As for ``jacobian``.

        Returns:
            Maps from [entries of θ] to [samples · features of z].
        """
        return ()

    def _jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        """``jacobian``, if it fits what was recorded; a chain records nothing."""
        jacobian = self.jacobian(hessian_pass.reading(self, "jacobian"))
        if self._record is None:
            return jacobian
        entering = self.last_record.input_shape[1:].numel() * hessian_pass.samples
        self._check_map("jacobian", jacobian, entering, hessian_pass)
        return jacobian

    def _check_map(
        self, rule: str, jacobian: LinearMap, entering: int, hessian_pass: HessianPass
    ) -> None:
        """Raise unless a rule's map fits; matrices would broadcast, or fail far off."""
        leaving = self.last_record.output_shape[1:].numel() * hessian_pass.samples
        if (jacobian.out_size, jacobian.in_size) != (leaving, entering):
            raise ValueError(
                f"{rule} of {type(self).__name__} is a map of shape "
                f"[{jacobian.out_size}, {jacobian.in_size}], but the pass reads "
                f"{hessian_pass.samples} sample(s) and needs [{leaving}, {entering}]."
            )

    def _parameter_hessians(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> None:
        """H_θ = JᵀH_z J, or E[JᵀH_z J], for the parameters that require a gradient.

        This is eq-hbp without a second-order term, with the means of eq-averaging, or
        read exactly as in eq-exact.
        """
        averages = getattr(self, "average_parameter_jacobian", True)
        if hessian_pass.is_exact or averages:
            jacobians = self._trained_jacobians(hessian_pass)
        else:  # Every sample gets 1/N of H, and its own J.
            with self._sample_by_sample(hessian_pass) as (exact_pass, count):
                jacobians = self._trained_jacobians(exact_pass)
            output_hessian = RepeatedOperator(output_hessian, count, 1 / count)
        if getattr(self, "joint_bias", False) and len(jacobians) == 2:
            joint = Congruence(output_hessian, JointMap(*jacobians.values()))
            self._leave(tuple(jacobians), joint, hessian_pass)
            return
        for parameter, jacobian in jacobians.items():
            block = Congruence(output_hessian, jacobian)
            self._leave((parameter,), block, hessian_pass)

    def _trained_jacobians(self, hessian_pass: HessianPass) -> dict[Tensor, LinearMap]:
        """∂z/∂θ of the parameters that require a gradient, checked."""
        jacobians = {}
        for parameter, jacobian in self._read_parameter_jacobians(hessian_pass):
            rule = f"parameter_jacobians ({list(parameter.shape)})"
            self._check_map(rule, jacobian, parameter.numel(), hessian_pass)
            if parameter.requires_grad:
                jacobians[parameter] = jacobian
        return jacobians

    def _leave(
        self,
        parameters: Sequence[Tensor],
        block: SymmetricOperator,
        hessian_pass: HessianPass,
    ) -> None:
        """Note the block of parameters, in as many sub-blocks as the layer wants."""
        if hessian_pass.joint is not None and hessian_pass.is_exact:
            block = JointOperator(block, hessian_pass.joint.process_group)
        features = len(parameters[0])
        count = min(getattr(self, "sub_blocks", 1), features)
        if count > 1:
            entries = block.shape[0] // features
            sizes = [
                len(part) * entries for part in torch.arange(features).chunk(count)
            ]
            block = DirectSum(block.diagonal_blocks(sizes))
        hessian_pass.blocks.append((parameters, block))

    @property
    def last_record(self) -> Record:
        """The record of the latest forward pass with gradients enabled.

        Raises:
            RuntimeError: there was none.
        """
        if self._record is None:
            raise RuntimeError(
                f"backward_hessian() before a forward pass through {self}. Run "
                "outputs = model(inputs) with gradients enabled first."
            )
        return self._record

    def _check_pass(self) -> None:
        """Raise unless a forward and a backward pass left a usable record."""
        record = self.last_record
        before, after = record.input_shape, record.output_shape
        if len(before) < 2 or len(after) < 2 or before[0] != after[0]:
            raise ValueError(
                f"{self} mapped {list(before)} to {list(after)}. The Hessian pass "
                "needs [N, features...] on both sides: samples first."
            )
        if after[0] == 0:
            raise ValueError(f"The batch that went through {self} is empty.")
        if record.expects_gradient and record.output_gradient is None:
            raise RuntimeError(
                f"backward_hessian() of {self} before loss.backward(). Call "
                "loss.backward() first (without create_graph)."
            )
        record.require_wide_state(self)
        record.require_same_state(self)
        if record.accumulated:
            raise RuntimeError(
                f"The gradients of {self} are a sum over several passes, but curvature "
                "is known for the last one only. Call zero_grad() before each "
                "loss.backward(); for a larger batch, use one forward pass."
            )

    def _check_hessian(
        self, hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> None:
        """Raise unless ``hessian`` fits the recorded output."""
        record = self.last_record
        count, features = record.output_shape[0], record.output_shape[1:].numel()
        if hessian_pass.is_exact and hessian_pass.batch != count:
            raise ValueError(
                f"output_hessian has matrices for {hessian_pass.batch} samples, but "
                f"{count} went through {self}. Use per_sample_hessian(loss, outputs) "
                "of the latest forward pass."
            )
        features *= hessian_pass.samples
        if hessian.shape[0] != features:
            raise ValueError(
                f"output_hessian has shape {list(hessian.shape)}, but {self} has "
                f"{features} output features: [{features}, {features}] is needed."
            )
        dtype, device = record.kind
        if (hessian.dtype, hessian.device) != (dtype, device):
            raise ValueError(
                f"output_hessian is {hessian.dtype} on {hessian.device}, but that of "
                f"{self} must be {dtype} on {device}. Convert it with .to(...)."
            )


def describe_blocks(layer: Any) -> str:
    """What ``set_hbp_blocks`` chose, for ``extra_repr``; nothing by default."""
    split = "" if layer.sub_blocks == 1 else f", sub_blocks: {layer.sub_blocks}"
    return split + (", joint_bias: True" if layer.joint_bias else "")


def sum_over_batch(values: Tensor) -> Tensor:
    """Σ_n of values, [N, features] → [features]."""
    # A matrix product streams through memory; a reduction over dimension 0 strides.
    return values.new_ones(len(values)) @ values


def _give_hessian(parameter: Tensor | None) -> None:
    if parameter is not None:
        vars(parameter).setdefault("hessian", None)


def _is_traced(output: Tensor) -> bool:
    """Whether a layer's output is a stand-in, of which nothing is to be remembered.

    ``torch.fx`` passes proxies, ``torch.export`` tensors without values (it runs this
    function itself; in a compiled model nobody compiles it). What ``torch.func``
    wraps is known by no public test.
    """
    if not isinstance(output, Tensor) or torch.compiler.is_compiling():
        return True
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(output))


def _samples_of(operator: SymmetricOperator) -> int | None:
    """N if there is a matrix for each sample; then curvature is exact."""
    return len(operator.blocks) if isinstance(operator, SampleBlocks) else None


def _require_hessian(hessian: object) -> None:
    if not isinstance(hessian, Tensor | SymmetricOperator):
        raise TypeError(
            f"output_hessian is a {type(hessian).__name__}; pass a [C, C] tensor, as "
            "from batch_summed_hessian(loss, outputs), or an operator."
        )


def as_operator(hessian: Tensor | SymmetricOperator) -> SymmetricOperator:
    """An output Hessian as an operator.

    Raises:
        TypeError: it is neither a tensor nor an operator.
        ValueError: a matrix is not square, symmetric and finite.
    """
    _require_hessian(hessian)
    if isinstance(hessian, SymmetricOperator):
        return hessian
    require_floats("output_hessian", hessian)
    matrix = hessian.detach()
    if matrix.dim() not in (2, 3) or matrix.shape[-2] != matrix.shape[-1]:
        raise ValueError(
            f"output_hessian has shape {list(matrix.shape)}; for C output features it "
            "must be [C, C], as from batch_summed_hessian(loss, outputs), or "
            "[N, C, C], as from per_sample_hessian(loss, outputs)."
        )
    if matrix.numel() == 0:
        raise ValueError(f"output_hessian of shape {list(matrix.shape)} is empty.")
    sizes = torch.stack([matrix.abs().max(), (matrix - matrix.mT).abs().max()])
    largest, asymmetry = sizes.tolist()
    if not math.isfinite(largest):
        raise ValueError(
            "output_hessian contains NaN or infinity. Check the loss and the inputs."
        )
    # Autograd's round-off is a few eps; a wrong matrix is off by far more.
    if asymmetry > torch.finfo(matrix.dtype).eps ** 0.5 * largest:
        raise ValueError("output_hessian is not symmetric.")
    return DenseOperator(matrix) if matrix.dim() == 2 else SampleBlocks(matrix)
