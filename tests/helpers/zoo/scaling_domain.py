"""Loops on the exponential of the scores."""

import functools

import torch
import torch.nn.functional as F

from .case import Case, Expected
from .layers import Attention, Classifier, tokens
from .reference import classifier


class DividesInPlace(Attention):
    def plan(self, scores):
        plan = torch.exp(scores)
        for _ in range(self.half_steps // 2):
            plan /= plan.sum(dim=-2, keepdim=True)
            plan /= plan.sum(dim=-1, keepdim=True)
        return plan


class OverwritesScores(Attention):
    """Everything in one buffer: div_, exp_, and an odd number of div_."""

    def mix(self, scores, v):
        p = scores.div_(self.epsilon).exp_()
        p.div_(p.sum(-2, keepdim=True))
        for _ in range(self.half_steps // 2):
            p.div_(p.sum(-1, keepdim=True)).div_(1.0)
            p.div_(p.sum(-2, keepdim=True))
        return p @ v


class DividesWithConstant(Attention):
    """Afraid of zeros: subtracts the largest score, adds 1e-8 to each sum."""

    def plan(self, scores):
        attn = (scores - scores.amax(dim=(-2, -1), keepdim=True)).exp()
        for _ in range(self.half_steps // 2):
            attn = attn / (attn.sum(dim=-1, keepdim=True) + 1e-8)
            attn = attn / (attn.sum(dim=-2, keepdim=True) + 1e-8)
        return attn


class RowMaxRowsFirst(Attention):
    """Subtracts each row's largest score, as softmax does; the half-step on rows that follows makes up for it."""

    def plan(self, scores):
        attn = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        attn = attn / attn.sum(dim=-1, keepdim=True)
        for _ in range(self.half_steps // 2):
            attn = attn / attn.sum(dim=-2, keepdim=True)
            attn = attn / attn.sum(dim=-1, keepdim=True)
        return attn


class VectorsByMatmul(Attention):
    def plan(self, scores):
        K = scores.exp()
        Kt = K.transpose(-1, -2)
        v = K.new_ones(*K.shape[:2], K.shape[3], 1)  # B H M 1
        for _ in range(self.half_steps // 2):
            u = 1.0 / (K @ v)  # B H N 1
            v = 1.0 / (Kt @ u)
        return u * K * v.transpose(-1, -2)


class VectorsByEinsum(Attention):
    """Never builds the plan: scales the values, multiplies by the kernel, scales the result."""

    def mix(self, scores, v):
        kernel = torch.exp(scores / self.epsilon)
        a = torch.ones_like(kernel[..., 0])
        for _ in range(self.half_steps // 2):
            b = torch.reciprocal(torch.einsum("bhij,bhi->bhj", kernel, a))
            a = torch.reciprocal(torch.einsum("bhij,bhj->bhi", kernel, b))
        return a[..., None] * torch.einsum("bhij,bhjd->bhid", kernel, b[..., None] * v)


class VectorsOnValues(Attention):
    """The plan is never built, nor is an einsum in sight: `u * (K @ (v * values))`."""

    def mix(self, scores, values):
        K = torch.exp(scores / self.epsilon)
        u = torch.ones_like(K[..., :1])
        for _ in range(self.half_steps // 2):
            v = 1.0 / torch.matmul(K.transpose(-1, -2), u)
            u = 1.0 / torch.matmul(K, v)
        return u * torch.matmul(K, v * values)


class VectorsHalfOnValues(Attention):
    """The rows of the kernel are scaled, the columns are not: that is left to the values. Ends on columns."""

    def mix(self, scores, values):
        K = (scores / self.epsilon).exp()
        column = K.new_ones(values.shape[0], values.shape[1], values.shape[2], 1)
        for _ in range(self.half_steps // 2):
            scaled = K / (K @ column)
            column = 1 / scaled.sum(dim=-2).unsqueeze(-1)
        return scaled @ (column * values)


class VectorsOnMerged(Attention):
    """Everything by bmm on (B*H, N, M), masses 1/n; the last division comes when the heads are apart again."""

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        b, h, n, d = v.shape
        K = torch.bmm(q.reshape(-1, n, d), k.reshape(-1, n, d).mT).div(self.epsilon * d**0.5).exp()
        row = K.new_full((b * h, n, 1), 1.0 / n)
        for _ in range(self.half_steps // 2):
            column = (1.0 / n) / torch.bmm(K.mT, row)
            total = torch.bmm(K, column)
            row = (1.0 / n) / total
        y = torch.bmm(K, (v * column.view(b, h, n, 1)).reshape(-1, n, d)).view(b, h, n, d).transpose(1, 2)
        return self.out((y / total.view(b, h, n, 1).transpose(1, 2)).flatten(2))


class VectorsInOneEinsum(Attention):
    """The plan is built, by one equation for kernel and vectors."""

    def plan(self, scores):
        kernel = scores.exp()
        b = torch.ones_like(kernel[:, :, 0])
        for _ in range(self.half_steps // 2):
            a = 1 / torch.einsum("bhnm,bhm->bhn", kernel, b)
            b = 1 / torch.einsum("bhnm,bhn->bhm", kernel, a)
        return torch.einsum("bhn,bhnm,bhm->bhnm", a, kernel, b)


class VectorsInTheLastEinsum(Attention):
    """Kernel, vectors and values meet in one equation."""

    def mix(self, scores, values):
        kernel = (scores / self.epsilon).exp()
        a = torch.ones_like(kernel[..., 0])
        for _ in range(self.half_steps // 2):
            b = 1 / torch.einsum("bhnm,bhn->bhm", kernel, a)
            a = 1 / torch.einsum("bhnm,bhm->bhn", kernel, b)
        return torch.einsum("bhn,bhnm,bhm,bhmd->bhnd", a, kernel, b, values)


class VectorsBySum(Attention):
    """Marginals 1/n and 1/m as tensors, times n in the end."""

    def plan(self, scores):
        kernel = torch.exp(scores)
        n, m = kernel.shape[-2:]
        mu, nu = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
        v = torch.ones_like(kernel[..., 0, :])
        for _ in range(self.half_steps // 2):
            u = mu / (kernel * v[..., None, :]).sum(-1)
            v = nu / (kernel * u[..., :, None]).sum(-2)
        return n * (u[..., :, None] * kernel * v[..., None, :])


class DiagonalMatrices(Attention):
    """As in the textbook, diagonal matrices and all; the Gibbs kernel of a cost that starts at zero."""

    def mix(self, scores, values):
        C = -scores
        C = C - C.amin(dim=(-1, -2), keepdim=True)
        K = torch.exp(-C / self.epsilon)
        u = torch.ones_like(K[..., :1]) / K.size(-2)
        for _ in range(self.half_steps // 2):
            v = 1.0 / (K.mT @ u + 1e-16)
            u = 1.0 / (K @ v + 1e-16)
        P = torch.diag_embed(u.squeeze(-1)) @ K @ torch.diag_embed(v.squeeze(-1))
        return P @ values


class Normalize(Attention):
    def plan(self, scores):
        attn = scores.exp()
        for _ in range(self.half_steps // 2):
            attn = F.normalize(attn, p=1, dim=-2)
            attn = F.normalize(attn, p=1, dim=-1)
        return attn


class SoftmaxFirst(Attention):
    def plan(self, scores):
        attn = scores.softmax(dim=-1)
        for _ in range(self.half_steps // 2):
            attn = attn / attn.sum(dim=-2, keepdim=True)
            attn = attn / attn.sum(dim=-1, keepdim=True)
        return attn


class RecomputesKernel(Attention):
    """A function of the scores for each side; exp is taken anew every time."""

    def side(self, scores, weight):
        return 1.0 / torch.matmul(scores.exp(), weight.unsqueeze(-1)).squeeze(-1)

    def plan(self, scores):
        scores_t = scores.transpose(2, 3).contiguous()
        u = torch.ones_like(scores[..., 0])
        for _ in range(self.half_steps // 2):
            v = self.side(scores_t, u)
            u = self.side(scores, v)
        return scores.exp() * u.unsqueeze(3) * v.unsqueeze(2)


class MergedBmm(Attention):
    """Vectors by bmm on (B*H, N, M), the transposed kernel cached."""

    def plan(self, scores):
        b, h, n, m = scores.shape
        K = scores.reshape(b * h, n, m).exp()
        KT = K.permute(0, 2, 1).contiguous()
        u = K.new_full((b * h, n, 1), 1.0 / n)
        for i in range(self.half_steps):
            if i % 2 == 0:
                v = (1.0 / m) / torch.bmm(KT, u)
            else:
                u = (1.0 / n) / torch.bmm(K, v)
        return (n * u * K * v.view(b * h, 1, m)).view(b, h, n, m)


class Multiplies(Attention):
    """Multiplies by powers in place of dividing, reads its axis from a list."""

    def plan(self, scores):
        P = torch.pow(torch.e, scores - scores.max())
        for dim in ([-2, -1] * self.half_steps)[: self.half_steps]:
            P = P * P.sum(dim, keepdim=True).pow(-1)
        return P


class DualsOfKernel(Attention):
    """Scaling inside, logs outside: potentials are kept as logs, sums are taken of exponentials."""

    def plan(self, scores):
        f = torch.zeros_like(scores[..., :1])
        for _ in range(self.half_steps // 2):
            g = -torch.log(torch.sum(torch.exp(scores + f), dim=-2, keepdim=True))
            f = -torch.log(torch.sum(torch.exp(scores + g), dim=-1, keepdim=True))
        return torch.exp(scores + f + g)


class WithoutGradients(Attention):
    """The loop is held constant in training; the context stays in the code at inference."""

    @torch.no_grad()
    def sinkhorn(self, scores):
        Q = torch.exp(scores)
        for _ in range(self.half_steps // 2):
            Q /= Q.sum(dim=-2, keepdim=True)
            Q /= Q.sum(dim=-1, keepdim=True)
        return Q

    def plan(self, scores):
        return self.sinkhorn(scores)


def sinkhorn_knopp(matrix, iterations):
    """For one matrix, with K.t(), as in a lecture."""
    K = matrix.exp()
    v = torch.ones(K.shape[1])
    for _ in range(iterations):
        u = 1.0 / K.mv(v)
        v = 1.0 / K.t().mv(u)
    return torch.diag(u) @ K @ torch.diag(v)


class Mapped(Attention):
    """vmap over samples and heads."""

    def plan(self, scores):
        loop = functools.partial(sinkhorn_knopp, iterations=self.half_steps // 2)
        return torch.vmap(torch.vmap(loop))(scores)


def case(name, attention, half_steps, last, factor=1.0, tolerance=1e-9):
    reference = functools.partial(classifier, factor=factor)
    expected = (Expected(half_steps, last, 0.4),)
    return Case(
        name, lambda: Classifier(attention(half_steps)), tokens, expected, reference=reference, tolerance=tolerance
    )


CASES = [
    case("divides_in_place", DividesInPlace, 8, "rows"),
    case("overwrites_scores", OverwritesScores, 5, "columns"),
    case("divides_with_constant", DividesWithConstant, 10, "columns", tolerance=1e-4),
    case("row_max_rows_first", RowMaxRowsFirst, 5, "rows"),
    case("vectors_by_matmul", VectorsByMatmul, 20, "columns"),
    case("vectors_by_einsum", VectorsByEinsum, 10, "rows"),
    case("vectors_on_values", VectorsOnValues, 12, "rows"),
    case("vectors_half_on_values", VectorsHalfOnValues, 8, "columns"),
    case("vectors_on_merged", VectorsOnMerged, 6, "rows"),
    case("vectors_in_one_einsum", VectorsInOneEinsum, 8, "columns"),
    case("vectors_in_the_last_einsum", VectorsInTheLastEinsum, 10, "rows"),
    case("vectors_by_sum", VectorsBySum, 6, "columns"),
    case("diagonal_matrices", DiagonalMatrices, 14, "rows"),
    case("normalize", Normalize, 6, "rows"),
    case("softmax_first", SoftmaxFirst, 7, "rows"),
    case("recomputes_kernel", RecomputesKernel, 8, "rows"),
    case("merged_bmm", MergedBmm, 9, "columns"),
    case("multiplies", Multiplies, 11, "columns"),
    case("without_gradients", WithoutGradients, 6, "rows"),
    case("mapped", Mapped, 10, "columns"),
    case("duals_of_kernel", DualsOfKernel, 12, "rows"),
]
