"""What ``p.hessian`` is, for who makes curvature of their own."""

from hbp.blocks import BlockDiagonal as BlockDiagonal
from hbp.core import settings
from hbp.core.guards import is_number
from hbp.core.operators import Congruence as Congruence
from hbp.core.operators import DenseOperator as DenseOperator
from hbp.core.operators import DiagonalOperator as DiagonalOperator
from hbp.core.operators import KroneckerBlock as KroneckerBlock
from hbp.core.operators import MatrixFree as MatrixFree
from hbp.core.operators import OperatorSum as OperatorSum
from hbp.core.operators import SampleBlocks as SampleBlocks
from hbp.core.operators import SymmetricOperator as SymmetricOperator
from hbp.core.operators import ZeroOperator as ZeroOperator


def set_dense_limit(nbytes: float) -> float:
    """Set how large a matrix may become before it stays an operator.

    ``to_dense()`` refuses to form a larger one. Rules that would form a larger one on
    their own, as the averaged product does, use products instead. 512 MiB at first:
    11,585 features in float32.

    Args:
        nbytes: The bound in bytes, for one matrix; positive.

    Returns:
        The bound that held before.

    Raises:
        ValueError: ``nbytes`` is no positive number.
    """
    if not (is_number(nbytes) and nbytes > 0):
        raise ValueError(f"nbytes={nbytes!r} must be a positive number of bytes.")
    before, settings.dense_limit = settings.dense_limit, nbytes
    return before
