"""What ``p.hessian`` is, for who makes curvature of their own."""

from hbp.blocks import BlockDiagonal as BlockDiagonal
from hbp.core.operators import Congruence as Congruence
from hbp.core.operators import DenseOperator as DenseOperator
from hbp.core.operators import DiagonalOperator as DiagonalOperator
from hbp.core.operators import KroneckerBlock as KroneckerBlock
from hbp.core.operators import MatrixFree as MatrixFree
from hbp.core.operators import OperatorSum as OperatorSum
from hbp.core.operators import SampleBlocks as SampleBlocks
from hbp.core.operators import SymmetricOperator as SymmetricOperator
from hbp.core.operators import ZeroOperator as ZeroOperator
from hbp.core.settings import set_dense_limit as set_dense_limit
