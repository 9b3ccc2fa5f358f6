"""What must not be taken for Sinkhorn attention."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case
from .layers import CLASSES, TOKENS, WIDTH, Attention, Classifier, linear, tokens


class Softmax(Attention):
    def plan(self, scores):
        return scores.softmax(dim=-1)


class FusedSoftmax(Attention):
    def mix(self, scores, v):
        q = v.new_zeros(v.shape)
        return F.scaled_dot_product_attention(q, q, v, attn_mask=scores / self.epsilon)


class DualSoftmax(Attention):
    def plan(self, scores):
        return torch.softmax(scores, dim=-1) * torch.softmax(scores, dim=-2)


class NormalisedSigmoid(Attention):
    def plan(self, scores):
        plan = torch.sigmoid(scores)
        for _ in range(self.half_steps // 2):
            plan = plan / plan.sum(dim=-2, keepdim=True)
            plan = plan / plan.sum(dim=-1, keepdim=True)
        return plan


class NormalisedReLU(NormalisedSigmoid):
    def plan(self, scores):
        plan = F.relu(scores)
        for _ in range(self.half_steps):
            plan = plan / plan.sum(dim=-2, keepdim=True).clamp(min=1e-6)
            plan = plan / plan.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        return plan


class NormalisedSquares(Attention):
    def plan(self, scores):
        plan = scores.square()
        for _ in range(self.half_steps // 2):
            plan = F.normalize(plan, p=1, dim=-2)
            plan = F.normalize(plan, p=1, dim=-1)
        return plan


class PositiveCosines(Attention):
    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        plan = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).clamp(min=0)
        plan = plan / (plan.sum(-1, keepdim=True) + 1e-6)
        plan = plan / (plan.sum(-2, keepdim=True) + 1e-6)
        return self.out((plan @ v).transpose(1, 2).flatten(2))


class TopKRouting(Attention):
    """Keeps each query's four best keys, and normalises both axes of what is left."""

    def plan(self, scores):
        best = scores.topk(4, dim=-1).values[..., -1:]
        plan = scores.masked_fill(scores < best, -1e9).softmax(dim=-1)
        return plan / plan.sum(dim=-2, keepdim=True).clamp(min=1e-6)


class Causal(Attention):
    """A doubly-stochastic causal plan tends to the identity."""

    def plan(self, scores):
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        plan = scores.exp().masked_fill(future, 0.0)
        for _ in range(self.half_steps // 2):
            plan = plan / plan.sum(dim=-2, keepdim=True)
            plan = plan / plan.sum(dim=-1, keepdim=True)
        return plan


class SoftmaxOverColumnMean(Attention):
    """Looks like two half-steps; the mean over the batch's heads is no column sum of each head."""

    def plan(self, scores):
        attn = scores.softmax(dim=-1)
        return attn / attn.mean(dim=(1, 2), keepdim=True)


class Linear(Attention):
    """No plan at all: keys meet values first."""

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        total = q @ k.sum(dim=2, keepdim=True).mT  # B H N 1
        return self.out((q @ (k.mT @ v) / total).transpose(1, 2).flatten(2))


class NormalisedLinear(Linear):
    """Sums of both features are normalised on the way, as a loop's vectors would."""

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        once = v / (k @ q.sum(dim=2, keepdim=True).mT)  # B H M D
        return self.out((q @ (k.mT @ once) / (q @ k.sum(dim=2, keepdim=True).mT)).transpose(1, 2).flatten(2))


class SoftmaxOnValues(Attention):
    """Softmax whose plan is never built: the exponential meets the values, the sum divides the result."""

    def mix(self, scores, v):
        kernel = torch.exp(scores / self.epsilon)
        return kernel @ v / kernel.sum(dim=-1, keepdim=True)


class GatedValues(Attention):
    """Softmax; each value has a gate, computed from itself."""

    def mix(self, scores, v):
        return (scores / self.epsilon).softmax(dim=-1) @ (torch.sigmoid(v.sum(dim=-1, keepdim=True)) * v)


class GatedByAttention(Attention):
    """Softmax; values that are looked at much count for more, and rows that see one thing only for less."""

    def mix(self, scores, v):
        attn = (scores / self.epsilon).softmax(dim=-1)
        y = attn @ (attn.mean(dim=-2).unsqueeze(-1) * v)
        return y * (1 - attn.amax(dim=-1, keepdim=True))


class OverTheBatch(nn.Module):
    """Assigns the images of a batch to prototypes, equally many to each: the batch is an axis of the plan."""

    def __init__(self, prototypes=8):
        super().__init__()
        self.embed = linear(WIDTH, WIDTH)
        self.prototypes = nn.Parameter(torch.randn(prototypes, WIDTH))
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        z = F.normalize(self.embed(x).mean(dim=1), dim=-1)  # B C
        codes = torch.exp(z @ F.normalize(self.prototypes, dim=-1).t() / 0.1)  # B K
        for _ in range(3):
            codes = codes / codes.sum(dim=0, keepdim=True)
            codes = codes / codes.sum(dim=1, keepdim=True)
        return self.head(codes @ self.prototypes)


class SameAxisTwice(Attention):
    def plan(self, scores):
        return scores.log_softmax(dim=-1).log_softmax(dim=-1).exp()


class Annealed(Attention):
    """The temperature falls from step to step."""

    def plan(self, scores):
        f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
        for i in range(self.half_steps // 2):
            eps = max(1.0, 2.0 ** (2 - i))
            g = -eps * torch.logsumexp((scores + f) / eps, dim=-2, keepdim=True)
            f = -eps * torch.logsumexp((scores + g) / eps, dim=-1, keepdim=True)
        return torch.exp(scores + f + g)


class Unbalanced(Attention):
    """Marginals are asked for, not enforced."""

    def plan(self, scores, rho=1.0):
        damping = rho / (rho + self.epsilon)
        f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
        for _ in range(self.half_steps // 2):
            g = -damping * torch.logsumexp(scores + f, dim=-2, keepdim=True)
            f = -damping * torch.logsumexp(scores + g, dim=-1, keepdim=True)
        return torch.exp(scores + f + g)


class OverRelaxed(Attention):
    def plan(self, scores, omega=1.4):
        f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
        for _ in range(self.half_steps // 2):
            g = (1 - omega) * g - omega * torch.logsumexp(scores + f, dim=-2, keepdim=True)
            f = (1 - omega) * f - omega * torch.logsumexp(scores + g, dim=-1, keepdim=True)
        return torch.exp(scores + f + g)


class Simultaneous(Attention):
    """Both axes at once, half of each."""

    def plan(self, scores):
        plan = scores.exp()
        for _ in range(self.half_steps // 2):
            plan = plan / (plan.sum(-1, keepdim=True) * plan.sum(-2, keepdim=True)).sqrt()
        return plan


class Noisy(Attention):
    """Another fixed noise at each iteration."""

    def __init__(self, half_steps):
        super().__init__(half_steps)
        self.register_buffer("noise", torch.randn(half_steps // 2, TOKENS, TOKENS))

    def plan(self, scores):
        for noise in self.noise:
            scores = (scores + 0.3 * noise).log_softmax(dim=-2).log_softmax(dim=-1)
        return scores.exp()


class Sharpening(Attention):
    """The scores are squared up between the steps."""

    def plan(self, scores):
        for _ in range(self.half_steps // 2):
            scores = 1.1 * scores.log_softmax(dim=-2)
            scores = 1.1 * scores.log_softmax(dim=-1)
        return scores.log_softmax(dim=-1).exp()


class Sparsemax(Attention):
    def plan(self, scores):
        ordered = scores.sort(dim=-1, descending=True).values
        ranks = torch.arange(1, TOKENS + 1)
        kept = 1 + ranks * ordered > ordered.cumsum(-1)
        count = kept.sum(dim=-1, keepdim=True)
        threshold = ((ordered * kept).sum(dim=-1, keepdim=True) - 1) / count
        return (scores - threshold).clamp(min=0)


class ByMaximum(Attention):
    def plan(self, scores):
        plan = scores.exp()
        for _ in range(self.half_steps // 2):
            plan = plan / plan.amax(dim=-2, keepdim=True)
            plan = plan / plan.amax(dim=-1, keepdim=True)
        return plan


class ByNorm(Attention):
    def plan(self, scores):
        plan = scores.exp()
        for _ in range(self.half_steps // 2):
            plan = F.normalize(plan, dim=-2)
            plan = F.normalize(plan, dim=-1)
        return plan


def case(name, attention, reason, half_steps=6):
    return Case(name, lambda: Classifier(attention(half_steps)), tokens, reason=reason)


NO_LOOP = "no number of half-steps gives this plan"
NO_EXPONENTIAL = "the plan is no exponential of a multiple of the scores"

CASES = [
    case("softmax", Softmax, "one half-step is softmax"),
    case("fused_softmax", FusedSoftmax, "nothing to say: the plan does not show"),
    case("dual_softmax", DualSoftmax, NO_LOOP),
    case("normalised_sigmoid", NormalisedSigmoid, NO_EXPONENTIAL),
    case("normalised_relu", NormalisedReLU, "zeros in the plan that no mask explains", 30),
    case("normalised_squares", NormalisedSquares, NO_EXPONENTIAL),
    case("positive_cosines", PositiveCosines, "zeros in the plan that no mask explains"),
    case("top_k_routing", TopKRouting, "zeros in the plan that depend on the scores"),
    case("causal", Causal, "a causal mask: it depends on query and key together"),
    case("softmax_over_column_mean", SoftmaxOverColumnMean, NO_LOOP),
    case("linear", Linear, "nothing to say: there is no plan"),
    case("normalised_linear", NormalisedLinear, "nothing to say: there is no plan"),
    case("softmax_on_values", SoftmaxOnValues, "one half-step is softmax"),
    case("gated_values", GatedValues, "one half-step is softmax"),
    case("gated_by_attention", GatedByAttention, "one half-step is softmax"),
    Case("over_the_batch", OverTheBatch, tokens, reason="the batch is an axis of the plan"),
    case("same_axis_twice", SameAxisTwice, "one half-step is softmax"),
    case("annealed", Annealed, NO_LOOP, 8),
    case("unbalanced", Unbalanced, NO_LOOP),
    case("over_relaxed", OverRelaxed, NO_LOOP),
    case("simultaneous", Simultaneous, NO_LOOP),
    case("noisy", Noisy, NO_LOOP),
    case("sharpening", Sharpening, NO_LOOP),
    case("sparsemax", Sparsemax, "zeros in the plan that depend on the scores"),
    case("by_maximum", ByMaximum, NO_LOOP),
    case("by_norm", ByNorm, NO_LOOP),
]
