"""Tests, in the order of the files. Each compares with a slow and obvious version, a closed form, or published numbers.

Numbers marked "golden" were computed by the published implementations on the weights and inputs that `fill`, `rn` and
`ru` reproduce.
"""
import io
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from dispersive import (KINDS, MODELS, DiT, FlowMatching, build_model, contrastive_loss, dispersive_floor,
                        dispersive_loss, mean_distance)
from sample import UserError

HERE = Path(__file__).parent


def rn(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def ru(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).uniform(size=shape).astype(np.float32))


def fill(module):
    """Weights that depend on the parameter's name alone, as the golden numbers were computed with."""
    for name, tensor in module.state_dict().items():
        if name == "pos_embed" or not tensor.is_floating_point():
            continue
        a = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape)).astype(np.float32)
        tensor.copy_(torch.from_numpy(a / np.float32(math.sqrt(np.prod(a.shape[1:]))) if a.ndim > 1 else a * 0.1))
    return module


def close(value, reference, tolerance):
    """Largest deviation relative to the largest reference value."""
    value, reference = (torch.as_tensor(v, dtype=torch.float64) for v in (value, reference))
    error = (value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# dispersive.py: losses


def pair_distance(a, b, kind):
    return -a @ b / (a.norm() * b.norm()) if kind == "cosine" else ((a - b) ** 2).mean()


def slow_dispersive(z, kind, tau=0.5, margin=1.0):
    """The definition, pair by pair in float64."""
    z = z.double().reshape(len(z), -1)
    if kind == "covariance":
        return slow_covariance(z, z)[1]
    pairs = torch.stack([pair_distance(a, b, kind) for a in z for b in z])
    if kind == "hinge":
        return (margin - pairs).clamp(min=0).square().mean()
    return (-pairs / tau).exp().mean().log()


def slow_contrastive(z, z_pos, kind, tau=0.5, margin=1.0):
    z, z_pos = (v.double().reshape(len(v), -1) for v in (z, z_pos))
    if kind == "covariance":
        on, off = slow_covariance(z, z_pos)
        return on + 0.7 * off
    total = 0
    for i, a in enumerate(z):
        pairs = torch.stack([pair_distance(a, b, kind) for b in z_pos])
        if kind == "hinge":
            total = total + pairs[i] ** 2 + (margin - pairs).clamp(min=0).square().mean()
        else:
            total = total + pairs[i] / tau + (-pairs / tau).exp().sum().log()
    return total / len(z)


def slow_covariance(a, b):
    """Mean over the diagonal of (1 - C)^2, and off the diagonal of C^2, by the dim x dim matrix."""
    def standard(v):
        std = v.std(0, unbiased=False)
        return torch.where(std > 1e-12, (v - v.mean(0)) / std.clamp(min=1e-12), torch.zeros_like(v))
    c = standard(a).T @ standard(b) / len(a)
    off = ~torch.eye(len(c), dtype=torch.bool)
    return (1 - c.diagonal()).square().mean(), c[off].square().mean()


def value_and_gradient(function, *inputs):
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    value = function(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


CASES = {"spread 1": lambda z: z, "spread 0.1": lambda z: 0.1 * z, "collapsed": lambda z: 1e-3 * z,
         "saturated": lambda z: 2.5 * z, "offset": lambda z: z + 1000 * rn(8, *z.shape[1:]).sign()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_dispersive_loss_is_the_pairwise_loop(kind, case):
    z = CASES[case](rn(1, 12, 5, 7))
    value, (gradient,) = value_and_gradient(lambda v: dispersive_loss(v, kind), z)
    reference, (slow_gradient,) = value_and_gradient(lambda v: slow_dispersive(v, kind), z)
    close(value, reference, 1e-5)
    if not (kind == "cosine" and case == "offset"):
        close(gradient, slow_gradient, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_contrastive_loss_is_the_pairwise_loop(kind, case):
    z, z_pos = CASES[case](rn(1, 12, 5, 7)), CASES[case](rn(1, 12, 5, 7) + 0.3 * rn(2, 12, 5, 7))
    value, gradients = value_and_gradient(lambda a, b: contrastive_loss(a, b, kind, cov_weight=0.7), z, z_pos)
    reference, slow_gradients = value_and_gradient(lambda a, b: slow_contrastive(a, b, kind), z, z_pos)
    close(value, reference, 1e-5)
    if not (kind == "cosine" and case == "offset"):
        close(torch.cat(gradients), torch.cat(slow_gradients), 1e-4)


def test_contrastive_loss_of_nearly_equal_views():
    """Positive distances of 1e-8 must survive beside negative ones of order 1."""
    z = rn(1, 6, 40) * 1.5
    z_pos = z + 1e-4 * rn(2, 6, 40)
    for kind in ("infonce", "hinge"):
        close(contrastive_loss(z, z_pos, kind), slow_contrastive(z, z_pos, kind), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_at_full_activation_size(kind):
    """B = 256, 256 x 768, against float64; the reference's Gram matrix needs no loop and is exact enough there."""
    z = rn(3, 256, 256 * 768)
    with torch.autocast("cpu", torch.bfloat16):  # the loss stays in float32 all the same
        value = dispersive_loss(z.view(256, 256, 768), kind)
    z = z.double()
    if kind == "covariance":
        z = (z - z.mean(0)) / z.std(0, unbiased=False)
        reference = ((z @ z.T).square().sum() / 256 ** 2 - z.shape[1]) / (z.shape[1] * (z.shape[1] - 1))
    else:
        gram = z @ z.T
        norm = gram.diagonal()
        l2, cosine = (norm[:, None] + norm - 2 * gram) / z.shape[1], gram / (norm[:, None] * norm).sqrt()
        d = -cosine if kind == "cosine" else l2
        reference = (1 - d).clamp(min=0).square().mean() if kind == "hinge" else (-d / 0.5).exp().mean().log()
    close(value, reference, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    z, z_pos = (rn(seed, 5, 3, 2).double().requires_grad_() for seed in (4, 5))
    assert torch.autograd.gradcheck(lambda v: dispersive_loss(v, kind), z)
    assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(a, b, kind), (z, z_pos))
    assert dispersive_loss(z, kind).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_consecutive_samples_averaged(kind):
    z, z_pos = rn(6, 12, 9), rn(7, 12, 9)
    parts = [dispersive_loss(part, kind) for part in z.split(4)]
    close(dispersive_loss(z, kind, group=4), sum(parts) / 3, 1e-6)
    parts = [contrastive_loss(*pair, kind) for pair in zip(z.split(4), z_pos.split(4))]
    close(contrastive_loss(z, z_pos, kind, group=4), sum(parts) / 3, 1e-6)
    close(mean_distance(z, group=4), sum(mean_distance(part) for part in z.split(4)) / 3, 1e-6)


def test_low_precision_is_promoted_and_shapes_are_flattened():
    for dtype in (torch.bfloat16, torch.float16):
        z = rn(8, 8, 4, 3, 2).to(dtype)
        close(dispersive_loss(z), dispersive_loss(z.float().flatten(1)), 1e-7)
        assert dispersive_loss(z).dtype == torch.float32
    close(dispersive_loss(rn(8, 8)), slow_dispersive(rn(8, 8, 1), "infonce"), 1e-5)
    strided = rn(8, 8, 6, 4).transpose(1, 2)
    close(dispersive_loss(strided), dispersive_loss(strided.contiguous()), 1e-6)


def test_constant_features_have_no_correlation_and_no_nan():
    z = torch.cat([rn(9, 8, 5), torch.full((8, 3), 0.1)], 1)
    value, (gradient,) = value_and_gradient(lambda v: dispersive_loss(v, "covariance"), z)
    close(value, slow_dispersive(torch.cat([z[:, :5], torch.zeros(8, 3)], 1), "covariance"), 1e-5)
    assert gradient.isfinite().all() and (gradient[:, 5:] == 0).all()
    same = torch.ones(4, 6)
    for kind in KINDS:
        value, (gradient,) = value_and_gradient(lambda v: dispersive_loss(v, kind), same)
        assert value.isfinite() and gradient.isfinite().all()
    assert dispersive_loss(same) == 0


def test_authors_dispersive_loss():
    """Golden: the authors' PyTorch code, tau = 1, on inputs of three scales."""
    for seed, scale, golden in ((10, 0.1, -0.01663364), (11, 0.5, -0.42340022), (12, 1.0, -1.40683627)):
        close(dispersive_loss(rn(seed, 8, 16, 24) * scale, tau=1.0), golden, 2e-6)


def test_floors_are_reached_and_not_passed():
    n = 16
    far, simplex = 100 * torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64) - 1 / n
    close(dispersive_loss(far), dispersive_floor("infonce", n), 1e-12)
    close(dispersive_floor("infonce", 32), -3.4657359, 1e-7)
    close(dispersive_loss(simplex, "cosine", tau=0.3), dispersive_floor("cosine", n, tau=0.3), 1e-12)
    close(dispersive_loss(far, "hinge", margin=1.5), dispersive_floor("hinge", n, margin=1.5), 1e-12)
    close(dispersive_loss(rn(13, n, 20000), "covariance"), dispersive_floor("covariance", n), 1e-2)


def test_mean_distance_is_the_mean_over_pairs():
    z = rn(14, 7, 3, 5) + 50
    pairs = [pair_distance(a, b, "l2") for i, a in enumerate(z.double()) for j, b in enumerate(z.double()) if i != j]
    close(mean_distance(z), sum(pairs) / len(pairs), 1e-5)


def test_loss_errors():
    with pytest.raises(ValueError, match="at least 2"):
        dispersive_loss(rn(1, 1, 8))
    with pytest.raises(ValueError, match="at least 2"):
        dispersive_loss(rn(1, 8, 8), group=1)
    with pytest.raises(ValueError, match="groups of 3"):
        dispersive_loss(rn(1, 8, 8), group=3)
    with pytest.raises(ValueError, match="infonce, cosine, hinge, covariance"):
        dispersive_loss(rn(1, 8, 8), "l2")
    with pytest.raises(ValueError, match="differ in shape"):
        contrastive_loss(rn(1, 8, 8), rn(1, 8, 7))


def test_loss_section_stands_alone():
    """What stands above the transformer runs with math and torch only."""
    source = (HERE / "dispersive.py").read_text().split("# Transformer")[0].split("# Losses.")[1]
    names = {"math": math, "torch": torch}
    exec("#" + source.rsplit("# ---", 1)[0], names)
    for kind in KINDS:
        close(names["dispersive_loss"](rn(1, 8, 8), kind), dispersive_loss(rn(1, 8, 8), kind), 0)


# ---------------------------------------------------------------------------------------------------------------------
# dispersive.py: transformer and objectives


def test_parameter_counts_of_the_published_shapes():
    """Golden counts."""
    counts = {"XL/2": 675129632, "XL/4": 675074432, "XL/8": 675683072, "L/2": 458102816, "L/4": 458053760,
              "L/8": 458594816, "B/2": 130512416, "B/4": 130475648, "B/8": 130881536, "S/2": 32963360, "S/4": 32945024,
              "S/8": 33148160}
    for name, count in counts.items():
        for family in ("SiT", "DiT"):
            with torch.device("meta"):
                model = build_model(f"{family}-{name}")
            assert sum(p.numel() for p in model.parameters()) == count
    with pytest.raises(ValueError, match="SiT-M/2"):
        build_model("SiT-M/2")


@pytest.fixture(scope="module")
def golden_sit():
    return fill(build_model("SiT-S/2", num_classes=10)).eval()


GOLDEN_SIT = {
    "out": [-0.6491057, -0.003471851, 1.045748, 0.975122, 0.1084242, -0.9454051, -0.7054862, 0.3594444, 0.03205636,
            -0.546802, 1.728984, -0.1839832],
    "loss": [3.268901, 3.151128, 3.140131],
    "ode_heun2": [-0.8416493, -0.5420452, 1.907666, 1.103138, -0.5571678, -0.1735705, -1.213986, 1.075168],
}


@torch.no_grad()
def test_forward_loss_and_heun_equal_the_published_code(golden_sit):
    """Golden: SiT-S/2; a few values of each output here, all of them where the reference file is at hand."""
    out = golden_sit(rn(1, 3, 4, 32, 32), ru(2, 3), torch.tensor([0, 7, 10]))[:, :4]
    loss, _ = FlowMatching().loss(golden_sit, rn(3, 3, 4, 32, 32), torch.tensor([0, 7, 10]), ru(2, 3),
                                  rn(4, 3, 4, 32, 32))
    heun = FlowMatching().sample(golden_sit, rn(5, 2, 4, 32, 32), torch.tensor([1, 2]), steps=5)
    close(out.flatten()[::1111], GOLDEN_SIT["out"], 1e-5)
    close(loss, GOLDEN_SIT["loss"], 1e-5)
    close(heun.flatten()[::1111], GOLDEN_SIT["ode_heun2"], 1e-5)
    path = HERE.parent / "shared" / "golden" / "sit.npz"
    if path.exists():
        golden = np.load(path)
        close(out, golden["out"], 1e-5)
        close(heun, golden["ode_heun2"], 1e-5)


def random_model(**overrides):
    """A small float64 model whose every weight matters (a fresh one is the identity)."""
    sizes = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=4)
    return fill(DiT(**{**sizes, **overrides})).double().eval()


def test_attention_and_block_are_their_formulas():
    model = random_model()
    block, x, c = model.blocks[0], rn(1, 2, 5, 32).double(), rn(2, 2, 32).double()

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attention(v):
        out = torch.zeros_like(v)
        for b in range(2):
            qkv = v[b] @ block.attn.qkv.weight.T + block.attn.qkv.bias
            for h in range(2):
                q, k, w = (qkv[:, i * 32 + h * 16:i * 32 + (h + 1) * 16] for i in range(3))
                out[b, :, h * 16:(h + 1) * 16] = torch.softmax(q @ k.T / 4, -1) @ w
        return out @ block.attn.proj.weight.T + block.attn.proj.bias

    def mlp(v):
        v = v @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        v = 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3)))
        return v @ block.mlp.fc2.weight.T + block.mlp.fc2.bias

    adaln = block.adaLN_modulation[1]
    m = (c * torch.sigmoid(c)) @ adaln.weight.T + adaln.bias
    m = m.view(2, 6, 1, 32)
    y = x + m[:, 2] * attention(norm(x) * (1 + m[:, 1]) + m[:, 0])
    y = y + m[:, 5] * mlp(norm(y) * (1 + m[:, 4]) + m[:, 3])
    close(block(x, c).detach(), y.detach(), 1e-12)


def test_activations_are_those_after_the_named_blocks():
    model, seen = random_model(), []
    x, t, y = rn(1, 2, 3, 8, 8).double(), ru(2, 2).double(), torch.tensor([0, 4])
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    out, activations = model(x, t, y, blocks=(3, 1))
    assert [a.shape for a in activations] == [(2, 16, 32)] * 2
    assert torch.equal(activations[0], seen[0]) and torch.equal(activations[1], seen[2])
    assert torch.equal(out, model(x, t, y))
    with pytest.raises(ValueError, match="from 1 to 3"):
        model(x, t, y, blocks=(0,))


def test_a_fresh_model_is_zero_and_every_block_the_identity():
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=4)
    out, (first, last) = model(rn(1, 2, 4, 8, 8), ru(2, 2), torch.tensor([0, 4]), blocks=(1, 2))
    assert (out == 0).all() and torch.equal(first, last)
    assert out.shape == (2, 8, 8, 8)


def test_bad_sizes_are_errors():
    with pytest.raises(ValueError, match="patch_size 3"):
        DiT(input_size=32, patch_size=3)
    assert DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, class_dropout_prob=0, num_classes=4
               ).y_embedder.embedding_table.weight.shape == (4, 32)


class Gaussian(torch.nn.Module):
    """The exact velocity field of data ~ Normal(mu_y, s^2): its flow and its SDE have closed forms."""
    num_classes, s = 2, 0.5

    def mean(self, y):
        return torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64)[y].view(-1, 1, 1, 1)

    def forward(self, x, t, y):
        self.calls = getattr(self, "calls", 0) + len(x)
        t, mu = t.view(-1, 1, 1, 1), self.mean(y)
        variance = t ** 2 * self.s ** 2 + (1 - t) ** 2
        return mu + (t * self.s ** 2 - (1 - t)) / variance * (x - t * mu)


@pytest.mark.parametrize("method, order", [("heun", 2), ("euler", 1)])
def test_order_of_convergence(method, order):
    """The flow of a Gaussian maps noise n to mu + s*n."""
    model, noise, y = Gaussian(), rn(1, 4, 1, 2, 2).double(), torch.tensor([0, 1, 0, 1])
    exact = model.mean(y) + model.s * noise
    errors = [(FlowMatching().sample(model, noise, y, steps, method) - exact).abs().max() for steps in (20, 40, 80)]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(coarse / fine / 2 ** order - 1) < 0.1


def test_sde_samples_the_same_distribution():
    model, y = Gaussian(), torch.ones(20000, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    draws = []

    def noise_fn(k):
        draws.append(k)
        return torch.randn(20000, 1, 1, 1, generator=generator, dtype=torch.float64)

    x = FlowMatching().sample(model, noise_fn(-1), y, steps=100, method="sde", noise_fn=noise_fn)
    assert draws == list(range(-1, 99))  # no noise in the last step
    assert abs(x.mean() - 2.0) < 0.02 and abs(x.std() - 0.5) < 0.02


def test_sde_step_is_the_published_formula():
    """drift v + w*score with w = 1-t and score = (t*v - x)/(1-t), noise sqrt(2w dt), to 0.96, then a step of 0.04."""
    model, x, y = Gaussian(), rn(1, 2, 1, 2, 2).double(), torch.tensor([0, 1])
    noises = {k: rn(20 + k, 2, 1, 2, 2).double() for k in range(2)}
    result = FlowMatching().sample(model, x, y, steps=3, method="sde", noise_fn=noises.__getitem__)
    for k, (t, dt) in enumerate([(0.0, 0.48), (0.48, 0.48), (0.96, 0.04)]):
        v = model(x, torch.full((2,), t, dtype=torch.float64), y)
        x = x + dt * (v + (1 - t) * (t * v - x) / (1 - t))
        if k < 2:
            x = x + math.sqrt(2 * (1 - t) * dt) * noises[k]
    close(result, x, 1e-12)


def test_guidance_scale_interval_and_channels():
    model, noise, y = random_model(), rn(1, 2, 3, 8, 8).double(), torch.tensor([0, 1])

    def field(x, t, channels, scale):
        t = torch.full((2,), t, dtype=torch.float64)
        cond, uncond = model(x, t, y)[:, :3], model(x, t, torch.tensor([4, 4]))[:, :3]
        return torch.cat([uncond + scale * (cond - uncond), cond], 1)[:, [*range(channels), *range(3 + channels, 6)]]

    with torch.no_grad():
        for channels in (None, 2):
            x = FlowMatching().sample(model, noise, y, 2, "euler", 3.0, (0.2, 0.7), channels)
            step = noise + 0.5 * field(noise, 0.0, channels or 3, 1.0)  # t = 0 lies outside the interval
            close(x, step + 0.5 * field(step, 0.5, channels or 3, 3.0), 1e-12)
    gaussian = Gaussian()
    FlowMatching().sample(gaussian, rn(1, 2, 1, 2, 2).double(), y, 4, "euler", cfg=2.0, cfg_interval=(0.5, 0.8))
    assert gaussian.calls == 2 * (4 + 2)  # the unconditional half runs at t = 0.5 and 0.75 only
    with pytest.raises(ValueError, match="heun, euler, sde"):
        FlowMatching().sample(model, noise, y, method="rk4")


def test_flow_matching_loss_is_its_formula():
    model, x, noise, y, t = random_model(), rn(1, 2, 3, 8, 8), rn(2, 2, 3, 8, 8), torch.tensor([0, 4]), ru(3, 2)
    x, noise, t = x.double(), noise.double(), t.double()
    loss, activations = FlowMatching().loss(model, x, y, t, noise, blocks=(2,))
    w = t.view(2, 1, 1, 1)
    out = model(w * x + (1 - w) * noise, t, y)[:, :3]
    close(loss.detach(), ((out - (x - noise)) ** 2).mean((1, 2, 3)).detach(), 1e-12)
    assert len(activations) == 1
    t = FlowMatching().times(10000, torch.Generator().manual_seed(0))
    assert abs(t.mean() - 0.5) < 0.02 and t.min() >= 0 and t.max() < 1
