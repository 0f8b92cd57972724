"The matrix nearest to another whose rows, or columns, are orthonormal: about that, and fast."

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalized(x: Tensor) -> Tensor:
    """A matrix with x's singular vectors, and singular values of about 1 (0.7 to 1.2): (m, n) float, same out.

    Five Newton-Schulz steps of Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon): each multiplies x by a
    polynomial of its Gram matrix. The polynomials, as small as x's smaller side, are multiplied with each other first
    and with x last, which is a third of the work for a ResNet's weights. Singular values below a thousandth of x's norm
    come out smaller; zeros remain zeros.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalized(x.T).T
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    if len(x) == 1:
        return x
    gram = x @ x.T
    product = _polynomial(gram)
    for _ in range(4):
        product = _polynomial(product @ gram @ product) @ product  # all are symmetric, and in any order the same
    return product @ x


def _polynomial(gram: Tensor) -> Tensor:
    "3.4445 I - 4.7750 gram + 2.0315 gram^2: Jordan's numbers, which raise small singular values the fastest."
    result = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    result.diagonal().add_(3.4445)
    return result
