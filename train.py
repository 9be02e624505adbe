"""Train a diffusion transformer with Dispersive Loss.

    python train.py                                      a demo that draws its own data
    python train.py --images photos --data data/photos --vae none --size 32             cache a folder, then train
    torchrun --nproc_per_node=8 train.py --data data/photos

A run is a function of (config, data, seed, step): each draw of a step has its own generator, seeded by (seed, step,
purpose), which draws for the whole global batch, and each rank takes its slice. So a run can go on from a checkpoint
alone, and the number of ranks and of accumulated passes changes nothing but the order of sums.
"""
import argparse
import collections
import colorsys
import copy
import fcntl
import functools
import json
import math
import os
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dispersive import (KINDS, MODELS, build_model, contrastive_loss, dispersive_floor, dispersive_loss, effective_rank,
                        mean_distance, repa_loss, repa_projector)
from sample import (DEFAULT_OBJECTIVE, OBJECTIVES, VAE, Parser, Progress, UnreadableFile, UserError, atomic, barrier,
                    center_crop, compile_blocks, default_dtype, generate, list_images, load_file, load_weights, lock,
                    number, one_line_errors, open_array, read_image, read_json, run, save_grid, start, weights_in)

CHUNK = 256  # images that are cached at a time
# flags that may change when a run goes on: silently, or logged; data are compared by content
FREE = {"steps", "epochs", "micro", "compile", "log_every", "ckpt_every", "sample_every", "snapshot_every", "wandb",
        "out", "init", "val", "images", "cache_only", "size", "data", "vae", "repa"}
LOGGED = {"lr", "beta2", "grad_clip", "dtype", "disp_weight"}


def parse(argv):
    p = Parser(prog="train.py", description=__doc__)
    count, amount, share = number(int, 1), number(float, 0), number(float, 0, 1)

    def flag(name, default=None, help="", **options):
        """A flag whose help ends in its default; an int default asks for a count, a float for an amount from 0."""
        if type(default) in (int, float):
            options.setdefault("type", count if type(default) is int else amount)
        p.add_argument(name, default=default, help=help if default is None else f"{help} ({default})", **options)

    # data
    flag("--data", metavar="DIR", help="directory of cached latents or pixels")
    flag("--images", metavar="FOLDER", help="cache this folder of class folders in --data first")
    flag("--size", 256, "crop and resize images to this", type=number(int, 8))
    flag("--vae", help="ema, mse or a file: keep Stable Diffusion's latents (ema); none: keep the pixels")
    flag("--cache-only", action="store_true", help="stop after caching")
    flag("--val", metavar="DIR", help="held-out data: log the EMA's regression loss on it at checkpoints")
    # training
    flag("--model", "SiT-B/2", "SiT- or DiT-, XS, S, B, L or XL, /2, /4 or /8", choices=MODELS, metavar="NAME")
    flag("--objective", choices=OBJECTIVES, help="default: flow for SiT, diffusion for DiT")
    flag("--epochs", type=number(float, 1e-3), help="(80)")
    flag("--steps", type=count, help="instead of epochs")
    flag("--batch", 256, "of all ranks")
    flag("--micro", type=count, help="samples a forward pass on each rank; default: its share of the batch")
    flag("--init", metavar="FILE", help="start from a checkpoint's weights, own or published")
    flag("--lr", 1e-4)
    flag("--beta2", type=number(float, 0, 0.999999), help="of AdamW (0.999; MeanFlow: 0.95)")
    flag("--ema", 0.9999, "decay, warmed up", type=share)
    flag("--grad-clip", 0.0, "largest gradient norm; 0: any")
    flag("--label-dropout", 0.1, "share of labels dropped; 1: train without labels", type=share)
    flag("--seed", 0, type=number(int, 0, 2 ** 63 - 1))
    flag("--dtype", choices=["bf16", "fp32"], help="default: bf16 where the hardware multiplies it")
    flag("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    # the dispersive loss, and what it is compared with
    flag("--disp", "infonce", choices=[*KINDS, "none"])
    flag("--disp-weight", 0.5, "lambda")
    flag("--disp-tau", 0.5, "temperature", type=number(float, 1e-3))
    flag("--disp-margin", 1.0, "of the hinge")
    flag("--disp-blocks", help="'all', or numbers from 1 such as 3,6; default: depth/4")
    flag("--disp-group", 16, "samples compared with each other", type=number(int, 2))
    flag("--contrastive", choices=["independent", "dependent"], help="contrast with a second view, of its own "
         "noise and time, or of the same noise and a time within 0.005")
    flag("--repa", metavar="FILE", help="align a block with an encoder's features, an .npy (N, 2, tokens, D)")
    flag("--repa-weight", 0.5)
    flag("--repa-block", 8)
    flag("--meanflow-omega", 1.0, "guidance in training, of scale omega / (1 - kappa)")
    flag("--meanflow-kappa", 0.0, type=number(float, 0, 0.999))
    flag("--meanflow-interval", [0.0, 1.0], "its times", type=share, nargs=2, metavar=("FROM", "TO"))
    # output
    flag("--out", "out", "directory of the run; one that holds a run continues it")
    flag("--log-every", 100)
    flag("--ckpt-every", 5000)
    flag("--sample-every", 10000)
    flag("--snapshot-every", type=count, help="keep the EMA of every so many steps")
    flag("--wandb", action="store_true", help="also log to Weights & Biases")
    args = p.parse_args(argv)
    if not args.data and not args.images:  # the demo: its values replace the defaults, not what the user says
        p.set_defaults(model="SiT-XS/4", lr=1e-3, ema=0.99, log_every=50, ckpt_every=400, sample_every=400,
                       batch=max(32, 16 * int(os.environ.get("WORLD_SIZE", 1))), steps=None if args.epochs else 1500)
        args = p.parse_args(argv)
    args.objective = args.objective or DEFAULT_OBJECTIVE[args.model[:3]]
    if args.beta2 is None:
        args.beta2 = 0.95 if args.objective == "meanflow" else 0.999

    if args.images and not args.data or args.cache_only and not args.images:
        p.error("--images FOLDER needs --data DIR, where the cached arrays go, and --cache-only needs --images")
    if args.label_dropout == 0 and (args.meanflow_omega, args.meanflow_kappa) != (1, 0):
        p.error("--meanflow-omega and --meanflow-kappa need the null label: a --label-dropout above 0")
    if args.contrastive and args.disp == "none":
        p.error("--contrastive needs a --disp other than none")
    depth = MODELS[args.model]["depth"]
    if args.repa and args.repa_block > depth:
        p.error(f"--repa-block {args.repa_block}: expected a number from 1 to {depth}")
    known, text = [str(block) for block in range(1, depth + 1)], args.disp_blocks or str(depth // 4)
    chosen = known if text == "all" else text.split(",")
    if not {*chosen} <= {*known}:
        p.error(f"--disp-blocks {text}: expected 'all' or numbers from 1 to {depth}, separated by commas")
    args.disp_blocks = sorted({*map(int, chosen)}) if args.disp != "none" else []
    return args


# ----------------------------------------
# Data: a demo that is drawn, a folder of images that is cached, and the batches that training reads

# points and inner radius of a star, turns, size of a hole; each is its own mirror image, so that flips keep the class
SHAPES = {"disc": (32, 1, 0, 0), "ring": (32, 1, 0, 0.5), "square": (2, 1, 1 / 8, 0), "frame": (2, 1, 1 / 8, 0.5),
          "triangle": (3, 0.5, 0, 0), "nabla": (3, 0.5, 1 / 2, 0), "diamond": (2, 0.6, 0, 0), "star": (5, 0.4, 0, 0),
          "spark": (4, 0.35, 0, 0), "cross": (4, 0.35, 1 / 8, 0)}


def demo_data(n=4000, size=16):
    """The demo's images (n, 3, size, size) uint8 and labels (n,): shapes of any colour, in varied sizes and places."""
    rng, background, large = np.random.default_rng(0), (16, 18, 32), 8 * size  # drawn large, then averaged
    images, labels = np.empty((n, 3, size, size), np.uint8), np.arange(n) % len(SHAPES)
    for image, label in zip(images, labels):
        points, inner, turns, hole = list(SHAPES.values())[label]
        angles = math.pi * np.arange(2 * points) / points + 2 * math.pi * turns
        radius = large * rng.uniform(0.36, 0.44) * np.resize([1, inner], 2 * points)
        outline = np.stack([radius * np.sin(angles), -radius * np.cos(angles)], 1)
        centre = large * rng.uniform(0.45, 0.55, 2)
        color = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.55, 0.95), 1.0)
        canvas = Image.new("RGB", (large, large), background)
        draw = ImageDraw.Draw(canvas)
        draw.polygon([*(centre + outline).flat], fill=tuple(int(255 * c) for c in color))
        if hole:
            draw.polygon([*(centre + hole * outline).flat], fill=background)
        image[:] = np.asarray(canvas.resize((size, size), Image.BOX)).transpose(2, 0, 1)
    return images, labels, list(SHAPES)


def one_ahead(function, items):
    """Yield function(item) for every item, while a thread works on the next one."""
    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(function, item) for item in items)
        coming = next(futures, None)
        while coming:
            current, coming = coming, next(futures, None)
            yield current.result()


def load_crop(file, label, size):
    """An image file -> pixels (3, size, size) uint8 and label; black, -1 and a line on stderr if it is unreadable."""
    try:
        return np.asarray(center_crop(read_image(file), size)).transpose(2, 0, 1), label
    except UnreadableFile as error:
        sys.stderr.write(f"left out: {error}\n")  # in one piece, since this is one of many threads
        return np.zeros((3, size, size), np.uint8), -1


def cache_images(args, rank, world, device):
    """Turn --images into the arrays of --data: first meta.json, then latents.npy, last labels.npy (-1: unreadable).

    Until then labels are in labels.new.npy, -2 where an image is not cached yet: an interrupted run goes on there.
    """
    folder, target, size = Path(args.images), Path(args.data), args.size
    files = [file for file in list_images(folder) if file.parent != folder]
    if not files:
        raise UserError(f"--images {folder}: expected class folders that hold images, found images without a class")
    names = [file.relative_to(folder) for file in files]
    classes, labels = np.unique([name.parts[0] for name in names], return_inverse=True)
    listing = zlib.crc32(os.fsencode("\n".join(map(str, names))))
    meta = dict(classes=classes.tolist(), vae=args.vae or "ema", size=size, images=f"{len(files)} ({listing:08x})")
    pixels, array, marks = meta["vae"] == "none", target / "latents.npy", target / "labels.new.npy"
    if not pixels and size % 8:
        raise UserError(f"--size {size}: the VAE needs a multiple of 8")
    if rank == 0:
        locked = lock(target)
        before = read_json(target / "meta.json") if array.exists() else meta
        differ = [name for name in meta if before.get(name) != meta[name]]
        if differ:
            raise UserError(f"--data {target}: was begun with other {' and '.join(differ)}; name another")
    barrier()
    if (target / "labels.npy").exists():
        return
    vae = None if pixels else VAE(meta["vae"]).to(device)
    if rank == 0 and not array.exists():  # begun once the VAE is found
        with one_line_errors(target):
            with atomic(target / "meta.json") as file:
                file.write(json.dumps(meta, indent=1).encode())
            np.save(marks, np.full(len(files), -2))
            shape, dtype = ((3, size, size), "uint8") if pixels else ((2, 8, size // 8, size // 8), "float16")
            np.lib.format.open_memmap(target / "new.npy", "w+", dtype, (len(files), *shape))
            os.replace(target / "new.npy", array)
    barrier()
    cached = open_array(marks) > -2
    todo = [first for first in range(0, len(files), CHUNK)[rank::world] if not cached[first:first + CHUNK].all()]
    progress = Progress("caching", min(len(todo) * CHUNK * world, len(files)), quiet=rank > 0)
    with ThreadPoolExecutor() as pool:
        crop = functools.partial(load_crop, size=size)
        load = lambda first: [*pool.map(crop, files[first:first + CHUNK], labels[first:first + CHUNK])]
        for first, loaded in zip(todo, one_ahead(load, todo)):
            images, found = map(np.stack, zip(*loaded))
            if not pixels:  # of each image and of its mirror, whose latent is not the mirror of the latent
                x = torch.from_numpy(images).to(device).float() / 127.5 - 1
                images = torch.stack([torch.cat(vae.encode(view), 1) for view in (x, x.flip(-1))], 1).half().cpu()
            for path, rows in ((array, np.asarray(images)), (marks, found)):
                begin = open_array(path).offset + first * rows[0].nbytes
                with one_line_errors(path), open(path, "r+b") as file:  # mapped memory would crash on a full disk
                    fcntl.lockf(file, fcntl.LOCK_EX)  # against ranks on other nodes, since network disks write pages
                    file.seek(begin)
                    file.write(rows.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
            progress.update(CHUNK * world)
    barrier()
    if rank == 0:
        if open_array(marks).max() < 0:
            raise UserError(f"--images {folder}: none of its images can be read")
        os.replace(marks, target / "labels.npy")
        locked.close()
    barrier()


class Data:
    """uint8 pixels (N, 3, H, H), or float16 posterior mean and std of image and mirror (N, 2, 8, H, H), memory-mapped.

    Its entries are the rows whose label is not -1. `features` are an encoder's, for REPA: (N, 2, T, D).
    """

    def __init__(self, latents, labels, classes, vae="none"):
        self.latents, self.labels, self.classes, self.vae = latents, labels, classes, vae
        self.rows = np.flatnonzero(labels >= 0)
        self.pixels, self.features = vae == "none", None
        self.shape = latents.shape[1:] if self.pixels else (4, *latents.shape[3:])

    @classmethod
    def open(cls, folder):
        labels, latents = (open_array(Path(folder, name)) for name in ("labels.npy", "latents.npy"))
        meta = read_json(Path(folder, "meta.json"))
        classes, vae = meta.get("classes"), meta.get("vae")
        dtype, channels = ("uint8", (3,)) if vae == "none" else ("float16", (2, 8))
        if (not isinstance(classes, list) or not isinstance(vae, str) or latents.dtype != dtype or not latents.size
                or latents.shape != (*labels.shape, *channels, *latents.shape[-1:] * 2)
                or labels.dtype.kind != "i" or labels.min() < -1 or not 0 <= labels.max() < len(classes)):
            raise UserError(f"{folder}: expected what --images makes, found latents.npy {latents.dtype} "
                            f"{latents.shape}, labels.npy {labels.dtype} {labels.shape}, meta.json {str(meta):.200}")
        return cls(latents, labels.astype(np.int64), classes, vae)

    def add_features(self, path, tokens):
        self.features, expected = open_array(path), (len(self.labels), 2, tokens)
        if self.features.dtype.kind != "f" or self.features.shape[:-1] != expected:
            raise UserError(f"--repa {path}: expected floats {expected} x D, found {self.features.dtype} "
                            f"{self.features.shape}")

    def contents(self):
        """What tells these data from others: checksums, of large arrays those of about 64 rows."""
        checksum = lambda array: zlib.crc32(array[::max(1, len(array) // 64)].tobytes())
        data = [checksum(self.latents), zlib.crc32(self.labels.tobytes()), self.classes]
        return dict(data=f"contents {zlib.crc32(str(data).encode()):08x}", vae=self.vae,
                    repa=self.features is not None and f"contents {checksum(self.features):08x}")

    def spread(self, count):
        """Up to `count` entries, evenly spaced, since a cache is sorted by class."""
        return np.linspace(0, len(self.rows) - 1, min(count, len(self.rows))).astype(int)

    def read(self, entries, flips):
        """[images or posteriors of the entries, mirrored where flips says; their labels; their features if any]."""
        rows, views = self.rows[entries], flips.astype(int)
        if self.pixels:
            images = self.latents[rows]
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
    """Yield this rank's slice `mine` of the global batch of every step, as Data.read gives it."""
    def read(step):
        flips = np.random.default_rng([seed, step, zlib.crc32(b"flip")]).random(batch) < 0.5
        return data.read(batch_entries(seed, step, batch, len(data.rows))[mine], flips[mine])

    for tensors in one_ahead(read, steps):
        if device.type == "cuda":  # from pinned memory, copying need not be waited for
            tensors = [tensor.pin_memory() for tensor in tensors]
        yield [tensor.to(device, non_blocking=True) for tensor in tensors]


# ----------------------------------------
# The loss of a batch


def stream(seed, step, purpose, device):
    """The random generator of one purpose at one step. Its seed has 32 bits: a CPU generator ignores more."""
    state = np.random.SeedSequence([seed, step, zlib.crc32(purpose.encode())]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


class Losses(nn.Module):
    """All that is trained, and all terms of its loss, in one module for DistributedDataParallel to wrap."""

    def __init__(self, args, data, device):
        super().__init__()
        self.args, self.data, self.meanflow = args, data, args.objective == "meanflow"
        guidance = dict(omega=args.meanflow_omega, kappa=args.meanflow_kappa, interval=args.meanflow_interval)
        self.objective = OBJECTIVES[args.objective](**(guidance if self.meanflow else {}))
        self.net = build_model(args.model, input_size=data.shape[-1], in_channels=data.shape[0],
                               num_classes=len(data.classes), class_dropout_prob=args.label_dropout,
                               second_time=self.meanflow)
        if args.init:  # may lack two embeddings: the labels', of other classes, and MeanFlow's second time's
            state, own = weights_in(load_file(args.init)), self.net.state_dict()
            fresh = {name: own[name] for name in own if name.startswith(("r_embedder.", "y_embedder."))
                     and (name not in state or state[name].shape != own[name].shape)}
            load_weights(self.net, state | fresh, args.init)
        self.projector = nn.Identity()
        if args.repa:
            self.projector = repa_projector(self.net.pos_embed.shape[-1], data.features.shape[-1])
        self.captured = sorted({*args.disp_blocks, *([args.repa_block] if args.repa else [])})
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    def draw_view(self, images, labels, seed, step, batch, mine=slice(None), prefix=""):
        """What the objective's loss takes: these images and labels, and `mine` of what a batch draws."""
        generator = lambda purpose: stream(seed, step, prefix + purpose, images.device)
        shape = (batch, *self.data.shape)
        randn = lambda purpose: torch.randn(shape, generator=generator(purpose), device=images.device)[mine]
        times = self.objective.times(batch, generator("time"))
        t, r = times if self.meanflow else (times, times)  # only MeanFlow has an r of its own
        x = self.data.prepare(images, randn("posterior"))
        return dict(x=x, y=labels, t=t[mine], r=r[mine], noise=randn("noise"))

    def forward(self, step, position, images, labels, features=None):
        """The total to minimise, a scalar, and what to log, {name: scalar}, for a part of the batch of this step.

        position: that of the first sample in the global batch. images, labels, features: as Data.read gives them.
        """
        args, n, mine = self.args, len(images), slice(position, position + len(images))
        rand = lambda purpose: torch.rand(args.batch, generator=stream(args.seed, step, purpose, images.device),
                                          device=images.device)[mine]
        y = torch.where(rand("label") < args.label_dropout, self.net.num_classes, labels)
        draw = functools.partial(self.draw_view, images, y, args.seed, step, args.batch, mine)
        first = draw()
        views = [first]
        if args.contrastive:  # a second view of the same images, always with r = t
            second = draw("second ") | dict(x=first["x"])
            if args.contrastive == "dependent":
                last = 999 if args.objective == "diffusion" else 1  # step numbers up to 999, or times up to 1
                t = (first["t"] + 0.005 * last * (2 * rand("shift") - 1)).clamp(0, last)
                second |= dict(t=t.round().long() if last == 999 else t, noise=first["noise"])
            views.append(second | dict(r=second["t"]))
        inputs = {name: torch.cat([view[name] for view in views]) for name in first}
        if self.meanflow:
            inputs["moving"] = self.objective.moving(n, position)  # those with r != t
        with self.autocast:
            error, activations = self.objective.loss(self.net, **inputs, blocks=self.captured)
            z = dict(zip(self.captured, activations))
        error = error[:n]  # of the first view; the second one is there for its activations
        terms = {"loss": error.mean()}
        total = self.objective.weight(error, inputs["x"][0].numel()).mean() if self.meanflow else terms["loss"]
        if args.disp_blocks:
            loss = contrastive_loss if args.contrastive else dispersive_loss
            terms["disp"] = torch.stack([
                loss(*z[block].chunk(len(views)), args.disp, args.disp_tau, args.disp_margin, group=args.disp_group)
                for block in args.disp_blocks]).mean()
            total = total + args.disp_weight * terms["disp"]
            distances = [mean_distance(z[block][:n], args.disp_group) for block in args.disp_blocks]
            terms["distance"] = torch.stack(distances).mean()
        if args.repa:
            with self.autocast:
                terms["repa"] = repa_loss(self.projector(z[args.repa_block][:n]), features)
            total = total + args.repa_weight * terms["repa"]
        return total, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def evaluate(self, net, data, entries, blocks=()):
        """The regression loss of a network on these entries, summed, and its activations after the blocks.
        The draws depend on the entries alone."""
        images, labels = data.read(entries, np.zeros(len(entries), bool))[:2]
        device = net.pos_embed.device
        view = self.draw_view(images.to(device), labels.to(device), 0, entries[0], len(entries), prefix="val ")
        with self.autocast:
            error, activations = self.objective.loss(net, **view, blocks=blocks)
        return error.sum(), activations


# ----------------------------------------
# What a run leaves in --out


def picture(losses, ema, path, decode, device):
    """Write a grid of samples, one class a row -> {measure: [its value after each block, over 64 images]}."""
    args, data = losses.args, losses.data
    labels = np.unique(data.labels[data.rows])
    labels = labels[np.linspace(0, len(labels) - 1, 10).round().astype(int)].repeat(8)
    images = generate(ema, losses.objective, data.shape, torch.from_numpy(labels), range(80), args.seed, device,
                      args.dtype, decode, steps=1 if losses.meanflow else 25)
    save_grid(images, path)
    measures = dict(block_distance=[], block_rank=[], block_norm=[])
    entries = data.spread(64)
    for block in (range(1, len(ema.blocks) + 1) if len(entries) > 1 else []):  # one at a time, to save memory
        z = losses.evaluate(ema, data, entries, [block])[1][0].float().cpu()
        for name, value in zip(measures, (mean_distance(z), effective_rank(z), z.square().mean())):
            measures[name].append(value.item())
    return measures


def save(path, step, config, parts, before=None):
    """Write a checkpoint; the one that `path` held becomes `before`: killed here, a run goes on from that."""
    state = {name: part.state_dict() for name, part in parts.items()} | dict(step=step, config=config)
    with atomic(f"{path}.new") as file:
        torch.save(state, file)
    if before and path.exists():
        os.replace(path, before)
    os.replace(f"{path}.new", path)


def resume(out, config, parts):
    """Load the latest checkpoint into the parts, if there is one -> its step, and the flags that have changed."""
    paths = [path for path in (out / "ckpt.pt", out / "ckpt.prev.pt") if path.exists()]
    if not paths:
        return 0, []
    path, changes = paths[0], []
    try:
        state = load_file(path)
    except UnreadableFile as error:
        raise UserError(f"{error}; delete it to go on from {paths[1] if paths[1:] else 'the start'}") from None
    if not {*parts, "step", "config"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of this train.py; name another --out")
    for name, now in config.items():
        before, flag = state["config"].get(name), "--" + name.replace("_", "-")
        if before != now:
            if name not in LOGGED:
                raise UserError(f"{path}: was begun with {flag} {before}, not {now}; name another --out")
            changes.append(f"{flag} {before} -> {now}")
    for name in parts.keys() - {"opt"}:
        load_weights(parts[name], state[name], path)
    parts["opt"].load_state_dict(copy.deepcopy(state["opt"]))  # a copy, rather than the file's mapped memory
    return state["step"], changes


# ----------------------------------------
# The loop


def note_signals():
    """From now on note Ctrl-C and SIGTERM in the dict returned; one over a second after the first exits at once."""
    noted = {}  # signal: when it first came

    def note(which, frame):
        noted.setdefault(which, time.monotonic())
        if time.monotonic() - min(noted.values()) > 1:  # sooner, it is the launcher passing on what all ranks got
            os._exit(128 + which)

    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, note)
    return noted


def max_over_ranks(value):
    """The greatest of the ranks' integers. The processes wait for each other here, but no GPU does."""
    if not dist.is_initialized():
        return value
    values = torch.tensor(value)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def flops_per_image(args, shape):
    """Floating-point operations of a training step for one image (C, H, W), in all views: forward and backward.

    MeanFlow's derivative and guidance, REPA's projector and the loss terms are not counted.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build_model(args.model, in_channels=shape[0], input_size=shape[-1])
        net(torch.empty(1, *shape), torch.empty(1), torch.empty(1, dtype=torch.long))
    return (2 if args.contrastive else 1) * 3 * counter.get_total_flops()  # backward takes twice what forward takes


def train(args, data, held_out, rank, world, device):
    # the batch: each rank takes its share, in passes of `micro` samples
    share = args.batch // world
    micro, group = args.micro or max(1, share), args.disp_group if args.disp_blocks else 1
    if args.batch % (world * micro) or micro % group:
        raise UserError(f"--batch {args.batch} must be a multiple of ranks x --micro, {world} x {micro}, and --micro "
                        f"of --disp-group, {group} (1 without dispersion)")
    mine = slice(rank * share, (rank + 1) * share)
    steps = args.steps or max(1, round((args.epochs or 80) * len(data.rows) / args.batch))
    flops = flops_per_image(args, data.shape)

    # the model, its EMA and the optimiser
    torch.manual_seed(args.seed)
    args.dtype = args.dtype or default_dtype(device)
    losses = Losses(args, data, device).to(device)
    net = losses.net
    ema = copy.deepcopy(net).requires_grad_(False)
    compile_blocks(net, args.compile, device)
    weights = [p for p in losses.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, args.lr, (0.9, args.beta2), weight_decay=0.0, fused=True)
    parallel = nn.parallel.DistributedDataParallel(losses, gradient_as_bucket_view=True) if world > 1 else losses
    decode = None if data.pixels else VAE(args.vae or data.vae).to(device).decode

    # the run, new or continued
    out = Path(args.out)
    log = out / "log.jsonl"
    if rank == 0:
        locked = lock(out)
    config = {name: value for name, value in vars(args).items() if name not in FREE} | data.contents()
    parts = dict(model=net, ema=ema, projector=losses.projector, opt=optimizer)
    first, changes = resume(out, config, parts)
    optimizer.param_groups[0].update(lr=args.lr, betas=(0.9, args.beta2))  # not the checkpoint's
    if max_over_ranks(first) + max_over_ranks(-first) != 0:  # max - min
        raise UserError(f"--out {out}: the ranks find different checkpoints there; it must be a directory they share")
    if rank == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else device
        print(f"{args.model}, --disp {args.disp} on blocks {args.disp_blocks}, from step {first:,} to {steps:,}: "
              f"{steps * args.batch / len(data.rows):.1f} epochs of {len(data.rows):,} images {data.shape} "
              f"in batches of {args.batch}; {world} x {name}, {args.dtype}", flush=True)
        # what follows the checkpoint will be logged again; a torn line is cut
        lines = log.read_text().splitlines(True) if log.exists() else []
        lines = [line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= first]
        if changes:
            print("changed:", ", ".join(changes))
            lines.append(json.dumps(dict(step=first, changed=changes)) + "\n")
        with atomic(log) as file:
            file.write("".join(lines).encode())
        if args.wandb:
            import wandb
            wandb.init(project="dispersive", dir=args.out, config=config)

    sums, logged, since, signals = collections.defaultdict(float), first, time.time(), note_signals()
    todo = range(first, steps)
    for step, batch in zip(todo, batches(data, todo, args.batch, mine, args.seed, device)):
        # forward and backward, in passes whose gradients add up; nothing here waits for the device
        for begin in range(0, share, micro):
            parallel.require_backward_grad_sync = begin + micro == share  # DDP's: exchange in the last pass
            part = [tensor[begin:begin + micro] for tensor in batch]
            total, terms = parallel(step, mine.start + begin, *part)
            (total * micro / share).backward()
            for name, value in terms.items():
                sums[name] += value * micro / share

        # the optimiser
        sums["gradient"] += nn.utils.clip_grad_norm_(weights, args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        # the EMA; its decay is warmed up, so that a short run's EMA forgets its start
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_([*ema.parameters()], [*net.parameters()], 1 - decay)

        # what is due; the checkpoint comes last: a run that is killed earlier does the rest again
        done, stopped_by = step + 1, max_over_ranks(max(signals, default=0))
        due = lambda every: every and (done % every == 0 or done == steps)
        if not (stopped_by or any(map(due, (args.log_every, args.ckpt_every, args.sample_every, args.snapshot_every)))):
            continue
        values = torch.stack([*sums.values()]) / (world * (done - logged))
        if world > 1:
            dist.all_reduce(values)
        line = dict(zip(sums, values.tolist()))  # waits for the device
        if not all(map(math.isfinite, line.values())):
            raise UserError(f"steps {logged + 1:,} to {done:,}: the loss or the gradient is not finite; no checkpoint "
                            f"has it: go on with a smaller --lr, --grad-clip 1 or --dtype fp32")
        if args.disp_blocks and not args.contrastive:
            line["floor"] = dispersive_floor(args.disp, args.disp_group, args.disp_tau, args.disp_margin)
        rate = (done - logged) * args.batch / (time.time() - since)
        line |= {"images/s": rate, "TFLOP/s": rate * flops / world / 1e12}
        if device.type == "cuda":
            line["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        if rank == 0:
            if args.val and due(args.ckpt_every):
                entries = held_out.spread(2048)
                errors = [losses.evaluate(ema, held_out, entries[begin:begin + 64])[0]
                          for begin in range(0, len(entries), 64)]
                line["val"] = sum(errors).item() / len(entries)
            if due(args.sample_every):
                line |= picture(losses, ema, out / "samples" / f"{done:07d}.png", decode, device)
            show = lambda value: " ".join(f"{v:.4g}" for v in np.ravel(value))
            text = "  ".join(f"{name} {show(value)}" for name, value in line.items())
            left = timedelta(seconds=int((steps - done) * args.batch / rate))
            print(f"step {done:,}/{steps:,}  {text}  left {left}", flush=True)
            with one_line_errors(log), open(log, "a") as file:
                file.write(json.dumps(dict(step=done, **line)) + "\n")
            if args.wandb:
                wandb.log(line, step=done)
            if due(args.snapshot_every):
                save(out / "snapshots" / f"{done:07d}.pt", done, config, dict(ema=ema))
            if stopped_by or due(args.ckpt_every):
                save(out / "ckpt.pt", done, config, parts, out / "ckpt.prev.pt")
        sums.clear()
        logged, since = done, time.time()
        if stopped_by:
            break
    stopped_by = max_over_ranks(max(signals, default=0))  # also what came during the last step
    if rank == 0:
        locked.close()
    if stopped_by:
        if rank == 0:
            print(f"{signal.Signals(stopped_by).name}: saved at step {logged:,}; the same command goes on")
        sys.exit(128 + stopped_by)


def main(argv=None):
    args = parse(argv)
    rank, world, device = start()
    if args.images:
        cache_images(args, rank, world, device)
        if args.cache_only:
            return
    data = Data.open(args.data) if args.data else Data(*demo_data())
    side, rest = divmod(data.shape[-1], MODELS[args.model]["patch_size"])
    if rest:
        raise UserError(f"--model {args.model}: its patches do not divide data of size {data.shape[-1]}")
    if args.repa:
        data.add_features(args.repa, side ** 2)
    held_out = Data.open(args.val) if args.val else data
    if (held_out.shape, held_out.classes, held_out.vae) != (data.shape, data.classes, data.vae):
        raise UserError(f"--val {args.val}: its shape, classes or VAE differ from the training data's")
    if args.label_dropout == 1:
        for part in (data, held_out):
            part.labels[:] = len(data.classes)  # the null label, in grids and validation too
    train(args, data, held_out, rank, world, device)
    if not args.data and rank == 0:
        print(f"see {args.out}/samples; next: python sample.py --ckpt {args.out}/ckpt.pt --steps 25")


if __name__ == "__main__":
    run(main)
