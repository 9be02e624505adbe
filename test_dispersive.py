"""Tests, in the order of the files. Each compares with a slow and obvious version, a closed form, or published numbers.

Numbers marked "golden" were computed by the published implementations on the weights and inputs that `fill`, `rn` and
`ru` reproduce. Some stand here; where the reference files are at hand, all of them are compared.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import multiprocessing.forkserver
import os
import re
import resource
import shutil
import signal
import socket
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import torch
import torch.distributed.run
import torch.utils.flop_counter
from PIL import Image

import fid
import sample
import train
from dispersive import (KINDS, MODELS, DiT, FlowMatching, GaussianDiffusion, MeanFlow, build_model, chain_constants,
                        contrastive_loss, dispersive_floor, dispersive_loss, effective_rank, mean_distance, repa_loss,
                        repa_projector, reverse_step)
from sample import UserError

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several ranks are started, too many for one GPU, and bits compared
torch.set_num_threads(1)  # the work is small, and threads that wait for each other crawl on a busy machine
HERE = Path(__file__).parent
GOLDEN = HERE.parent / "shared" / "golden"

def rn(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))

def ru(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).uniform(size=shape).astype(np.float32))

def fill(module, prefix=""):
    """Weights that depend on the parameter's name alone, as the golden numbers were computed with."""
    for name, tensor in module.state_dict().items():
        if name == "pos_embed" or not tensor.is_floating_point():
            continue
        a = np.random.RandomState(zlib.crc32((prefix + name).encode())).standard_normal(tensor.shape)
        a = a.astype(np.float32)
        if name.endswith("running_var"):
            a = np.abs(a) + 0.5
        elif name.endswith("bn.weight"):
            a = 1 + 0.1 * a
        else:
            a = a / np.float32(math.sqrt(np.prod(a.shape[1:]))) if a.ndim > 1 else a * 0.1
        tensor.copy_(torch.from_numpy(a))
    return module

def close(value, reference, tolerance, absolute=0.0):
    """Largest deviation at most `tolerance` times the largest reference value, plus `absolute`."""
    value, reference = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (value, reference))
    error, size = (value - reference).abs().max(), reference.abs().max()
    assert error <= tolerance * size + absolute, f"error {error:.2e}, where the reference is up to {size:.2e}"

# ----------------------------------------
# dispersive.py: losses

def slow_distances(a, b, kind):
    """Pair by pair, in float64."""
    cosine = lambda v, w: -v @ w / (v.norm() * w.norm())
    distance = cosine if kind == "cosine" else lambda v, w: ((v - w) ** 2).mean()
    return torch.stack([distance(v, w) for v in a.double() for w in b.double()]).view(len(a), len(b))

def slow_loss(z, z_pos, kind, tau=0.5, margin=1.0, cov_weight=1.0):
    """The contrastive loss of two views, or the dispersive loss where the second one is None."""
    a, b = (v.double().flatten(1) for v in (z, z if z_pos is None else z_pos))
    if kind == "covariance":
        a, b = ((v - v.mean(0)) / v.std(0, unbiased=False) for v in (a, b))
        c = a.T @ b / len(a)
        off = c[~torch.eye(len(c), dtype=torch.bool)].square().mean()
        return off if z_pos is None else (1 - c.diagonal()).square().mean() + cov_weight * off
    distances = slow_distances(a, b, kind)
    positive = distances.diagonal()
    if kind == "hinge":
        apart = (margin - distances).clamp(min=0).square().mean()
        return apart if z_pos is None else positive.square().mean() + apart
    if z_pos is None:
        return (-distances / tau).exp().mean().log()
    return (positive / tau + (-distances / tau).exp().sum(1).log()).mean()

def value_and_gradient(function, z):
    z = z.clone().requires_grad_()
    value = function(z)
    return value, torch.autograd.grad(value, z)[0]

CASES = {"spread 1": lambda z: z, "spread 0.1": lambda z: 0.1 * z, "collapsed": lambda z: 1e-3 * z,
         "saturated": lambda z: 2.5 * z, "offset": lambda z: z + 1000 * rn(8, *z.shape[2:]).sign()}

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(5, 7), (8, 8)])  # 64 divides 8 x 8
def test_losses_and_their_gradients_are_the_pairwise_loops(kind, case, shape):
    views, options = torch.stack([rn(1, 12, *shape), rn(1, 12, *shape) + 0.3 * rn(2, 12, *shape)]), (kind, 0.4, 1.2)
    for fast, slow in ((lambda v: dispersive_loss(v[0], *options), lambda v: slow_loss(v[0], None, *options)),
                       (lambda v: contrastive_loss(*v, *options, 0.7), lambda v: slow_loss(*v, *options, 0.7))):
        value, gradient = value_and_gradient(fast, CASES[case](views))
        reference, slow_gradient = value_and_gradient(slow, CASES[case](views))
        close(value, reference, 1e-5, absolute=1e-6)
        if case == "saturated":  # the pairs are too far apart to push: what is left of the gradient is rounding
            close(gradient, slow_gradient, 1e-4, absolute=1e-6 * value_and_gradient(slow, views)[1].abs().max())
        elif (kind, case) != ("cosine", "offset"):  # all cosines are 1 there
            close(gradient, slow_gradient, 1e-4)

@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_large_bf16_activations_under_autocast_is_that_in_float64(kind):
    def loss(z):
        with torch.autocast("cpu", torch.bfloat16):
            return dispersive_loss(z, kind)

    z = 0.6 * rn(3, 16, 1152, 64).mT.bfloat16()  # in any memory layout
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 0.01)):
        value, gradient = value_and_gradient(loss, z.to(dtype))
        reference, exact_gradient = value_and_gradient(loss, z.double())
        close(value, reference, 5e-5)
        close(gradient, exact_gradient, tolerance)

@pytest.mark.parametrize("kind", ["infonce", "hinge"])
def test_the_distance_of_a_sample_to_itself_is_zero_and_none_is_negative(kind):
    """Rounding noise in its place would be most of the gradient near the floor, and lift the loss above its bound."""
    far = 2.12 * rn(3, 16, 4096)  # D / tau is about 18
    value, gradient = value_and_gradient(lambda z: dispersive_loss(z, kind, margin=9.5), far)
    reference, slow_gradient = value_and_gradient(lambda z: slow_loss(z, None, kind, margin=9.5), far)
    close(value, reference, 1e-5)
    close(gradient, slow_gradient, 1e-4)
    large = 1000 * rn(4, 8, 196608)
    twins = torch.cat([large, large + 0.1 * rn(5, 8, 196608)])  # D is 0.01 where squares are 1e6
    value, bound = dispersive_loss(twins, kind), dict(infonce=0, hinge=1)[kind]
    assert value <= bound and abs(value - slow_loss(twins, None, kind)) < 0.5

@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_consecutive_samples_averaged(kind):
    parts = [rn(seed, 4, 9) for seed in (6, 7, 8)]
    for function in (lambda z, **o: dispersive_loss(z, kind, **o), mean_distance, effective_rank,
                     lambda z, **o: contrastive_loss(z, z ** 3, kind, **o)):
        close(function(torch.cat(parts), group=4), sum(map(function, parts)) / 3, 1e-6)

def test_constant_features_have_no_correlation_and_no_nan():
    z = torch.cat([rn(9, 9, 5), torch.full((9, 3), 0.1)], 1)  # whose mean float32 misses
    value, gradient = value_and_gradient(lambda v: dispersive_loss(v, "covariance"), z)
    close(value, slow_loss(z[:, :5], None, "covariance") * 20 / 56, 1e-5)  # 20 of the 56 pairs of features
    assert gradient.isfinite().all() and (gradient[:, 5:] == 0).all()
    for kind in KINDS:
        assert value_and_gradient(lambda v: dispersive_loss(v, kind), torch.ones(4, 6))[1].isfinite().all()
    assert effective_rank(torch.ones(4, 6)) == 1

def test_the_authors_dispersive_loss():
    """Golden: the authors' PyTorch code, tau = 1, on inputs of three scales."""
    for seed, scale, golden in ((10, 0.1, -0.01663364), (11, 0.5, -0.42340022), (12, 1.0, -1.40683627)):
        close(dispersive_loss(rn(seed, 8, 16, 24) * scale, tau=1.0), golden, 2e-6, absolute=2e-7)

def test_floors_are_reached():
    n, z = 16, torch.eye(16, dtype=torch.float64)
    for kind, z, tolerance in (("infonce", 100 * z, 1e-12), ("cosine", z - 1 / n, 1e-12), ("hinge", 100 * z, 1e-12),
                               ("covariance", rn(13, n, 20000), 1e-2)):
        close(dispersive_loss(z, kind, 0.3, 1.5), dispersive_floor(kind, n, 0.3, 1.5), tolerance)

def test_mean_distance_is_over_pairs_and_effective_rank_over_directions():
    z = rn(14, 8, 15)
    close(mean_distance(z + 50), slow_distances(z, z, "l2").sum() / (8 * 7), 1e-5)
    spectrum = np.linalg.svd((z - z.mean(0)).double().numpy(), compute_uv=False)[:7] ** 2
    p = spectrum / spectrum.sum()
    close(effective_rank(z + 50), math.exp(-(p * np.log(p)).sum()), 1e-4)

def test_impossible_groups_kinds_and_views_are_clear_errors():
    z = rn(1, 8, 8)
    for function, inputs, words in ((dispersive_loss, (z[:1],), "at least 2"), (mean_distance, (z, 3), "groups of 3"),
                                    (dispersive_loss, (z, "l2"), "infonce, cosine, hinge"),
                                    (contrastive_loss, (z, z, "l2"), "infonce, cosine, hinge"),
                                    (contrastive_loss, (z, z[:, 1:]), "differ"), (repa_loss, (z, z[:, 1:]), "differ")):
        with pytest.raises(ValueError, match=words):
            function(*inputs)

def test_the_losses_can_be_pasted_alone_and_work_under_vmap_jvp_and_compile():
    names, z, other = {"math": math, "torch": torch}, rn(1, 8, 4), rn(2, 8, 4)
    exec(re.search(r"```python\n(import .*?)```", (HERE / "README.md").read_text(), re.S)[1], names)
    for scale in (0.1, 2.2):  # at the second, D / tau is about 19, near the floor
        ours, pasted = (value_and_gradient(loss, scale * rn(3, 32, 7, 64)) for loss in (
            functools.partial(dispersive_loss, group=16), names["dispersive_loss"]))
        close(pasted[0], ours[0], 1e-6)
        close(pasted[1], ours[1], 1e-4)
    exec("#" + (HERE / "dispersive.py").read_text().split("# Losses.")[1].split("# Transformer")[0], names)
    for kind in KINDS:
        loss = functools.partial(names["dispersive_loss"], kind=kind)
        assert torch.equal(loss(z), dispersive_loss(z, kind))
        assert torch.equal(names["contrastive_loss"](z, other, kind), contrastive_loss(z, other, kind))
        close(torch.func.vmap(loss)(torch.stack([z, other])), torch.stack([loss(z), loss(other)]), 1e-5)
        close(torch.func.jvp(loss, (z,), (other,))[1], (value_and_gradient(loss, z)[1] * other).sum(), 1e-4)
        assert torch.equal(torch.compile(loss, backend="eager", fullgraph=True, dynamic=True)(z), loss(z))
        close(torch.func.grad(loss)(z), value_and_gradient(loss, z)[1], 1e-6)
        x = z.clone().requires_grad_()
        gradient, = torch.autograd.grad(loss(x), x, create_graph=True)
        assert not torch.autograd.grad(gradient.sum(), x)[0].isfinite().any()  # rather than wrong

def test_repa_loss_is_minus_the_mean_cosine_and_its_projector_has_three_layers():
    h, target = rn(1, 3, 5, 7), rn(2, 3, 5, 7).bfloat16()
    close(repa_loss(h, target), -((h * target).sum(-1) / (h.norm(dim=-1) * target.float().norm(dim=-1))).mean(), 1e-6)
    assert repa_loss(target, h).dtype == torch.float32
    projector, silu = repa_projector(7, 4), torch.nn.functional.silu
    assert [tuple(p.shape) for p in projector.parameters()][::2] == [(2048, 7), (2048, 2048), (4, 2048)]
    close(projector(h), projector[4](silu(projector[2](silu(projector[0](h))))), 1e-6)

# ----------------------------------------
# dispersive.py: transformer

COUNTS = {"XL/2": 675129632, "XL/4": 675074432, "XL/8": 675683072, "L/2": 458102816, "L/4": 458053760, "L/8": 458594816,
          "B/2": 130512416, "B/4": 130475648, "B/8": 130881536, "S/2": 32963360, "S/4": 32945024, "S/8": 33148160}

@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model("SiT-" + name).parameters()) == COUNTS[name]

GOLDEN_SIT = {
    "out": [-0.6491057, -0.003471851, 1.045748, 0.975122, 0.1084242, -0.9454051, -0.7054862, 0.3594444, 0.03205636,
            -0.546802, 1.728984, -0.1839832],
    "loss": [3.268901, 3.151128, 3.140131],
    "ode_heun2": [-0.8416493, -0.5420452, 1.907666, 1.103138, -0.5571678, -0.1735705, -1.213986, 1.075168],
}

@torch.no_grad()
def test_sit_its_loss_and_heun_equal_the_published_code():
    """Golden: SiT-S/2."""
    sit, y, t = fill(build_model("SiT-S/2", num_classes=10)), torch.tensor([0, 7, 10]), ru(2, 3)
    result = {"out": sit(rn(1, 3, 4, 32, 32), t, y)[0][:, :4],
              "loss": FlowMatching().loss(sit, rn(3, 3, 4, 32, 32), y, t, rn(4, 3, 4, 32, 32))[0],
              "ode_heun2": FlowMatching().sample(sit, rn(5, 2, 4, 32, 32), torch.tensor([1, 2]), steps=5)}
    for name, value in result.items():
        close(value.flatten()[::1 if name == "loss" else 1111], GOLDEN_SIT[name], 1e-5)
        if GOLDEN.exists():
            close(value, np.load(GOLDEN / "sit.npz")[name], 1e-5)

GOLDEN_DIT = {  # by sample
    "out": [[-1.004304, -1.253021, 2.241493, -0.2466072, 0.7236568, -2.282217, 0.1864561, 1.143],
            [-0.9504329, -0.8432694, 0.725911, 0.9091185, -1.06761, -0.7397046, -0.09116036, -1.451336],
            [-1.301937, -0.1905879, 0.525243, 0.8334168, 0.1091399, -1.408858, -0.7006797, 0.9117367]],
    "mse": [[2.185664], [2.075458], [2.148793], [2.158874]],
    "vb": [[3.068321], [1.492162], [0.01708921], [0.0317829]],
    "mean": [[-0.07121047, -0.6616288, 0.08601939, 0.8464932], [0.6905113, 1.016016, 0.1653869, 1.76401],
             [0.1674054, -1.635692, 1.143011, -1.15453], [-2.345612, -0.2062639, -0.008869943, -0.6877363]],
}

@torch.no_grad()
def test_dit_its_loss_and_posterior_equal_the_published_code():
    """Golden: DiT-S/4, sample by sample: small ones count as much as large ones."""
    dit, diffusion = fill(build_model("DiT-S/4", num_classes=10)), GaussianDiffusion()
    y, t = torch.tensor([0, 7, 10, 3]), torch.tensor([0, 1, 500, 999])
    x, noise, abar = rn(22, 4, 4, 32, 32), rn(23, 4, 4, 32, 32), diffusion.abar[t].view(4, 1, 1, 1)
    x_t = (abar.sqrt() * x + (1 - abar).sqrt() * noise).float()
    eps, v = dit(x_t, t, y)[0].chunk(2, 1)
    result = {"out": dit(rn(21, 3, 4, 32, 32), torch.tensor([0, 500, 999]), y[:3])[0],
              "mse": (eps - noise).square().mean((1, 2, 3)),
              "mean": reverse_step(chain_constants(diffusion.abar, "cpu"), t, x_t, eps, v)[0]}
    result["vb"] = diffusion.loss(dit, x, y, t, noise)[0] - result["mse"]
    for name, values in result.items():
        for i, value in enumerate(values):
            close(value.flatten()[::1111], GOLDEN_DIT[name][i], 2e-5)
            if GOLDEN.exists():
                close(value, np.load(GOLDEN / "dit.npz")[name][i], 2e-5)

def test_fifty_training_steps_of_the_authors_code():
    """Golden: losses of the authors' own training (last block, tau 1, weight 0.25, AdamW)."""
    net, losses = fill(DiT(input_size=16, hidden_size=128, depth=4, num_heads=4, num_classes=10)), []
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=0.0)
    for s in range(50):
        y = torch.from_numpy(np.random.RandomState(4000 + s).randint(0, 11, 32))
        loss, (z,) = FlowMatching().loss(net, rn(1000 + s, 32, 4, 16, 16), y, ru(3000 + s, 32),
                                         rn(2000 + s, 32, 4, 16, 16), blocks=[4])
        total = loss.mean() + 0.25 * dispersive_loss(z, tau=1.0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    for s, reference in {0: 2.59821773, 1: 2.51078415, 9: 2.09170985, 24: 1.76760042, 49: 1.32502353}.items():
        close(losses[s], reference, 1e-6)
    if GOLDEN.exists():
        close(losses, np.load(GOLDEN / "train.npz")["loss"], 1e-6)

def random_model(dtype=torch.float64, **overrides):
    """A small model whose every weight matters (a fresh one is the identity)."""
    sizes = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=4)
    return fill(DiT(**{**sizes, **overrides})).to(dtype)

def images(seed, n, dtype=torch.float64):
    return rn(seed, n, 3, 8, 8).to(dtype)

def test_initialisation_is_adaln_zero():
    model = DiT(input_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=400, second_time=True)
    for name, p in model.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name in ("r_embedder.mlp.2.weight", "final_layer.linear.weight"):
            assert (p == 0).all(), name
        elif "_embedder.mlp" in name or "embedding_table" in name:
            assert abs(p.std() / 0.02 - 1) < 0.1, name
        elif name != "pos_embed":  # Xavier's uniform distribution; the patches' convolution counts as a matrix
            assert abs(p.abs().max() / math.sqrt(6 / sum(p.flatten(1).shape)) - 1) < 0.02, name

def test_what_a_model_is_not_made_for_is_a_clear_error():
    model, t, y = random_model(), ru(2, 2), torch.tensor([0, 4])
    for shape, options, words in (((3, 4, 16), {}, r"\(3, 8, 8\), got \(3, 4, 16\)"),
                                  ((3, 8, 8), dict(blocks=(0,)), "1 to 3"), ((3, 8, 8), dict(blocks=(4,)), "1 to 3"),
                                  ((3, 8, 8), dict(r=t), "second_time=True")):
        with pytest.raises(ValueError, match=words):
            model(rn(1, 2, *shape).double(), t, y, **options)
    for build in (lambda: DiT(input_size=32, patch_size=3), lambda: build_model("SiT-M/2")):
        with pytest.raises(ValueError, match="patch_size 3|SiT-M/2"):
            build()

def test_with_a_sits_weights_a_model_with_a_second_time_computes_what_the_sit_does():
    sit, both = random_model(), DiT(8, 2, 3, 32, 3, 2, num_classes=4, second_time=True).double()
    x, t, y = images(1, 2), ru(2, 2), torch.tensor([0, 4])
    missing, unexpected = both.load_state_dict(sit.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("r_embedder.mlp.") for name in missing)
    assert torch.equal(both(x, t, y, t + 0.5)[0], sit(x, t, y)[0])
    both(x, t, y, t + 0.5)[0].sum().backward()
    assert both.r_embedder.mlp[2].weight.grad.abs().min() > 0  # zero, but not stuck there
    fill(both)
    assert torch.equal(both(x, t, y)[0], both(x, t, y, t)[0])  # r = t where no r is given
    swapped, r = copy.deepcopy(both), t + 0.5
    swapped.t_embedder, swapped.r_embedder = both.r_embedder, both.t_embedder
    close(swapped(x, r - t, y, r)[0], both(x, t, y, r)[0], 1e-5)  # it sees r - t, and r - (r - t) is t

# ----------------------------------------
# dispersive.py: objectives

class Gaussian(torch.nn.Module):
    """The exact velocity field of data ~ Normal(mu_y, s^2), whose flow maps noise n to mu + s*n."""
    s = 0.5

    def mean(self, y):
        return torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64)[y].view(-1, 1, 1, 1)

    def forward(self, x, t, y, blocks=()):
        t, mu = t.double().view(-1, 1, 1, 1), self.mean(y)
        variance = t ** 2 * self.s ** 2 + (1 - t) ** 2
        return mu + (t * self.s ** 2 - (1 - t)) / variance * (x - t * mu), []

class GaussianNoise(Gaussian):
    """The exact noise prediction at integer steps for the same data, and v = 0.3 for the variance."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def forward(self, x, t, y, blocks=()):
        abar, mu = self.abar[t.long()].view(-1, 1, 1, 1), self.mean(y)
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mu) / (abar * self.s ** 2 + 1 - abar)
        return torch.cat([eps, torch.full_like(x, 0.3)], 1), []

X, Y = rn(1, 3, 1, 2, 2).double(), torch.tensor([0, 1, 2])

@pytest.mark.parametrize("objective, model, method, order", [
    (FlowMatching(), Gaussian(), "heun", 2), (FlowMatching(), Gaussian(), "euler", 1),
    (GaussianDiffusion(), GaussianNoise(), "heun", 2), (GaussianDiffusion(), GaussianNoise(), "ddim", 1)])
def test_deterministic_samplers_converge_to_the_flow_in_their_order(objective, model, method, order):
    limit, mu = objective.sample(model, X, Y, 1000, "heun"), model.mean(Y)
    left = model.abar[999] if objective.methods[0] == "ddpm" else 0.0  # of the data, in the noise that it starts from
    close(limit, mu + model.s * (X - left ** 0.5 * mu) / (left * model.s ** 2 + 1 - left) ** 0.5, 3e-4)
    errors = [(objective.sample(model, X, Y, steps, method) - limit).abs().max() for steps in (38, 112, 334)]
    for coarse, fine in zip(errors, errors[1:]):  # of diffusion every i-th step from 0 to 999, for i = 27, 9, 3
        assert abs(math.log(coarse / fine, 3) - order) < 0.35, errors

@pytest.mark.parametrize("method, evaluations", [("ddim", 5), ("heun", 9)])
def test_noise_that_does_not_change_is_taken_away_entirely(method, evaluations):
    times, abar = [], GaussianNoise.abar[800]  # the first of five steps
    noisy = lambda x, t, y: (torch.ones_like(x).repeat(1, 2, 1, 1), times.append(t))
    x = GaussianDiffusion().sample(noisy, X, Y, 5, method)
    close(x, (X - (1 - abar).sqrt()) / abar.sqrt(), 1e-10)
    assert len(times) == evaluations

def test_sde_steps_are_the_published_formula():
    """drift v + w*score with w = 1-t and score = (t*v - x)/(1-t), noise sqrt(2w dt), to 0.96, then a step of 0.04."""
    model, x, drawn = Gaussian(), X, []
    noise_fn = lambda k: drawn.append(k) or rn(20 + k, *X.shape).double()
    result = FlowMatching().sample(model, X, Y, steps=3, method="sde", noise_fn=noise_fn)
    assert drawn == [0, 1]  # no noise in the last step
    for k, (t, dt) in enumerate([(0.0, 0.48), (0.48, 0.48), (0.96, 0.04)]):
        v, _ = model(x, torch.full((3,), t), Y)
        x = x + dt * (v + (1 - t) * (t * v - x) / (1 - t))
        if k < 2:
            x = x + math.sqrt(2 * (1 - t) * dt) * noise_fn(k)
    close(result, x, 1e-6)

def guided(model, x, t, y, cfg, channels):
    cond, uncond = (model(x, torch.full((2,), t), labels)[0] for labels in (y, torch.tensor([4, 4])))
    return torch.cat([(uncond + cfg * (cond - uncond))[:, :channels], cond[:, channels:]], 1)

@torch.no_grad()
@pytest.mark.parametrize("channels", [None, 2])
def test_guidance_has_a_scale_an_interval_and_channels_and_leaves_the_variance(channels):
    model, noise, y, step_noise = random_model(), images(1, 2), torch.tensor([0, 1]), {0: images(2, 2)}  # by step
    x = FlowMatching().sample(model, noise, y, 2, "euler", 3.0, (0.2, 0.5), channels)
    step = noise + 0.5 * model(noise, torch.zeros(2), y)[0][:, :3]  # t = 0 lies outside the interval
    close(x, step + 0.5 * guided(model, step, 0.5, y, 3.0, channels or 3)[:, :3], 1e-12)
    diffusion = GaussianDiffusion()
    result = diffusion.sample(model, noise, y, 2, "ddpm", 3.0, (0.5, 0), channels, step_noise.get)  # in either order
    chain = chain_constants(diffusion.abar[[0, 999]], "cpu")
    x, log_variance = reverse_step(chain, 1, noise, *guided(model, noise, 999, y, 3.0, channels or 3).chunk(2, 1))
    x = x + (log_variance / 2).exp() * step_noise[0]
    close(result, reverse_step(chain, 0, x, *model(x, torch.zeros(2), y)[0].chunk(2, 1))[0], 1e-10)

@pytest.mark.parametrize("objective", [FlowMatching(), GaussianDiffusion(), MeanFlow()])
def test_samplers_refuse_what_is_impossible(objective):
    model, x, y = random_model(class_dropout_prob=0, second_time=True), images(1, 2), torch.tensor([0, 1])
    for options, words in ((dict(method="rk4"), ", ".join(objective.methods)), (dict(cfg_channels=4), "1 to 3"),
                           (dict(cfg=2.0), "null label|guided in training")):
        if not (isinstance(objective, MeanFlow) and "cfg_channels" in options):  # which have no effect there
            with pytest.raises(ValueError, match=words):
                objective.sample(model, x, y, 2, **options)
    with pytest.raises(ValueError, match="null label"):
        MeanFlow(omega=1.5).loss(model, x, y)

@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objective", [FlowMatching(), GaussianDiffusion(), MeanFlow(omega=1.5)])
def test_data_of_every_type_train_and_sample_with_times_in_float32(objective, dtype):
    """In bf16 step 333 would be 332. What is not given is drawn from torch's generator."""
    model, x, y, seen, losses = random_model(dtype, second_time=True), images(1, 4, dtype), torch.arange(4), [], []
    model.t_embedder.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    for noise in (None, None, x, x):  # given the noise, it is the times that differ
        loss, (z,) = objective.loss(model, x, y, noise=noise, blocks=(2,))
        assert loss.dtype == torch.promote_types(dtype, torch.float32) and z.dtype == dtype
        losses.append(loss.tolist())
    assert losses[0] != losses[1] and losses[2] != losses[3] and np.isfinite(losses).all()
    for method in objective.methods:
        assert objective.sample(model, x, y, 4, method).dtype == dtype
    assert {*seen} <= {torch.float32, torch.int64}

@pytest.mark.parametrize("t", [0, 1, 999])
def test_diffusions_noise_learns_from_the_squared_error_alone_and_its_variance_from_the_bound(t):
    """Whose gradient is that of central differences; the golden numbers above are for their values."""
    x, noise, out, h = images(1, 2), images(2, 2), rn(3, 2, 6, 8, 8).double(), 1e-4
    step, net = torch.tensor([t, t]), lambda out: lambda *args, blocks: (out, [])
    loss = lambda out: GaussianDiffusion().loss(net(out), x, None, step, noise)[0].sum()
    gradient = value_and_gradient(loss, out)[1]
    close(gradient[:, :3], 2 * (out[:, :3] - noise) / 192, 1e-6)
    change = torch.cat([0 * noise, h * images(4, 2)], 1)
    close((gradient * change).sum(), (loss(out + change) - loss(out - change)) / 2, 1e-2)

def test_diffusion_spacing_is_the_published_one():
    spaced = GaussianDiffusion().spaced
    for n in (2, 10, 250, 999, 1000):  # by summation
        assert spaced(n, "ddpm") == [round(step) for step in np.cumsum([0.0] + (n - 1) * [999 / (n - 1)])]
    assert spaced(250, "ddim") == list(range(0, 1000, 4)) == spaced(250, "heun")
    assert spaced(7, "ddim") == list(range(0, 1000, 143))  # 143 to 166 all give 7
    for n, method in ((1, "ddpm"), (1001, "ddpm"), (1, "ddim"), (65, "heun")):
        with pytest.raises(ValueError, match=rf"{method} takes .* {n}"):
            spaced(n, method)

def test_training_times_have_the_published_distributions():
    """Flow: uniform. Diffusion: uniform steps. MeanFlow: a pair of logit-normal times in one row of four."""
    draw = lambda objective: objective.times(40000, torch.Generator().manual_seed(0))
    t = draw(FlowMatching())
    assert abs(t.mean() - 0.5) < 0.02 and abs(t.var() - 1 / 12) < 0.002 and 0 <= t.min() and t.max() < 1
    t = draw(GaussianDiffusion())
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 5
    t, r = draw(MeanFlow())
    moves = torch.arange(40000) % 4 == 0
    assert torch.equal(r > t, moves) and torch.equal(r == t, ~moves)
    pair = torch.logit(1 - torch.cat([t[moves], r[moves]]).double())  # in the paper's time
    assert abs(pair.mean() + 0.4) < 0.03 and abs(pair.std() - 1) < 0.03

def test_mean_flow_samples_are_the_same_for_any_number_of_steps():
    """Of the velocity 2t, whose average from t to r is t + r, and which flows from the noise to itself plus 1."""
    for steps in (1, 2, 5):
        x = MeanFlow().sample(lambda x, t, y, r: (torch.ones_like(x) * (t + r).view(-1, 1, 1, 1), []), X, Y, steps)
        close(x, X + 1, 1e-6)

@pytest.mark.parametrize("guidance", [{}, dict(omega=1.5, kappa=0.4, interval=(0.8, 0.2))])
def test_mean_flow_target_is_the_directional_derivative_of_the_guided_velocity(guidance):
    """By central differences along (x_t, t) -> (x_t + h*v, t + h), r fixed; guided in the interval, where labelled."""
    model, x, noise, h = random_model(second_time=True), images(1, 8), images(2, 8), 1e-5
    y = torch.tensor([0, 1, 4, 2, 3, 2, 1, 0])  # 4 is the null label
    t = torch.tensor([0.2, 0.1, 0.5, 0.8, 0.5, 0.9, 0.4, 0.3], dtype=torch.float64)
    r = t + torch.tensor([0.4, 0, 0, 0, 0.5, 0, 0, 0])
    w, v = t.view(-1, 1, 1, 1), x - noise
    x_t = w * x + (1 - w) * noise
    with torch.no_grad():
        if guidance:
            cond, uncond = (model(x_t, t, labels, t)[0][:, :3] for labels in (y, torch.full((8,), 4)))
            applies = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1]).bool().view(-1, 1, 1, 1)
            v = torch.where(applies, 1.5 * v + 0.4 * cond - 0.9 * uncond, v)
        up, down = (model(x_t + s * v, t + s, y, r)[0][:, :3] for s in (h, -h))
        target = v + (r - t).view(-1, 1, 1, 1) * (up - down) / (2 * h)
    slow = ((model(x_t, t, y, r)[0][:, :3] - target) ** 2).mean((1, 2, 3))
    for rows in (slice(None), slice(0, None, 4), torch.tensor([4, 0])):  # elsewhere r = t, and needs no derivative
        loss, _ = MeanFlow(**guidance).loss(model, x, y, t, noise, r, moving=rows)
        close(loss, slow, 1e-7)
        close(*(torch.autograd.grad(value.sum(), model.blocks[0].mlp.fc1.weight, retain_graph=True)[0]
                for value in (loss, slow)), 1e-7)
    close(MeanFlow().loss(model, x, y, t, noise)[0], FlowMatching().loss(model, x, y, t, noise)[0], 1e-12)  # r = t

# ----------------------------------------
# train.py: runs and files that the tests below, and those of sample.py, share

NANO = ["--model", "SiT-nano/8", "--batch", "32", "--lr", "1e-3", "--ema", "0.9", "--log-every", "1", "--dtype",
        "fp32", "--ckpt-every", "1000", "--sample-every", "1000"]
for name in ("SiT-nano/8", "SiT-nano/4", "SiT-nano/2", "DiT-nano/8"):
    MODELS[name] = dict(hidden_size=32, depth=4, num_heads=2, patch_size=int(name[-1]))
CPU, partial = torch.device("cpu"), functools.partial
os.environ["PYTHONPATH"] = str(HERE)  # for the processes that the tests start elsewhere
CLOCKS = {"images/s", "TFLOP/s", "time"}  # what differs from run to run
FORK = multiprocessing.get_context("forkserver")  # a server that has imported all this forks a run in milliseconds
FORK.set_forkserver_preload([__name__, "torch._dynamo"])

def generate_roughly(*args, steps):
    """4 steps for a picture's 25; all of them where a test asks for sample.generate."""
    assert steps in (1, 25)
    return generate_well(*args, steps=1 + steps // 8)

generate_well = sample.generate
train.generate = generate_roughly

@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Begins to import while the first tests run."""
    multiprocessing.forkserver.ensure_running()

def fails(main, capsys, *args):
    """The one line that a bad command line prints, after progress and warnings; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.run(main, [str(arg) for arg in args])
    lines = [line for line in capsys.readouterr().err.splitlines() if not re.match("warning: |.* images, ", line)]
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]

def trains(*args):
    sample.run(train.main, [str(arg) for arg in args])

def child(folder, main, args, environment, fault):
    os.chdir(folder)
    os.environ.update(environment)
    with open("log" + os.environ.get("RANK", "0"), "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sample.time = mock.Mock(wraps=time, sleep=lambda seconds: print("sleeps"))
    fault()
    sample.run(main, args)

def launch(*args, main=train.main, fault=bool, ranks=1):
    """Start `main` in processes of its own, after `fault` has been called there; rank r writes the file log<r>."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        group = f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE={ranks} LOCAL_WORLD_SIZE={ranks} MASTER_ADDR=localhost " \
                f"MASTER_PORT={port}" if ranks > 1 else ""
        environment = dict(pair.split("=") for pair in group.split())
        processes.append(FORK.Process(target=child, args=(os.getcwd(), main, [*map(str, args)], environment, fault)))
        processes[-1].start()
    return processes

def ends(processes):
    """Their exit codes; None: killed."""
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes

def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)

def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]

def column(out, *names):
    """These values of the lines of the log that have them."""
    return [[entry[name] for name in names] for entry in log_of(out) if names[0] in entry]

def weights(out, which="model"):
    return torch.load(Path(out, "ckpt.pt"), weights_only=True)[which]

def same(a, b):
    """Whether nested dicts and lists hold the same tensors and values, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def same_run(a, b):
    """Whether two runs left the same files: checkpoint and pictures to the bit, the log but for what the clock says."""
    a, b = Path(a), Path(b)
    files = [{path.relative_to(out) for path in out.rglob("*") if path.name != "ckpt.prev.pt"} for out in (a, b)]
    curves = [[{name: entry[name] for name in entry.keys() - CLOCKS} for entry in log_of(out)] for out in (a, b)]
    checkpoints = [torch.load(out / "ckpt.pt") for out in (a, b)]
    return files[0] == files[1] and curves[0] == curves[1] and same(*checkpoints) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in files[0] if name.suffix == ".png")

def nearly_same(a, b, *names):
    """The same curves, weights and EMA up to the order of sums."""
    close(column(a, *names), column(b, *names), 1e-4)
    for which in ("model", "ema"):
        there = weights(b, which)
        for name, value in weights(a, which).items():
            difference = (value - there[name]).abs()
            if name.endswith("qkv.bias"):  # softmax cancels the keys' bias: its gradient is pure rounding, which Adam
                difference.chunk(3)[1].zero_()  # scales up to whole steps
            assert difference.max() <= 1e-4, name

def caching(images, data):
    return ["--images", images, "--data", data, "--vae", "none", "--size", 16, "--cache-only"]

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of class folders with a few small images of several formats, their cache, and weights to start from."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(48):
        folder = root / "images" / "cat dog".split()[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        array = rng.integers(0, 256, (18 + i % 5, 20, 3), dtype=np.uint8)
        Image.fromarray(array).convert("L" if i == 5 else "RGB").save(folder / f"{i:02d}.{'png' if i % 3 else 'jpg'}")
    trains(*caching(root / "images", root / "cache"))
    torch.save(fill(build_model("SiT-nano/8", input_size=16, in_channels=3, num_classes=2)).state_dict(),
               root / "start.pt")
    return root

@pytest.fixture
def base(photos, tmp_path, monkeypatch):
    """In a folder of its own, the flags of a small run, which starts from weights that are not zero."""
    monkeypatch.chdir(tmp_path)
    yield ["--data", photos / "cache", *NANO, "--init", photos / "start.pt"]
    for process in multiprocessing.active_children():
        process.kill()

def data_folder(folder, latents, labels=None, vae="none"):
    os.makedirs(folder)
    np.save(f"{folder}/latents.npy", latents)
    np.save(f"{folder}/labels.npy", np.arange(len(latents)) % 2 if labels is None else labels)
    Path(folder, "meta.json").write_text(json.dumps(dict(classes=["cat", "dog"], vae=vae)))
    return folder

# ----------------------------------------
# train.py: data

def test_cache_holds_the_cropped_images_in_sorted_order(photos):
    latents, labels = (np.load(photos / "cache" / f"{name}.npy") for name in ("latents", "labels"))
    files = sorted((photos / "images").glob("*/*.[jp]*"))
    assert json.loads((photos / "cache/meta.json").read_text())["classes"] == ["cat", "dog"]
    assert labels.tolist() == [0] * 24 + [1] * 24 and latents.shape == (48, 3, 16, 16)
    mirrored = train.Data.open(photos / "cache").read(np.arange(48), np.ones(48, bool))[0].numpy()
    for file, pixels, mirror in zip(files, latents, mirrored):
        image = np.asarray(train.center_crop(Image.open(file).convert("RGB"), 16))
        assert np.array_equal(pixels, image.transpose(2, 0, 1))
        assert np.array_equal(mirror, image[:, ::-1].transpose(2, 0, 1))

def test_unreadable_images_are_left_out_and_listed_and_one_usable_image_trains(base, capsys):
    for name in ("a/0", "a/1", "b/0"):
        file = Path(f"images/{name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 43, np.uint8)).save(file)
    Path("images/a/0.png").write_text("no image")
    os.truncate("images/a/1.png", 50)
    trains(*caching("images", "cache"))
    listed = re.findall(r"^left out: .*images/(./.\.png)", capsys.readouterr().err, re.M)
    assert sorted(listed) == ["a/0.png", "a/1.png"] and np.load("cache/labels.npy").tolist() == [-1, -1, 1]
    images, labels = train.Data.open("cache").read(np.arange(1), np.zeros(1, bool))
    assert images.unique().tolist() == [43] and labels.tolist() == [1]
    trains("--data", "cache", *NANO, "--steps", 2, "--out", "out")
    file.write_text("no image")
    with pytest.raises(SystemExit):
        trains(*caching("images", "none"))
    assert "error: " in capsys.readouterr().err.splitlines()[-1] and not Path("none/labels.npy").exists()

def chunks_of_ten(hang=None):
    """Cache ten images at a time; hang at this opening of an array: one at the start, two for each chunk."""
    train.CHUNK, count, inner = 10, iter(range(99)), train.open_array
    train.open_array = lambda path: next(count) == hang and time.sleep(60) or inner(path)

def test_killed_while_caching_two_ranks_go_on_with_what_is_not_done(base, photos, capsys):
    args = caching(photos / "images", "cache")
    process, = launch(*args, fault=partial(chunks_of_ten, 6))  # between the two of the third chunk
    wait_for(lambda: Path("cache/latents.npy").exists() and np.load("cache/labels.new.npy")[19] > -2)
    assert "cache: another process is writing there" in fails(train.main, capsys, *args)
    process.kill()
    process.join()
    assert "labels.npy: No such file" in fails(train.main, capsys, "--data", "cache")
    rows, marks = (np.load(f"cache/{name}.npy", mmap_mode="r+") for name in ("latents", "labels.new"))
    rows[[3, 23]] = 7  # in a chunk that is done, with an unreadable image, and in one that is not,
    marks[3], marks[20] = -1, 0  # although its first image is
    assert ends(launch(*args, fault=chunks_of_ten, ranks=2)) == [0, 0]
    for name, value in (("latents", 7), ("labels", -1)):
        expected = np.load(photos / f"cache/{name}.npy")
        expected[3] = value
        assert np.array_equal(np.load(f"cache/{name}.npy"), expected)
    assert Path("cache/meta.json").read_bytes() == (photos / "cache/meta.json").read_bytes()

def test_a_cache_of_other_images_or_flags_is_refused(base, photos, capsys):
    shutil.copytree(photos, "photos")
    args = caching("photos/images", "photos/cache")
    for flag, value, name in (("--size", 24, "size"), ("--vae", "mse", "vae_sha256")):
        with mock.patch.object(train, "VAE", SmallVAE):
            assert f"cache: was begun with other {name};" in fails(train.main, capsys, *args, flag, value)
    assert Path("photos/cache/latents.npy").read_bytes() == (photos / "cache/latents.npy").read_bytes()
    os.rename("photos/images/cat/00.jpg", "photos/images/cat/new.jpg")
    assert "other images;" in fails(train.main, capsys, *args)
    os.remove("photos/cache/latents.npy")  # not remade
    assert "latents.npy: No such file" in fails(train.main, capsys, *args[:-1])
    line = fails(train.main, capsys, *args, "--data", "new", "--vae", "none.pt")
    assert "none.pt: No such file" in line and os.listdir("new") == [".lock"]

class SmallVAE(torch.nn.Module):
    """Stands in for Stable Diffusion's."""
    def __init__(self, weights=None):
        super().__init__()
        self.conv = fill(torch.nn.Conv2d(3, 8, 8, 8)).requires_grad_(False)

    def encode(self, x):
        return self.conv(x).chunk(2, 1)

    def decode(self, z):
        return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

def with_little():
    """A little VAE, projector and demo."""
    train.VAE, train.repa_projector = SmallVAE, partial(repa_projector, width=64)
    train.demo_data = partial(train.demo_data, 40)

@pytest.fixture
def little(monkeypatch):
    for module, name in ((train, "VAE"), (train, "repa_projector"), (train, "demo_data")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(sample, "VAE", SmallVAE)
    with_little()

def test_images_become_latents_then_a_model_then_samples_then_a_distance(base, photos, little, capsys):
    """A mirror image has a latent of its own."""
    trains(*NANO, "--model", "SiT-nano/2", "--steps", 1, "--images", photos / "images", "--data", "cache", "--size", 16)
    latents, file = np.load("cache/latents.npy"), min((photos / "images").glob("*/*.jpg"))
    image = train.center_crop(Image.open(file).convert("RGB"), 16)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    assert latents.dtype == np.float16 and latents.shape == (48, 2, 8, 2, 2)
    for view, image in enumerate((x, x.flip(-1))):
        close(latents[0, view], torch.cat(SmallVAE().encode(image), 1)[0], 2e-3)
    again = ["--images", photos / "images", "--data", "cache", "--size", 16, "--cache-only", "--vae"]
    trains(*again, "renamed")  # the same weights, though
    with mock.patch.object(train, "fingerprint", lambda vae: "other weights"):
        assert "was begun with other vae" in fails(train.main, capsys, *again, "ema")
    sample.main(["--ckpt", "out/ckpt.pt", "--n", "4", "--steps", "1", "--out", "new"])
    assert 0 <= numbers_of(capsys, "new", "new", "--size", 16)["FID"] < 1e-6

def test_every_epoch_reads_every_entry_once():
    entries = np.concatenate([train.batch_entries(3, step, 4, 10) for step in range(10)])
    assert [sorted(part) for part in entries.reshape(4, 10)] == [list(range(10))] * 4
    assert entries[:10].tolist() != entries[10:20].tolist()
    assert sorted(train.batch_entries(3, 0, 30, 10)) == sorted([*range(10)] * 3)

def test_latents_are_drawn_from_the_posterior_of_the_image_or_its_mirror(base):
    moments = np.random.default_rng(0).normal(size=(6, 2, 8, 4, 4)).astype(np.float16)
    data = train.Data.open(data_folder("data", moments, [0, -1, 1, 0, 1, 0], "ema"))
    with mock.patch.object(os, "posix_fadvise", create=True, side_effect=OSError):  # only a hint
        data.read(np.array([4]), np.array([False]))
    with mock.patch.object(os, "posix_fadvise", create=True) as asked:
        x, labels = data.read(np.array([4, 1]), np.array([False, True]))
    content, wanted = Path("data/latents.npy").read_bytes(), [moments[5, 0].tobytes(), moments[2, 1].tobytes()]
    assert [content[begin:begin + size] for (_, begin, size, _), _ in asked.call_args_list] == wanted
    mean, std = torch.from_numpy(np.stack([moments[5, 0], moments[2, 1]]).astype(np.float32)).chunk(2, 1)
    losses = train.Losses(train.parse(["--model", "SiT-nano/2"]), data, CPU)
    draws = train.Draws(3, 7, 8, slice(2, 4), CPU)
    noise = torch.randn(8, 4, 4, 4, generator=draws.generator("posterior"))[2:4]
    close(losses.prepare(x, draws, "posterior"), mean + std * noise, 1e-6)
    assert data.shape == (4, 4, 4) and len(data.rows) == 5 and labels.tolist() == [0, 1]

def test_the_demo_is_deterministic_and_balanced_and_its_batch_suits_eight_ranks(monkeypatch):
    demo, again = train.demo_data(40), train.demo_data(40).images
    images, labels, names = demo.images, demo.labels, demo.classes
    assert np.array_equal(images, again) and images.dtype == np.uint8 and images.shape == (40, 3, 16, 16)
    assert np.bincount(labels).tolist() == [4] * 10 and len(names) == 10
    for world, batch in ((1, 32), (2, 32), (8, 128)):  # groups of 16 on every rank
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert train.parse([]).batch == batch and train.parse(["--batch", "48"]).batch == 48
    assert train.parse([]).steps == 1500 and train.parse(["--epochs", "2"]).steps is None

def test_the_demos_loss_falls_and_it_leaves_a_picture(base, little, monkeypatch, capsys):
    monkeypatch.setattr(train, "generate", sample.generate)
    trains("--model", "SiT-nano/4", "--steps", 60, "--log-every", 20)
    (first,), _, (last,) = column("out", "loss")
    assert last < 0.9 * first and "sample.py --ckpt out/ckpt.pt --steps 25" in capsys.readouterr().out
    picture = Image.open("out/samples/0000060.png")
    assert picture.mode == "RGB" and picture.size == (512, 640) and np.asarray(picture)[-9:].std() > 10

# ----------------------------------------
# train.py: the step

def by_hand(photos, model="SiT-nano/8", objective=FlowMatching(), kind="infonce", blocks=(1,), group=16, weight=0.5,
            view=None, features=None, beta2=0.999, clip=math.inf, **options):
    """Two steps of training on the photos, written out -> ([{name: float}, ...], {"model": weights, ...})."""
    data, meanflow = train.Data.open(photos / "cache"), isinstance(objective, MeanFlow)
    torch.manual_seed(0)
    net = build_model(model, input_size=16, in_channels=3, num_classes=2, second_time=meanflow)
    net.load_state_dict(torch.load(photos / "start.pt"), strict=False)
    projector = train.repa_projector(32, 6) if features is not None else torch.nn.Module()
    parameters = [*net.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-2, (0.9, beta2), weight_decay=0)
    ema, curve, last = copy.deepcopy(net), [], 999 if model.startswith("DiT") else 1
    for step in range(2):
        generator = train.Draws(0, step, 32, slice(None), CPU).generator

        def draw(sampler, purpose, *shape):
            return sampler(32, *shape, generator=generator(purpose))
        entries = train.batch_entries(0, step, 32, 48)
        flips = np.random.default_rng([0, step, zlib.crc32(b"flip")]).random(32) < 0.5
        x, y = data.read(entries, flips)
        x, y = x / 127.5 - 1, torch.where(draw(torch.rand, "label") < 0.1, 2, y)
        t, noise = objective.times(32, generator("time")), draw(torch.randn, "noise", 3, 16, 16)
        t, r = t if meanflow else (t, t)
        error, z = objective.loss(net, x, y, t, noise, r, blocks=blocks)
        values = dict(loss=error.mean())
        total = 768 * error / (768 * error.detach() + 0.01) if meanflow else error
        total = total.mean()
        if view:  # of its own noise and time, or of the same noise and a time within 0.005 (five of 1000 steps)
            t2 = objective.times(32, generator("second time"))
            t2 = t2[0] if meanflow else t2  # with r = t
            noise2 = draw(torch.randn, "second noise", 3, 16, 16)
            if view == "dependent":
                t2 = (t + 0.005 * last * (2 * draw(torch.rand, "shift") - 1)).clamp(0, last)
                t2, noise2 = t2.round().long() if last > 1 else t2, noise
            _, z_pos = objective.loss(net, x, y, t2, noise2, blocks=blocks)
            values["disp"] = sum(contrastive_loss(a, b, kind, group=group) for a, b in zip(z, z_pos)) / len(z)
        elif kind != "none":
            values["disp"] = sum(dispersive_loss(a, kind, **options, group=group) for a in z) / len(z)
        if features is not None:
            values["repa"] = repa_loss(projector(z[0]), torch.from_numpy(features[entries, flips.astype(int)]))
        (total + weight * sum(value for name, value in values.items() if name != "loss")).backward()
        if kind in ("infonce", "hinge") and not view:  # the losses that compute distances
            values["distance"] = sum(mean_distance(a, group) for a in z) / len(z)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        for average, p in zip(ema.parameters(), net.parameters()):
            average.data.lerp_(p.data, 1 - (1 + step) / (10 + step))
        curve.append({name: value.item() for name, value in values.items()})
    return curve, dict(model=net.state_dict(), ema=ema.state_dict(), projector=projector.state_dict())

def check_by_hand(base, out, flags, **options):
    """train.py takes the same two steps: terms of the loss, weights, EMA."""
    trains(*base, "--lr", 1e-2, "--steps", 2, "--out", out, *flags)
    curve, expected = by_hand(base[1].parent, **options)
    for entry, values in zip(log_of(out), curve):
        close([entry[name] for name in values], [*values.values()], 1e-4)
        assert ("disp" in entry) == ("disp" in values) and "val" not in entry
        assert ("distance" in entry) == ("distance" in values)
    assert weights(out, "opt")["param_groups"][0]["betas"][1] == options.get("beta2", 0.999)
    for which in expected if "features" in options else ("model", "ema"):
        for name, value in weights(out, which).items():
            far = (value - expected[which][name]).abs().max()  # the bias of attention's keys has no gradient but noise
            assert far <= 2e-4 or name.endswith("qkv.bias"), name

@pytest.mark.parametrize("flags, options", [
    ("--disp hinge --disp-blocks 1,3 --disp-group 8 --disp-margin 2 --grad-clip 0.01 --beta2 0.9",
     dict(kind="hinge", blocks=[1, 3], group=8, margin=2.0, clip=0.01, beta2=0.9)),
    ("--disp cosine --disp-tau 0.7 --disp-blocks all --disp-weight 3",
     dict(kind="cosine", tau=0.7, blocks=range(1, 5), weight=3)),
    ("--contrastive dependent --disp covariance", dict(kind="covariance", view="dependent")),
    ("--contrastive dependent --disp hinge --model DiT-nano/8", dict(
        kind="hinge", view="dependent", model="DiT-nano/8", objective=GaussianDiffusion())),
    ("--objective meanflow --contrastive independent", dict(objective=MeanFlow(), beta2=0.95, view="independent")),
    ("--objective meanflow --meanflow-omega 0.5 --meanflow-kappa 0.4 --meanflow-interval 0.25 1", dict(
        objective=MeanFlow(4, 0.5, 0.4, (0.25, 1.0)), beta2=0.95))])
def test_the_step_is_the_recipe(flags, options, base, monkeypatch):
    """Data order, flips, label dropout, streams, losses, clipping, AdamW, and an EMA whose decay warms up."""
    if "DiT" in flags:
        monkeypatch.setattr(train, "generate", sample.generate)
    check_by_hand(base, "run", flags.split(), **options)

def test_repa_aligns_a_block_with_the_features_of_image_or_mirror_image(base, little):
    features = np.random.default_rng(0).normal(size=(48, 2, 4, 6)).astype(np.float16)
    np.save("features.npy", features)
    check_by_hand(base, "run", ["--disp", "none", "--repa", "features.npy", "--repa-weight", 0.7],
                  kind="none", blocks=[4], features=features, weight=0.7)
    for name, block, dispersed in (("SiT-B/2", 4, 3), ("DiT-L/4", 8, 6), ("SiT-XL/2", 8, 7)):  # as the authors advise
        args = train.parse(["--model", name])
        assert args.repa_block == block and args.disp_blocks == [dispersed]

def test_held_out_loss_is_the_emas_on_2048_spread_images_under_draws_of_its_own(base, latents, capsys):
    """Neither the seed nor the batch nor the images between them matter."""
    pixels = np.random.default_rng(0).integers(0, 256, (4095, 3, 16, 16), dtype=np.uint8)
    data_folder("val", pixels)
    trains(*base, "--lr", 1e-2, "--steps", 2, "--val", "val", "--out", "a")
    pixels[1::2] //= 255
    np.save("val/latents.npy", pixels)
    still = ["--lr", 0, "--steps", 1, "--val", "val", "--disp", "none"]
    trains(*base, *still, "--seed", 5, "--batch", 16, "--init", "a/ckpt.pt", "--out", "b")
    close(column("b", "val"), column("a", "val"), 1e-5)
    trains("--data", base[1], *NANO, *still, "--val", data_folder("few", pixels[:100]), "--out", "c")
    close(column("c", "val"), [[((pixels[:100] / 127.5 - 1) ** 2).mean() + 1]], 2e-2)  # a fresh network says zero
    extremes = np.array([0, 128], np.uint8).repeat(768).reshape(2, 3, 16, 16)
    trains("--data", base[1], *NANO, *still, "--val", data_folder("two", extremes), "--out", "d")
    close(column("d", "val"), [[1.5]], 4e-2)  # the mean of 1 + 1 and of 0 + 1
    small, mse = data_folder("small", pixels[:2, :, :8, :8]), data_folder("mse", np.load("data/latents.npy"), vae="mse")
    for args, other, words in ((base, small, "its size differs"), (latents, mse, "shape, classes or VAE")):
        assert words in fails(train.main, capsys, *args, "--val", other)

def test_a_model_without_labels_is_trained_validated_and_sampled_with_the_null_label(base, monkeypatch):
    seen, inner = [], DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda net, x, t, y, *rest, **named: seen.append(y) or inner(
        net, x, t, y, *rest, **named))
    trains(*base, "--out", "out", "--steps", 2, "--val", base[1], "--label-dropout", 1)
    sample.main(["--ckpt", "out/ckpt.pt", "--n", "4", "--steps", "1", "--out", "new"])
    labels = torch.cat(seen)
    assert len(labels) > 700 and (labels == 2).all()

def test_training_starts_from_the_ema_of_a_checkpoint_or_from_published_weights(base, photos, capsys):
    trains(*base, "--steps", 2, "--out", "run")
    args = [*base, "--steps", 1, "--lr", 0, "--disp", "none"]
    trains(*args, "--objective", "meanflow", "--init", "run/ckpt.pt", "--out", "mean")
    before, after = weights("run", "ema"), weights("mean")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    published = fill(build_model("SiT-nano/8", input_size=16, in_channels=3, num_classes=7)).state_dict()
    torch.save(published, "published.pt")  # of other classes: all but the label embedding is taken
    trains(*args, "--init", "published.pt", "--out", "other")
    for name, value in weights("other").items():
        assert torch.equal(value, published[name]) == (name != "y_embedder.embedding_table.weight")

def test_the_log_counts_epochs_and_operations(base):
    trains(*base, "--epochs", 3, "--contrastive", "independent")  # 3 x 48 images in batches of 32
    trains(*base, "--batch", 480, "--out", "default")  # 80 x 48
    assert column("out", "step")[-1] == [4] and column("default", "step")[-1] == [8]
    (at, lr), *_ = column("out", "time", "lr")
    assert abs(time.time() - at) < 600 and lr == 1e-3
    with torch.device("meta"), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        for block in build_model("SiT-nano/8").blocks:
            block(torch.empty(1, 4, 32), torch.empty(1, 32))
    counted = counter.get_total_flops() - 4 * 2 * 6 * 32 ** 2  # of one forward pass, without its modulation
    for out, views in (("out", 2), ("default", 1)):
        for images, tera in column(out, "images/s", "TFLOP/s"):
            close(tera * 1e12 / images, 3 * views * counted, 1e-6)

def test_everything_at_once_on_two_ranks_that_accumulate_equals_one_process(base, little):
    random = np.random.default_rng(0)
    data = data_folder("data", random.normal(size=(100, 2, 8, 8, 8)).astype(np.float16), vae="ema")
    np.save("features.npy", random.normal(size=(100, 2, 4, 6)).astype(np.float32))
    args = [*NANO, "--model", "SiT-nano/4", "--data", data, "--val", data, "--repa", "features.npy",
            "--contrastive", "independent", "--disp-group", 8, "--disp-blocks", "2,4", "--grad-clip", 0.1,
            "--snapshot-every", 2, "--steps", 4, "--out"]
    two = launch(*args, "two", "--micro", 8, fault=with_little, ranks=2)
    trains(*args, "one")
    assert ends(two) == [0, 0]
    nearly_same("two", "one", "loss", "disp", "repa")
    close(column("two", "val"), column("one", "val"), 1e-4)
    snapshot = torch.load("two/snapshots/0000004.pt", weights_only=True)
    assert same(snapshot["ema"], weights("two", "ema"))
    args = [*base, "--objective", "meanflow", "--disp", "none", "--batch", 12, "--steps", 2, "--out"]
    two = launch(*args, "mean2", "--micro", 3, ranks=2)  # r != t in any place of a pass, or in none
    trains(*args, "mean1")
    assert ends(two) == [0, 0]
    nearly_same("mean2", "mean1", "loss")

# ----------------------------------------
# train.py: nothing is lost

def in_step(number, action, rank=0):
    """Call this on this rank, in step `number`, counted from 0."""
    batches = train.batches

    def faulty(data, steps, *args):
        for step, batch in zip(steps, batches(data, steps, *args)):
            if step == number and int(os.environ.get("RANK", 0)) == rank:
                action()
            yield batch
    train.batches = faulty

def send(which):
    os.kill(os.getpid(), which)

def killed_between_the_renames():
    """kill -9 when the second checkpoint is about to become ckpt.pt, which the first has just ceased to be."""
    replace, renamed = os.replace, []

    def deadly(source, target):
        renamed.extend([target] * (Path(target).name == "ckpt.pt"))
        if len(renamed) == 2:
            send(signal.SIGKILL)
        replace(source, target)
    os.replace = deadly

def killed_before_the_picture():
    train.Run.draw_grid = lambda *args: send(signal.SIGKILL)

def sick():
    """The gradient of the dispersive loss, though not its value, is not finite in the next call."""
    loss = train.repulsion

    def value(D, *args):
        train.repulsion = loss
        return loss(D, *args) + D.sum().mul(0).sqrt()
    train.repulsion = value

def disk_full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """An undisturbed run, with checkpoints at steps 2 and 4, a picture at 4, too, lines of the log at 3 and 6."""
    args = ["--data", photos / "cache", *NANO, "--init", photos / "start.pt", "--ckpt-every", 2, "--sample-every", 4,
            "--snapshot-every", 3, "--log-every", 3, "--steps", 6, "--out"]
    out = tmp_path_factory.mktemp("whole")
    trains(*args, out)
    return args, out

@pytest.mark.parametrize("ranks, code, said, fault", [
    (1, -9, "", killed_between_the_renames), (1, -9, "", killed_before_the_picture),
    (1, 130, "SIGINT: saved at step 3", partial(in_step, 2, partial(send, signal.SIGINT))),
    (2, 143, "SIGTERM: saved at step [34]", partial(in_step, 2, partial(send, signal.SIGTERM), 1)),
    (1, 2, "step.* 3:.* not finite.*--lr", partial(in_step, 2, sick)),
    (1, 2, "ckpt.*: File too large", partial(in_step, 3, disk_full))])
def test_however_a_run_ends_the_same_command_goes_on_to_the_same_bits(ranks, code, said, fault, base, whole):
    args, reference = [*whole[0], "run"], whole[1]
    assert ends(launch(*args, ranks=ranks, fault=fault)) == [code] * ranks
    assert re.search(said, Path("log0").read_text())
    assert not said or weights("run", "step") > 1 + ("saved" in said)
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # torn
    assert ends(launch(*args, ranks=ranks, fault=partial(in_step, 0, partial(send, 9)))) == [0] * ranks  # no new start
    if ranks == 1:
        assert same_run("run", reference)
    else:
        assert column("run", "step") == column(reference, "step")
        nearly_same("run", reference, "loss", "disp")

def test_a_signal_during_the_last_checkpoint_is_not_swallowed(base, monkeypatch, capsys):
    save = train.save
    monkeypatch.setattr(train, "save", lambda *args, **named: (send(signal.SIGTERM), save(*args, **named)))
    with pytest.raises(SystemExit) as stop:
        trains(*base, "--steps", 2, "--out", "out")
    assert stop.value.code == 143 and "SIGTERM: saved at step 2" in capsys.readouterr().out

def test_killed_at_random_a_run_ends_in_the_same_bits(base):
    args = [*base, "--steps", 20, "--ckpt-every", 1, "--out"]
    trains(*args, "whole")
    for attempt in range(4):
        process, = launch(*args, "run")
        wait_for(lambda: os.path.exists("run/log.jsonl") and len(column("run", "step")) > 4 * attempt)
        time.sleep(np.random.default_rng().uniform(0, 0.1))
        process.kill()
        process.join()
    trains(*args, "run")
    assert same_run("run", "whole")

def busy(*args, **options):
    print("busy", flush=True)
    time.sleep(60)

def is_busy():
    return Path("log0").exists() and "busy" in Path("log0").read_text()

def test_a_second_signal_a_second_later_exits_at_once_and_a_dead_run_locks_nobody_out(base, capsys):
    args = [*base, "--steps", 2, "--out", "run"]
    process, = launch(*args, fault=partial(in_step, 1, busy))
    wait_for(is_busy)
    assert "run: another process is writing there" in fails(train.main, capsys, *args)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.6)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == 143 and not Path("run/ckpt.pt").exists()
    trains(*args)

def test_torchrun_restarts_from_the_last_checkpoint(base):
    Path("run.py").write_text(
        f"import os, {__name__} as test\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    test.in_step(3, test.partial(test.send, 9), rank=1)\n"
        "test.sample.run(test.train.main)\n")
    args = [*base, "--ckpt-every", 2, "--steps", 5, "--out"]
    torchrun = "--standalone --nproc_per_node=2 --max-restarts=1 --redirects=3 --log-dir=logs"
    forked = ["--run-path", "--start-method=forkserver", "run.py"]  # rather than in interpreters of their own
    with mock.patch.dict(os.environ):
        torch.distributed.run.main([*torchrun.split(), *forked, *map(str, args), "run"])
    said = "".join(path.read_text() for path in Path("logs").rglob("stdout.log"))
    assert [said.count(f"step {step}/5  loss") for step in (1, 2, 3)] == [1, 1, 2]
    trains(*args, "whole")
    assert column("run", "step") == column("whole", "step")
    nearly_same("run", "whole", "loss", "disp")

class Runs:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("owned"),)

def torch_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()

def npy_bytes(*shape, dtype=np.float32):
    file = io.BytesIO()
    np.save(file, np.full(shape, Runs() if dtype is object else 0, dtype))
    return file.getvalue()

def test_a_damaged_checkpoint_is_named_and_deleting_it_goes_on_from_the_one_before(base, capsys):
    args = [*base, "--ckpt-every", 2, "--steps", 4, "--out"]
    trains(*args, "whole")
    path = Path(shutil.copytree("whole", "run"), "ckpt.pt")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (flipped, good[:len(good) // 2], b"", b"no archive"):
        path.write_bytes(damaged)
        line = fails(train.main, capsys, *args, "run")
        assert f"{path}: " in line and "delete it to go on from run/ckpt.prev.pt" in line
    path.write_bytes(torch_bytes(dict(model={"x": torch.zeros(1)})))
    assert f"{path}: not a checkpoint of this train.py" in fails(train.main, capsys, *args, "run")
    path.unlink()
    trains(*args, "run")
    assert same_run("run", "whole")
    path.unlink()
    os.truncate("run/ckpt.prev.pt", 50)
    assert re.search("ckpt.prev.pt: .*go on from the start", fails(train.main, capsys, *args, "run"))

def test_a_continued_run_is_the_same_run_but_for_what_may_change(base, photos, little, capsys):
    np.save("features.npy", np.random.default_rng(0).normal(size=(48, 2, 4, 6)).astype(np.float32))
    data = Path(shutil.copytree(photos / "cache", "data"))
    args = [*NANO, "--repa", "features.npy", "--out", "run", "--steps"]
    trains(*args, 2, "--data", data)
    before = Path("run/ckpt.pt").read_bytes()
    for flag, old, new in (("--seed", 0, 1), ("--disp", "infonce", "hinge"), ("--label-dropout", 0.1, 1.0)):
        line = fails(train.main, capsys, *args, 8, "--data", data, flag, new)
        assert f"ckpt.pt: was begun with {flag} {old}, not {new}" in line
    for path, change in ((data / "latents.npy", lambda a: 255 - a), (data / "labels.npy", lambda a: 1 - a),
                         ("features.npy", lambda a: -a)):
        array = np.load(path)
        np.save(path, change(array))
        assert "ckpt.pt: was begun with" in fails(train.main, capsys, *args, 8, "--data", data)
        np.save(path, array)
    assert Path("run/ckpt.pt").read_bytes() == before
    capsys.readouterr()
    trains(*args, 3, "--lr", 0.002, "--beta2", 0.9, "--disp-weight", 1, "--micro", 16, "--data", data.rename("moved"))
    (changed, step), = column("run", "changed", "step")
    assert step == 2 and "changed: " + ", ".join(changed) in capsys.readouterr().out
    assert {*changed} == {"--lr 0.001 -> 0.002", "--beta2 0.999 -> 0.9", "--disp-weight 0.5 -> 1.0"}
    group, = weights("run", "opt")["param_groups"]
    assert group["lr"] == 0.002 and [*group["betas"]] == [0.9, 0.9]

def elsewhere_on_rank_one():
    if os.environ["RANK"] == "1":
        os.mkdir("elsewhere")
        os.chdir("elsewhere")

def test_ranks_that_do_not_share_the_folder_do_not_start(base):
    trains(*base, "--steps", 1, "--out", "run")
    assert ends(launch(*base, "--steps", 2, "--out", "run", fault=elsewhere_on_rank_one, ranks=2))[0] == 2
    assert "the ranks find different checkpoints" in Path("log0").read_text()

# ----------------------------------------
# train.py: bad flags and files, speed, and the README

BAD_FLAGS = [
    ("--disp-blocks 9", "--disp-blocks 9: expected 'all', or numbers from 1 to 4"), ("--lr nan", "--lr: "),
    ("--model SiT-M/2", "--model: invalid choice: 'SiT-M/2'"), ("--init nowhere.pt", "nowhere.pt: No such file"),
    ("--batch 40", "40 images per pass and rank (--micro, or --batch / ranks) must be a multiple of --disp-group, 16"),
    ("--micro 12", "--batch 32 must be a multiple of ranks x --micro, 1 x 12"),
    ("--images nowhere --data x", "nowhere: "), ("--images x --data y --size 64 --val z", "z/labels.npy: "),
    ("--images x --data y --size 20", "--size 20: the VAE needs a multiple of 8"),
    ("--steps 2 --epochs 2", "--epochs: not allowed with argument --steps"), ("--wandb", "--wandb: not installed"),
    ("--images x --data y --model SiT-nano/8 --size 32", "SiT-nano/8: its patches do not divide data of size 4"),
    ("--images x --data y --batch 40", "40 images per"), ("--meanflow-omega 2", "need --objective meanflow"),
    ("--objective meanflow --meanflow-interval 0 0.5", "--meanflow-interval needs"),
    ("--data nowhere", "nowhere/labels.npy: No such file"), ("--batch 0", "--batch: "), ("--stepz 3", "--stepz"),
    ("--disp none --disp-blocks all --cache-only", "--cache-only needs --images"), ("--epochs 0", "--epochs: "),
    ("--objective meanflow --meanflow-kappa 0.5 --label-dropout 0", "need the null label")]

def test_bad_flags_are_one_line_each_and_once_on_two_ranks(base, little, capsys):
    for flags, words in BAD_FLAGS:
        assert words in fails(train.main, capsys, "--model", "SiT-nano/8", *flags.split())
        assert not Path("out").exists()
    assert ends(launch("--batch", 33, ranks=2)) == [2, 2]
    assert re.fullmatch(r"train: error: --batch 33.* 2 x 16.*\n", Path("log0").read_text())
    assert "sleeps" in Path("log1").read_text()  # until torchrun stops it, since rank 0 has ended

def test_damaged_and_hostile_inputs_are_one_line_each(base, photos, little, capsys):
    """One file cut short, one misshapen, one foreign and one that would run code, in every place."""
    shutil.copytree(photos / "cache", "data")
    whole, pickled = torch.load(photos / "start.pt"), npy_bytes(48, dtype=object)
    Path("init.pt").write_bytes(torch_bytes(whole))
    Path("features.npy").write_bytes(npy_bytes(48, 2, 4, 6))
    inputs = {
        "data/latents.npy": [npy_bytes(48, 3, 16, 8, dtype=np.uint8), npy_bytes(48, 3, 16, 16), pickled],
        "data/labels.npy": [npy_bytes(47, dtype=int), torch_bytes(whole), pickled],
        "data/meta.json": [b"[]", b'{"classes": 3, "vae": "none"}', b"\xff"],
        "features.npy": [npy_bytes(48, 2, 5, 6), npy_bytes(48, 2, 4, 6, dtype=int), pickled],
        "init.pt": [torch_bytes({**whole, "pos_embed": torch.zeros(1)}), torch_bytes([1]),
                    torch_bytes({"ema": Runs()})]}
    args = [*NANO, "--data", "data", "--steps", 1, "--repa", "features.npy", "--init", "init.pt"]
    for name, contents in inputs.items():
        before = Path(name).read_bytes()
        for content in (before[:-9], b"text", *contents):
            Path(name).write_bytes(content)
            assert Path(name).name in fails(train.main, capsys, *args), content[:99]
        Path(name).write_bytes(before)
    trains(*args)  # what was whole
    assert not Path("owned").exists()

@pytest.fixture
def latents(base, little):
    """Flags of three steps on random latents, whose log has one line."""
    moments = np.random.default_rng(0).random((64, 2, 8, 8, 8), np.float32).astype(np.float16)
    return [*NANO, "--model", "SiT-nano/4", "--data", data_folder("data", moments, np.arange(64) % 2, "ema"), "--batch",
            8, "--disp-group", 4, "--steps", 3, "--log-every", 1000]

@pytest.mark.parametrize("flags", ["--disp-blocks all --micro 4", "--objective meanflow"])
def test_one_compilation_serves_all_blocks(flags, latents, monkeypatch):
    from torch._dynamo.backends.debugging import aot_eager
    torch._dynamo.reset()
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(
        compile_module, backend=lambda graph, inputs: compiled.append(graph) or aot_eager(graph, inputs)))
    trains(*latents, *flags.split(), "--out", "eager")
    trains(*latents, *flags.split(), "--out", "compiled", "--compile")
    before, after = weights("eager"), weights("compiled")
    assert "blocks.3.mlp.fc1.weight" in after and len(compiled) == 1 and before.keys() == after.keys()
    assert all((value - before[name]).abs().max() <= 1e-4 for name, value in after.items())

class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a value, and shapes that depend on values."""
    waits = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        assert function.overloadpacket not in self.waits and not masks, f"{function} waits for the device"
        return function(*args, **kwargs or {})

@pytest.mark.parametrize("flags", [
    "--disp-blocks all --micro 4 --grad-clip 1", "--objective diffusion --disp hinge",
    "--contrastive independent --disp covariance", "--contrastive dependent --disp cosine",
    "--objective meanflow --meanflow-omega 1.5 --meanflow-kappa 0.3"])
def test_a_step_never_waits_for_the_device(flags, latents, monkeypatch):
    batches, watched = train.batches, []

    def watching(*args):
        for step, batch in enumerate(batches(*args)):
            with contextlib.ExitStack() as stack:
                if step == 1:
                    for name in ("cpu", "numpy", "tolist"):
                        stack.enter_context(mock.patch.object(torch.Tensor, name, side_effect=AssertionError("waits")))
                    stack.enter_context(NoWaiting())
                    with pytest.raises(AssertionError, match="waits"):
                        batch[1].sum().item()
                    watched.append(step)
                yield batch
    monkeypatch.setattr(train, "batches", watching)
    trains(*latents, *flags.split())
    assert watched == [1]

class Traffic(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes that operations read and write, each storage once for every operation."""
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        leaves = torch.utils._pytree.tree_leaves
        read, written = ({t.untyped_storage().data_ptr(): t.nbytes for t in leaves(values) if torch.is_tensor(t)}
                         for values in ((args, kwargs), result))
        if function._schema.is_mutable or not written.keys() <= read.keys():  # else it is a view
            self.total += sum({**read, **written}.values())
        return result

@functools.cache
def traffic(*flags):
    """Of a whole step, with the distance that is logged, in passes over a block's activations."""
    data = train.Data(np.zeros((16, 3, 32, 32), np.uint8), np.zeros(16, int), ["all"])
    images, labels = data.read(np.arange(16), np.zeros(16, bool))
    losses = train.Losses(train.parse(["--model", "SiT-nano/2", "--batch", "16", *flags]), data, CPU)
    with Traffic() as counted:
        losses(0, 0, images, labels)[0].backward()
    return counted.total / (16 * 256 * 32 * 4)

@pytest.mark.parametrize("kind", ["infonce", "hinge", "cosine"])
def test_a_dispersed_block_costs_at_most_nine_passes_over_its_activations(kind):
    none = traffic("--disp", "none")
    assert 2 < traffic("--disp", kind, "--disp-blocks", "3") - none <= 9
    assert 2 < (traffic("--disp", kind, "--disp-blocks", "all") - none) / 4 <= 9

def test_the_commands_of_the_paper_row_by_row_run(base, monkeypatch):
    """The full command with what each row appends: train.py knows all flags, and one of each sort runs."""
    section = (HERE / "README.md").read_text().split("\n## The paper\n")[1].split("\n## ")[0]
    full = re.search(r"train.py (.*)", section)[1]
    commands = [f"{full} {row}".split() for row in re.findall(r"^\|[^|]*\| `(--[^`]*)` \|", section, re.M)]
    for name, sizes in MODELS.items():
        monkeypatch.setitem(MODELS, name, {**sizes, "hidden_size": 16, "num_heads": 2})
    rng = np.random.default_rng(0)
    data_folder(Path("data/imagenet256"), rng.integers(0, 256, (64, 3, 8, 8), dtype=np.uint8))
    np.save("dinov2.npy", rng.normal(size=(64, 2, 16, 6)).astype(np.float16))
    assert len([train.parse(flags) for flags in commands]) == 7
    for wanted in ("12", "--repa", "--meanflow-kappa"):
        flags, = (flags for flags in commands if wanted in flags)
        out = Path("out", wanted.strip("-"))
        flags = re.sub("--epochs [0-9]*", "", " ".join(flags)).split()
        trains(*flags, "--steps", 1, "--batch", 32, "--dtype", "fp32", "--log-every", 1, "--out", out)
        columns = {name for entry in log_of(out) for name in entry}
        assert {"loss", "block_rank"} <= columns and ("repa" in columns) == ("--repa" in flags)

# ----------------------------------------
# sample.py: sampling

@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    """{objective: (a file like train.py's, its EMA's network)}, all but the first trained without labels."""
    made, folder = {}, tmp_path_factory.mktemp("checkpoints")
    for objective, dropout in (("flow", 0.1), ("diffusion", 1), ("meanflow", 1)):
        model = "DiT-nano/8" if objective == "diffusion" else "SiT-nano/8"
        net = build_model(model, input_size=16, in_channels=3, num_classes=2, second_time=objective == "meanflow")
        state = fill(net.requires_grad_(False)).state_dict()
        config = dict(model=model, objective=objective, classes=["cat", "dog"], vae="none", label_dropout=dropout)
        zero = {name: 0 * tensor for name, tensor in state.items()}
        torch.save(dict(model=zero, ema=state, opt={}, step=0, config=config), folder / objective)
        made[objective] = folder / objective, net
    return made

@pytest.fixture
def sampling(ckpts, tmp_path):
    """sampling(name, flags) runs the command line into tmp_path / name."""
    base = ["--ckpt", ckpts["flow"][0], "--n", 6, "--steps", 2, "--batch", 2, "--dtype", "fp32"]
    return lambda name, *flags: sample.run(sample.main, [*map(str, [*base, "--out", tmp_path / name, *flags])])

def interrupt(monkeypatch, where, name, call):
    """Ctrl-C in the call-th call of a function from now on -> the list of its calls."""
    real, calls = getattr(where, name), []

    def function(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **options)
    monkeypatch.setattr(where, name, function)
    return calls

def content(path):
    return [file.read_bytes() for file in sorted(path.iterdir())] if path.is_dir() else path.read_bytes()

@pytest.mark.parametrize("objective, labels", [("flow", [0, 1]), ("diffusion", [2, 2]), ("meanflow", [2, 2])])
def test_samples_are_the_emas_with_noise_of_their_own(objective, labels, ckpts, sampling, tmp_path):
    path, net = ckpts[objective]
    sampling("x.npz", "--ckpt", path, "--n", 2, "--steps", 3, "--seed", 3)
    streams = [np.random.default_rng([3, i]) for i in range(2)]
    noise = lambda k=None: torch.from_numpy(np.stack([s.standard_normal((3, 16, 16), np.float32) for s in streams]))
    x = sample.OBJECTIVES[objective]().sample(net, noise(), torch.tensor(labels), steps=3, noise_fn=noise)
    pixels = np.load(tmp_path / "x.npz")["arr_0"].transpose(0, 3, 1, 2)
    assert np.array_equal(pixels, (127.5 * x + 128).clamp(0, 255).byte()) and x.std() > 0.1

def test_samples_depend_on_seed_and_index_alone(ckpts, sampling, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("logs"))
    sampling("one.npz", "--batch", 64)
    sampling("few.npz", "--n", 5)
    flags = ["--ckpt", ckpts["flow"][0], "--num-samples", 6, "--steps", 2, "--dtype", "fp32", "--batch", 2]
    assert ends(launch(*flags, "--out", tmp_path / "two.npz", main=sample.main, ranks=2)) == [0, 0]
    one = np.load(tmp_path / "one.npz")
    assert one["arr_0"].nbytes == 6 * 16 * 16 * 3 and one["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]
    for name, count in (("few", 5), ("two", 6)):
        pixels = np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
        assert len(pixels) == count and np.abs(pixels - one["arr_0"][:count]).max() <= 1
    sampling("pngs", "--classes", "1,0,1")
    image = np.asarray(Image.open(tmp_path / "pngs" / "000005.png")).astype(int)  # its label is 1 here, too
    assert np.abs(image - one["arr_0"][5]).max() <= 1

    def labels(seed, n):  # random ones, uniform over the classes
        args = argparse.Namespace(labels="random", classes="1,3", n=n, seed=seed)
        return sample.choose_labels(args, mock.Mock(num_classes=5), dict(label_dropout=0.1)).tolist()
    assert labels(0, 99)[:50] == labels(0, 50) != labels(1, 50)
    assert set(labels(0, 99)) == {1, 3} and 400 < labels(2, 1000).count(3) < 600

@pytest.mark.parametrize("suffix", [".npz", ""])
def test_interrupted_sampling_continues(suffix, sampling, tmp_path, monkeypatch):
    sampling("whole" + suffix)
    batches = []
    for where, name, call in ((sample, "generate", 2), (os, "rename", 1)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            interrupt(patch, where, name, call)
            calls = interrupt(patch, sample, "generate", 9)
            sampling("x" + suffix)
        assert not (tmp_path / f"x{suffix}").exists()
        batches += [list(args[4]) for args in calls]
    (tmp_path / "x.png").unlink()  # the grid, which is the first to appear
    assert batches == [[0, 1], [2, 3], [2, 3], [4, 5]]
    part, = tmp_path.glob("*.part")
    (part / "000007.png.tmp").write_text("torn")
    (part / "000006.png").write_bytes((part / "000005.png").read_bytes())  # of a run with a larger --n
    monkeypatch.setattr(sample, "generate", None)
    sampling("x" + suffix)
    assert content(tmp_path / f"x{suffix}") == content(tmp_path / f"whole{suffix}")
    assert len(list(tmp_path.iterdir())) == 4

def test_what_exists_is_refused_before_any_work(sampling, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "generate", None)
    for name, exists in (("x.npz", "x.npz"), ("y.npz", "y.png"), ("y", "y.png")):
        (tmp_path / exists).write_text("mine")
        assert f"{tmp_path / exists}: exists already" in fails(lambda argv: sampling(name), capsys)
        assert (tmp_path / exists).read_text() == "mine"

def test_runs_whose_images_differ_get_folders_of_their_own(ckpts, sampling, tmp_path, monkeypatch):
    other = torch.load(ckpts["flow"][0])
    other["ema"]["blocks.3.mlp.fc2.bias"][-1] += 1e-6
    torch.save(other, tmp_path / "other.pt")
    different = [[], ["--seed", 1], ["--steps", 3], ["--method", "euler"], ["--cfg", 2], ["--cfg-interval", 0, 0.5],
                 ["--cfg-channels", 1], ["--classes", "1"], ["--dtype", "bf16"], ["--labels", "random"],
                 ["--ckpt", tmp_path / "other.pt"]]
    for flags in [*different, ["--n", 9], ["--batch", 9]]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            interrupt(patch, sample, "generate", 1)
            sampling("x.npz", *flags)
    assert len(list(tmp_path.glob("x.npz.*.part"))) == len(different)

@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_a_run_that_finishes_second_does_not_overwrite(name, sampling, tmp_path, monkeypatch, capsys):
    first, real = [], sample.generate

    def generate(*args, **options):
        monkeypatch.setattr(sample, "generate", real)
        sampling(name, "--seed", 1)
        first.extend([content(tmp_path / name), content(tmp_path / "x.png")])
        return real(*args, **options)
    monkeypatch.setattr(sample, "generate", generate)
    assert f"{name}: exists already" in fails(lambda argv: sampling(name), capsys)
    assert first == [content(tmp_path / name), content(tmp_path / "x.png")]

def generating():
    sample.generate = busy

def test_a_running_run_locks_its_folder_and_a_dead_one_does_not(ckpts, sampling, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", ckpts["flow"][0], "--n", 6, "--steps", 2, "--dtype", "fp32"]
    other, = launch(*flags, "--out", tmp_path / "x", main=sample.main, fault=generating)
    wait_for(is_busy)
    part, = tmp_path.glob("*.part")
    assert f"{part}: another process is writing there" in fails(lambda argv: sampling("x"), capsys)
    other.kill()
    other.join()
    sampling("x")

@pytest.mark.parametrize("args, words", [
    (["--n", "0"], "argument --n/--num-samples: expected int from 1, got"),
    (["--classes", "2"], "--classes 2: expected numbers from 0 to 1"), (["--model", "SiT-nano/8"], "of no other file"),
    (["--method", "rk4"], "unknown method 'rk4': expected one of heun, euler, sde"),
    (["--cfg-channels", "4"], "cfg_channels 4: expected a number from 1 to 3"),
    (["--ckpt", "nowhere.pt"], "nowhere.pt: No such file"), (["--out", "/proc/x/y.npz"], "/proc/x/y.npz."),
    (["--steps", "1001", "--ckpt", "diffusion"], "ddpm takes 2 to 1000 steps, got 1001"),
    (["--cfg", "2", "--ckpt", "meanflow"], "cfg 2.0: MeanFlow is guided in training")])
def test_bad_flags_are_found_before_any_work(args, words, ckpts, sampling, capsys, monkeypatch):
    monkeypatch.chdir(ckpts["flow"][0].parent)
    monkeypatch.setattr(sample, "generate", None)
    assert words in fails(lambda argv: sampling("x.npz", *args), capsys)

def test_published_files_load_as_they_come(tmp_path):
    """A bare state dict or one under "ema" beside flags, in the format of today and that before torch 1.6."""
    path = tmp_path / "published.pt"
    net = fill(build_model("SiT-nano/8", input_size=16, in_channels=3, num_classes=5))
    for today in (True, False):
        for state in (net.state_dict(), dict(model={}, ema=net.state_dict(), opt={}, args=argparse.Namespace(lr=1))):
            torch.save(state, path, _use_new_zipfile_serialization=today)
            loaded = sample.load_model(path, "SiT-nano/8")[0]
            inputs = rn(1, 1, 3, 16, 16), ru(1, 1), torch.tensor([5])
            assert torch.equal(loaded(*inputs)[0], net(*inputs)[0]) and loaded.num_classes == 5
    assert sample.load_model(path, "DiT-nano/8")[1]["objective"] == "diffusion"
    for name, words in ((None, "say with --model"), ("SiT-S/8", r"0.adaLN_modulation.1.bias is \(192,\) where")):
        with pytest.raises(UserError, match=words):
            sample.load_model(path, name)

# ----------------------------------------
# sample.py: the VAE

@pytest.fixture(scope="module")
def vae():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, **options: tensor)  # soon overwritten
        vae, generator = sample.VAE(), torch.Generator().manual_seed(0)
        for name in ("encoder", "quant_conv", "post_quant_conv"):
            fill(vae.get_submodule(name), name + ".")
        for tensor in vae.decoder.parameters():  # on which no golden number depends; `fill` would take longer
            tensor.normal_(0, tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1, generator=generator)
        yield vae

def moments(mean, std):
    """What `encode` made mean and std of."""
    return torch.cat([mean / 0.18215, 2 * torch.log(std / 0.18215)], dim=1)[0]

def test_vae_decodes_by_the_parts_of_its_encoder_in_diffusers_order(vae):
    z, decoder, norm = rn(43, 1, 4, 3, 4), vae.decoder, vae.decoder.conv_norm_out
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z / 0.18215)))
    for i, block in enumerate(decoder.up_blocks):
        for j in range(3):
            x = block.resnets[j](x)
        if i < 3:
            x = block.upsamplers[0].conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    x = torch.nn.functional.group_norm(x, 32, norm.weight, norm.bias, 1e-6)
    close(vae.decode(z), decoder.conv_out(x * x.sigmoid()), 1e-5)

def test_vae_moments_names_and_shapes_are_those_of_diffusers(vae):
    found = moments(*vae.encode(rn(41, 1, 3, 64, 64).clamp(-1, 1)))
    torch.testing.assert_close(found[:, 2, 5], torch.tensor([  # golden: one place of the latent
        0.120131940, 0.195904762, -0.122031748, 0.136251375, 0.132280618, -0.327936649, 0.101699010, -0.167610466]),
        rtol=0, atol=1e-4)
    shapes = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    digest = hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()
    assert digest == "6286db08f9cfd63c3269bc33f220dd77e9ab46cd1173bb5f3f71ef61a92db085"
    if GOLDEN.exists():
        np.testing.assert_allclose(found, np.load(GOLDEN / "vae.npz")["moments"][0], rtol=0, atol=1e-4)
    vae.quant_conv.bias[4:] += torch.tensor([1000, 1000, -1000, -1000.])  # the log-variance is clamped
    std = vae.encode(torch.zeros(1, 3, 16, 16))[1][0, :, 1, 1]
    vae.quant_conv.bias[4:] -= torch.tensor([1000, 1000, -1000, -1000.])
    torch.testing.assert_close(std, 0.18215 * torch.exp(torch.tensor([10, 10, -15, -15.])), rtol=1e-5, atol=0)

def test_vae_works_in_slices_and_keeps_latents_and_pixels_in_float32(vae, monkeypatch):
    x, z, rows = rn(45, 3, 3, 8, 8), rn(46, 3, 4, 1, 1), []
    mean, image = vae.encode(x)[0], vae.decode(z)
    monkeypatch.setattr(sample, "SLICE_PIXELS", 2 * 8 * 8 + 1)  # two images
    for half in (vae.encoder, vae.decoder):
        half.conv_in.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(vae.encode(x)[0], mean, rtol=0, atol=1e-5)
        lower = vae.decode(z)
    assert rows == [2, 1] * 2 and lower.dtype == torch.float32
    assert 1e-4 < (lower - image).std() / image.std() < 0.02  # bf16 within, float32 at the end
    assert len(lower.unique()) > 0.9 * lower.numel()

def write_safetensors(path, state):
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        code = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        entries[name] = dict(dtype=code, shape=list(tensor.shape), data_offsets=[len(data), len(data) + len(content)])
        data += content
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)

def test_vae_loads_both_file_formats_and_both_spellings(vae, tmp_path, monkeypatch):
    state, old, loaded = {}, {}, []
    for name, tensor in vae.state_dict().items():
        if ".attentions." in name:
            state[name] = tensor.bfloat16()
            for new, spelling in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(new, spelling)  # older files have 1x1 convolutions
            old[name] = tensor.bfloat16()[..., None, None] if tensor.ndim == 2 else tensor.bfloat16()
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old
    torch.save(old, tmp_path / "old.bin")
    write_safetensors(tmp_path / "new.safetensors", state)
    for file, folder in (("new.safetensors", "vae"), ("old.bin", "pipeline/vae")):  # as diffusers writes them
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(tmp_path / file, tmp_path / folder / f"diffusion_pytorch_model{Path(file).suffix}")
    monkeypatch.setattr(sample, "load_weights", lambda module, state, path: loaded.append(state))
    for path in tmp_path.iterdir():
        sample.VAE(path)
    assert same(loaded, [state] * 4)
    with pytest.raises(UserError, match="moved.bin: No such file.* --vae FILE"):
        sample.VAE("moved.bin")
    loaded.append({**state, "decoder.mid_block.attentions.0.to_q.bias": torch.ones(512).bfloat16()})
    prints = [sample.fingerprint(mock.Mock(state_dict=lambda: state)) for state in loaded]
    assert [known == prints[0] for known in prints] == [True] * 4 + [False]

def test_published_vaes_are_fetched_under_names_of_their_own_and_failure_names_file_url_and_flag(tmp_path, monkeypatch):
    def download(url, path, sha256, progress):
        calls.append((url, path, sha256))
        if "ema" in url:
            raise OSError("no route")
        write_safetensors(Path(path), {"a": torch.zeros(1)})

    calls, url = [], "https://huggingface.co/stabilityai/sd-vae-ft-{}/resolve/main/diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    files = {kind: f"{tmp_path}/checkpoints/sd-vae-ft-{kind}.safetensors" for kind in ("mse", "ema")}
    for kind, words in (("mse", "a is .1,. where nothing is expected"), ("mse", "a is "),
                        ("ema", f"{url.format('ema')} .*no route.*{files['ema']}.* --vae FILE")):
        with pytest.raises(UserError, match=words):
            sample.VAE(kind)
    assert calls == [  # once each
        (url.format("mse"), files["mse"], "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"),
        (url.format("ema"), files["ema"], None)]

# ----------------------------------------
# sample.py: files

def test_damaged_foreign_and_hostile_files_are_one_clear_line(ckpts, tmp_path, monkeypatch):
    """What the test of train.py's inputs leaves: .safetensors, checksums, and pickles of every format."""
    monkeypatch.chdir(tmp_path)
    whole, net = ckpts["flow"][0].read_bytes(), ckpts["flow"][1]
    weight = whole.index(net.final_layer.linear.weight.numpy().tobytes())
    Path("checksum.pt").write_bytes(whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1:])
    Path("text.safetensors").write_text("no file of ours")
    write_safetensors(Path("cut.safetensors"), {"w": torch.ones(4)})
    os.truncate("cut.safetensors", os.path.getsize("cut.safetensors") - 1)
    torch.save({"w": 1}, "no state dict.pt")
    torch.save({"ema": Runs()}, "Weights only load failed.pt")
    torch.save({"ema": Runs()}, "Weights only load failed.old.pt", _use_new_zipfile_serialization=False)
    for path in sorted(Path().iterdir()):
        with pytest.raises(UserError) as error:
            sample.load_file(path)
        beginning, reason = str(error.value).split(" (", 1)
        assert beginning == f"{path}: not a readable weights file" and "\n" not in reason
        assert path.suffix != ".pt" or path.name.split(".")[0] in reason
    assert not Path("owned").exists()
    torch.load("Weights only load failed.pt", weights_only=False)
    assert Path("owned").exists()  # the trap works

def test_only_what_the_user_can_mend_is_caught(ckpts, tmp_path, monkeypatch, capsys):
    for error, code in ((UserError("two\nlines"), 2), (KeyboardInterrupt(), 130), (OSError("bug"), None)):
        def main(argv=None):
            raise error
        with pytest.raises(SystemExit if code else OSError) as stop:
            sample.run(main, [])
        assert code is None or stop.value.code == code
        assert capsys.readouterr().err.count("\n") == (code is not None)
    monkeypatch.chdir(tmp_path)  # rank 0 cannot make this folder; rank 1, which loses it, waits before it raises
    assert ends(launch("--ckpt", ckpts["flow"][0], "--out", "/proc/x/y", main=sample.main, ranks=2)) == [2, 1]
    assert Path("log0").read_text().count("\n") == 1 and Path("log1").read_text().startswith("sleeps\n")

def test_images_of_any_format_are_rgb_and_16_bit_grey_keeps_its_contents(tmp_path):
    array = np.random.RandomState(0).randint(0, 256, (6, 5, 4)).astype(np.uint8)
    rgba, rotated = Image.fromarray(array, "RGBA"), Image.Exif()
    rotated[0x0112] = 6
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / ".hidden.png").write_text("")
    rgba.save(tmp_path / "rgba.png", exif=rotated)
    deep.save(tmp_path / "deep.png")
    rgba.convert("RGB").convert("CMYK").save(tmp_path / "sub/cmyk.jpg")
    paths = sample.list_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["deep.png", "rgba.png", "sub/cmyk.jpg"]
    assert all(sample.read_image(path).mode == "RGB" and sample.read_image(path).size == (5, 6) for path in paths)
    assert np.array_equal(np.asarray(sample.read_image(paths[0]))[..., 1], array[..., 0])
    assert np.array_equal(np.asarray(sample.read_image(paths[1])), array[..., :3])
    deep.convert("F").save(tmp_path / "float.tiff")
    with pytest.raises(sample.UnreadableFile, match="float.tiff: not a readable image .*floats"):
        sample.read_image(tmp_path / "float.tiff")

# ----------------------------------------
# fid.py

@pytest.fixture(scope="module")
def inception():
    return fill(fid.Inception())

@functools.cache
def inception_of(weights, build=fid.Inception):
    """Made once, and run once on every batch that comes again."""
    network, known = build(weights), {}
    forward = network.forward

    def remembering(x):
        key = tuple(x.shape), x.numpy().tobytes()
        if key not in known:
            known[key] = forward(x)
        return known[key]
    network.forward = remembering
    return network

class SmallInception(torch.nn.Module):
    """Stands in for the large one."""
    def __init__(self, weights):
        super().__init__()
        self.fc = fill(torch.nn.Linear(12, 2048 + 2023 + 1008).requires_grad_(False))

    def forward(self, x):
        return self.fc(fid.resize_tf1(x, 2).flatten(1) / 255).split([2048, 2023, 1008], 1)

def with_small_inception():
    fid.Inception = SmallInception

FID_FLAGS = ["--weights", "random", "--device", "cpu", "--batch", "4"]

def smooth_images(seed, count):
    noise = np.random.RandomState(seed).randint(0, 256, (count, 5, 4, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((20, 24), Image.BICUBIC)) for image in noise])

@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two sets of 5 and 4 images, each as an archive and as folders in a folder."""
    root = tmp_path_factory.mktemp("sides")
    for name, count in (("a", 5), ("b", 4)):
        images = smooth_images(count, count)
        np.savez(root / f"{name}.npz", images)
        for i, image in enumerate(images):
            (root / name / f"{i // 4}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / name / f"{i // 4}" / f"{i:03d}{('.png', '.BMP')[i % 2]}")
    return root

def run_fid(args):
    with mock.patch.object(fid, "Inception", inception_of):  # made once
        sample.run(fid.main, [*FID_FLAGS, *map(str, args)])

def numbers_of(capsys, *args):
    """The JSON in the last line of what the command prints."""
    run_fid(args)
    return json.loads(capsys.readouterr().out.splitlines()[-1].replace('"random"', "0"))

GOLDEN_FEATURES = {  # of golden/inception.npz (the published network, reproducible weights): part of the first image's
    "pool32": (slice(1, None, 400), [0.18013462, 0, 0.108957, 0.01511516, 0.08196568, 0]),
    "spatial32": (slice(0, None, 400), [0.14335807, 0, 0, 0.01928014, 0, 0.03683205]),
    "logits_unbiased32": (slice(0, None, 200),
                          [0.08772594, 0.27910304, -0.04730734, -0.00238647, -0.09473391, -0.224189])}

def golden_images():
    return torch.from_numpy(np.random.RandomState(31).randint(0, 256, (4, 3, 32, 32)).astype(np.uint8))

def test_inception_matches_the_published_network_and_keeps_full_float32(inception):
    shapes = {name: list(tensor.shape) for name, tensor in inception.state_dict().items()}
    assert len(shapes) == 566 and sum(map(math.prod, shapes.values())) == 23_885_486
    tf32 = []
    hook = inception.Mixed_6d.register_forward_pre_hook(lambda *_: tf32.append(torch.backends.cudnn.allow_tf32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = dict(zip(("pool32", "spatial32", "logits_unbiased32"), inception(golden_images())))
    hook.remove()
    assert tf32 == [False] and torch.backends.cudnn.allow_tf32
    with pytest.raises(ValueError, match="expected uint8"):
        inception(golden_images().float())
    for name, (part, expected) in GOLDEN_FEATURES.items():
        np.testing.assert_allclose(outputs[name][0, part], expected, rtol=1e-4, atol=1e-6)
    if GOLDEN.exists():
        assert shapes == json.loads((GOLDEN / "inception_keys.json").read_text())
        for name, golden in np.load(GOLDEN / "inception.npz").items():
            assert outputs[name].shape == golden.shape
            close(outputs[name], golden, 1e-5)

@pytest.mark.parametrize("height, width", [(7, 50), (299, 299), (64, 400)])
def test_resize_is_tensorflow_1(height, width):
    image = np.random.RandomState(0).randint(0, 256, (height, width)).astype(float)
    # ResizeBilinear, align_corners and half_pixel_centers false
    y, x = np.arange(299)[:, None] * height / 299, np.arange(299) * width / 299
    top, left = y.astype(int), x.astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
    lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
    expected = upper + (lower - upper) * (y - top)
    resized = fid.resize_tf1(torch.from_numpy(image.astype(np.uint8))[None, None])[0, 0]
    np.testing.assert_allclose(resized, expected, atol=0.02)

def test_random_weights_have_a_fixed_seed_and_published_ones_load_as_they_come(inception, tmp_path):
    images = golden_images()[:1]
    assert inception_of("random").fc.weight[0, 0].item() == pytest.approx(-0.06702939, rel=1e-5)
    state = {name: tensor for name, tensor in inception.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "inception.pth", _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    assert torch.equal(fid.Inception(tmp_path / "inception.pth")(images)[0], inception(images)[0])

def test_frechet_distance_of_rank_deficient_covariances_is_the_matrix_root_one():
    rng = np.random.RandomState(0)
    x, y = (rng.standard_normal((count, 24)) @ rng.standard_normal((24, 24)) for count in (11, 17))
    (mu1, sigma1), (mu2, sigma2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    root1 = scipy.linalg.sqrtm(sigma1 + 0j)
    root = scipy.linalg.sqrtm(root1 @ sigma2 @ root1 + 1e-13 * np.eye(24))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root).real
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)
    assert 0 <= fid.frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-12 * np.trace(sigma1)

def test_frechet_distance_of_commuting_covariances_is_the_closed_form():
    a, b = np.random.RandomState(0).rand(2, 30) * np.logspace(0, -9, 30)  # eigenvalues over nine decades
    turn = np.linalg.qr(np.random.RandomState(1).standard_normal((30, 30)))[0]
    distance = fid.frechet_distance(np.zeros(30), turn * a @ turn.T, np.ones(30), turn * b @ turn.T)
    assert distance == pytest.approx(30 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)

def test_inception_score_by_its_definition_and_at_its_limits():
    logits = np.random.RandomState(0).standard_normal((23, 12)) * 3 + 1000  # the offset overflows a plain exp
    scores = []
    for part in np.split(logits, [10, 20]):
        p = scipy.special.softmax(part, axis=1)
        scores.append(math.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert fid.inception_score(logits, split=10) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    sure = np.eye(10) * 1e4  # probabilities of 0 and 1
    assert fid.inception_score(np.concatenate([sure, np.ones((2, 10))]), split=10) == pytest.approx((5.5, 4.5))

def inside_slowly(points, centres, k):
    radii = np.partition(scipy.spatial.distance.cdist(centres, centres, "sqeuclidean"), k)[:, k]  # itself is the 0th
    return (scipy.spatial.distance.cdist(points, centres, "sqeuclidean") <= radii).any(1).mean()

def test_precision_and_recall():
    rng = np.random.RandomState(3)
    real, fake = rng.standard_normal((40, 5)), 0.9 * rng.standard_normal((31, 5)) + 1.1
    expected = inside_slowly(fake, real, 3), inside_slowly(real, fake, 3)
    assert 0.2 < min(expected) and max(expected) < 1 and expected[0] != expected[1]
    for x in (real, real.astype(np.float32)):
        for offset in (0, 300):  # whose square swamps the distances in float32
            assert fid.precision_recall(x + offset, (fake + offset).astype(x.dtype)) == expected
    real, fake = rng.randint(0, 3, (90, 9)), rng.randint(0, 3, (70, 9))  # many ties, broken by rounding after the shift
    expected = inside_slowly(fake, real, 3), inside_slowly(real, fake, 3)
    assert fid.precision_recall((real + 0.1).astype(np.float32), (fake + 0.1).astype(np.float32)) == expected
    real, fake = rng.standard_normal((99, 3)), rng.standard_normal((6000, 3)) * 2  # two blocks of 5,592 rows at most
    assert fid.precision_recall(real, fake) == (inside_slowly(fake, real, 3), inside_slowly(real, fake, 3))

def test_folders_archives_statistics_and_data_folders_agree(sides, tmp_path, capsys):
    with mock.patch.object(fid, "measure", wraps=fid.measure) as measure:
        run_fid([sides / "a", sides / "b", "--save", tmp_path / "stats.npz"])
    assert [call.kwargs["keep_logits"] for call in measure.call_args_list] == [True, False]
    out, err = capsys.readouterr()
    folders = json.loads(out.splitlines()[-1])
    assert "NOT an FID" in out and "only 5 images" in err and folders.pop("weights") == "random"
    images = [np.load(sides / f"{name}.npz")["arr_0"] for name in "ab"]
    outputs = [inception_of("random")(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in images]
    for name, k in (("FID", 0), ("sFID", 1)):
        moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (output[k].double().numpy() for output in outputs)]
        assert folders[name] == pytest.approx(fid.frechet_distance(*moments[0], *moments[1]), rel=1e-5)
    assert folders["IS"] == pytest.approx(fid.inception_score(outputs[0][2])[0], rel=1e-6)
    assert (folders["precision"], folders["recall"]) == fid.precision_recall(outputs[1][0], outputs[0][0])

    # a folder of cached pixels, one of which is left out; statistics instead of the images
    latents = np.insert(images[0], 3, 0, axis=0).transpose(0, 3, 1, 2)
    data = data_folder(tmp_path / "data", latents, np.insert(np.zeros(5, int), 3, -1))
    saved = numbers_of(capsys, data, tmp_path / "stats.npz")
    assert all(saved[name] == pytest.approx(folders[name], rel=1e-5) for name in ("FID", "sFID", "IS"))
    assert saved["precision"] is None

    # as in ADM's archives, statistics win over images, and a missing pair is computed
    with np.load(tmp_path / "stats.npz") as stats:
        np.savez_compressed(tmp_path / "both.npz", arr_0=images[1], mu=stats["mu"] + 1, sigma=0 * stats["sigma"])
        np.savez(tmp_path / "pair.npz", mu=stats["mu"], sigma=stats["sigma"])  # like adm_in256_stats.npz and JiT's
    assert numbers_of(capsys, data, tmp_path / "pair.npz") == saved | {"sFID": None}
    both = numbers_of(capsys, sides / "a.npz", tmp_path / "both.npz")
    assert both["FID"] > 1000 and both["sFID"] == pytest.approx(folders["sFID"], rel=1e-5)
    assert both["precision"] == folders["precision"]

    np.savez(tmp_path / "copies.npz", images[0][[0, 0, 0, 0]])  # all of them real, and one of the five covered
    copies = numbers_of(capsys, tmp_path / "copies.npz", sides / "a.npz")
    assert (copies["precision"], copies["recall"]) == (1, 0.2)

    # --size crops a folder as training does
    crops = [np.asarray(fid.center_crop(Image.fromarray(image), 16)) for image in smooth_images(5, 5)]
    np.savez(tmp_path / "crops.npz", np.stack(crops))
    assert numbers_of(capsys, sides / "a", tmp_path / "crops.npz", "--size", 16)["FID"] == pytest.approx(0, abs=1e-4)

def test_two_ranks_give_the_result_of_one(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = []
    for ranks in (1, 2):
        assert ends(launch(sides / "a.npz", sides / "b", *FID_FLAGS, main=fid.main, fault=with_small_inception,
                           ranks=ranks)) == [0] * ranks
        results.append(json.loads(Path("log0").read_text().splitlines()[-1].replace('"random"', "0")))
    assert results[1] == pytest.approx(results[0], rel=1e-6) and "FID" not in Path("log1").read_text()
    batches = zip(range(9), range(9))  # few of them are read ahead, and all in order
    ahead = fid.read_ahead(mock.Mock(read=lambda first, last: first), batches)
    assert next(ahead) == 0 and next(batches) == (2, 2) and list(ahead) == [1, *range(3, 9)]

def test_numbers_are_printed_before_saving_and_nothing_is_overwritten(sides, tmp_path, capsys):
    mu = tmp_path / "mu.npz"
    np.savez(mu, mu=np.zeros(5), sigma=np.eye(5))
    before = mu.read_bytes()
    with mock.patch.object(fid, "measure", side_effect=AssertionError("work began")):
        assert "File exists" in fails(run_fid, capsys, sides / "a", sides / "b", "--save", mu)
    with mock.patch.object(np, "savez", side_effect=OSError(28, "No space left")), pytest.raises(SystemExit):
        run_fid([mu, mu, "--save", tmp_path / "new.npz"])
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["FID"] == 0 and "new.npz: No space left" in err
    assert os.listdir(tmp_path) == ["mu.npz"] and mu.read_bytes() == before
    with mock.patch.object(fid, "frechet_distance", lambda *args: (tmp_path / "new.npz").write_text("another run's")):
        assert "File exists" in fails(run_fid, capsys, mu, mu, "--save", tmp_path / "new.npz")

def test_damaged_archives_are_one_line_each(sides, tmp_path, capsys):
    good, bad, whole = sides / "b.npz", tmp_path / "bad.npz", (sides / "b.npz").read_bytes()

    def refuses(expected):
        line = fails(run_fid, capsys, bad, good)
        assert re.search(expected, line) and str(bad) in line, line

    refuses("No such file")
    bad.write_bytes(whole[:len(whole) // 2])
    refuses("not a zip file")
    for array in (np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.uint8, "F"), np.array([print, 1])):
        np.savez(bad, array)
        refuses("arr_0 is .* expected uint8")
    np.savez(bad, mu=np.array([print] * 5), sigma=np.eye(5))  # never unpickled
    refuses("Object arrays cannot be loaded")
    np.savez(bad, np.zeros((1, 4, 4, 3), np.uint8), mu=0, sigma=0)
    refuses("found 1 images")
    np.savez(bad, mu=np.zeros(5), sigma=np.eye(4))
    assert "statistics do not fit together: (5,) (4, 4)" in fails(run_fid, capsys, bad, bad)

def test_damaged_image_and_data_folders_are_one_line_each(sides, tmp_path, capsys):
    good, folder = sides / "b.npz", shutil.copytree(sides / "a" / "0", tmp_path / "images")
    os.truncate(folder / "002.png", 90)
    assert "002.png: not a readable image" in fails(run_fid, capsys, folder, good)  # raised in a worker
    Image.new("RGB", (6, 5)).save(folder / "002.png")
    assert re.search(r"002.png: \(6, 5\) pixels, but \(20, 24\) in .*000.png", fails(run_fid, capsys, folder, good))
    data = data_folder(tmp_path / "data", np.zeros((4, 2, 8, 4, 4), np.float16))
    assert "float16 (4, 2, 8, 4, 4), not pixels" in fails(run_fid, capsys, data, good)
    os.remove(data / "labels.npy")  # unfinished
    assert "labels.npy" in fails(run_fid, capsys, data, good)
