"The matrices nearest to others whose rows, or columns, are orthonormal: about that, and fast."

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices with x's singular vectors, and singular values of about 1 (0.7 to 1.2): (k, m, n) float, same out.

    Five Newton-Schulz steps of Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon): each multiplies x by a
    polynomial of its Gram matrix. The polynomials, as small as x's smaller side, are multiplied with each other first
    and with x last, which is a third of the work for a ResNet's weights. Singular values below a thousandth of x's norm
    come out smaller; zeros remain zeros.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalized(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    if x.shape[1] == 1:
        return x
    gram = torch.bmm(x, x.mT)
    product = _polynomial(gram)
    for _ in range(4):
        gram_now = torch.bmm(torch.bmm(product, gram), product)  # all are symmetric, and in any order the same
        product = torch.bmm(_polynomial(gram_now), product)
    return torch.bmm(product, x)


def _polynomial(gram: Tensor) -> Tensor:
    "3.4445 I - 4.7750 gram + 2.0315 gram^2: Jordan's numbers, which raise small singular values the fastest."
    result = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    result.diagonal(dim1=1, dim2=2).add_(3.4445)
    return result
