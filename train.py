"""Train a diffusion transformer with Dispersive Loss.

    python train.py                                      a demo that makes its own data
    python train.py --images photos --data data/photos --vae none --size 32    cache, then train
    torchrun --nproc_per_node=8 train.py --data data/photos

A run is a function of (config, data, seed, step). Every draw of a step has a generator of its own,
seeded by (seed, step, purpose), which draws for the whole global batch; each rank takes its slice.
So a checkpoint suffices to go on, and ranks and --micro change nothing but the order of sums.
"""
import argparse
import colorsys
import contextlib
import copy
import fcntl
import functools
import importlib.util
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

from dispersive import (KINDS, MODELS, MeanFlow, build_model, contrastive_loss, dispersive_floor, dispersive_loss,
                        effective_rank, mean_distance, pairwise_distances, repa_loss, repa_projector, repulsion)
from sample import (DEFAULT_OBJECTIVE, OBJECTIVES, VAE, Parser, Progress, UnreadableFile, UserError, atomic, barrier,
                    center_crop, compile_blocks, default_dtype, fingerprint, generate, list_images, load_file,
                    load_weights, lock, number, one_line_errors, open_array, read_image, read_json, run, save_grid,
                    start, weights_in)

CHUNK = 256  # images that are cached at a time
# When a run goes on, flags in FREE may change, and those in LOGGED with a line in the log; others must
# stay. The paths data, vae and repa may change, what they hold may not: see Data.contents.
FREE = {"steps", "epochs", "micro", "compile", "log_every", "ckpt_every", "sample_every", "out", "init",
        "snapshot_every", "wandb", "val", "images", "cache_only", "size", "data", "vae", "repa"}
LOGGED = {"lr", "beta2", "grad_clip", "dtype", "disp_weight"}
# the demo's defaults, where there are neither --data nor --images; its batch depends on the ranks
DEMO = dict(model="SiT-XS/4", lr=1e-3, ema=0.99, steps=1500, log_every=50, ckpt_every=400, sample_every=400)

def parse(argv):
    """The command line -> arguments, checked as far as they can be without reading a file."""
    p = Parser(prog="train.py", description=__doc__)
    flag = p.add_argument
    count = number(int, 1)
    amount = number(float, 0)
    share = number(float, 0, 1)

    # data; without --data and --images: the demo
    flag("--data", metavar="DIR", help="directory of cached latents or pixels")
    flag("--images", metavar="FOLDER", help="cache this folder, with a folder per class, in --data")
    flag("--size", type=number(int, 8), default=256, help="crop and resize images to this (256)")
    flag("--vae", help="ema, mse or a path: cache Stable Diffusion's latents (ema); none: pixels")
    flag("--cache-only", action="store_true", help="stop after caching")
    flag("--val", metavar="DIR", help="held-out data, for the EMA's loss at checkpoints")
    # training
    flag("--model", choices=MODELS, default="SiT-B/2", metavar="NAME",
         help="SiT- or DiT-, then XS, S, B, L or XL, then /2, /4 or /8 (SiT-B/2; demo: SiT-XS/4)")
    flag("--objective", choices=OBJECTIVES, help="default: flow for SiT, diffusion for DiT")
    either = p.add_mutually_exclusive_group().add_argument
    either("--epochs", type=number(float, 1e-3), help="passes over the data (80)")
    either("--steps", type=count, help="instead of --epochs (demo: 1500)")
    flag("--batch", type=count, default=256, help="of all ranks (256; demo: 32 or more)")
    flag("--micro", type=count, help="images per forward pass and rank; default: all its share")
    flag("--init", metavar="FILE", help="start from a checkpoint's weights, own or published")
    flag("--lr", type=amount, default=1e-4, help="learning rate (1e-4; demo: 1e-3)")
    flag("--beta2", type=number(float, 0, 0.999999), help="of AdamW (0.999; MeanFlow: 0.95)")
    flag("--ema", type=share, default=0.9999, help="decay of the mean weights (0.9999; demo: 0.99)")
    flag("--grad-clip", type=amount, default=0.0, help="largest gradient norm; 0: no clipping (0)")
    flag("--label-dropout", type=share, default=0.1, help="share dropped (0.1); 1: no labels")
    flag("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of all random numbers (0)")
    flag("--dtype", choices=["bf16", "fp32"], help="default: bf16 where the hardware multiplies it")
    flag("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    # the dispersive loss, and what it is compared with
    flag("--disp", choices=[*KINDS, "none"], default="infonce", help="kind of loss (infonce)")
    flag("--disp-weight", type=amount, default=0.5, help="lambda (0.5)")
    flag("--disp-tau", type=number(float, 1e-3), default=0.5, help="temperature (0.5)")
    flag("--disp-margin", type=amount, default=1.0, help="margin of the hinge (1)")
    flag("--disp-blocks", help="'all', or numbers from 1 such as 3,6; default: depth/4")
    flag("--disp-group", type=number(int, 2), default=16, help="samples compared at a time (16)")
    flag("--contrastive", choices=["independent", "dependent"],
         help="with a second view, of its own noise and time; or of the same noise and a near time")
    flag("--repa", metavar="FILE", help="align with an encoder's features, .npy (N, 2, tokens, D)")
    flag("--repa-weight", type=amount, default=0.5, help="weight of that term (0.5)")
    flag("--repa-block", type=count, help="block to align; default: 8 for L and XL, else 4")
    flag("--meanflow-omega", type=amount, default=1.0, help="omega of its guidance (1)")
    flag("--meanflow-kappa", type=number(float, 0, 0.999), default=0.0, help="kappa, likewise (0)")
    flag("--meanflow-interval", type=share, nargs=2, default=[0.0, 1.0], help="guided times (0 1)")
    # output
    flag("--out", default="out", help="directory of the run, which is continued if it exists (out)")
    flag("--log-every", type=count, default=100, help="steps per log line (100; demo: 50)")
    flag("--ckpt-every", type=count, default=5000, help="steps per checkpoint (5000; demo: 400)")
    flag("--sample-every", type=count, default=10000, help="steps per grid (10000; demo: 400)")
    flag("--snapshot-every", type=count, help="steps per kept copy of the EMA (none)")
    flag("--wandb", action="store_true", help="also log to Weights & Biases")

    args = p.parse_args(argv)
    if not args.data and not args.images:  # the demo: again, with its defaults
        p.set_defaults(batch=max(32, 16 * int(os.environ.get("WORLD_SIZE", 1))), **DEMO)
        args = p.parse_args(argv)
        if args.epochs:
            args.steps = None
    complete(args)
    return args

def complete(args):
    """Fill in what depends on other flags, and refuse what does not go together."""
    depth = MODELS[args.model]["depth"]
    args.objective = args.objective or DEFAULT_OBJECTIVE[args.model[:3]]
    args.repa_block = args.repa_block or (8 if "L/" in args.model else 4)  # L and XL
    meanflow = args.objective == "meanflow"
    if args.beta2 is None:
        args.beta2 = 0.95 if meanflow else 0.999
    guided = args.meanflow_omega != 1 or args.meanflow_kappa != 0
    known = [str(block) for block in range(1, depth + 1)]
    blocks = (args.disp_blocks or str(depth // 4)).split(",")
    if blocks == ["all"]:
        blocks = known
    if not set(blocks) <= set(known):
        raise UserError(f"--disp-blocks {args.disp_blocks}: expected 'all', or numbers from 1 to {depth} such as 1,3")
    rules = [
        (args.images and not args.data, "--images FOLDER needs --data DIR, where the arrays go"),
        (args.cache_only and not args.images, "--cache-only needs --images"),
        (args.images and args.vae != "none" and args.size % 8, f"--size {args.size}: the VAE needs a multiple of 8"),
        (guided and not meanflow, "--meanflow-omega, -kappa need --objective meanflow"),
        (args.meanflow_interval != [0, 1] and not guided, "--meanflow-interval needs --meanflow-omega or -kappa"),
        (guided and args.label_dropout == 0, "--meanflow-omega, -kappa need the null label: a --label-dropout above 0"),
        (args.contrastive and args.disp == "none", "--contrastive needs a --disp other than none"),
        (args.repa and args.repa_block > depth, f"--repa-block {args.repa_block}: expected 1 to {depth}"),
        (args.wandb and not importlib.util.find_spec("wandb"), "--wandb: not installed: pip install wandb")]
    for broken, message in rules:
        if broken:
            raise UserError(message)
    args.disp_blocks = sorted(int(block) for block in set(blocks))
    if args.disp == "none":
        args.disp_blocks = []

def check_data(args, world, side):
    """Refuse --batch, --model, --val or --repa that do not fit the ranks or data of side x side."""
    if args.batch % (world * args.micro):
        raise UserError(f"--batch {args.batch} must be a multiple of ranks x --micro, {world} x {args.micro} "
                        "(default of --micro: --batch / ranks)")
    if args.disp_blocks and args.micro % args.disp_group:
        raise UserError(f"{args.micro} images per pass and rank (--micro, or --batch / ranks) must be a "
                        f"multiple of --disp-group, {args.disp_group}")
    patch = MODELS[args.model]["patch_size"]
    if side % patch:
        raise UserError(f"--model {args.model}: its patches do not divide data of size {side}")
    if args.val and Data.open(args.val).shape[-1] != side:
        raise UserError(f"--val {args.val}: its size differs from the training data's, {side}")
    if args.repa:
        tokens = (side // patch) ** 2
        found = open_array(args.repa)
        if (found.dtype.kind != "f" or found.ndim != 4 or found.shape[1:3] != (2, tokens)
                or not found.flags.c_contiguous):
            raise UserError(f"--repa {args.repa}: expected floats (N, 2, {tokens}, D) in C order, "
                            f"found {found.dtype} {found.shape}")

# ----------------------------------------
# Data: a demo that is drawn, a folder of images that is cached, the batches that training reads

# The demo's shapes are stars: number of points, inner radius, rotation in turns, size of the hole.
# Two points and inner radius 1 make a square. Each equals its mirror image: flips keep classes.
SHAPES = {"disc": (32, 1, 0, 0), "ring": (32, 1, 0, 0.5), "square": (2, 1, 1 / 8, 0),
          "frame": (2, 1, 1 / 8, 0.5), "triangle": (3, 0.5, 0, 0), "nabla": (3, 0.5, 1 / 2, 0),
          "diamond": (2, 0.6, 0, 0), "star": (5, 0.4, 0, 0), "spark": (4, 0.35, 0, 0),
          "cross": (4, 0.35, 1 / 8, 0)}
BACKGROUND = (16, 18, 32)

def draw_shape(name, rng, size):
    """A shape of a random colour, place and size -> pixels (3, size, size) uint8."""
    points, inner, turn, hole = SHAPES[name]
    large = 8 * size  # drawn large, then averaged
    radius = large * rng.uniform(0.36, 0.44)
    center = large * rng.uniform(0.45, 0.55, 2)
    color = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.55, 0.95), 1.0)
    # points at even angles, alternately at the radius and at the inner radius
    angles = 2 * math.pi * (np.arange(2 * points) / (2 * points) + turn)
    radii = radius * np.tile([1, inner], points)
    outline = np.stack([radii * np.sin(angles), -radii * np.cos(angles)], 1)  # (2 * points, 2)

    canvas = Image.new("RGB", (large, large), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.polygon((center + outline).flatten().tolist(), fill=tuple(int(255 * channel) for channel in color))
    if hole:
        draw.polygon((center + hole * outline).flatten().tolist(), fill=BACKGROUND)
    return np.asarray(canvas.resize((size, size), Image.BOX)).transpose(2, 0, 1)

def demo_data(n=4000, size=16):
    """The demo: n images of size x size pixels, of a class for each shape."""
    rng = np.random.default_rng(0)
    names = list(SHAPES)
    labels = np.arange(n) % len(names)
    images = np.stack([draw_shape(names[label], rng, size) for label in labels])
    return Data(images, labels, names)

def one_ahead(function, items):
    """Yield function(item) for every item, while a thread works on the next one."""
    ahead = []
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) == 2:
                yield ahead.pop(0).result()
        if ahead:
            yield ahead.pop().result()

def encode_views(vae, images, device):
    """Pixels (n, 3, H, H) -> float16 mean and std of the latents of the images and of their mirror
    images, (n, 2, 8, H/8, H/8). A mirror image's latent is not the mirrored latent."""
    x = torch.from_numpy(images).to(device).float() / 127.5 - 1
    views = [torch.cat(vae.encode(view), 1) for view in (x, x.flip(-1))]
    return torch.stack(views, 1).half().cpu().numpy()

def write_rows(path, first, rows):
    """Write to rows of an .npy. On a full disk this fails; mapped memory would kill the process."""
    begin = open_array(path).offset + first * rows[0].nbytes
    with one_line_errors(path), open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # nodes write whole pages to network disks, others' rows too
        file.seek(begin)
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())

def begin_cache(target, meta, shape, dtype):
    """Write meta.json, labels that are all -2, not cached yet, and last empty latents. If that was
    done before, refuse to go on with other images or flags."""
    if (target / "latents.npy").exists():
        before = read_json(target / "meta.json")
        vae = "vae_sha256" if "vae_sha256" in before else "vae"  # older caches hold the name alone
        for name in ("classes", "size", "images", vae):
            if before.get(name) != meta[name]:
                raise UserError(f"--data {target}: was begun with other {name}; name another")
    elif not (target / "labels.npy").exists():
        with atomic(target / "meta.json") as file:
            file.write(json.dumps(meta, indent=1).encode())
        with one_line_errors(target):
            np.save(target / "labels.new.npy", np.full(shape[0], -2))
            np.lib.format.open_memmap(target / "new.npy", "w+", dtype, shape)
            os.replace(target / "new.npy", target / "latents.npy")

def cache_images(args, rank, world, device):
    """Turn --images into the arrays of --data: meta.json, then latents.npy, last labels.npy.
    Until all is cached, the labels are in labels.new.npy, -2 where an image is not cached yet, so
    that an interrupted run knows where to go on. -1 is an unreadable image."""
    folder, target, size = Path(args.images), Path(args.data), args.size
    unfinished, finished = target / "labels.new.npy", target / "labels.npy"
    files = [file for file in list_images(folder) if file.parent != folder]
    if not files:
        raise UserError(f"--images {folder}: expected class folders, found images without a class")
    names = [file.relative_to(folder) for file in files]
    classes, labels = np.unique([name.parts[0] for name in names], return_inverse=True)
    listing = zlib.crc32(os.fsencode("\n".join(map(str, names))))
    meta = dict(classes=classes.tolist(), vae=args.vae or "ema", vae_sha256=None, size=size,
                images=f"{len(files)} ({listing:08x})")
    if rank == 0:
        locked = lock(target)  # until this function returns
    vae = None
    shape, dtype = (len(files), 3, size, size), "uint8"
    if args.vae != "none":
        vae = VAE(args.vae or "ema").to(device)
        meta["vae_sha256"] = fingerprint(vae)  # a path may come to hold other weights
        shape, dtype = (len(files), 2, 8, size // 8, size // 8), "float16"
    if rank == 0:
        begin_cache(target, meta, shape, dtype)
    barrier()
    if finished.exists():
        return

    cached = open_array(unfinished) > -2
    chunks = range(0, len(files), CHUNK)[rank::world]
    todo = [first for first in chunks if not cached[first:first + CHUNK].all()]
    progress = Progress("caching", min(len(todo) * CHUNK * world, len(files)), quiet=rank > 0)
    with ThreadPoolExecutor() as pool:
        def load_crop(i):
            """Pixels (3, size, size); of an unreadable image black, and its label becomes -1."""
            try:
                return np.asarray(center_crop(read_image(files[i]), size)).transpose(2, 0, 1)
            except UnreadableFile as error:
                sys.stderr.write(f"left out: {error}\n")  # in one piece: other threads write, too
                labels[i] = -1
                return np.zeros((3, size, size), np.uint8)

        def load_chunk(first):
            rows = range(first, min(first + CHUNK, len(files)))
            return np.stack(list(pool.map(load_crop, rows)))

        # many threads read the next chunk while this one is encoded
        for first, images in zip(todo, one_ahead(load_chunk, todo)):
            if vae is not None:
                images = encode_views(vae, images, device)
            write_rows(target / "latents.npy", first, images)
            write_rows(unfinished, first, labels[first:first + CHUNK])
            progress.update(CHUNK * world)
    barrier()
    if rank == 0:
        if open_array(unfinished).max() < 0:
            raise UserError(f"--images {folder}: none of its images can be read")
        os.replace(unfinished, finished)
    barrier()

class Data:
    """Memory-mapped samples: uint8 pixels (N, 3, H, H), or float16 latents (N, 2, 8, H, H), mean and
    std of an image and of its mirror image. Entry i is row rows[i]; a label of -1 is left out.
    shape: that of a sample, (3 or 4, H, H). features: an encoder's, for REPA, (N, 2, tokens, D)."""

    def __init__(self, images, labels, classes, vae="none", vae_sha256=None):
        self.images, self.labels, self.classes = images, labels, classes
        self.vae, self.vae_sha256 = vae, vae_sha256  # its name or path, and the hash of its weights
        self.rows = np.flatnonzero(labels >= 0)
        self.pixels = vae == "none"
        self.shape = (3 if self.pixels else 4,) + images.shape[-2:]
        self.features = None

    @classmethod
    def open(cls, folder):
        """The data of a folder that --images made; UserError if it is anything else."""
        labels = open_array(Path(folder, "labels.npy"))
        images = open_array(Path(folder, "latents.npy"))
        meta = read_json(Path(folder, "meta.json"))
        classes, vae = meta.get("classes"), meta.get("vae")
        dtype, channels = ("uint8", (3,)) if vae == "none" else ("float16", (2, 8))
        shape = labels.shape + channels + 2 * images.shape[-1:]  # (N,) + channels + (H, H)
        if not (isinstance(classes, list) and isinstance(vae, str) and images.dtype == dtype
                and images.shape == shape and images.size > 0 and labels.dtype.kind == "i"
                and labels.min() >= -1 and 0 <= labels.max() < len(classes)):
            raise UserError(f"{folder}: expected what --images makes, found latents.npy {images.dtype} "
                            f"{images.shape}, labels.npy {labels.dtype} {labels.shape}, meta.json {str(meta):.200}")
        return cls(images, labels.astype(np.int64), classes, vae, meta.get("vae_sha256"))

    def contents(self):
        """What tells these data from others, for the config."""
        sums = [checksum(self.images), zlib.crc32(self.labels.tobytes()), self.classes]
        contents = dict(data=f"contents {zlib.crc32(str(sums).encode()):08x}", vae=self.vae, repa=False)
        if self.features is not None:
            contents["repa"] = f"contents {checksum(self.features):08x}"
        return contents

    def has_same_vae(self, other):
        if self.vae_sha256 and other.vae_sha256:
            return self.vae_sha256 == other.vae_sha256
        return self.vae == other.vae  # of older caches the name alone is known

    def spread(self, count):
        """Up to `count` entries, evenly spaced, since a cache is sorted by class."""
        return np.linspace(0, len(self.rows) - 1, min(count, len(self.rows))).astype(int)

    def read(self, entries, flips):
        """[images or latents, mirrored where flips says; labels; features, if any] of entries."""
        rows = self.rows[entries]
        if self.pixels:
            images = read_rows(self.images, rows)  # a copy
            images[flips] = images[flips, ..., ::-1]
        else:
            images = read_views(self.images, rows, flips)
        arrays = [images, self.labels[rows]]
        if self.features is not None:
            arrays.append(read_views(self.features, rows, flips))
        return [torch.from_numpy(array) for array in arrays]

def checksum(array):
    """CRC of a small array, or of about 64 evenly spaced rows of a large one."""
    return zlib.crc32(array[::max(1, len(array) // 64)].tobytes())

def read_rows(array, rows):
    """array[rows]. All rows are announced first: Linux then reads them in parallel and nothing
    else, many times as fast from a disk."""
    if isinstance(array, np.memmap) and hasattr(os, "posix_fadvise"):
        size = array.strides[0]
        with contextlib.suppress(OSError), open(array.filename, "rb") as file:  # it is only a hint
            for row in rows:
                os.posix_fadvise(file.fileno(), array.offset + int(row) * size, size, os.POSIX_FADV_WILLNEED)
    return array[rows]

def read_views(array, rows, mirrored):
    """Rows of an array (N, 2, ...): of each the first view, or the second where `mirrored` says."""
    return read_rows(array.reshape((-1,) + array.shape[2:]), 2 * rows + mirrored)

@functools.lru_cache(maxsize=2)  # for a batch that spans two epochs
def permutation(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)

def batch_entries(seed, step, batch, n):
    """Entries of a batch: sample k of a run is entry k mod n of epoch k div n's permutation."""
    samples = range(step * batch, (step + 1) * batch)
    return np.array([permutation(seed, k // n, n)[k % n] for k in samples])

def batches(data, steps, batch, mine, seed, device):
    """Yield this rank's slice `mine` of the global batch of every step, as Data.read gives it."""
    def read(step):
        entries = batch_entries(seed, step, batch, len(data.rows))
        flips = np.random.default_rng([seed, step, zlib.crc32(b"flip")]).random(batch) < 0.5
        return data.read(entries[mine], flips[mine])
    for tensors in one_ahead(read, steps):
        if device.type == "cuda":  # pinned memory is copied while the host goes on
            tensors = [tensor.pin_memory() for tensor in tensors]
        yield [tensor.to(device, non_blocking=True) for tensor in tensors]

# ----------------------------------------
# The loss of a batch

class Draws:
    """The random numbers of a step: drawn for the whole batch, whatever the ranks and --micro, of
    which a slice, `part`, is returned."""

    def __init__(self, seed, step, batch, part, device):
        self.seed, self.step, self.batch, self.part, self.device = seed, step, batch, part, device

    def generator(self, purpose):
        """A new one, for this step and purpose. CPU generators ignore all but 32 bits of a seed."""
        words = [self.seed, self.step, zlib.crc32(purpose.encode())]
        seed = np.random.SeedSequence(words).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(seed))

    def uniform(self, purpose):
        return torch.rand(self.batch, generator=self.generator(purpose), device=self.device)[self.part]

    def normal(self, purpose, shape):
        shape = (self.batch,) + shape
        return torch.randn(shape, generator=self.generator(purpose), device=self.device)[self.part]

    def times(self, purpose, objective):
        """t and r (n,) for the objective's loss; only MeanFlow has an r of its own."""
        times = objective.times(self.batch, self.generator(purpose))
        t, r = times if isinstance(objective, MeanFlow) else (times, times)
        return t[self.part], r[self.part]

class Losses(nn.Module):
    """All that is trained, and all terms of its loss, in one module for DDP to wrap."""

    def __init__(self, args, data, device):
        super().__init__()
        self.args, self.data = args, data
        self.meanflow = args.objective == "meanflow"
        options = {}
        if self.meanflow:
            options = dict(omega=args.meanflow_omega, kappa=args.meanflow_kappa, interval=args.meanflow_interval)
        self.objective = OBJECTIVES[args.objective](**options)
        self.net = build_model(args.model, input_size=data.shape[-1], in_channels=data.shape[0],
                               num_classes=len(data.classes), class_dropout_prob=args.label_dropout,
                               second_time=self.meanflow)
        if args.init:
            load_initial_weights(self.net, args.init)
        self.projector = nn.Identity()  # without REPA, no weights
        self.captured = args.disp_blocks  # the blocks whose activations are needed, in order
        if args.repa:
            self.projector = repa_projector(self.net.pos_embed.shape[-1], data.features.shape[-1])
            self.captured = sorted(set(args.disp_blocks) | {args.repa_block})
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    def forward(self, step, position, images, labels, features=None):
        """A part of the batch, as Data.read gives it, whose first sample is at `position` of the global
        batch of this step -> the total to minimise, a scalar, and what to log, {name: scalar}."""
        args, n = self.args, len(images)
        draws = Draws(args.seed, step, args.batch, slice(position, position + n), images.device)

        # the sample, its label, noise and time
        x = self.prepare(images, draws, "posterior")
        y = torch.where(draws.uniform("label") < args.label_dropout, self.net.num_classes, labels)
        noise = draws.normal("noise", self.data.shape)
        t, r = draws.times("time", self.objective)

        # a second view of the same samples, to contrast the first with; it always has r = t
        if args.contrastive:
            if args.contrastive == "independent":
                noise2 = draws.normal("second noise", self.data.shape)
                t2, _ = draws.times("second time", self.objective)
            else:
                noise2 = noise
                t2 = nearby_times(t, draws.uniform("shift"))
            x, y = torch.cat([x, x]), torch.cat([y, y])
            noise = torch.cat([noise, noise2])
            t, r = torch.cat([t, t2]), torch.cat([r, t2])

        # the network: squared error per sample, and activations
        options = dict(blocks=self.captured)
        if self.meanflow:
            options["moving"] = self.objective.moving(n, position)  # none of the second view
        with self.autocast:
            error, activations = self.objective.loss(self.net, x, y, t, noise, r, **options)
        z = dict(zip(self.captured, activations))  # {block: (n, or 2n with two views, T, D)}

        # L_objective of the first view, "loss" in the log; MeanFlow minimises it weighted
        error = error[:n]
        terms = {"loss": error.mean()}
        total = terms["loss"]
        if self.meanflow:
            total = self.objective.weighted(error, x[0].numel()).mean()

        # + lambda * L_disp
        if args.disp_blocks:
            terms.update(self.dispersion([z[block] for block in args.disp_blocks], n))
            total = total + args.disp_weight * terms["disp"]

        # + weight * L_repa
        if args.repa:
            with self.autocast:
                terms["repa"] = repa_loss(self.projector(z[args.repa_block][:n]), features)
            total = total + args.repa_weight * terms["repa"]
        return total, terms

    def prepare(self, images, draws, purpose):
        """Pixels in [-1, 1], or latents drawn from their posterior."""
        if self.data.pixels:
            return images.float() / 127.5 - 1
        mean, std = images.float().chunk(2, 1)
        return mean + std * draws.normal(purpose, self.data.shape)

    def dispersion(self, activations, n):
        """{"disp": mean L_disp of the blocks}; for infonce and hinge without a second view, too,
        "distance", the mean D of different samples. The first n activations are the first view."""
        kind, tau, margin = self.args.disp, self.args.disp_tau, self.args.disp_margin
        group = self.args.disp_group
        losses, distances = [], []
        for z in activations:
            if self.args.contrastive:
                losses.append(contrastive_loss(z[:n], z[n:], kind, tau, margin, group=group))
            elif kind in ("infonce", "hinge"):
                D = pairwise_distances(z, kind, group)  # (groups, group, group)
                losses.append(repulsion(D, kind, tau, margin))
                distances.append(D.mean() * group / (group - 1))  # over pairs i != j
            else:
                losses.append(dispersive_loss(z, kind, tau, margin, group))
        means = {"disp": torch.stack(losses).mean()}
        if distances:
            means["distance"] = torch.stack(distances).mean()
        return means

    @torch.no_grad()
    def evaluate(self, net, data, entries, blocks=()):
        """The regression losses (n,) of a network on these entries, and its activations after the
        blocks. The draws depend on the first entry and their number alone."""
        device = net.pos_embed.device
        images, labels = data.read(entries, np.zeros(len(entries), bool))[:2]
        draws = Draws(0, entries[0], len(entries), slice(None), device)
        x = self.prepare(images.to(device), draws, "val posterior")
        noise = draws.normal("val noise", self.data.shape)
        t, r = draws.times("val time", self.objective)
        with self.autocast:
            return self.objective.loss(net, x, labels.to(device), t, noise, r, blocks)

def nearby_times(t, uniform):
    """Times (n,) within 0.005 of t, or steps within 5, by random numbers (n,) in [0, 1)."""
    shift = 0.005 * (2 * uniform - 1)
    if t.is_floating_point():
        return (t + shift).clamp(0, 1)
    return (t + 999 * shift).clamp(0, 999).round().long()

def load_initial_weights(net, path):
    """Load a checkpoint's weights. Where it lacks the embeddings of labels or of MeanFlow's second
    time, or has them in another shape, they keep their initialisation."""
    state = weights_in(load_file(path))
    for name, tensor in net.state_dict().items():
        misfit = name not in state or state[name].shape != tensor.shape
        if misfit and name.startswith(("r_embedder.", "y_embedder.")):
            state[name] = tensor
    load_weights(net, state, path)

# ----------------------------------------
# The run

def catch_signals():
    """From now on, only note Ctrl-C and SIGTERM; one that comes over a second after the first ends
    the process at once. Returns a function that gives the first signal's number, or 0."""
    came = []  # (time, signal)
    def note(which, frame):
        came.append((time.monotonic(), which))
        if came[-1][0] - came[0][0] > 1:  # sooner, it may be torchrun that passes the first one on
            os._exit(128 + which)
    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return lambda: came[0][1] if came else 0

def from_all_ranks(value, world):
    """[every rank's integer]. On the CPU, so that no GPU is waited for."""
    if world == 1:
        return [value]
    values = torch.zeros(world, dtype=torch.long)
    dist.all_gather(list(values.split(1)), torch.tensor([value]))
    return values.tolist()

def save(path, step, config, parts, before=None):
    """Write a checkpoint. The one that `path` held becomes `before`: a run that is killed between
    the two renames goes on from it."""
    state = {name: part.state_dict() for name, part in parts.items()}
    with atomic(f"{path}.new") as file:
        torch.save(dict(state, step=step, config=config), file)
    if before and path.exists():
        os.replace(path, before)
    os.replace(f"{path}.new", path)

class Run:
    """What is trained, the loop that trains it, and what that leaves in --out."""

    def __init__(self, args, data, held_out, rank, world, device):
        self.args, self.data, self.held_out = args, data, held_out
        self.rank, self.world, self.device = rank, world, device
        self.out, self.log = Path(args.out), Path(args.out, "log.jsonl")
        self.steps = args.steps or max(1, round((args.epochs or 80) * (len(data.rows) / args.batch)))

        # the model, its EMA and the optimiser
        torch.manual_seed(args.seed)
        if device.type == "cuda" and args.dtype == "bf16":
            torch.set_float32_matmul_precision("high")  # TF32, for products of the dispersive loss
        self.losses = Losses(args, data, device).to(device)
        self.net = self.losses.net
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        compile_blocks(self.net, args.compile, device)
        self.weights = [p for p in self.losses.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(self.weights, args.lr, (0.9, args.beta2), weight_decay=0.0, fused=True)
        self.parallel = self.losses
        if world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.losses, gradient_as_bucket_view=True)

        # what --out holds: the parts and flags in a checkpoint; what its log and pictures need
        self.parts = dict(model=self.net, ema=self.ema, projector=self.losses.projector, opt=self.opt)
        self.config = {name: value for name, value in vars(args).items() if name not in FREE}
        self.config.update(data.contents())
        if not args.repa:
            del self.config["repa_block"]  # it plays no part
        self.decode = None
        if not data.pixels:
            self.decode = VAE(args.vae or data.vae).to(device).decode
        self.sums = {}  # of what is logged, since the last line

    def resume(self):
        """Load the latest checkpoint, if any -> its step. Begin or go on with the log."""
        args, data = self.args, self.data
        if self.rank == 0:
            self.locked = lock(self.out)  # as long as this object lives
        step, changes = self.load()
        if len(set(from_all_ranks(step, self.world))) > 1:
            raise UserError(f"--out {args.out}: the ranks find different checkpoints; it must be shared")
        self.logged = step  # of the last log line, or of the start
        if self.rank > 0:
            return step
        # drop an unfinished last line, and what follows the checkpoint: it will be logged again
        self.log.touch()
        lines = self.log.read_text().splitlines(True)
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if changes:
            print("changed:", ", ".join(changes))
            lines.append(json.dumps(dict(step=step, changed=changes)) + "\n")
        with atomic(self.log) as file:
            file.write("".join(lines).encode())
        if args.wandb:
            import wandb
            self.wandb = wandb.init(project="dispersive", dir=args.out, config=self.config)
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device
        print(f"{args.model}, --disp {args.disp} on blocks {args.disp_blocks}, from step {step:,} to {self.steps:,}: "
              f"{self.steps * args.batch / len(data.rows):.1f} epochs of {len(data.rows):,} images {data.shape} in "
              f"batches of {args.batch}; {self.world} x {gpu}, {args.dtype}", flush=True)
        if step >= self.steps:
            print(f"the run is at step {step:,} of {self.steps:,} already: nothing is left to do")
        return step

    def load(self):
        """Load the latest checkpoint, if any -> its step, and the flags that changed since."""
        paths = [self.out / "ckpt.pt", self.out / "ckpt.prev.pt"]
        paths = [path for path in paths if path.exists()]
        if not paths:
            return 0, []
        path, older = (paths + ["the start"])[:2]
        try:
            state = load_file(path)
        except UnreadableFile as error:
            raise UserError(f"{error}; delete it to go on from {older}") from None
        if state.keys() != {"step", "config"} | self.parts.keys():
            raise UserError(f"{path}: not a checkpoint of this train.py; name another --out")
        changes = []
        for name, now in self.config.items():
            before = state["config"].get(name)
            if before == now or name == "vae":  # the VAE may have been moved; the data are compared
                continue
            flag = "--" + name.replace("_", "-")
            if name not in LOGGED:
                raise UserError(f"{path}: was begun with {flag} {before}, not {now}; name another --out")
            changes.append(f"{flag} {before} -> {now}")
        for name in ("model", "ema", "projector"):
            load_weights(self.parts[name], state[name], path)
        self.opt.load_state_dict(copy.deepcopy(state["opt"]))  # not the file's mapped memory
        self.opt.param_groups[0].update(lr=self.args.lr, betas=(0.9, self.args.beta2))
        return state["step"], changes

    def train(self):
        """Train from the latest checkpoint to the last step, or until any rank gets a signal."""
        args, micro = self.args, self.args.micro
        first = self.resume()
        # each rank takes its share of the batch, in passes of `micro` samples
        per_rank = args.batch // self.world
        mine = slice(self.rank * per_rank, (self.rank + 1) * per_rank)
        todo = range(first, self.steps)
        first_signal = catch_signals()
        self.since = time.time()  # the last log line, or the start
        for step, batch in zip(todo, batches(self.data, todo, args.batch, mine, args.seed, self.device)):
            # forward and backward, in passes whose gradients add up; nothing waits for the device
            for begin in range(0, per_rank, micro):
                # DDP's switch: exchange gradients in the last pass alone. Without DDP it is not read.
                self.parallel.require_backward_grad_sync = begin + micro == per_rank
                part = [tensor[begin:begin + micro] for tensor in batch]
                total, terms = self.parallel(step, mine.start + begin, *part)
                (total * micro / per_rank).backward()
                self.add(terms, micro / per_rank)

            # the gradient's norm, and clipping
            norm = nn.utils.get_total_norm([p.grad for p in self.weights if p.grad is not None])
            if args.grad_clip:
                nn.utils.clip_grads_with_norm_(self.weights, args.grad_clip, norm)
            self.add({"grad_norm": norm})

            self.opt.step()
            self.opt.zero_grad()

            # EMA; its decay is warmed up, so that a short run's EMA forgets its start
            decay = min(args.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)

            # log, sample, save; stopped_by: the signal that any rank got, or 0
            stopped_by = max(from_all_ranks(first_signal(), self.world))
            self.record(step + 1, stopped_by)
            if stopped_by:
                break
        stopped_by = max(from_all_ranks(first_signal(), self.world))  # it may have come in the last record
        if stopped_by:
            if self.rank == 0:
                name = signal.Signals(stopped_by).name
                print(f"{name}: saved at step {self.logged:,}; the same command goes on")
            sys.exit(128 + stopped_by)

    def add(self, terms, weight=1.0):
        """Add {name: scalar tensor} to what the next log line averages; waits for no GPU."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach() * weight

    def record(self, done, stopped_by):
        """All that is due after `done` steps. The checkpoint is written last, so that a run killed
        here repeats these steps, their log and their grid."""
        def is_due(every):
            return every and (done % every == 0 or done == self.steps)
        args = self.args
        sample, snapshot = is_due(args.sample_every), is_due(args.snapshot_every)
        ckpt = is_due(args.ckpt_every) or stopped_by
        if not (is_due(args.log_every) or sample or snapshot or ckpt):
            return
        line = self.averages(done)  # on all ranks
        if self.rank == 0:
            if args.val and is_due(args.ckpt_every):
                line["val"] = self.validate()
            if sample:
                self.draw_grid(self.out / "samples" / f"{done:07d}.png")
                line.update(self.measure_blocks())
            self.write_log(done, line)
            if snapshot:
                save(self.out / "snapshots" / f"{done:07d}.pt", done, self.config, dict(ema=self.ema))
            if ckpt:
                save(self.out / "ckpt.pt", done, self.config, self.parts, self.out / "ckpt.prev.pt")
        self.sums, self.logged, self.since = {}, done, time.time()

    def averages(self, done):
        """{name: average over steps and ranks since the last line}, the floor and the speed."""
        args, count = self.args, done - self.logged
        values = torch.stack(list(self.sums.values())) / (self.world * count)
        if self.world > 1:
            dist.all_reduce(values)
        line = dict(zip(self.sums, values.tolist()))  # waits for the device
        if not np.isfinite(list(line.values())).all():
            raise UserError(f"steps {self.logged + 1:,} to {done:,}: the loss or its gradient is not finite, and "
                            "was not saved: go on with a smaller --lr, --grad-clip 1 or --dtype fp32")
        if args.disp_blocks and not args.contrastive:
            line["floor"] = dispersive_floor(args.disp, args.disp_group, args.disp_tau, args.disp_margin)
        rate = count * args.batch / (time.time() - self.since)
        line["images/s"] = rate  # of all ranks
        # Operations of the blocks' matrix products in a step, for one image: 2 for each token and
        # each of 12 D^2 weights, 4 T^2 D for attention; backward takes twice what forward takes.
        # MeanFlow's passes without gradients are not counted.
        T, D = self.net.pos_embed.shape[1:]
        views = 1 + bool(args.contrastive)
        flops = 3 * views * len(self.net.blocks) * (24 * T * D ** 2 + 4 * T ** 2 * D)
        line["TFLOP/s"] = rate * flops / self.world / 1e12  # of each rank
        if self.device.type == "cuda":
            line["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        return line

    def validate(self):
        """The EMA's regression loss on up to 2,048 held-out samples, 64 at a time."""
        entries = self.held_out.spread(2048)
        parts = np.split(entries, range(64, len(entries), 64))
        errors = [self.losses.evaluate(self.ema, self.held_out, part)[0] for part in parts]
        return torch.cat(errors).mean().item()

    def draw_grid(self, path):
        """Write a grid of samples: 10 classes, 8 samples each, one class a row."""
        classes = np.unique(self.data.labels[self.data.rows])
        classes = classes[np.linspace(0, len(classes) - 1, 10).round().astype(int)]
        labels = torch.from_numpy(classes.repeat(8))
        steps = 1 if self.losses.meanflow else 25
        images = generate(self.ema, self.losses.objective, self.data.shape, labels, range(80), self.args.seed,
                          self.device, self.args.dtype, self.decode, steps=steps)
        save_grid(images, path)

    def measure_blocks(self):
        """{measure: [its value after each block]} of the EMA, over up to 64 samples."""
        entries, blocks = self.data.spread(64), range(1, len(self.ema.blocks) + 1)
        if len(entries) < 2:
            return {}
        _, activations = self.losses.evaluate(self.ema, self.data, entries, blocks)
        activations = [z.float().cpu() for z in activations]
        return dict(block_distance=[mean_distance(z).item() for z in activations],
                    block_rank=[effective_rank(z).item() for z in activations],
                    block_norm=[z.square().mean().item() for z in activations])

    def write_log(self, done, line):
        """Print a line, of a list the first, middle and last value; append all to log.jsonl."""
        texts = []
        for name, value in line.items():
            if isinstance(value, list):
                value = [value[0], value[len(value) // 2], value[-1]]
            texts.append(f"{name} " + " ".join(f"{one:.4g}" for one in np.ravel(value)))
        left = timedelta(seconds=int((self.steps - done) * self.args.batch / line["images/s"]))
        print(f"step {done:,}/{self.steps:,}  {'  '.join(texts)}  left {left}", flush=True)
        with one_line_errors(self.log), open(self.log, "a") as file:
            file.write(json.dumps(dict(step=done, time=time.time(), lr=self.args.lr, **line)) + "\n")
        if self.args.wandb:
            self.wandb.log(line, step=done)

def main(argv=None):
    args = parse(argv)
    rank, world, device = start()
    args.micro = args.micro or max(1, args.batch // world)
    args.dtype = args.dtype or default_dtype(device)
    if args.images:
        if not args.cache_only:  # now, not after hours of caching
            check_data(args, world, args.size if args.vae == "none" else args.size // 8)
        cache_images(args, rank, world, device)
        if args.cache_only:
            return
    data = Data.open(args.data) if args.data else demo_data()
    check_data(args, world, data.shape[-1])
    if args.repa:
        data.features = open_array(args.repa)
        if len(data.features) != len(data.labels):
            raise UserError(f"--repa {args.repa}: expected {len(data.labels)} rows, found {len(data.features)}")
    held_out = Data.open(args.val) if args.val else data
    same_kind = held_out.shape == data.shape and held_out.classes == data.classes
    if not same_kind or not held_out.has_same_vae(data):
        raise UserError(f"--val {args.val}: its shape, classes or VAE differ from the training data's")
    if args.label_dropout == 1:  # the null label, in grids and validation too
        data.labels[:] = len(data.classes)
        held_out.labels[:] = len(data.classes)
    Run(args, data, held_out, rank, world, device).train()
    if not args.data and rank == 0:
        print(f"see {args.out}/samples; next: python sample.py --ckpt {args.out}/ckpt.pt --steps 25")

if __name__ == "__main__":
    run(main)
