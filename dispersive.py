"""Dispersive Loss, the transformers it was published on, and what it is compared with: losses, transformer, objectives.

Time is SiT's: t = 0 is noise, t = 1 is data, x_t = t*x + (1-t)*noise, velocity v = x - noise. GaussianDiffusion's
`times` and `loss`, and its network, count DiT's steps instead: 0 is next to data, 999 is noise.
Images and latents are (B, C, H, W); labels are (B,) int64, and label num_classes is the null label: "no class".
"""
import math

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ----------------------------------------
# Losses. This section can be pasted alone into other code: it needs only `import math` and `import torch`.

KINDS = ("infonce", "cosine", "hinge", "covariance")


def dispersive_loss(z, kind="infonce", tau=0.5, margin=1.0, group=None):
    """Push the representations of a batch apart (Wang & He 2025, arXiv 2506.09027, table 1).

    z: activations (B, ...) of any floating dtype, flattened to (B, dim); computed in at least float32.
    kind, with D(a, b) = |a - b|^2 / dim, or -cos(a, b) for "cosine"; the means include i = j:
        "infonce", "cosine"   log mean_ij exp(-D(z_i, z_j) / tau)
        "hinge"               mean_ij max(0, margin - D(z_i, z_j))^2
        "covariance"          mean_{m != n} C_mn^2, C the correlation of features m and n over the batch
    group: compare only so many consecutive samples, and average over groups (default: all; the paper: 16).
    Returns a scalar to add to the loss, times 0.5 in the paper. ValueError for unknown kinds and unfit group sizes.
    """
    check_known(kind, "kind", KINDS)
    z = split_groups(z, group)
    if kind == "covariance":
        z = standardize(z)
        return mean_off_diagonal(z, z).mean()
    D = distances(z, kind)
    if kind == "hinge":
        return (margin - D).relu().square().mean()
    return (-D / tau).logsumexp((-2, -1)).mean() - math.log(D.shape[-2] * D.shape[-1])


def contrastive_loss(z, z_pos, kind="infonce", tau=0.5, margin=1.0, cov_weight=1.0, group=None):
    """The contrastive counterparts of dispersive_loss; z_pos holds a second view of every sample of z.

        "infonce", "cosine"   mean_i [D(z_i, z_pos_i) / tau + log sum_j exp(-D(z_i, z_pos_j) / tau)]
        "hinge"               mean_i [D(z_i, z_pos_i)^2 + mean_j max(0, margin - D(z_i, z_pos_j))^2]
        "covariance"          mean_m (1 - C_mm)^2 + cov_weight * mean_{m != n} C_mn^2, C the correlations between views:
                              Barlow Twins (Zbontar et al. 2021), with means where that has sums
    """
    check_known(kind, "kind", KINDS)
    if z.shape != z_pos.shape:
        raise ValueError(f"the two views differ in shape: {tuple(z.shape)} and {tuple(z_pos.shape)}")
    z, z_pos = split_groups(z, group), split_groups(z_pos, group)
    if kind == "covariance":
        z, z_pos = standardize(z), standardize(z_pos)
        diagonal = (z * z_pos).mean(-2)
        return (1 - diagonal).square().mean() + cov_weight * mean_off_diagonal(z, z_pos).mean()
    D = distances(torch.cat([z, z_pos], 1), kind)[:, :z.shape[1], z.shape[1]:]
    positive = diagonal_of(D)
    if kind == "hinge":
        return positive.square().mean() + (margin - D).relu().square().mean()
    return (positive / tau + (-D / tau).logsumexp(-1)).mean()


def repa_loss(h, target):
    """REPA (Yu et al. 2024, arXiv 2410.06940): minus the mean cosine of h and an encoder's features, (B, T, D)."""
    if h.shape != target.shape:
        raise ValueError(f"tokens and features differ in shape: {tuple(h.shape)} and {tuple(target.shape)}")
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    return -torch.nn.functional.cosine_similarity(h, target.to(h.dtype), dim=-1).mean()


def repa_projector(dim, feature_dim, width=2048):
    """REPA's trained map from the tokens of a block (..., dim) to the encoder's features (..., feature_dim)."""
    return torch.nn.Sequential(torch.nn.Linear(dim, width), torch.nn.SiLU(), torch.nn.Linear(width, width),
                               torch.nn.SiLU(), torch.nn.Linear(width, feature_dim))


def dispersive_floor(kind, n, tau=0.5, margin=1.0):
    """Smallest possible value of dispersive_loss for n samples; "infonce" gets close to it early in training."""
    return {"infonce": -math.log(n),
            "cosine": 1 / tau + math.log1p((n - 1) * math.exp(-n / (tau * (n - 1)))) - math.log(n),
            "hinge": margin ** 2 / n,
            "covariance": 1 / (n - 1)}[kind]  # about, if dim >> n; random features reach it


@torch.no_grad()
def mean_distance(z, group=None):
    """Mean of |z_i - z_j|^2 / dim over pairs i != j in groups of z (B, ...), a scalar tensor."""
    z = split_groups(z, group)
    norms = torch.linalg.vector_norm(z - z.mean(-2, keepdim=True), dim=-1)
    return 2 * norms.square().sum() / z[:, 1:].numel()  # 2 * z.var(-2).mean(), but faster


@torch.no_grad()
def effective_rank(z, group=None):
    """How many directions the samples of z (B, ...) spread over: between 1 and group - 1, a scalar tensor.

    exp of the entropy of the normalised eigenvalues of the centred Gram matrix (Roy & Vetterli 2007).
    """
    z = split_groups(z, group)
    eigenvalues = torch.linalg.eigvalsh(gram(z - z.mean(-2, keepdim=True))).clamp(min=0)
    total = eigenvalues.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)  # a collapsed group has rank 1
    return torch.special.entr(eigenvalues / total).sum(-1).exp().mean()


def check_known(name, what, known):
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(known)}")


def split_groups(z, group):
    """(B, ...) -> (B/group, group, dim), in at least float32."""
    n = len(z) if group is None else group
    if n < 2:
        raise ValueError(f"dispersion compares samples: it needs at least 2 in a group, got {n}")
    if len(z) % n:
        raise ValueError(f"cannot split activations of shape {tuple(z.shape)} into groups of {n} samples")
    return z.reshape(len(z) // n, n, -1).to(torch.promote_types(z.dtype, torch.float32))


def gram(z):
    """z @ z.mT, (G, n, dim) -> (G, n, n), without autocast, which would round to 16 bits."""
    # a sum over 64 slices of the features, where 64 divides dim: GPUs are slow at few products of long rows
    z = z.unflatten(-1, (64 if z.shape[-1] % 64 == 0 else 1, -1)).transpose(-3, -2).contiguous()
    with torch.autocast(z.device.type, enabled=False):
        return (z @ z.mT).sum(-3)


def diagonal_of(x):
    """(G, n, n) -> (G, n). Tensor.diagonal can get wrong gradients from torch 2.13's compiler on CPUs."""
    return (x * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).sum(-1)


def distances(z, kind):
    """D between all rows of z (G, n, dim) -> (G, n, n)."""
    if kind == "cosine":
        return -gram(torch.nn.functional.normalize(z, dim=-1))
    # |a|^2 + |b|^2 - 2ab loses its digits when all rows are far from zero, and a common shift changes no distance
    products = gram(z - z.mean(-2, keepdim=True).detach())
    squares = diagonal_of(products)
    return (squares[..., :, None] + squares[..., None, :] - 2 * products) / z.shape[-1]


def standardize(z):
    """Zero mean and unit (population) variance over the group for every feature; a constant feature becomes zero."""
    z = z - z[..., :1, :].detach()  # a constant feature is now exactly zero; its mean might be off by a rounding
    z = z - z.mean(-2, keepdim=True)
    return z * (z.square().mean(-2, keepdim=True) + 1e-20).rsqrt()


def mean_off_diagonal(a, b):
    """mean_{m != n} C_mn^2 of the correlations C = a^T b / n of standardised a and b, (G, n, dim) each -> (G,)."""
    # C is dim x dim, far too large, but its sum of squares needs only n x n matrices. Factors rotate inside a trace:
    # sum_mn C_mn^2 = trace(b^T a a^T b) / n^2 = trace(a a^T b b^T) / n^2 = sum_ij (a a^T)_ij (b b^T)_ij / n^2
    n, dim = a.shape[-2:]
    everything = (gram(a) ** 2 if a is b else gram(a) * gram(b)).sum((-2, -1)) / n ** 2
    diagonal = (a * b).mean(-2).square().sum(-1)
    return (everything - diagonal) / (dim * (dim - 1))


# ----------------------------------------
# Transformer. Parameter names and initialisation are those of the published DiT and SiT, so that weights interchange.


class TimestepEmbedder(nn.Module):
    """Times or step numbers (B,) -> (B, dim): sinusoids of 128 frequencies, cosines first, and a small network."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t.device))
        angles = t[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


def position_embedding(dim, side):
    """Fixed 2-D sinusoids for side x side tokens, (1, side*side, dim): first half columns, second half rows."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], -1).float()
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], -1)[None]


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def norm(x):
    """Layer norm over the channels, without weights."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """Transformer block with adaptive layer norm: the condition c shifts, scales and gates both residual branches."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, -1)
        return self.linear(norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """The transformer of DiT and SiT (Peebles & Xie 2023, arXiv 2212.09748): predicts noise or velocity.

    input_size, in_channels: the image or latent is (in_channels, input_size, input_size); patch_size divides the size.
    class_dropout_prob: if it is positive, label num_classes exists, the null label. The caller drops labels.
    learn_sigma: 2*in_channels output channels; DiT uses both halves, SiT the first.
    second_time: MeanFlow's second time r. Its embedder starts as zero, so that a SiT's weights still give that SiT.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, second_time=False):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide input_size {input_size}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes, self.has_null_label = num_classes, class_dropout_prob > 0
        self.x_embedder = nn.Module()  # a container, for the published name, as y_embedder is
        self.x_embedder.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size) if second_time else None
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + self.has_null_label, hidden_size)
        self.pos_embed = nn.Parameter(position_embedding(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * self.out_channels)
        self.initialize()

    def initialize(self):
        """adaLN-Zero: every block starts as the identity, and the output as zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view; treats the convolution as a linear layer
                nn.init.zeros_(module.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.r_embedder is not None:
            nn.init.normal_(self.r_embedder.mlp[0].weight, std=0.02)
            nn.init.zeros_(self.r_embedder.mlp[2].weight)

    def forward(self, x, t, y, r=None, blocks=()):
        """x (B, C, H, W), t (B,) and y (B,) -> (B, out_channels, H, W). t: SiT's time, or DiT's step, in 0..999.

        r: the second time (B,) of a model that has one; by default it is t.
        blocks: numbers of blocks, counted from 1. When any are named the result is (output, [activations
            (B, T, hidden_size) after each of those blocks, in ascending order]).
        """
        B, size, p = len(x), self.input_size, self.patch_size
        if x.shape[1:] != (self.in_channels, size, size):
            raise ValueError(f"expected images {(self.in_channels, size, size)}, got {tuple(x.shape[1:])}")
        if r is not None and self.r_embedder is None:
            raise ValueError("r is given to a model without a second time: build it with second_time=True")
        if any(not 1 <= number <= len(self.blocks) for number in blocks):
            raise ValueError(f"blocks {tuple(blocks)}: expected numbers from 1 to {len(self.blocks)}")
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, hidden_size), row by row
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        if self.r_embedder is not None:
            c = c + self.r_embedder(torch.zeros_like(t) if r is None else r - t)
        activations = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number in blocks:
                activations.append(x)
        x = self.final_layer(x, c)  # (B, T, p*p*channels): the pixels of every patch
        x = x.view(B, size // p, size // p, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(B, self.out_channels, size, size)
        return (x, activations) if blocks else x


MODELS = {f"{family}-{size}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
          for family in ("SiT", "DiT")
          for size, width, depth, heads in (("XS", 256, 8, 4), ("S", 384, 12, 6), ("B", 768, 12, 12),
                                            ("L", 1024, 24, 16), ("XL", 1152, 28, 16))
          for patch in (2, 4, 8)}


def build_model(name, **overrides):
    """A DiT of one of the MODELS (XS is ours, for small experiments), with any of DiT's arguments overridden."""
    check_known(name, "model", MODELS)
    return DiT(**MODELS[name] | overrides)


# ----------------------------------------
# Objectives: what to regress in training, and how to integrate it in sampling


def per_sample(error):
    """Mean over everything but the batch, in at least float32: (B, ...) -> (B,)."""
    return error.flatten(1).to(torch.promote_types(error.dtype, torch.float32)).mean(1)


def null_labels(model, y):
    if not model.has_null_label:
        raise ValueError("guidance needs the null label: build the model with class_dropout_prob > 0")
    return torch.full_like(y, model.num_classes)


def predict(model, x, t, y, sit_time, cfg, interval, channels):
    """The model's output at t, a time or step; its first `channels` are guided where sit_time lies in the interval."""
    t = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    if cfg == 1 or not min(interval) <= sit_time <= max(interval):
        return model(x, t, y).to(x.dtype)
    out = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null_labels(model, y)]))
    cond, uncond = out.to(x.dtype).chunk(2)
    guided = uncond + cfg * (cond - uncond)
    return torch.cat([guided[:, :channels], cond[:, channels:]], 1)


def check_sampling(objective, noise, method, cfg_channels=None):
    check_known(method, "method", objective.methods)
    if cfg_channels is not None and not 1 <= cfg_channels <= noise.shape[1]:
        raise ValueError(f"cfg_channels {cfg_channels}: expected a number from 1 to {noise.shape[1]}")


class FlowMatching:
    """SiT (Ma et al. 2024, arXiv 2401.08740): regress the velocity x - noise, and integrate it from noise to data."""

    methods = ("heun", "euler", "sde")

    def times(self, n, generator=None, device=None):
        """n training times (n,), uniform in [0, 1), on the generator's device or the given one."""
        return torch.rand(n, generator=generator, device=device or generator.device)

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=()):
        """Mean squared error per sample (B,), and a list of the activations after the named blocks.

        x (B, C, H, W) data, y (B,) labels; t (B,) and noise, like x, are drawn when not given. r is ignored.
        """
        t = self.times(len(x), device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        velocity = x - noise
        x_t = (noise + t.view(-1, 1, 1, 1) * velocity).to(x.dtype)
        out, activations = model(x_t, t, y, blocks=blocks) if blocks else (model(x_t, t, y), [])
        return per_sample((out[:, :x.shape[1]] - velocity).square()), activations

    @torch.no_grad()
    def sample(self, model, noise, y, steps=250, method="heun", cfg=1.0, cfg_interval=(0, 1), cfg_channels=None,
               noise_fn=None):
        """Integrate from noise (B, C, H, W) with labels y (B,) to samples, in `steps` intervals.

        method: "heun" (the paper's), "euler", or "sde": Euler-Maruyama on SiT's reverse SDE with diffusion 1 - t, the
            last interval 0.04 long and without noise; noise_fn(k) gives step k's noise.
        cfg: scale of classifier-free guidance (Ho & Salimans 2022), for t in cfg_interval, on the first cfg_channels
            channels (default: all; the published DiT and SiT code guides 3 of 4).
        """
        check_sampling(self, noise, method, cfg_channels)
        x, channels = noise, noise.shape[1]
        guidance = cfg, cfg_interval, cfg_channels or channels
        velocity = lambda x, t: predict(model, x, t, y, t, *guidance)[:, :channels]
        times = [k / steps for k in range(steps + 1)]
        if method == "sde":
            times = [0.96 * k / max(1, steps - 1) for k in range(steps)] + [1.0]
        for k in range(steps):
            t, dt = times[k], times[k + 1] - times[k]
            v = velocity(x, t)
            if method == "heun":
                v = (v + velocity(x + dt * v, times[k + 1])) / 2
            elif method == "sde":
                v = (1 + t) * v - x  # velocity + diffusion * score, where score = (t*v - x) / (1-t)
            x = x + dt * v
            if method == "sde" and k < steps - 1:
                step_noise = torch.randn_like(x) if noise_fn is None else noise_fn(k)
                x = x + math.sqrt(2 * (1 - t) * dt) * step_noise
        return x


def chain_constants(abar, device):
    """Constants of a chain of n noising steps, each (n, 1, 1, 1); abar (n,): signal variance after each step."""
    abar = abar.view(-1, 1, 1, 1)
    abar_before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    alpha = abar / abar_before
    beta = 1 - alpha
    variance = beta * (1 - abar_before) / (1 - abar)  # of q(x_prev | x_t, x): Ho et al. 2020, eq. 7
    variance[0] = variance[1]  # rather than 0, whose log is infinite: as published
    constants = dict(signal=abar.sqrt(), noise=(1 - abar).sqrt(), x_scale=alpha.rsqrt(),
                     eps_scale=beta / (1 - abar).sqrt() / alpha.sqrt(), log_variance=variance.log(),
                     log_beta=beta.log())
    return {name: value.float().to(device) for name, value in constants.items()}


def posterior(chain, k, x_t, eps, v):
    """The model's eps and v at step k of a chain -> mean and log-variance of x one step before.

    Ho et al. 2020, eq. 11; Nichol & Dhariwal 2021, eq. 15: v from -1 to 1 spans the bounds of the log-variance.
    """
    mean = chain["x_scale"][k] * x_t - chain["eps_scale"][k] * eps
    low, high = chain["log_variance"][k], chain["log_beta"][k]
    return mean, low + (v + 1) / 2 * (high - low)


def discretized_log_likelihood(x, mean, log_std):
    """Log-probability under Normal(mean, std^2) of 8-bit grey levels x in [-1, 1]: bins of 2/255, open at the ends."""
    edges = torch.stack([x - mean - 1 / 255, x - mean + 1 / 255]) * torch.exp(-log_std)
    below, above = 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (edges + 0.044715 * edges ** 3))  # normal CDF
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


class GaussianDiffusion:
    """DiT: regress the noise of 1000 noising steps, and learn the variance of the reverse steps from their likelihood.

    Nichol & Dhariwal 2021, arXiv 2102.09672. x_t = sqrt(abar_t) * x + sqrt(1 - abar_t) * noise, abar_t the product of
    alpha = 1 - beta over steps 0..t, beta rising linearly from 1e-4 to 0.02. The first half of the model's 2*C channels
    predicts the noise, the other one the variance. Matches the published DiT's create_diffusion().
    """

    methods = ("ddpm", "ddim", "heun")

    def __init__(self):
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")
        self.abar = torch.cumprod(1 - beta, 0)
        self.chains = {}  # the constants by device; to copy them there in every step would wait for it

    def times(self, n, generator=None, device=None):
        """n training steps (n,), uniform in 0..999."""
        return torch.randint(1000, (n,), generator=generator, device=device or generator.device)

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=()):
        """Squared error of the noise plus variational bound in bits per dimension, (B,), and the named activations.

        Arguments as in FlowMatching.loss, but t (B,) are step numbers. The bound trains only the variance.
        """
        if x.device not in self.chains:
            self.chains[x.device] = chain_constants(self.abar, x.device)
        chain = self.chains[x.device]
        t = self.times(len(x), device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        x_t = (chain["signal"][t] * x + chain["noise"][t] * noise).to(x.dtype)
        out, activations = model(x_t, t, y, blocks=blocks) if blocks else (model(x_t, t, y), [])
        eps, v = out.to(torch.promote_types(x.dtype, torch.float32)).split(x.shape[1], 1)
        mean, log_variance = posterior(chain, t, x_t, eps.detach(), v)
        gap = chain["eps_scale"][t] * (eps.detach() - noise)  # between that mean and the mean of q(x_prev | x_t, x)
        log_ratio = log_variance - chain["log_variance"][t]
        kl = 0.5 * (log_ratio - 1 + (-log_ratio).exp() + gap.square() * (-log_variance).exp())
        nll = -discretized_log_likelihood(x, mean, 0.5 * log_variance)
        bound = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl)
        return per_sample((eps - noise).square()) + per_sample(bound) / math.log(2), activations

    def spaced(self, n, method):
        """The n step numbers that a sampler visits, ascending, as in DiT's respace.py; ValueError if impossible."""
        if method == "ddpm":
            if not 2 <= n <= 1000:
                raise ValueError(f"ddpm takes 2 to 1000 steps, got {n}")
            positions = [0.0]  # evenly to 999, by summation, since products would round to other steps
            while len(positions) < n:
                positions.append(positions[-1] + 999 / (n - 1))
            return [round(position) for position in positions]
        for stride in range(1, 1000):  # the smallest that gives n steps
            if len(range(0, 1000, stride)) == n:
                return list(range(0, 1000, stride))
        raise ValueError(f"{method} takes every i-th of 1000 steps, and no i gives {n} steps")

    @torch.no_grad()
    def sample(self, model, noise, y, steps=250, method="ddpm", cfg=1.0, cfg_interval=(0, 1), cfg_channels=None,
               noise_fn=None):
        """From noise (B, C, H, W) with labels y (B,) to samples, through `steps` of the 1000 steps (see `spaced`).

        method: "ddpm" draws from each step's learned normal distribution. "ddim" (Song et al. 2020, arXiv 2010.02502)
            is Euler's method on the ODE d(x / sqrt(abar)) / d sigma = eps, sigma = sqrt((1-abar) / abar). "heun" is
            Heun's, but for the last interval, which stays Euler's.
        The rest is as in FlowMatching.sample. The variance is not guided, and cfg_interval bounds t = 1 / (1 + sigma),
        the time at which SiT's path has the same signal-to-noise ratio.
        """
        check_sampling(self, noise, method, cfg_channels)
        x, channels, numbers = noise, noise.shape[1], self.spaced(steps, method)
        abar = self.abar[numbers]
        chain, sigma = chain_constants(abar, x.device), (1 / abar - 1).sqrt().tolist()
        guidance = cfg, cfg_interval, cfg_channels or channels
        output = lambda x, k: predict(model, x, numbers[k], y, 1 / (1 + sigma[k]), *guidance).split(channels, 1)

        def euler(x, k, eps):  # from step k to k - 1, or to the data; hypot(1, sigma) is 1 / sqrt(abar)
            end = sigma[k - 1] if k > 0 else 0.0
            return (x * math.hypot(1, sigma[k]) + (end - sigma[k]) * eps) / math.hypot(1, end)

        for k in reversed(range(steps)):
            eps, v = output(x, k)
            if method == "ddpm":
                x, log_variance = posterior(chain, k, x, eps, v)
                if k > 0:
                    step_noise = torch.randn_like(x) if noise_fn is None else noise_fn(steps - 1 - k)
                    x = x + torch.exp(0.5 * log_variance) * step_noise
                x = x.to(noise.dtype)
            else:
                if method == "heun" and k > 0:
                    eps = (eps + output(euler(x, k, eps), k - 1)[0]) / 2
                x = euler(x, k, eps)
        return x


class MeanFlow:
    """Regress the average velocity u(x_t, t, r) from time t to a later r: then x_t + (r - t) * u is x_r, in one step.

    Geng et al. 2025, arXiv 2505.13447, whose time runs the other way, from data at 0 to noise at 1.
    every: one sample in `every` has r != t, the others are flow matching.
    omega, kappa, interval: guidance in training, of effective scale omega / (1 - kappa). For t in the interval and
        labels that are not null, omega * v + kappa * u(y) + (1 - omega - kappa) * u(null), at r = t, replaces v.
    """

    methods = ("average",)

    def __init__(self, every=4, omega=1.0, kappa=0.0, interval=(0, 1)):
        self.every, self.omega, self.kappa, self.interval = every, omega, kappa, interval

    def times(self, n, generator=None, device=None):
        """Times t and r >= t, (n,) each, logit-normal; r != t only in rows 0, every, 2*every, ..."""
        device = device or generator.device
        a, b = torch.sigmoid(torch.randn(2, n, generator=generator, device=device) - 0.4)
        t, r = 1 - torch.maximum(a, b), 1 - torch.minimum(a, b)
        return t, torch.where(torch.arange(n, device=device) % self.every == 0, r, t)

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=(), rows=slice(None)):
        """Mean squared error per sample (B,), to be passed through `weight`, and the named activations.

        Arguments as in FlowMatching.loss; r (B,) is drawn with t, else t by default. The model must not be wrapped in
        DistributedDataParallel. rows: index of the samples with r != t, which cost a derivative (default: all).
        """
        if t is None:
            t, r = self.times(len(x), device=x.device)
        r = t if r is None else r
        noise = torch.randn_like(x) if noise is None else noise
        velocity = x - noise
        x_t = (noise + t.view(-1, 1, 1, 1) * velocity).to(x.dtype)
        target = self.target(model, x_t, y, t, r, velocity, rows)
        out, activations = model(x_t, t, y, r, blocks=blocks) if blocks else (model(x_t, t, y, r), [])
        return per_sample((out[:, :x.shape[1]] - target).square()), activations

    def weight(self, loss, size):
        """The loss to minimise: the error summed over a sample's `size` numbers, over itself + 0.01 (no gradient)."""
        total = size * loss
        return total / (total.detach() + 0.01)

    @torch.no_grad()
    def target(self, net, x_t, y, t, r, v, rows):
        """The MeanFlow identity, eq. 6 of its paper: u = v + (r - t) * du/dt along the path, with r held fixed."""
        channels = x_t.shape[1]
        if (self.omega, self.kappa) != (1, 0):
            null = null_labels(net, y)
            out = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null]), torch.cat([t, t]))
            cond, uncond = out[:, :channels].chunk(2)
            guided = self.omega * v + self.kappa * cond + (1 - self.omega - self.kappa) * uncond
            applies = (min(self.interval) <= t) & (t <= max(self.interval)) & (y != null)
            v = torch.where(applies.view(-1, 1, 1, 1), guided, v)
        average_velocity = lambda x, t: net(x, t, y[rows], r[rows])[:, :channels]
        # forward-mode differentiation works neither in fused attention nor in compiled code
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            _, derivative = torch.func.jvp(average_velocity, (x_t[rows], t[rows]),
                                           (v[rows].to(x_t.dtype), torch.ones_like(t[rows])))
        torch.clear_autocast_cache()  # autocast would use the weights that it cast here, without gradients, once more
        target = v.clone()
        target[rows] += (r - t)[rows].view(-1, 1, 1, 1) * derivative
        return target

    @torch.no_grad()
    def sample(self, model, noise, y, steps=1, method="average", cfg=1.0, **others):
        """From noise (B, C, H, W) with labels y (B,) to samples, in `steps` equal intervals of one evaluation each.

        ValueError for cfg other than 1. The others of FlowMatching.sample's arguments have no effect.
        """
        check_sampling(self, noise, method)
        if cfg != 1:
            raise ValueError(f"cfg {cfg}: MeanFlow is guided in training, by omega and kappa, not here")
        x = noise
        for k in range(steps):
            t = torch.full((len(x),), k / steps, dtype=torch.float32, device=x.device)
            r = torch.full_like(t, (k + 1) / steps)
            x = x + model(x, t, y, r)[:, :x.shape[1]].to(x.dtype) / steps
        return x
