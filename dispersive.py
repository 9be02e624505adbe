"""Dispersive Loss, the diffusion transformers it was published on and what it is compared with, in one file.

    losses        dispersive_loss, contrastive_loss: four kinds each      Wang & He 2025, arXiv 2506.09027
                  repa_loss: alignment with an encoder's features         Yu et al. 2024, arXiv 2410.06940
    transformer   DiT, the adaLN-Zero transformer of DiT and SiT          Peebles & Xie 2023, arXiv 2212.09748
    objectives    FlowMatching: SiT's linear path and velocity            Ma et al. 2024, arXiv 2401.08740
                  GaussianDiffusion: DiT's noise and learned variance     Nichol & Dhariwal 2021, arXiv 2102.09672
                  and its deterministic sampler, DDIM                     Song et al. 2020, arXiv 2010.02502
                  MeanFlow: average velocities, one-step sampling         Geng et al. 2025, arXiv 2505.13447

Time is SiT's everywhere: t = 0 is noise, t = 1 is data, x_t = t*x + (1-t)*noise, velocity v = x - noise. Only the
network of GaussianDiffusion is told DiT's step number instead: 0 is next to data, 999 is noise.
Images and latents are (B, C, H, W); labels are (B,) int64, and label num_classes stands for "no label".
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---------------------------------------------------------------------------------------------------------------------
# Losses. This section stands alone: copy it as it is, it needs only `import math` and `import torch`.

KINDS = ("infonce", "cosine", "hinge", "covariance")


def dispersive_loss(z, kind="infonce", tau=0.5, margin=1.0, group=None):
    """Push the representations of a batch apart: a contrastive loss without positives (Wang & He 2025, table 1).

    z: activations (B, ...) of any floating dtype, flattened to (B, dim); computed in at least float32.
    kind, with D(a, b) = |a - b|^2 / dim, or -cos(a, b) for "cosine", and i = j included:
        "infonce", "cosine"   log mean_ij exp(-D(z_i, z_j) / tau)
        "hinge"               mean_ij max(0, margin - D(z_i, z_j))^2
        "covariance"          mean_{m != n} C_mn^2, C the correlation of features m and n over the batch
    group: compute it on every `group` consecutive samples and average (default: on the whole batch). What the loss
        sees is a hyper-parameter: the paper uses 16 samples.
    Returns a scalar to add to the training loss, times 0.5 in the paper. dispersive_floor gives its least value.
    Raises ValueError for fewer than two samples: there is nothing to push apart.
    """
    _check_kind(kind)
    z = _groups(z, group)
    if kind == "covariance":
        z = _standardize(z)
        return _mean_off_diagonal(_gram(z).square(), z.square().mean(-2)).mean()
    distance = _distances(z, kind)
    if kind == "hinge":
        return (margin - distance).relu().square().mean()
    return _log_mean_exp(-distance / tau).mean()


def contrastive_loss(z, z_pos, kind="infonce", tau=0.5, margin=1.0, cov_weight=1.0, group=None):
    """The contrastive counterparts of dispersive_loss: z_pos holds a second view of every sample of z (same table).

        "infonce", "cosine"   mean_i [D(z_i, z_pos_i) / tau + log sum_j exp(-D(z_i, z_pos_j) / tau)]
        "hinge"               mean_i [D(z_i, z_pos_i)^2 + mean_j max(0, margin - D(z_i, z_pos_j))^2]
        "covariance"          mean_m (1 - C_mm)^2 + cov_weight * mean_{m != n} C_mn^2, C the cross-correlation of the
                              views: Barlow Twins (Zbontar et al. 2021), with means where that paper has sums
    Everything else is as in dispersive_loss.
    """
    _check_kind(kind)
    if z.shape != z_pos.shape:
        raise ValueError(f"the two views differ in shape: {tuple(z.shape)} and {tuple(z_pos.shape)}")
    z, z_pos = _groups(z, group), _groups(z_pos, group)
    if kind == "covariance":
        z, z_pos = _standardize(z), _standardize(z_pos)
        diagonal = (z * z_pos).mean(-2)
        off_diagonal = _mean_off_diagonal(_gram(z) * _gram(z_pos), diagonal)
        return ((1 - diagonal).square().mean(-1) + cov_weight * off_diagonal).mean()
    n = z.shape[-2]
    distance = _distances(torch.cat([z, z_pos], -2), kind)[..., :n, n:]
    positive = distance.diagonal(dim1=-2, dim2=-1)
    if kind == "hinge":
        return positive.square().mean() + (margin - distance).relu().square().mean()
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    negatives = (-distance / tau).masked_fill(itself, -math.inf).logsumexp(-1)
    return torch.nn.functional.softplus(negatives + positive / tau).mean()  # -log of the positive's softmax


def repa_loss(h, target):
    """Minus the mean cosine between tokens h (B, T, D), projected activations, and an encoder's features, as target.

    Computed in at least float32 (REPA, Yu et al. 2024). Raises ValueError when the shapes differ.
    """
    if h.shape != target.shape:
        raise ValueError(f"tokens and features differ in shape: {tuple(h.shape)} and {tuple(target.shape)}")
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    return -torch.nn.functional.cosine_similarity(h, target.to(h.dtype), dim=-1).mean()


def repa_projector(dim, feature_dim, width=2048):
    """REPA's trained map from the tokens of a block (..., dim) to the encoder's features (..., feature_dim)."""
    return torch.nn.Sequential(torch.nn.Linear(dim, width), torch.nn.SiLU(), torch.nn.Linear(width, width),
                               torch.nn.SiLU(), torch.nn.Linear(width, feature_dim))


def dispersive_floor(kind, n, tau=0.5, margin=1.0):
    """The least value of dispersive_loss on n samples: where a loss that "stopped at -log(n)" has arrived.

    For "covariance" it is the value of random features, which n samples can hardly beat when dim is much larger than n.
    """
    _check_kind(kind)
    return {"infonce": -math.log(n),
            "cosine": 1 / tau + math.log1p((n - 1) * math.exp(-n / (tau * (n - 1)))) - math.log(n),
            "hinge": margin ** 2 / n,
            "covariance": 1 / (n - 1)}[kind]


@torch.no_grad()
def mean_distance(z, group=None):
    """Mean over i != j of |z_i - z_j|^2 / dim, a scalar tensor: how far apart a batch is, whatever the loss."""
    return 2 * _groups(z, group).var(-2).mean()


@torch.no_grad()
def effective_rank(z, group=None):
    """How many directions a batch spreads over: between 1 and group - 1, averaged over groups, a scalar tensor.

    exp of the entropy of the normalised eigenvalues of the group's centred Gram matrix (Roy & Vetterli 2007).
    """
    z = _groups(z, group)
    eigenvalues = torch.linalg.eigvalsh(_gram(z - z.mean(-2, keepdim=True))).clamp(min=0)
    total = eigenvalues.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    return torch.special.entr(eigenvalues / total).sum(-1).exp().mean()


def _check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")


def _groups(z, group):
    """(B, ...) -> (B/group, group, dim), in at least float32."""
    n = len(z) if group is None else group
    if n < 2:
        raise ValueError(f"dispersion compares samples: it needs at least 2 in a group, got {n}")
    if len(z) % n or not z.numel():
        raise ValueError(f"cannot split activations of shape {tuple(z.shape)} into groups of {n} samples")
    return z.reshape(len(z) // n, n, -1).to(torch.promote_types(z.dtype, torch.float32))


class _Gram(torch.autograd.Function):
    """z @ z.mT with one product instead of two in the backward pass, which is most of what the losses cost."""
    forward = staticmethod(lambda z: z @ z.mT)
    setup_context = staticmethod(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    backward = staticmethod(lambda ctx, gradient: (gradient + gradient.mT) @ ctx.saved_tensors[0])


def _gram(z):
    """Inner products of all pairs of rows, (G, n, n), outside autocast, which would round them to 16 bits."""
    with torch.autocast(z.device.type, enabled=False):
        return _Gram.apply(z)


def _distances(z, kind):
    """D of all pairs of rows, (G, n, n). That of a row to itself is a constant, and has no gradient to round."""
    itself = torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
    if kind == "cosine":
        return -_gram(torch.nn.functional.normalize(z, dim=-1)).masked_fill(itself, 1)
    z = z - z.mean(-2, keepdim=True).detach()  # changes no distance, but |a|^2 + |b|^2 - 2ab cancels far from 0
    gram = _gram(z)
    square = gram.diagonal(dim1=-2, dim2=-1)
    return ((square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * gram) / z.shape[-1]).masked_fill(itself, 0)


def _log_mean_exp(x):
    """log mean exp over the last two axes. Near x = 0 logsumexp loses the value's digits, but never the gradient's."""
    value = x.logsumexp((-2, -1)) - math.log(x.shape[-2] * x.shape[-1])
    near_zero = x.detach().expm1().mean((-2, -1)).log1p()
    return value + (torch.where(value.abs() < 1, near_zero, value) - value).detach()


def _standardize(z):
    """Features with zero mean and unit (population) variance over the group; a constant feature becomes zero."""
    z = z - z[..., :1, :].detach()  # makes a constant feature exactly zero
    z = z - z.mean(-2, keepdim=True)
    variance = z.square().mean(-2, keepdim=True)
    return z * torch.where(variance > 0, variance, math.inf).rsqrt()


def _mean_off_diagonal(gram_product, diagonal):
    """mean_{m != n} C_mn^2 for C = A^T B / n, (G,), without the dim x dim matrix: |A^T B|_F^2 = <A A^T, B B^T>."""
    n, dim = gram_product.shape[-1], diagonal.shape[-1]
    total = gram_product.sum((-2, -1)) / n ** 2
    return (total - diagonal.square().sum(-1)) / max(1, dim * (dim - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Transformer. Parameter names and initialisation are those of the published DiT and SiT, so that weights interchange.


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def adaln(dim, outputs):
    """The conditioning's shifts, scales and gates: (B, dim) -> (B, outputs*dim)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, outputs * dim))


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        plain = x.device.type == "cpu" and q.dtype == torch.bfloat16  # there the fused kernel is slower
        x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v if plain else F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaptive layer norm: the condition shifts, scales and gates both residual branches."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = adaln(dim, 6)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = adaln(dim, 2)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def timestep_embedding(t, dim=256, max_period=10000):
    """Sinusoids of the times t (B,) -> (B, dim), cosines first."""
    freqs = torch.exp(-math.log(max_period) / (dim // 2) * torch.arange(dim // 2, dtype=torch.float32, device=t.device))
    angles = t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def position_embedding(dim, side):
    """Fixed 2-D sinusoids for side x side tokens, (1, side*side, dim): first half columns, second half rows."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], -1).float()
    columns, rows = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], -1).reshape(1, side * side, dim)


class DiT(nn.Module):
    """The transformer of DiT and SiT: predicts noise or velocity from a noisy image, a time and a label.

    input_size, in_channels: the image or latent is (in_channels, input_size, input_size); patch_size divides the size.
    class_dropout_prob: only whether it is positive matters here: then label num_classes (no label) has an embedding.
    learn_sigma: 2*in_channels output channels; DiT uses both halves, SiT the first.
    second_time: MeanFlow's second time r. Its embedder ends in zeros: with a SiT's weights it computes what SiT does.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, second_time=False):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"patch_size {patch_size} must divide input_size {input_size}, and num_heads {num_heads} "
                             f"and 4 must divide hidden_size {hidden_size}")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        # the one-entry dicts give the parameters their published names: x_embedder.proj.weight, ...
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)})
        self.t_embedder = self._time_embedder(hidden_size)
        self.r_embedder = self._time_embedder(hidden_size) if second_time else None
        self.y_embedder = nn.ModuleDict(
            {"embedding_table": nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)})
        self.pos_embed = nn.Parameter(position_embedding(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * self.out_channels)
        self._initialize()

    @staticmethod
    def _time_embedder(dim):
        return nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})

    def _initialize(self):
        """adaLN-Zero: every block starts as the identity, and the output as zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the convolution is initialised as a matrix
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(b.adaLN_modulation[1] for b in [*self.blocks, self.final_layer]), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
        if self.r_embedder is not None:
            nn.init.normal_(self.r_embedder.mlp[0].weight, std=0.02)
            nn.init.zeros_(self.r_embedder.mlp[2].weight)  # starts as a SiT

    def forward(self, x, t, y, r=None, blocks=()):
        """x (B, C, H, W), t (B,): SiT's time in [0, 1], or DiT's step in 0..999, y (B,) -> (B, out_channels, H, W).

        r: the second time (B,) of a model that has one (else ValueError); not given, it is t.
        blocks: numbers of blocks, from 1. When any are named the result is (output, [activations (B, T, hidden_size)
        after each of those blocks, in ascending order]).
        """
        if any(not 1 <= number <= len(self.blocks) for number in blocks):
            raise ValueError(f"blocks {tuple(blocks)}: expected numbers from 1 to {len(self.blocks)}")
        if r is not None and self.r_embedder is None:
            raise ValueError("r is given to a model without a second time: build it with second_time=True")
        x = self.x_embedder.proj(x)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder.mlp(timestep_embedding(t).to(x.dtype)) + self.y_embedder.embedding_table(y)
        if self.r_embedder is not None:
            c = c + self.r_embedder.mlp(timestep_embedding((t if r is None else r) - t).to(x.dtype))
        activations = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number in blocks:
                activations.append(x)
        x = self.final_layer(x, c)
        x = x.unflatten(-1, (self.patch_size, self.patch_size, self.out_channels)).unflatten(1, (side, side))
        x = torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)
        return (x, activations) if blocks else x


MODELS = {f"{family}-{size}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
          for family in ("SiT", "DiT")
          for size, width, depth, heads in (("XS", 256, 8, 4), ("S", 384, 12, 6), ("B", 768, 12, 12),
                                            ("L", 1024, 24, 16), ("XL", 1152, 28, 16))
          for patch in (2, 4, 8)}


def build_model(name, **overrides):
    """A DiT of one of the MODELS: the published S, B, L and XL, and XS for small experiments.

    overrides: arguments of DiT, for instance in_channels=3. Under torch.device("meta") nothing is allocated.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return DiT(**{**MODELS[name], **overrides})


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: what to regress in training, and how to integrate it in sampling


def per_sample(error):
    """Mean over everything but the batch, in at least float32: (B, ...) -> (B,)."""
    return error.flatten(1).mean(1)


def expand(t, x):
    """(B,) -> (B, 1, 1, 1), to be broadcast against x."""
    return t.view(-1, *[1] * (x.ndim - 1))


def new_generator(device):
    """A generator seeded by torch's global one, for what the caller leaves to be drawn."""
    return torch.Generator(device).manual_seed(torch.randint(2 ** 32, ()).item())


def predict(model, *inputs, blocks=()):
    """The model's output, and the activations after the named blocks."""
    return model(*inputs, blocks=blocks) if blocks else (model(*inputs), [])


def check_method(method, methods):
    if method not in methods:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(methods)}")


def guidance(model, like, y, cfg, interval, channels):
    """-> output(x, t, position), the model's at its time t; where SiT's time `position` lies in the interval, the first
    `channels` channels are guided: uncond + cfg * (cond - uncond), both halves in one batch. Buffers serve all calls.
    """
    n, times = len(like), like.new_empty(2 * len(like))
    if cfg != 1:
        twice, labels = torch.cat([like, like]), torch.cat([y, torch.full_like(y, model.num_classes)])

    def output(x, t, position):
        times.fill_(t)
        if cfg == 1 or not interval[0] <= position <= interval[1]:
            return model(x, times[:n], y).to(x.dtype)
        twice.view(2, *x.shape).copy_(x)
        cond, uncond = model(twice, times, labels).to(x.dtype).chunk(2)
        torch.lerp(uncond[:, :channels], cond[:, :channels], cfg, out=cond[:, :channels])
        return cond
    return output


class FlowMatching:
    """SiT: regress the velocity x - noise on the line x_t = t*x + (1-t)*noise, and integrate it from noise to data."""

    methods = ("heun", "euler", "sde")

    def times(self, n, generator):
        """n training times, uniform in [0, 1), on the generator's device."""
        return torch.rand(n, generator=generator, device=generator.device)

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=()):
        """Mean squared error per sample (B,), and the activations after the named blocks.

        x (B, C, H, W) data, y (B,) labels; t (B,) and noise, like x, are drawn when not given; r is MeanFlow's.
        """
        t = self.times(len(x), new_generator(x.device)) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        x_t = torch.lerp(noise, x, expand(t, x))
        out, activations = predict(model, x_t, t, y, blocks=blocks)
        return per_sample((out[:, :x.shape[1]] - (x - noise)).square()), activations

    @torch.no_grad()
    def sample(self, model, noise, y, steps=250, method="heun", cfg=1.0, cfg_interval=(0, 1), cfg_channels=None,
               noise_fn=None):
        """Integrate from noise (B, C, H, W) with labels y (B,) to samples, in `steps` intervals.

        method: "heun" (the paper's: two evaluations an interval), "euler", or "sde": Euler-Maruyama on SiT's reverse
            SDE with diffusion 1 - t, the last interval 0.04 long and without noise; noise_fn(k) gives step k's noise.
        cfg: guidance scale, applied where cfg_interval[0] <= t <= cfg_interval[1], on the first cfg_channels channels
            (default: all; the published DiT and SiT code guides 3 of 4).
        """
        check_method(method, self.methods)
        x, channels = noise, noise.shape[1]
        output = guidance(model, noise, y, cfg, cfg_interval, cfg_channels or channels)
        times = [0.96 * k / max(1, steps - 1) if method == "sde" else k / steps for k in range(steps)] + [1.0]
        for k, (t, t_next) in enumerate(zip(times, times[1:])):
            dt = t_next - t
            v = output(x, t, t)[:, :channels]
            if method == "heun":
                v = (v + output(x + dt * v, t_next, t_next)[:, :channels]) / 2
            elif method == "sde":
                v = (1 + t) * v - x  # velocity + diffusion * score, where score = (t*v - x) / (1-t)
            x = x + dt * v
            if method == "sde" and k < steps - 1:
                step_noise = torch.randn_like(x) if noise_fn is None else noise_fn(k)
                x = x + math.sqrt(2 * (1 - t) * dt) * step_noise
        return x


def discretized_log_likelihood(x, mean, log_std):
    """Log-probability under Normal(mean, std^2) of 8-bit grey levels x in [-1, 1]: bins of 2/255, open at the ends."""
    z = torch.stack([x - mean - 1 / 255, x - mean + 1 / 255]) * torch.exp(-log_std)
    below, above = 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))  # about the normal CDF
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


class GaussianDiffusion:
    """DiT: regress the noise of 1000 noising steps, and learn the variance of the reverse steps from their likelihood.

    x_t = sqrt(abar_t) * x + sqrt(1 - abar_t) * noise, where abar_t is the product of alpha = 1 - beta over steps 0..t,
    and beta rises linearly from 1e-4 to 0.02. The second half of the model's channels places the log-variances between
    their bounds. Matches what create_diffusion of the published DiT gives (diffusion/__init__.py).
    """

    methods = ("ddpm", "ddim", "heun")

    def __init__(self):
        self.abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu"), 0)
        self.tables = {}

    def times(self, n, generator):
        """n training steps, uniform in 0..999, on the generator's device."""
        return torch.randint(1000, (n,), generator=generator, device=generator.device)

    def spaced(self, n, method):
        """The n step numbers that a sampler visits, ascending, as in the published space_timesteps (respace.py).

        "ddpm" spreads them evenly, both ends included; the others take every i-th from 0, with the smallest i that
        leaves n of them, and raise ValueError when there is none.
        """
        if method == "ddpm":
            if not 2 <= n <= 1000:
                raise ValueError(f"ddpm takes 2 to 1000 steps, got {n}")
            positions = [0.0]
            while len(positions) < n:
                positions.append(positions[-1] + 999 / (n - 1))  # a product would round otherwise than published
            return [round(position) for position in positions]
        strides = {len(range(0, 1000, i)): i for i in range(999, 0, -1)}
        if n not in strides:
            nearest = sorted(sorted(strides, key=lambda count: abs(count - n))[:2])
            raise ValueError(f"no stride through 1000 steps leaves {n} for {method}: take {nearest[0]} or {nearest[1]}")
        return list(range(0, 1000, strides[n]))

    def constants(self, index, x, steps=range(1000)):
        """sqrt(abar), sqrt(1-abar), 1/sqrt(alpha), beta/sqrt(1-abar), log variance of q(x_prev | x_t, x), log beta:

        at steps[index], index (B,) or a slice, in the chain of `steps` alone, and shaped to be broadcast against x.
        """
        key = (tuple(steps), x.dtype, x.device)
        if key not in self.tables:  # made and sent to the device once
            abar = self.abar[list(steps)]  # float64 until all differences are taken
            abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
            alpha = abar / abar_prev
            beta = 1 - alpha
            variance = beta * (1 - abar_prev) / (1 - abar)
            variance[0] = variance[1]  # rather than 0, whose log is infinite: as published
            self.tables[key] = torch.stack([abar.sqrt(), (1 - abar).sqrt(), alpha.rsqrt(), beta / (1 - abar).sqrt(),
                                            variance.log(), beta.log()], -1).to(x.device, x.dtype)
        return [expand(c, x) for c in self.tables[key][index].unbind(-1)]

    def posterior(self, eps, v, x_t, index, steps=range(1000)):
        """The model's two outputs at steps[index] -> mean and log-variance of x one step of the chain before.

        Ho et al. 2020, eq. 11, and Nichol & Dhariwal 2021, eq. 15; nothing is clipped.
        """
        _, _, inverse_sqrt_alpha, eps_scale, low, high = self.constants(index, x_t, steps)
        return inverse_sqrt_alpha * (x_t - eps_scale * eps), torch.lerp(low, high, (v + 1) / 2)

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=()):
        """Squared error of the noise plus variational bound in bits per dimension, (B,), and the named activations.

        Arguments as in FlowMatching.loss, but t (B,) are step numbers. The bound trains the variance alone.
        """
        t = self.times(len(x), new_generator(x.device)) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        signal, level, inverse_sqrt_alpha, eps_scale, low, _ = self.constants(t, x)
        x_t = signal * x + level * noise
        out, activations = predict(model, x_t, t, y, blocks=blocks)
        eps, v = out.to(x.dtype).split(x.shape[1], 1)
        mean, log_variance = self.posterior(eps.detach(), v, x_t, t)
        gap = inverse_sqrt_alpha * eps_scale * (eps.detach() - noise)  # between that mean and q(x_prev | x_t, x)'s
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + gap.square() * (-log_variance).exp())
        nll = -discretized_log_likelihood(x, mean, 0.5 * log_variance)
        bound = torch.where(expand(t == 0, x), nll, kl)
        return per_sample((eps - noise).square()) + per_sample(bound) / math.log(2), activations

    @torch.no_grad()
    def sample(self, model, noise, y, steps=250, method="ddpm", cfg=1.0, cfg_interval=(0, 1), cfg_channels=None,
               noise_fn=None):
        """From noise (B, C, H, W) with labels y (B,) to samples, through `steps` of the 1000 steps (see `spaced`).

        method: "ddpm" draws from each step's learned normal distribution; noise_fn(k) gives step k's noise. "ddim" has
            no noise: it is Euler's method on the ODE d(x / sqrt(abar)) / d sigma = eps, sigma = sqrt((1-abar) / abar).
            "heun" is Heun's on the same grid, but for the last interval: there is no step number at its end.
        cfg, cfg_channels: as in FlowMatching.sample, for the predicted noise; the variance is not guided. cfg_interval
            bounds t = 1 / (1 + sigma), the time at which SiT's path has the same signal-to-noise ratio.
        """
        check_method(method, self.methods)
        x, channels, numbers = noise, noise.shape[1], self.spaced(steps, method)
        sigma = (1 / self.abar[numbers] - 1).sqrt().tolist()

        guided = guidance(model, noise, y, cfg, cfg_interval, cfg_channels or channels)
        output = lambda x, k: guided(x, numbers[k], 1 / (1 + sigma[k])).split(channels, 1)

        def euler(x, k, eps):
            end = sigma[k - 1] if k > 0 else 0.0
            return (x * math.hypot(1, sigma[k]) + (end - sigma[k]) * eps) / math.hypot(1, end)  # hypot: 1 / sqrt(abar)

        for k in reversed(range(steps)):
            eps, v = output(x, k)
            if method == "ddpm":
                x, log_variance = self.posterior(eps, v, x, slice(k, k + 1), numbers)
                if k > 0:
                    step_noise = torch.randn_like(x) if noise_fn is None else noise_fn(steps - 1 - k)
                    x = x + torch.exp(0.5 * log_variance) * step_noise
            else:
                if method == "heun" and k > 0:
                    eps = (eps + output(euler(x, k, eps), k - 1)[0]) / 2
                x = euler(x, k, eps)
        return x


class MeanFlow:
    """Regress the average velocity u(x_t, t, r) from time t to a later r: then x_t + (r - t) * u is x_r, in one step.

    In SiT's time: the paper's runs the other way, from data at 0 to noise at 1.
    every: one sample in `every` has r != t, the others are flow matching (the paper's best share, 25%).
    omega, kappa, interval: guidance in training, of effective scale omega / (1 - kappa), for t in the interval: there
        omega * v + kappa * u(y) + (1 - omega - kappa) * u(no label), both u at r = t, takes the place of the velocity
        v, except for samples without a label.
    """

    methods = ("average",)

    def __init__(self, every=4, omega=1.0, kappa=0.0, interval=(0, 1)):
        self.every, self.omega, self.kappa, self.interval = every, omega, kappa, interval

    def times(self, n, generator):
        """n times t and as many r >= t, on the generator's device: logit-normal, r != t in rows 0, every, 2*every.."""
        a, b = torch.sigmoid(torch.randn(2, n, generator=generator, device=generator.device) - 0.4)
        t, r = 1 - torch.maximum(a, b), 1 - torch.minimum(a, b)
        return t, torch.where(torch.arange(n, device=t.device) % self.every == 0, r, t)

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=()):
        """Adaptively weighted squared error per sample (B,), and the activations after the named blocks.

        x (B, C, H, W) data, y (B,) labels; t and r (B,) and noise, like x, are drawn when not given (r given t: r = t).
        Of B samples at most B / every, rounded up, may have r != t: the loss of any more is NaN. As the weighted loss
        hovers near 1, the attribute `squared_error` keeps the last call's mean squared error per sample, for logging.
        """
        if t is None:
            t, r = self.times(len(x), new_generator(x.device))
        r = t if r is None else r
        noise = torch.randn_like(x) if noise is None else noise
        x_t = torch.lerp(noise, x, expand(t, x))
        target = self.target(getattr(model, "module", model), x_t, y, t, r, x - noise)
        out, activations = predict(model, x_t, t, y, r, blocks=blocks)
        error = (out[:, :x.shape[1]] - target).square()
        self.squared_error = per_sample(error.detach())
        error = error.flatten(1).sum(1)
        return error / (error.detach() + 0.01), activations

    @torch.no_grad()
    def target(self, net, x_t, y, t, r, v):
        """The MeanFlow identity, eq. 6 of the paper: v + (r - t) * du/dt along the path equals the average velocity u.

        Forward-mode differentiation passes neither through DistributedDataParallel, nor through compiled code, nor
        through fused attention.
        """
        channels = x_t.shape[1]
        if (self.omega, self.kappa) != (1, 0):
            no_label = torch.full_like(y, net.num_classes)
            x2, t2 = torch.cat([x_t, x_t]), torch.cat([t, t])
            cond, uncond = net.forward(x2, t2, torch.cat([y, no_label]), t2)[:, :channels].chunk(2)
            guides = (self.interval[0] <= t) & (t <= self.interval[1]) & (y != no_label)
            v = torch.where(expand(guides, v), self.omega * (v - uncond) + self.kappa * (cond - uncond) + uncond, v)
        # the rows with r != t, as many as there may be: counting them would wait for the device
        rows = (r != t).float().topk(-(-len(t) // self.every)).indices
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            _, derivative = torch.func.jvp(lambda x, t: net.forward(x, t, y[rows], r[rows])[:, :channels],
                                           (x_t[rows], t[rows]), (v[rows], torch.ones_like(t[rows])))
        torch.clear_autocast_cache()  # older versions of torch keep the weights cast here, which have no gradient
        target = torch.where(expand(r == t, v), v, math.nan)
        target[rows] = v[rows] + expand((r - t)[rows], v) * derivative
        return target

    @torch.no_grad()
    def sample(self, model, noise, y, steps=1, method="average", cfg=1.0, cfg_interval=(0, 1), cfg_channels=None,
               noise_fn=None):
        """From noise (B, C, H, W) with labels y (B,) to samples, in `steps` equal intervals of one evaluation each.

        Guidance belongs to training: ValueError for cfg other than 1. The last three arguments have no effect.
        """
        check_method(method, self.methods)
        if cfg != 1:
            raise ValueError(f"cfg {cfg}: MeanFlow is guided in training, through omega and kappa, not in sampling")
        x = noise
        for k in range(steps):
            t, r = (torch.full((len(x),), i / steps, device=x.device, dtype=x.dtype) for i in (k, k + 1))
            x = x + model(x, t, y, r)[:, :x.shape[1]].to(x.dtype) / steps
        return x
