"""Policy: every threshold of the core in one place, with what was measured.

The mathematics does not depend on any of them. They decide how much memory a step may
take, which of two ways to the same numbers is faster, and what counts as round-off.
"""

from __future__ import annotations

from typing import Final

dense_limit: float = 2**29
"""Bytes of the largest matrix that is formed; ``hbp.set_dense_limit`` sets it."""

DENSE_FEATURES: Final = 256
"""Up to this size ``Congruence`` forms its matrix before it multiplies.

A product through the chain reads every weight above twice and launches some five
kernels a layer; with the matrix it reads n² numbers in one. Conjugate gradients takes
tens of products. On the network of tutorial 02, on a CPU, a whole step is as fast with
128 as with 256, and slower by 1 or 2 % with 0 or with 512, where forming the matrix
takes eight times the arithmetic.
"""

ROWS_AT_ONCE: Final = 256
"""Rows of the identity that are multiplied at a time, at most."""

ENTRIES_AT_ONCE: Final = 2**24
"""Entries of such rows or of their images, at most: 64 MiB in float32."""

REMAINDER_ENTRIES: Final = 2**19
"""Entries of a gradient's remainder that are formed at a time: 2 MiB in float32."""

NEGLIGIBLE: Final = 1e-15
"""A length, relative to others, that has no say in any inner product."""

TOGETHER: Final = 2**12
"""Systems of up to this many unknowns share the vectors of conjugate gradients.

Short vectors are padded to the longest. With 2**16, those of a network with averaged
products took more memory than the test allows, and no less time.
"""

CHECK_EVERY: Final = 3
"""Iterations of such systems between two reads of what is done: a GPU waits for each.

A product of a large system costs more than the read, so there it is 1.
"""

NULL_SLACK: Final = 10
"""By how many eps·‖A‖ an eigenvalue 0 may differ from 0, at α = 0.

In thousands of softmax Hessians of 2 to 200 classes, whose null space is (1, …, 1), the
smallest eigenvalue was at most 7.5 eps·‖A‖ (2 classes; 5.7 above), and 1/‖A⁻¹‖ as two
inverse iterations find it at most 7.4. Regular matrices of condition κ have 1/(κ·eps):
84 at 1e5, 8.4 at 1e6 in float32, for 2 unknowns as for 4,000, where a row sum in place
of ‖A‖ takes a factor of 10. A pivot says less: it grows with the size of the matrix,
and n·eps refused a condition of 250 for 4,002 unknowns. A damped one stands at α.
"""


def rows_at_once(entries: int) -> int:
    """How many vectors of so many entries are multiplied at a time; at least 1."""
    return max(1, min(ROWS_AT_ONCE, ENTRIES_AT_ONCE // entries))
