"""Train a diffusion transformer with Dispersive Loss.

    python train.py                                      a demo that draws its own data
    python train.py --images photos --data data/photos --vae none --size 32             cache a folder, then train
    torchrun --nproc_per_node=8 train.py --data data/photos --model SiT-B/2

A run is a function of (config, data, seed, step): every random draw has a generator of its own, seeded by (seed, step,
purpose), which draws for the whole global batch, and each rank takes its slice. So a run can go on from its weights and
its step alone, and the number of ranks and of accumulated passes changes nothing but the order of sums.
"""
import argparse
import colorsys
import copy
import functools
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dispersive import (KINDS, MODELS, MeanFlow, build_model, contrastive_loss, dispersive_floor, dispersive_loss,
                        effective_rank, mean_distance, repa_loss, repa_projector)
from sample import (OBJECTIVES, PATIENCE, VAE, Parser, Progress, UnreadableImage, UserError, atomic, barrier,
                    center_crop, clock, command, compile_blocks, cpu_cores, default_dtype, default_objective, generate,
                    list_images, load_file, load_weights, lock, naming, number, open_array, read_image, read_json,
                    save_grid, start, weights_in)

DEMO = dict(model="SiT-XS/4", steps=1500, lr=1e-3, ema=0.99, log_every=50, ckpt_every=400, sample_every=400)
CHUNK = 256  # images that are cached at a time
# flags that may change when a run is continued; a change of those in TUNABLE is logged
FREE = {"steps", "epochs", "micro", "compile", "log_every", "ckpt_every", "sample_every", "snapshot_every", "wandb",
        "out", "data", "val", "images", "cache_only", "size", "vae"}
TUNABLE = {"lr", "beta2", "grad_clip", "dtype", "disp_weight"}


def parse(argv):
    p = Parser(prog="train.py", description=__doc__)
    flag = p.add_argument
    count, amount, share = number(int, 1), number(float, 0), number(float, 0, 1)
    # data
    flag("--data", metavar="DIR", help="directory of cached latents or pixels")
    flag("--images", metavar="FOLDER", help="cache this folder of class folders in --data first")
    flag("--size", type=number(int, 8), default=256, help="crop and resize images to this (256)")
    flag("--vae", help="ema, mse or a file: keep Stable Diffusion's latents (ema); none: keep the pixels")
    flag("--cache-only", action="store_true", help="stop after caching")
    flag("--val", metavar="DIR", help="held-out data: log the EMA's regression loss on it at checkpoints")
    # training
    flag("--model", default="SiT-B/2", help="SiT- or DiT-, XS, S, B, L or XL, /2, /4 or /8 (SiT-B/2)")
    flag("--objective", choices=[*OBJECTIVES], help="default: flow for SiT, diffusion for DiT")
    flag("--epochs", type=amount, default=80, help="(80)")
    flag("--steps", type=count, help="instead of epochs")
    flag("--batch", type=count, default=256, help="global batch (256)")
    flag("--micro", type=count, help="samples a forward pass on each rank; default: its share")
    flag("--init", metavar="FILE", help="start from the weights of a checkpoint, one's own or published")
    flag("--lr", type=amount, default=1e-4, help="(1e-4)")
    flag("--beta2", type=number(float, 0, 0.999999), help="of AdamW (0.999; MeanFlow: 0.95)")
    flag("--ema", type=share, default=0.9999, help="decay, warmed up (0.9999)")
    flag("--grad-clip", type=amount, default=0.0, help="largest gradient norm; 0: any (0)")
    flag("--label-dropout", type=share, default=0.1, help="share of labels dropped; 1: train without labels (0.1)")
    flag("--seed", type=number(int, 0, 2 ** 63 - 1), default=0)
    flag("--dtype", choices=["bf16", "fp32"], help="default: bf16 where the hardware multiplies it")
    flag("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    # the dispersive loss, and what it is compared with
    flag("--disp", choices=[*KINDS, "none"], default="infonce")
    flag("--disp-weight", type=amount, default=0.5, help="lambda (0.5)")
    flag("--disp-tau", type=number(float, 1e-3), default=0.5, help="temperature (0.5)")
    flag("--disp-margin", type=amount, default=1.0, help="of the hinge (1.0)")
    flag("--disp-blocks", help="'all', or numbers from 1 such as 3,6; default: depth/4")
    flag("--disp-group", type=number(int, 2), default=16, help="samples compared with each other (16)")
    flag("--contrastive", choices=["independent", "dependent"], help="contrast with a second view of each image: with "
         "noise and time of its own, or with the same noise and a time within 0.005")
    flag("--repa", metavar="FILE", help="align a block with an encoder's features, an .npy (N, tokens, D), or (N, 2, "
         "tokens, D) with those of the mirror images")
    flag("--repa-weight", type=amount, default=0.5, help="(0.5)")
    flag("--repa-block", type=count, default=8, help="(8)")
    flag("--meanflow-omega", type=amount, default=1.0, help="guidance in training, of scale omega / (1 - kappa) (1)")
    flag("--meanflow-kappa", type=number(float, 0, 0.999), default=0.0, help="(0)")
    flag("--meanflow-interval", type=share, nargs=2, default=[0.0, 1.0], metavar=("FROM", "TO"), help="its times (0 1)")
    # output
    flag("--out", default="out", help="directory of the run; one that holds a run continues it (out)")
    flag("--log-every", type=count, default=100, help="(100)")
    flag("--ckpt-every", type=count, default=5000, help="(5000)")
    flag("--sample-every", type=count, default=10000, help="(10000)")
    flag("--snapshot-every", type=count, help="also keep the EMA of every so many steps")
    flag("--wandb", action="store_true", help="also log to Weights & Biases")
    args = p.parse_args(argv)
    if not args.data and not args.images:  # the demo: its values replace the defaults, not what the user says
        p.set_defaults(**DEMO, batch=max(32, 16 * int(os.environ.get("WORLD_SIZE", 1))))
        args = p.parse_args(argv)
    if args.model not in MODELS:
        raise UserError(f"--model {args.model}: expected one of {', '.join(MODELS)}")
    if args.images and not args.data:
        raise UserError("--images needs --data DIR, where the cached arrays go")
    if args.cache_only and not args.images:
        raise UserError("--cache-only needs --images FOLDER")
    if args.contrastive and args.disp == "none":
        raise UserError("--contrastive needs a --disp other than none")
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb: the wandb package is not installed")
    args.objective = args.objective or default_objective(args.model)
    args.beta2 = args.beta2 or (0.95 if args.objective == "meanflow" else 0.999)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data: a demo that is drawn, a folder of images that is cached, and the batches that training reads

# the demo's classes: points and inner radius of a star, turns, and the size of a hole; each is its own mirror image, so
# that horizontal flips keep the class
SHAPES = {"disc": (32, 1, 0, 0), "ring": (32, 1, 0, 0.5), "square": (2, 1, 1 / 8, 0), "frame": (2, 1, 1 / 8, 0.5),
          "triangle": (3, 0.5, 0, 0), "nabla": (3, 0.5, 1 / 2, 0), "diamond": (2, 0.6, 0, 0), "star": (5, 0.4, 0, 0),
          "spark": (4, 0.35, 0, 0), "cross": (4, 0.35, 1 / 8, 0)}


def demo_data(n=4000, size=16, oversample=8):
    """The demo's images (n, 3, size, size) uint8 and labels (n,): shapes of any colour, in varied sizes and places."""
    rng, background = np.random.default_rng(0), (16, 18, 32)
    images, labels = np.empty((n, 3, size, size), np.uint8), np.arange(n) % len(SHAPES)
    for image, label in zip(images, labels):
        points, inner, turns, hole = list(SHAPES.values())[label]
        angles = math.pi * np.arange(2 * points) / points + 2 * math.pi * turns
        radius = oversample * size * rng.uniform(0.36, 0.44) * np.resize([1, inner], 2 * points)
        outline = np.stack([radius * np.sin(angles), -radius * np.cos(angles)], 1)
        centre = oversample * size * rng.uniform(0.45, 0.55, 2)
        color = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.55, 0.95), 1.0)
        canvas = Image.new("RGB", (size * oversample, size * oversample), background)
        draw = ImageDraw.Draw(canvas)
        draw.polygon([tuple(point) for point in centre + outline], fill=tuple(int(255 * c) for c in color))
        draw.polygon([tuple(point) for point in centre + hole * outline], fill=background if hole else None)
        image[:] = np.asarray(canvas.resize((size, size), Image.BOX)).transpose(2, 0, 1)
    return images, labels, list(SHAPES)


def one_ahead(function, items):
    """Yield function(item) for every item, while a thread works on the next one."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            current, coming = coming, pool.submit(function, item)
            if current:
                yield current.result()
        if coming:
            yield coming.result()


def load_crop(file, size):
    """An image file -> its pixels (3, size, size) uint8 and None, or zeros and the reason why it cannot be read."""
    try:
        return np.asarray(center_crop(read_image(file), size)).transpose(2, 0, 1), None
    except UnreadableImage as error:
        return np.zeros((3, size, size), np.uint8), str(error)


def cache_images(args, rank, world, device):
    """Turn --images into the arrays of --data: latents.npy, meta.json, and last labels.npy (-1: unreadable image).

    When a chunk of images has been written, a file in chunks/ lists those that were unreadable; an interrupted run goes
    on with the chunks that have no such file.
    """
    folder, target, size = Path(args.images), Path(args.data), args.size
    files = [file for file in list_images(folder) if file.parent != folder]
    if not files:
        raise UserError(f"--images {folder}: expected class folders that hold images, found images without a class")
    kinds = [file.relative_to(folder).parts[0] for file in files]
    listing = zlib.crc32("\n".join(str(file.relative_to(folder)) for file in files).encode())
    meta = dict(classes=sorted({*kinds}), vae=args.vae or "ema", size=size, images=f"{len(files)} ({listing:08x})")
    pixels = meta["vae"] == "none"
    if not pixels and size % 8:
        raise UserError(f"--size {size}: the VAE needs a multiple of 8")
    chunks, array = target / "chunks", target / "latents.npy"
    if rank == 0:
        with naming(target):
            target.mkdir(parents=True, exist_ok=True)
            locked = lock(target / ".lock")
            before = read_json(target / "meta.json") if (target / "meta.json").exists() else {}
            if (before or array.exists()) and before != meta:
                differs = ", ".join(f"--{name} {before.get(name)}" for name in meta if before.get(name) != meta[name])
                raise UserError(f"--data {target}: was begun with {differs}: name another directory")
            with atomic(target / "meta.json") as file:
                file.write(json.dumps(meta, indent=1).encode())
            if not array.exists():
                chunks.mkdir(exist_ok=True)
                shape, dtype = ((3, size, size), np.uint8) if pixels else ((2, 8, size // 8, size // 8), np.float16)
                np.lib.format.open_memmap(target / "new.npy", "w+", dtype, (len(files), *shape))
                os.replace(target / "new.npy", array)
    barrier()
    if (target / "labels.npy").exists():
        return
    rows = open_array(array)
    todo = [first for first in range(0, len(files), CHUNK) if not (chunks / f"{first}.json").exists()][rank::world]
    barrier()  # every rank has looked before any writes

    vae = None if pixels else VAE(meta["vae"]).to(device)
    progress = Progress("caching", len(todo) * CHUNK * world, quiet=rank > 0)
    with ThreadPoolExecutor(cpu_cores()) as pool:
        load = lambda first: [*pool.map(functools.partial(load_crop, size=size), files[first:first + CHUNK])]
        for first, loaded in zip(todo, one_ahead(load, todo)):
            images = torch.from_numpy(np.stack([image for image, _ in loaded]))
            if not pixels:  # mean and std of each image and of its mirror, whose latent is not the mirror of the latent
                x = images.to(device).float() / 127.5 - 1
                images = torch.stack([torch.cat(vae.encode(view), 1) for view in (x, x.flip(-1))], 1).half().cpu()
            with naming(array), open(array, "r+b") as file:  # a full disk is an error here; mapped memory would crash
                file.seek(rows.offset + first * rows[0].nbytes)
                file.write(images.numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            with atomic(chunks / f"{first}.json") as file:
                file.write(json.dumps({first + i: bad for i, (_, bad) in enumerate(loaded) if bad}).encode())
            progress.update(CHUNK * world)
    barrier()
    if rank == 0:
        unreadable = {int(row): bad for path in chunks.glob("*.json") for row, bad in read_json(path).items()}
        for row in sorted(unreadable):
            print("left out:", unreadable[row], file=sys.stderr)
        if len(unreadable) == len(files):
            raise UserError(f"--images {folder}: none of its {len(files)} images can be read")
        labels = np.searchsorted(meta["classes"], kinds)
        labels[[*unreadable]] = -1
        with atomic(target / "labels.npy") as file:
            np.save(file, labels)
        shutil.rmtree(chunks)
        locked.close()
    barrier()


def fingerprint(array):
    """A checksum of up to 64 rows, spread over the array: enough to tell it from others."""
    rows = np.linspace(0, len(array) - 1, min(64, len(array))).astype(int)
    return f"{array.dtype} {'x'.join(map(str, array.shape))} {zlib.crc32(array[rows].tobytes()):08x}"


class Data:
    """uint8 pixels (N, 3, H, H), or float16 posterior mean and std of image and mirror (N, 2, 8, H, H), memory-mapped.

    Entries are the rows whose label is not -1.
    """

    def __init__(self, name, latents, labels, classes, vae="none"):
        self.name, self.latents, self.labels, self.classes, self.vae = name, latents, labels, classes, vae
        self.rows = np.flatnonzero(labels >= 0)
        self.pixels = vae == "none"
        self.shape = latents.shape[1:] if self.pixels else (latents.shape[2] // 2, *latents.shape[3:])
        self.features, self.mirrors = None, True
        self.contents = dict(data=fingerprint(latents), labels=zlib.crc32(labels.tobytes()), classes=classes, vae=vae)

    @classmethod
    def open(cls, flag, folder):
        folder = Path(folder)
        if not (folder / "labels.npy").exists():
            raise UserError(f"{flag} {folder}: no labels.npy there; make it with --images FOLDER --data {folder}")
        latents, labels = open_array(folder / "latents.npy"), np.array(open_array(folder / "labels.npy"))
        meta = read_json(folder / "meta.json")
        classes, vae = meta.get("classes"), meta.get("vae")
        if not isinstance(classes, list) or not isinstance(vae, str):
            raise UserError(f"{folder / 'meta.json'}: expected a list of classes and the name of a vae")
        dtype, sizes = ("uint8", (3,)) if vae == "none" else ("float16", (2, 8))
        if latents.dtype != dtype or latents.shape[1:] != sizes + 2 * latents.shape[-1:] or not latents.size:
            raise UserError(f"{folder / 'latents.npy'}: is {latents.dtype} {latents.shape}; for vae {vae}, {dtype} "
                            f"(N, {', '.join(map(str, sizes))}, H, H) is expected")
        known = {*np.unique(labels)} <= {*range(-1, len(classes))}
        if labels.shape != latents.shape[:1] or not known or labels.max() < 0:
            raise UserError(f"{folder / 'labels.npy'}: is {labels.dtype} {labels.shape}; {latents.shape[:1]} integers "
                            f"from 0 to {len(classes) - 1} are expected (-1: left out)")
        return cls(str(folder), latents, labels.astype(np.int64), classes, vae)

    def add_features(self, path, tokens):
        """Read an encoder's features, too: (N, T, D), which rules out mirror images, or (N, 2, T, D), with theirs."""
        features, n = open_array(path), len(self.labels)
        self.features = features[:, None] if features.ndim == 3 else features
        self.mirrors = features.ndim == 4
        if features.dtype.kind != "f" or self.features.shape[:-1] != (n, 1 + self.mirrors, tokens):
            raise UserError(f"--repa {path}: is {features.dtype} {features.shape}, where floats ({n}, {tokens}, D) or "
                            f"({n}, 2, {tokens}, D) are expected")
        self.contents["repa"] = fingerprint(features)

    def __len__(self):
        return len(self.rows)

    def read(self, entries, flips):
        """Images or posteriors of the entries, mirrored where flips says, their labels, and their features if any."""
        rows, views = self.rows[entries], flips.astype(int)
        if self.pixels:
            images = np.ascontiguousarray(self.latents[rows])
            images[flips] = images[flips, ..., ::-1]
        else:
            images = self.latents[rows, views]
        arrays = [images, self.labels[rows]] + ([] if self.features is None else [self.features[rows, views]])
        return [torch.from_numpy(array) for array in arrays]

    def prepare(self, images, noise):
        """On the device: pixels to [-1, 1], or a draw from the posterior with this noise."""
        if self.pixels:
            return images.float() / 127.5 - 1
        mean, std = images.float().chunk(2, 1)
        return mean + std * noise


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_entries(seed, step, batch, n):
    """Entries of a global batch: position p = step*batch + k reads entry p mod n of epoch p div n's permutation."""
    p = step * batch + np.arange(batch)
    return np.concatenate([permutation(seed, int(e), n)[p[p // n == e] % n] for e in np.unique(p // n)])


def batches(data, steps, batch, mine, seed, device):
    """Yield this rank's slice `mine` of the global batch of every step: [images, labels, features if any]."""
    def read(step):
        flips = np.random.default_rng([seed, step, zlib.crc32(b"flip")]).random(batch) < 0.5
        tensors = data.read(batch_entries(seed, step, batch, len(data))[mine], flips[mine] & data.mirrors)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # this is a thread, and threads start on GPU 0
            tensors = [tensor.pin_memory() for tensor in tensors]
        return tensors

    for tensors in one_ahead(read, steps):
        yield [tensor.to(device, non_blocking=True) for tensor in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# The step


def stream(seed, step, purpose, device):
    """The generator of one purpose at one step. Seeds have 32 bits, since a CPU generator ignores the upper ones."""
    state = np.random.SeedSequence([seed, step, zlib.crc32(purpose.encode())]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def draw_times(objective, n, generator):
    """n times t, and as many r: only MeanFlow has an r of its own."""
    times = objective.times(n, generator)
    return times if isinstance(times, tuple) else (times, times)


class Losses(nn.Module):
    """The network, and REPA's projector if there is one; the forward pass computes all terms of the loss.

    It is one module, so that DistributedDataParallel wraps it once and exchanges the gradients of everything.
    """

    def __init__(self, args, data, device):
        super().__init__()
        self.args, self.meanflow = args, args.objective == "meanflow"
        self.objective = OBJECTIVES[args.objective]()
        if self.meanflow:
            self.objective = MeanFlow(4, args.meanflow_omega, args.meanflow_kappa, args.meanflow_interval)
        self.net = build_model(args.model, input_size=data.shape[-1], in_channels=data.shape[0],
                               num_classes=len(data.classes), second_time=self.meanflow)
        if args.init:
            initialize(self.net, args.init)
        depth, width = len(self.net.blocks), self.net.pos_embed.shape[-1]
        self.blocks = parse_blocks(args.disp_blocks, depth) if args.disp != "none" else []
        if args.repa and args.repa_block > depth:
            raise UserError(f"--repa-block {args.repa_block}: expected a number from 1 to {depth}")
        self.projector = repa_projector(width, data.features.shape[-1]) if args.repa else None
        self.captured = sorted({*self.blocks, *([args.repa_block] if args.repa else [])})
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    def forward(self, views, features, rows):
        """The total to minimise, a scalar, and its terms, {name: scalar}.

        views: [dict of x, y, t, r, noise, each (n, ...)], or two of the same images, for a contrastive loss.
        features: the encoder's, for REPA. rows: the samples with r != t, for MeanFlow.
        """
        args, n = self.args, len(views[0]["x"])
        inputs = {name: torch.cat([view[name] for view in views]) for name in views[0]}
        if self.meanflow:
            inputs["rows"] = rows
        with self.autocast():
            error, activations = self.objective.loss(self.net, **inputs, blocks=self.captured)
        z = dict(zip(self.captured, activations))
        error = error[:n]  # of the first view; the second one is there for its activations
        terms = {"loss": error.detach().mean()}
        if self.meanflow:
            error = self.objective.weight(error, inputs["x"][0].numel())
        total = error.mean()
        if self.blocks:
            loss = contrastive_loss if args.contrastive else dispersive_loss  # of the two views, or of the one
            disp = sum(loss(*z[block].chunk(len(views)), args.disp, args.disp_tau, args.disp_margin,
                            group=args.disp_group) for block in self.blocks) / len(self.blocks)
            total = total + args.disp_weight * disp
            distance = sum(mean_distance(z[block][:n], args.disp_group) for block in self.blocks) / len(self.blocks)
            terms |= {"disp": disp.detach(), "distance": distance}
        if self.projector:
            with self.autocast():
                projected = self.projector(z[args.repa_block][:n])
            repa = repa_loss(projected, features)
            total = total + args.repa_weight * repa
            terms["repa"] = repa.detach()
        return total, terms


class Trainer:
    """What a run carries from step to step: the model, its EMA, the optimiser, and the sums for the log."""

    def __init__(self, args, data, rank, world, device):
        torch.manual_seed(args.seed)
        self.args, self.data, self.rank, self.world, self.device = args, data, rank, world, device
        args.dtype = args.dtype or default_dtype(device)
        losses = self.losses = Losses(args, data, device).to(device)
        self.net, self.objective, self.projector = losses.net, losses.objective, losses.projector
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.compiled = compile_blocks(self.net, args.compile, device)
        self.weights = [p for p in losses.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, args.lr, (0.9, args.beta2), weight_decay=0.0, fused=True)
        if world > 1:
            self.losses = nn.parallel.DistributedDataParallel(losses, gradient_as_bucket_view=True)
        self.share = args.batch // world  # of the batch, on each rank
        self.micro, group = args.micro or max(1, self.share), args.disp_group if losses.blocks else 1
        if args.batch % (world * self.micro) or self.micro % group:
            raise UserError(f"--batch {args.batch}, --micro {self.micro} and --disp-group {group} do not fit {world} "
                            f"rank(s): --batch must be a multiple of ranks x --micro, and --micro of --disp-group "
                            f"(1 without dispersion)")
        self.mine = slice(rank * self.share, (rank + 1) * self.share)
        self.sums, self.logged = {}, 0  # of the terms since the last line of the log, and that line's step
        self.config = {name: value for name, value in vars(args).items() if name not in FREE}
        self.config |= data.contents | dict(disp_blocks=losses.blocks)

    def draw(self, sampler, step, purpose, *shape):
        """This rank's slice of what torch.rand or torch.randn draws for the whole global batch, (share, *shape)."""
        generator = stream(self.args.seed, step, purpose, self.device)
        return sampler(self.args.batch, *shape, generator=generator, device=self.device)[self.mine]

    def views(self, step, images, labels):
        """What the objective's loss takes for this rank's share: once, or twice for a contrastive loss."""
        args, shape = self.args, self.data.shape
        posterior = None if self.data.pixels else self.draw(torch.randn, step, "posterior", *shape)
        x = self.data.prepare(images, posterior)
        dropped = self.draw(torch.rand, step, "label") < args.label_dropout
        y = torch.where(dropped, self.net.num_classes, labels)
        views = []
        for suffix in ("", "2") if args.contrastive else ("",):
            generator = stream(args.seed, step, "time" + suffix, self.device)
            t, r = (times[self.mine] for times in draw_times(self.objective, args.batch, generator))
            views.append(dict(x=x, y=y, t=t, r=r, noise=self.draw(torch.randn, step, "noise" + suffix, *shape)))
        if args.contrastive == "dependent":
            last = 999 if args.objective == "diffusion" else 1  # the largest step number, or time
            t = views[0]["t"] + 0.005 * last * (2 * self.draw(torch.rand, step, "time2") - 1)
            views[1] |= dict(t=(t.round().long() if last > 1 else t).clamp(0, last), noise=views[0]["noise"])
        if args.contrastive:
            views[1]["r"] = views[1]["t"]
        return views

    def update(self, step, images, labels, features=None):
        """One update of the weights, from this rank's share of the batch. Nothing in it waits for the device."""
        args, share, micro = self.args, self.share, self.micro
        views = self.views(step, images, labels)

        # forward and backward, in passes of `micro` samples whose gradients add up
        for begin in range(0, share, micro):
            part = slice(begin, begin + micro)
            rows = slice(-(self.mine.start + begin) % 4, micro, 4)  # every fourth of the global batch
            if self.world > 1:
                self.losses.require_backward_grad_sync = part.stop == share  # ranks exchange in the last pass
            total, terms = self.losses([{name: value[part] for name, value in view.items()} for view in views],
                                       None if features is None else features[part], rows)
            (total * micro / share).backward()
            for name, value in terms.items():
                self.sums[name] = self.sums.get(name, 0) + value * micro / share

        # the optimiser
        norm = nn.utils.clip_grad_norm_(self.weights, args.grad_clip or math.inf)
        self.sums["gradient"] = self.sums.get("gradient", 0) + norm
        self.optimizer.step()
        self.optimizer.zero_grad()

        # the EMA; its decay is warmed up, so that a short run's EMA forgets its start
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_([*self.ema.parameters()], [*self.net.parameters()], 1 - decay)

    def means(self, values):
        """{name: mean of the scalar over the ranks}. Waits for the device."""
        stacked = torch.stack([*values.values()])
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).tolist()))

    @torch.no_grad()
    def evaluate(self, data, entries, blocks=()):
        """The EMA's regression loss on these entries, summed, and the activations after the blocks.

        Its draws depend on the first entry alone: neither on the seed nor on the batch.
        """
        images, labels = (part.to(self.device) for part in data.read(entries, np.zeros(len(entries), bool))[:2])
        of = lambda purpose: stream(0, entries[0], f"val {purpose}", self.device)
        posterior, noise = (torch.randn(len(entries), *data.shape, generator=of(purpose), device=self.device)
                            for purpose in ("posterior", "noise"))
        t, r = draw_times(self.objective, len(entries), of("time"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            error, activations = self.objective.loss(self.ema, data.prepare(images, posterior), labels, t, noise, r,
                                                     blocks=blocks)
        return error.sum(), activations

    def validate(self, data, count=2048, chunk=64):
        """The EMA's regression loss on the first held-out images."""
        count, total = min(count, len(data)), torch.zeros((), device=self.device)
        for first in range(0, count, chunk)[self.rank::self.world]:
            total += self.evaluate(data, np.arange(first, min(first + chunk, count)))[0]
        return self.means(dict(total=total))["total"] * self.world / count

    def picture(self, path, decode):
        """Write a grid of EMA samples, one class a row -> {measure: of 64 samples' activations after every block}."""
        data, args = self.data, self.args
        rows = np.linspace(0, len(data.classes) - 1, min(10, len(data.classes))).round().astype(int)
        labels = torch.from_numpy(rows.repeat(8))
        if args.label_dropout == 1:
            labels = torch.full_like(labels, self.net.num_classes)
        images = generate(self.ema, self.objective, data.shape, labels, range(len(labels)), args.seed, self.device,
                          args.dtype, decode, steps=1 if args.objective == "meanflow" else 25)
        save_grid(images.numpy(), path, columns=8)
        measures = dict(block_distance=[], block_rank=[], block_norm=[])
        entries = np.linspace(0, len(data) - 1, min(64, len(data))).astype(int)  # of all classes: caches are sorted
        for block in range(1, len(self.net.blocks) + 1) if len(entries) > 1 else []:  # one at a time, to save memory
            z = self.evaluate(data, entries, [block])[1][0]
            for name, value in zip(measures, (mean_distance(z), effective_rank(z), z.float().square().mean())):
                measures[name].append(float(f"{value.item():.6g}"))
        return measures


def parse_blocks(text, depth):
    """--disp-blocks -> ascending block numbers, from 1. The paper's default is a quarter of the way in."""
    numbers = [str(number) for number in range(1, depth + 1)]
    chosen = numbers if text == "all" else (text or str(max(1, depth // 4))).split(",")
    if not {*chosen} <= {*numbers}:
        raise UserError(f"--disp-blocks {text}: expected 'all' or numbers from 1 to {depth}, separated by commas")
    return sorted({int(number) for number in chosen})


def initialize(net, path):
    """Load a checkpoint's weights, and say which stay fresh: the embedding of labels when the file's is for other
    classes, that of MeanFlow's second time when the file has none."""
    state = weights_in(load_file(path))
    fresh = {name: value for name, value in net.state_dict().items()
             if name.startswith("r_embedder.") and name not in state
             or name.startswith("y_embedder.") and name in state and state[name].shape != value.shape}
    load_weights(net, {**state, **fresh}, path)
    if fresh:
        print(f"not in {path}: {', '.join(fresh)}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, and signals that end a run


def save_checkpoint(trainer, step, sums):
    """Write ckpt.pt; the one before stays as ckpt.prev.pt. Killed between the renames, a run goes on from that."""
    out, t = Path(trainer.args.out), trainer
    state = dict(model=t.net.state_dict(), ema=t.ema.state_dict(), opt=t.optimizer.state_dict(), step=step,
                 config=t.config, sums=sums, logged=t.logged)
    if t.projector:
        state["projector"] = t.projector.state_dict()
    with atomic(out / "ckpt.new.pt") as file:
        torch.save(state, file)
    if (out / "ckpt.pt").exists():
        os.replace(out / "ckpt.pt", out / "ckpt.prev.pt")
    os.replace(out / "ckpt.new.pt", out / "ckpt.pt")


def resume(trainer):
    """Load the latest checkpoint of --out, if there is one -> its step, and remarks on flags that have changed."""
    latest, previous = (Path(trainer.args.out, name) for name in ("ckpt.pt", "ckpt.prev.pt"))
    path = latest if latest.exists() else previous
    if not path.exists():
        return 0, []
    try:
        checkpoint = load_file(path)
    except UserError as error:
        hint = f"; delete it to go on from {previous}" if path == latest and previous.exists() else ""
        raise UserError(f"{error}{hint}") from None
    if not {"model", "ema", "opt", "step", "config", "sums", "logged"} <= checkpoint.keys():
        raise UserError(f"{path}: not a checkpoint of this train.py; name another --out")
    changes = []
    for name, now in json.loads(json.dumps(trainer.config)).items():  # as the checkpoint holds it: lists, no tuples
        before, flag = json.loads(json.dumps(checkpoint["config"].get(name))), "--" + name.replace("_", "-")
        if before != now and name not in TUNABLE:
            raise UserError(f"{path}: was begun with {flag} {before}, not {now}; name another --out")
        if before != now:
            changes.append(f"{flag} {before} -> {now}")
    load_weights(trainer.net, checkpoint["model"], path)
    load_weights(trainer.ema, checkpoint["ema"], path)
    if trainer.projector:
        load_weights(trainer.projector, checkpoint["projector"], path)
    trainer.optimizer.load_state_dict(copy.deepcopy(checkpoint["opt"]))  # a copy, rather than the file's mapped memory
    trainer.optimizer.param_groups[0].update(lr=trainer.args.lr, betas=(0.9, trainer.args.beta2))
    trainer.sums = {name: torch.tensor(value, device=trainer.device) for name, value in checkpoint["sums"].items()}
    trainer.logged = checkpoint["logged"]
    return checkpoint["step"], changes


class Stop:
    """Ctrl-C and SIGTERM end the loop after a step that all ranks agree on; a second one, a second later, at once."""

    def __init__(self, world):
        self.received, self.since = 0, 0.0
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None

    def __enter__(self):
        self.before = {which: signal.signal(which, self.note) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def note(self, which, frame):
        if not self.received:
            self.received, self.since = which, time.monotonic()
        elif time.monotonic() - self.since > 1:  # launchers repeat at once a signal that all processes got
            os._exit(128 + which)

    def agreed(self):
        """The signal that any rank has received, or 0. The processes wait for each other here, but no GPU does."""
        received = torch.tensor(self.received)
        if self.group:
            dist.all_reduce(received, dist.ReduceOp.MAX, self.group)
        return int(received)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def flops_per_image(args, shape):
    """Floating-point operations of a training step for one image (C, H, W), in all views: forward and backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build_model(args.model, in_channels=shape[0], input_size=shape[-1])
        net(torch.empty(1, *shape), torch.empty(1), torch.empty(1, dtype=torch.long))
    return (2 if args.contrastive else 1) * 3 * counter.get_total_flops()  # backward takes twice what forward takes


def train(args, data, held_out, rank, world, device):
    out, trainer = Path(args.out), Trainer(args, data, rank, world, device)
    decode = None if data.pixels else VAE(args.vae or data.vae).to(device).decode
    steps = args.steps or max(1, round(args.epochs * len(data) / args.batch))
    if rank == 0:
        with naming(out):
            (out / "samples").mkdir(parents=True, exist_ok=True)
            (out / "snapshots").mkdir(exist_ok=True)
        trainer.lock = lock(out / ".lock")
    barrier()
    first, changes = resume(trainer)
    ends = torch.tensor([first, -first], device=device)  # the greatest of each are opposite if all are equal
    if world > 1:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    if ends.sum() != 0:
        raise UserError(f"--out {out}: the ranks find different checkpoints there; it must be a directory they share")
    log, board = out / "log.jsonl", None
    if rank == 0 and log.exists():  # what lies beyond the checkpoint will be logged again
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
        with atomic(log) as file:
            file.write("".join(line + "\n" for line in lines if json.loads(line)["step"] <= first).encode())
    if rank == 0 and args.wandb:
        import wandb
        board = wandb.init(project="dispersive", dir=str(out), config=trainer.config)

    def report(step, **values):
        """Show values, and add them to the log."""
        if rank == 0:
            show = lambda value: value if isinstance(value, str) else " ".join(f"{v:.4g}" for v in np.ravel(value))
            text = "  ".join(f"{name} {show(value)}" for name, value in values.items())
            print(f"step {step:,}/{steps:,}  {text}", flush=True)
            with naming(log), open(log, "a") as file:
                file.write(json.dumps(dict(step=step, **values)) + "\n")
            if board:
                board.log(values, step=step)

    losses = trainer.losses.module if world > 1 else trainer.losses
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        shape, passes = "x".join(map(str, data.shape)), trainer.share // trainer.micro
        print(f"{args.model}, {args.objective}, --disp {args.disp} on blocks {losses.blocks}\n"
              f"{data.name}: {len(data):,} of {shape}, {len(data.classes)} classes"
              f"{'' if data.mirrors else ', no flips: --repa lacks the features of mirror images'}\n"
              f"{world} x {name}, {args.dtype}{', compiled' if trainer.compiled else ''}; {steps:,} steps, "
              f"{steps * args.batch / len(data):.1f} epochs; batch {args.batch} = {world} rank(s) x {passes} x "
              f"{trainer.micro}", flush=True)
    if changes:
        report(first, changed=", ".join(changes))
    floor = {}
    if losses.blocks and not args.contrastive:
        floor["floor"] = dispersive_floor(args.disp, args.disp_group, args.disp_tau, args.disp_margin)
    flops = flops_per_image(args, data.shape) / world
    began = since = time.time()  # `since` moves on with every line of the log, and by the time that is not training's
    todo, done = range(first, steps), first
    with Stop(world) as stop:
        for step, batch in zip(todo, batches(data, todo, args.batch, trainer.mine, args.seed, device)):
            trainer.update(step, *batch)
            done, stopped_by = step + 1, stop.agreed()
            due = lambda every: every and (done % every == 0 or done == steps)
            is_ckpt = due(args.ckpt_every) or stopped_by
            if not (is_ckpt or due(args.log_every) or due(args.sample_every) or due(args.snapshot_every)):
                continue

            # what is due comes before the checkpoint: a run that is killed goes on from there
            sums = trainer.means(trainer.sums)
            if not all(map(math.isfinite, sums.values())):
                raise UserError(f"steps {trainer.logged + 1:,} to {done:,}: the loss or the gradient is not finite; no "
                                f"checkpoint has it: go on with a smaller --lr, --grad-clip 1 or --dtype fp32")
            if due(args.log_every):
                now = time.time()
                rate = (done - max(trainer.logged, first)) * args.batch / (now - since)
                speed = {"images/s": rate, "TFLOP/s": rate * flops / 1e12, "seconds": now - began}
                if device.type == "cuda":
                    speed["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
                means = {name: value / (done - trainer.logged) for name, value in sums.items()}
                report(done, **means, **floor, **speed, left=clock((steps - done) * args.batch / rate))
                trainer.sums, trainer.logged, sums, since = {}, done, {}, now
            paused = time.time()
            if held_out and is_ckpt:
                report(done, val=trainer.validate(held_out))
            if rank == 0 and due(args.sample_every):
                report(done, **trainer.picture(out / "samples" / f"{done:07d}.png", decode))
            if rank == 0 and due(args.snapshot_every):
                with atomic(out / "snapshots" / f"{done:07d}.pt") as file:
                    torch.save(dict(ema=trainer.ema.state_dict(), step=done, config=trainer.config), file)
            if rank == 0 and is_ckpt:
                save_checkpoint(trainer, done, sums)
            since += time.time() - paused
            if stopped_by:
                break
        stopped_by = stop.agreed()  # also what came during the last step
    if stopped_by:
        barrier()
        if rank == 0:
            print(f"{signal.Signals(stopped_by).name}: saved at step {done:,}; the same command goes on")
        sys.exit(128 + stopped_by)
    if first >= steps and rank == 0:
        print(f"{out} is at step {first:,} already: nothing to train; more with --steps")


@command
def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    rank, world, device = start()
    if args.images:
        cache_images(args, rank, world, device)
        if args.cache_only:
            return
    data = Data.open("--data", args.data) if args.data else Data("drawn demo", *demo_data())
    if data.shape[-1] % MODELS[args.model]["patch_size"]:
        raise UserError(f"--model {args.model}: its patches do not divide images of size {data.shape[-1]}")
    if args.repa:
        data.add_features(args.repa, (data.shape[-1] // MODELS[args.model]["patch_size"]) ** 2)
    held_out = Data.open("--val", args.val) if args.val else None
    if held_out and (held_out.shape, held_out.classes) != (data.shape, data.classes):
        raise UserError(f"--val {args.val}: its shape or classes differ from the training data's")
    if args.label_dropout == 1:
        for part in filter(None, (data, held_out)):
            part.labels = np.full_like(part.labels, len(data.classes))  # the null label
    train(args, data, held_out, rank, world, device)
    if not args.data and rank == 0:
        print(f"see {args.out}/samples; next: python sample.py --ckpt {args.out}/ckpt.pt --out {args.out}/generated")


if __name__ == "__main__":
    main()
