"""Train a diffusion transformer with Dispersive Loss.

    python train.py                                      a demo that draws its own data: 4 minutes on 2 CPU cores
    python train.py --images photos --data data/photos --vae none --size 32             cache a folder, then train
    torchrun --nproc_per_node=8 train.py --data data/photos --model SiT-B/2

A run is a function of (config, data, seed, step): every draw comes from a stream seeded by (seed, step, purpose) for
the whole global batch, of which each rank takes its slice. So resuming needs no generator states, and the number of
ranks and of accumulation steps changes nothing but the order of floating-point sums.
"""
import argparse
import colorsys
import contextlib
import copy
import ctypes
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

from dispersive import (KINDS, MODELS, MeanFlow, build_model, contrastive_loss, dispersive_floor, dispersive_loss,
                        effective_rank, mean_distance, repa_loss, repa_projector)
from sample import (OBJECTIVES, PATIENCE, VAE, Parser, Progress, UserError, atomic, barrier, check_state, clock,
                    command, compile_blocks, cpu_cores, default_dtype, default_objective, first_line, generate,
                    list_images, load_file, load_weights, lock, number, read_image, read_json, refuse_other,
                    save_grid, start, weights_in)

DEMO = dict(model="SiT-XS/4", epochs=12, batch=32, lr=1e-3, ema=0.99, log_every=50, ckpt_every=400, sample_every=400)
VAL_IMAGES, VAL_CHUNK = 2048, 64  # of the held-out data, and how many go through the network at a time
CKPT = "ckpt.pt", "ckpt.prev.pt", "ckpt.new.pt"  # the latest, the one before, and the next until it is verified
NEVER = 2 ** 62  # the first bad step of a run without one
# what may differ when a run is resumed; data and features are compared by content
MAY_CHANGE = {"steps", "epochs", "micro", "compile", "log_every", "ckpt_every", "sample_every", "snapshot_every",
              "wandb", "resume", "out", "data", "val", "images", "cache_only", "skip_bad", "size", "vae", "bench",
              "repa"}


def parse(argv):
    p = Parser(prog="train.py", description=__doc__)
    data = p.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="directory of cached latents or pixels")
    data.add_argument("--images", metavar="FOLDER", help="cache this folder of class folders in --data first")
    data.add_argument("--size", type=number(int, 8), default=256, help="crop and resize images to this (256)")
    data.add_argument("--vae", help="ema, mse or a file: keep Stable Diffusion's latents (ema); none: keep the pixels")
    data.add_argument("--skip-bad", action="store_true", help="leave out unreadable images instead of stopping")
    data.add_argument("--cache-only", action="store_true", help="stop after caching")
    data.add_argument("--val", metavar="DIR", help="held-out data: log the EMA's regression loss on it at checkpoints")
    run = p.add_argument_group("training")
    run.add_argument("--model", default="SiT-B/2", help="SiT- or DiT-, XS, S, B, L or XL, /2, /4 or /8 (SiT-B/2)")
    run.add_argument("--objective", choices=[*OBJECTIVES], help="default: flow for SiT, diffusion for DiT")
    run.add_argument("--epochs", type=number(float, 0), default=80, help="(80)")
    run.add_argument("--steps", type=number(int, 1), help="instead of epochs")
    run.add_argument("--batch", type=number(int, 1), default=256, help="global batch (256)")
    run.add_argument("--micro", type=number(int, 1), help="samples a forward pass on each rank; default: its share")
    run.add_argument("--init", metavar="FILE", help="start from the weights of a checkpoint, one's own or published")
    run.add_argument("--lr", type=number(float, 0), default=1e-4, help="(1e-4)")
    run.add_argument("--ema", type=number(float, 0, 1), default=0.9999, help="decay, warmed up (0.9999)")
    run.add_argument("--label-dropout", type=number(float, 0, 1), default=0.1, help="share of the labels replaced by "
                     "the null label; 1 trains without labels (0.1)")
    run.add_argument("--grad-clip", type=number(float, 0), default=0.0, help="largest gradient norm; 0: any (0)")
    run.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0)
    run.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 where the hardware multiplies it")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    disp = p.add_argument_group("dispersive loss")
    disp.add_argument("--disp", choices=[*KINDS, "none"], default="infonce")
    disp.add_argument("--disp-weight", type=number(float, 0), default=0.5, help="lambda (0.5)")
    disp.add_argument("--disp-tau", type=number(float, 1e-3), default=0.5, help="temperature (0.5)")
    disp.add_argument("--disp-margin", type=number(float, 0), default=1.0, help="of the hinge (1.0)")
    disp.add_argument("--disp-blocks", help="'all', or numbers from 1 such as 3,6; default: depth/4")
    disp.add_argument("--disp-group", type=number(int, 2), default=16, help="samples compared with each other (16)")
    compared = p.add_argument_group("what it is compared with")
    compared.add_argument("--contrastive", choices=["independent", "dependent"], help="contrast with a second view of "
                          "each image, of its own noise and time, or of the same noise and a time within 0.005")
    compared.add_argument("--repa", metavar="FILE", help="align a block with an encoder's features, an .npy "
                          "(N, tokens, D), or (N, 2, tokens, D) with those of the mirror images")
    compared.add_argument("--repa-weight", type=number(float, 0), default=0.5, help="(0.5)")
    compared.add_argument("--repa-block", type=number(int, 1), default=8, help="(8)")
    compared.add_argument("--meanflow-omega", type=number(float, 0), default=1.0, help="MeanFlow's guidance in "
                          "training, of effective scale omega / (1 - kappa) (1: none)")
    compared.add_argument("--meanflow-kappa", type=number(float, 0, 0.999), default=0.0, help="(0)")
    compared.add_argument("--meanflow-interval", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0],
                          metavar=("FROM", "TO"), help="times of that guidance; 0 is noise, 1 is data (0 1)")
    out = p.add_argument_group("output")
    out.add_argument("--out", default="out", help="directory of ckpt.pt, log.jsonl and samples/ (out)")
    out.add_argument("--log-every", type=number(int, 1), default=100, help="(100)")
    out.add_argument("--ckpt-every", type=number(int, 1), default=5000, help="(5000)")
    out.add_argument("--sample-every", type=number(int, 1), default=10000, help="(10000)")
    out.add_argument("--snapshot-every", type=number(int, 1), help="also keep the EMA of every so many steps")
    out.add_argument("--resume", default="auto", help="auto: continue --out; none: start afresh; or a file (auto)")
    out.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    out.add_argument("--bench", type=number(int, 1), metavar="N", help="only measure speed and memory, in N steps; "
                     "without --data on random latents of ImageNet's shape")
    args = p.parse_args(argv)
    if not args.data and not args.images and not args.bench:
        # the demo: its values replace the defaults, not what the user says
        p.set_defaults(**DEMO)
        args = p.parse_args(argv)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data: a demo that is drawn, a folder of images that is cached, and the arrays that training reads

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


def center_crop(image, size):
    """ADM's crop: halve by box filter while the short side is at least 2*size, bicubic to size, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_crops(files, size, rows):
    """Files of these rows -> the rows that could be read, their pixels uint8 (B, 3, size, size), [(row, error)]."""
    good, pixels, bad = [], [], []
    for row in rows:
        try:
            pixels.append(np.array(center_crop(read_image(files[row]), size)).transpose(2, 0, 1))
            good.append(row)
        except UserError as error:
            bad.append((row, str(error)))
    return good, torch.from_numpy(np.array(pixels, np.uint8).reshape(-1, 3, size, size)), bad


class Rows:
    """An array on disk that ranks fill row by row, and that an interrupted run continues.

    It grows as PATH.part, with PATH.part.map (a byte a row, 1 when it is done) and PATH.part.json (what it is made of:
    a continuation with other values is refused); `finish` turns it into PATH.
    """

    def __init__(self, path, shape, dtype, made_of, rank, world):
        self.path, self.part = Path(path), Path(f"{path}.part")
        self.notes = [Path(f"{self.part}.map"), Path(f"{self.part}.json")]
        if rank == 0:
            if self.notes[1].exists():
                refuse_other(self.part, read_json(self.notes[1]), made_of)
            else:
                self._create(shape, dtype, made_of)
        barrier()
        begun = open_data(self.part)
        if (begun.shape, begun.dtype) != (shape, dtype) or self.notes[0].stat().st_size != len(begun):
            raise UserError(f"{self.part}: it or its .map is not as it was begun: remove {self.notes[1]} to begin anew")
        self.rows = np.lib.format.open_memmap(self.part, mode="r+")
        self.map = np.memmap(self.notes[0], np.uint8, "r+")
        self.todo = np.array_split(np.flatnonzero(self.map == 0), world)[rank]
        barrier()  # nobody writes before everybody has read the map

    def _create(self, shape, dtype, made_of):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(self.part, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash on some later write
            with open(self.part, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.part.stat().st_size)
        self.notes[0].write_bytes(bytes(shape[0]))
        with atomic(self.notes[1]) as file:  # last: its presence says that the other two are complete
            file.write(json.dumps(made_of).encode())

    def write(self, indices, rows):
        self.rows[indices] = rows
        self.map[indices] = 1

    def finish(self):
        """On rank 0, once every rank is done."""
        self.rows.flush()
        os.replace(self.part, self.path)
        for note in self.notes:
            note.unlink()


def cache_images(args, rank, world, device):
    """Turn --images into the arrays of --data: latents.npy, labels.npy (-1: left out) and meta.json."""
    folder, target = Path(args.images), Path(args.data)
    found = list_images(folder)
    files = [file for file in found if file.parent != folder]
    if rank == 0 and len(files) < len(found):
        print(f"{len(found) - len(files)} images outside the class folders are left out", file=sys.stderr)
    if not files:
        raise UserError(f"--images {folder}: expected class folders that hold images, found images without a class")
    relative = [file.relative_to(folder) for file in files]
    names = sorted({path.parts[0] for path in relative})
    listing = zlib.crc32("\n".join(map(str, relative)).encode())
    made_of = dict(size=args.size, vae=args.vae or "ema", images=f"{len(files)} files ({listing:08x})")
    if (target / "latents.npy").exists():
        return refuse_other(f"--data {target}", read_json(target / "meta.json"), made_of)
    if made_of["vae"] == "none":
        vae, shape, dtype = None, (3, args.size, args.size), np.uint8
    elif args.size % 8:
        raise UserError(f"--size {args.size}: the VAE needs a multiple of 8")
    else:
        vae, shape, dtype = VAE(made_of["vae"]).to(device), (2, 8, args.size // 8, args.size // 8), np.float16
    rows = Rows(target / "latents.npy", (len(files), *shape), dtype, made_of, rank, world)
    workers = max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    loader = torch.utils.data.DataLoader(rows.todo.tolist(), batch_size=64, num_workers=workers,
                                         collate_fn=functools.partial(load_crops, files, args.size))
    progress = Progress("caching", len(rows.todo) * world, quiet=rank > 0)
    bad = []
    for good, pixels, errors in loader:
        if good:
            rows.write(good, (posteriors(vae, pixels.to(device)).cpu() if vae else pixels).numpy())
        bad += errors
        progress.update((len(good) + len(errors)) * world)
    if world > 1:
        everywhere = [None] * world
        dist.all_gather_object(everywhere, bad)
        bad = sorted(sum(everywhere, []))
    if bad and not args.skip_bad:
        raise UserError(f"--images {folder}: {len(bad)} unreadable, such as {'; '.join(e for _, e in bad[:3])}: mend "
                        f"or remove them, or pass --skip-bad, which lists all; what is cached already is kept")
    if rank == 0:
        labels = np.searchsorted(names, [path.parts[0] for path in relative])
        labels[[row for row, _ in bad]] = -1
        for _, error in bad:
            print("left out:", error, file=sys.stderr)
        with atomic(target / "labels.npy") as file:
            np.save(file, labels)
        with atomic(target / "meta.json") as file:
            file.write(json.dumps(dict(classes=names, **made_of), indent=1).encode())
        rows.finish()  # last: latents.npy is there only when everything is
    barrier()


def posteriors(vae, pixels):
    """uint8 images (B, 3, H, W) -> float16 mean and std of each and of its mirror, (B, 2, 8, H/8, W/8).

    The latent of a mirror image is not the mirror of the latent.
    """
    x = pixels.float() / 127.5 - 1
    return torch.stack([torch.cat(vae.encode(view), 1) for view in (x, x.flip(-1))], 1).half()


def open_data(path):
    """A memory-mapped .npy array, never unpickled; UserError when it is missing, damaged, of objects or too long."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError(f"the file is longer than {array.dtype} {array.shape}")
        return array
    except Exception as error:  # numpy raises whatever the damage causes
        raise UserError(f"{path}: not a readable .npy array ({first_line(error)})") from None


class Data:
    """uint8 pixels (N, 3, H, H), or float16 posterior mean and std of image and mirror (N, 2, 8, H, H), by entry."""

    def __init__(self, name, latents, labels, classes, vae="none", meta=""):
        self.name, self.latents, self.labels, self.classes, self.vae = name, latents, labels, classes, vae
        self.rows = np.flatnonzero(labels >= 0)
        self.hash = zlib.crc32(labels.tobytes() + meta.encode())
        self.pixels = latents.dtype == np.uint8
        self.shape = latents.shape[1:] if self.pixels else (latents.shape[2] // 2, *latents.shape[3:])
        self.features, self.mirrors = None, True

    def add_features(self, path, tokens):
        """Read an encoder's features, too: (N, T, D), which rules out mirror images, or (N, 2, T, D), with theirs."""
        features, n = open_data(path), len(self.labels)
        self.features = features[:, None] if features.ndim == 3 else features
        self.mirrors = features.ndim == 4
        views = self.features.shape[1:2] == ((2,) if self.mirrors else (1,))
        if features.dtype.kind != "f" or self.features.ndim != 4 or not views or self.features.shape[2] != tokens \
                or len(features) != n or not features.shape[-1]:
            raise UserError(f"--repa {path}: is {features.dtype} {features.shape}, where floats ({n}, {tokens}, D) or "
                            f"({n}, 2, {tokens}, D) are expected, a row for each of the data's and a token for each "
                            f"of the model's")

    @classmethod
    def open(cls, folder):
        folder = Path(folder)
        if not (folder / "latents.npy").exists():
            raise UserError(f"--data {folder}: no latents.npy there; make it with --images FOLDER --data {folder}")
        latents, labels = open_data(folder / "latents.npy"), open_data(folder / "labels.npy")
        meta = read_json(folder / "meta.json")
        if not meta.get("classes") or not isinstance(meta["classes"], list) or not isinstance(meta.get("vae"), str):
            raise UserError(f"{folder / 'meta.json'}: expected a list of classes and the name of a vae")
        classes = list(map(str, meta["classes"]))
        shape = latents.shape
        dtype, *sizes = (np.uint8, 3) if meta["vae"] == "none" else (np.float16, 2, 8)
        if latents.dtype != dtype or 0 in shape or shape[1:] != (*sizes, *2 * shape[-1:]):
            raise UserError(f"{folder / 'latents.npy'}: is {latents.dtype} {shape}, where {dtype.__name__} "
                            f"(N, {', '.join(map(str, sizes))}, H, H) is expected: its meta.json has vae {meta['vae']}")
        if labels.dtype.kind not in "iu" or labels.shape != latents.shape[:1]:
            raise UserError(f"{folder / 'labels.npy'}: is {labels.dtype} {labels.shape}, where {latents.shape[:1]} "
                            f"integers are expected")
        labels = np.array(labels)
        if labels.max() < 0 or labels.max() >= len(classes) or labels.min() < -1:
            raise UserError(f"{folder / 'labels.npy'}: expected labels from 0 to {len(classes) - 1} (-1: left out)")
        return cls(str(folder), latents, labels.astype(np.int64), classes, meta["vae"], json.dumps(meta))

    def __len__(self):
        return len(self.rows)

    def read(self, entries, flips):
        """Arrays of the entries, mirrored where flips says, their labels, and their features if any, as tensors."""
        rows = self.rows[entries]
        if self.pixels:
            images = np.ascontiguousarray(self.latents[rows])
            images[flips] = images[flips, ..., ::-1]
        else:
            images = self.latents[rows, flips.astype(int)]
        arrays = [images, self.labels[rows]]
        if self.features is not None:
            arrays.append(self.features[rows, flips.astype(int)])
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


def batches(data, first, last, batch, mine, seed, device):
    """Yield (step, images, labels, features if any), this rank's slice `mine` of every global batch.

    A thread reads one step ahead.
    """
    def read(step):
        flips = np.random.default_rng([seed, step, zlib.crc32(b"flip")]).random(batch) < 0.5
        flips &= data.mirrors
        tensors = data.read(batch_entries(seed, step, batch, len(data))[mine], flips[mine])
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread starts on GPU 0
            tensors = [tensor.pin_memory() for tensor in tensors]
        return tensors

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(read, first)
        for step in range(first, last):
            tensors, future = future.result(), pool.submit(read, step + 1)
            yield step, *(tensor.to(device, non_blocking=True) for tensor in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def stream(seed, step, purpose, device):
    """The generator of one purpose at one step. Seeds have 32 bits, since a CPU generator ignores the upper ones."""
    state = np.random.SeedSequence([seed, step, zlib.crc32(purpose.encode())]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def check_batch(batch, world, micro, group):
    """The samples a forward pass on each rank; UserError, with the nearest values that fit, if sizes do not divide."""
    wanted = micro or max(1, batch // world)
    if batch % (world * wanted) == 0 and wanted % group == 0:
        return wanted
    fits = [size for size in range(group, batch // world + 1, group) if batch % (world * size) == 0]
    fit = min(fits, key=lambda size: abs(size - wanted)) if fits else max(1, round(wanted / group)) * group
    near = batch if fits else max(1, round(batch / (world * fit))) * world * fit
    raise UserError(f"--batch {batch}, --micro {wanted} and --disp-group {group} do not fit {world} rank(s): --batch "
                    f"must be a multiple of ranks x --micro, and --micro of --disp-group (1 without dispersion); the "
                    f"nearest that fit are --batch {near} --micro {fit}")


def parse_blocks(text, depth):
    """--disp-blocks -> ascending block numbers, from 1. The paper's default is a quarter of the way in."""
    if text is None:
        return [max(1, depth // 4)]
    if text == "all":
        return list(range(1, depth + 1))
    numbers = sorted({int(part) if part.strip().isdecimal() else 0 for part in text.split(",")})
    if numbers[0] < 1 or numbers[-1] > depth:
        raise UserError(f"--disp-blocks {text}: expected 'all' or numbers from 1 to {depth}, separated by commas")
    return numbers


def initialize(net, path):
    """Start from a checkpoint's weights, and say so. The embedding of labels stays fresh when the file's is for other
    classes, that of MeanFlow's second time when the file has none."""
    state = weights_in(load_file(path))
    table = "y_embedder.embedding_table.weight"
    fresh = {name: value for name, value in net.state_dict().items()
             if name.startswith("r_embedder.") and name not in state
             or name == table and name in state and state[name].shape != value.shape
             and state[name].shape[1:] == value.shape[1:]}
    load_weights(net, {**state, **fresh}, path)
    return f", from {path}" + (f" without {', '.join(fresh)}" if fresh else "")


def keep_freed_memory():
    """Keep glibc from handing the activations' memory back to the system after every step, to be cleared anew."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no block apart
            ctypes.CDLL(None).mallopt(option, value)


class Trainer:
    """What a run carries from step to step (model, EMA, optimiser, REPA's projector), and the step."""

    def __init__(self, args, data, rank, world, device):
        torch.manual_seed(args.seed)
        if device.type == "cpu":
            keep_freed_memory()
        self.args, self.data, self.world, self.device = args, data, world, device
        if data.shape[-1] % MODELS[args.model]["patch_size"]:
            raise UserError(f"--model {args.model}: its patches do not divide images of size {data.shape[-1]}")
        sizes = dict(input_size=data.shape[-1], in_channels=data.shape[0], num_classes=len(data.classes))
        self.objective_name = args.objective or default_objective(args.model)
        guidance = dict(omega=args.meanflow_omega, kappa=args.meanflow_kappa, interval=tuple(args.meanflow_interval))
        mean = self.objective_name == "meanflow"
        self.objective = MeanFlow(**guidance) if mean else OBJECTIVES[self.objective_name]()
        self.net = build_model(args.model, **sizes, second_time=mean)
        self.origin = initialize(self.net, args.init) if args.init else ""
        self.net.to(device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.blocks = parse_blocks(args.disp_blocks, len(self.net.blocks)) if args.disp != "none" else []
        self.group = args.disp_group if self.blocks else 1
        self.micro = check_batch(args.batch, world, args.micro, self.group)
        self.share = args.batch // world
        self.mine = slice(rank * self.share, (rank + 1) * self.share)
        self.projector = None
        if args.repa:
            if args.repa_block > len(self.net.blocks):
                raise UserError(f"--repa-block {args.repa_block}: expected a number from 1 to {len(self.net.blocks)}")
            self.projector = repa_projector(self.net.pos_embed.shape[-1], data.features.shape[-1]).to(device)
        modules = [self.net, self.projector] if self.projector else [self.net]
        self.weights = [p for module in modules for p in module.parameters() if p.requires_grad]
        betas = (0.9, 0.95) if mean else (0.9, 0.999)
        self.optimizer = torch.optim.AdamW(self.weights, args.lr, betas, weight_decay=0.0, fused=True)
        self.dtype = args.dtype or default_dtype(device)
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=self.dtype == "bf16")
        self.compiled = compile_blocks(self.net, args.compile, device)
        parallel = functools.partial(torch.nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)
        self.model = parallel(self.net) if world > 1 else self.net
        self.project = parallel(self.projector) if world > 1 and self.projector else self.projector
        self.choose_blocks(self.blocks)
        self.mark = lambda phase: None  # --bench puts a stopwatch here
        self.config = dict(data=f"{len(data)} of {'x'.join(map(str, data.shape))} ({data.hash:08x})")
        self.config |= {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        self.config["repa"] = args.repa and f"features {data.features.shape} ({zlib.crc32(data.features[0]):08x})"
        self.config |= dict(sizes, dtype=self.dtype, disp_blocks=self.blocks, objective=self.objective_name,
                            classes=data.classes, vae=data.vae)

    def choose_blocks(self, blocks):
        """Disperse these blocks from now on."""
        self.blocks = blocks
        self.terms = {"loss": 1.0}  # what the training loss is the weighted sum of
        if blocks:
            self.terms["disp"] = self.args.disp_weight
        if self.projector:
            self.terms["repa"] = self.args.repa_weight
        self.factors = torch.tensor([*self.terms.values()], device=self.device)
        self.first_bad = torch.full((len(self.terms) + 1,), NEVER, device=self.device)

    def draw(self, sampler, step, purpose, *shape):
        """This rank's slice of what torch.rand or torch.randn draws for the whole global batch, (share, *shape)."""
        generator = stream(self.args.seed, step, purpose, self.device)
        return sampler(self.args.batch, *shape, generator=generator, device=self.device)[self.mine]

    def view(self, step, suffix):
        """Times t, r (share,) and noise (share, C, H, W) of a view of the images; r is MeanFlow's alone."""
        times = self.objective.times(self.args.batch, stream(self.args.seed, step, "time" + suffix, self.device))
        t, r = times if isinstance(times, tuple) else (times, times)
        return dict(t=t[self.mine], r=r[self.mine],
                    noise=self.draw(torch.randn, step, "noise" + suffix, *self.data.shape))

    def inputs(self, step, images, labels, suffix=""):
        """What the objective's loss takes, for the images and labels of this rank's share of the batch."""
        posterior = None if self.data.pixels else self.draw(torch.randn, step, "posterior" + suffix, *self.data.shape)
        dropped = self.draw(torch.rand, step, "label" + suffix) < self.args.label_dropout
        return dict(x=self.data.prepare(images, posterior), y=torch.where(dropped, self.net.num_classes, labels),
                    **self.view(step, suffix))

    def second_view(self, step, first):
        """The same images once more, for contrastive losses. Its regression loss is dropped, and MeanFlow's r is t."""
        if self.args.contrastive == "independent":
            view = self.view(step, "2")
        else:
            last = 999 if self.objective_name == "diffusion" else 1  # a step number, or SiT's time
            t = first["t"] + 0.005 * last * (2 * self.draw(torch.rand, step, "time2") - 1)
            t = (t if last == 1 else t.round().long()).clamp(0, last)
            view = dict(t=t, noise=first["noise"])
        return {**first, **view, "r": view["t"]}

    def regress(self, model, views, part, blocks=()):
        """The objective's loss of the samples `part` of the first view, the same as it is logged, and the activations
        [(views x samples, T, D)] after the blocks, view by view."""
        inputs = {name: torch.cat([view[name][part] for view in views]) for name in views[0]}
        with self.autocast():
            loss, activations = self.objective.loss(model, **inputs, blocks=blocks)
        shown = self.objective.squared_error if self.objective_name == "meanflow" else loss.detach()
        first = len(loss) // len(views)
        return loss[:first].mean(), shown[:first].mean(), activations

    def disperse(self, z):
        """The dispersive loss of a block's activations, or the contrastive one of two views of them."""
        a = self.args
        if a.contrastive:
            return contrastive_loss(*z.chunk(2), a.disp, a.disp_tau, a.disp_margin, group=self.group)
        return dispersive_loss(z, a.disp, a.disp_tau, a.disp_margin, self.group)

    def step(self, step, images, labels, features=None, with_distance=False):
        """One update, on this rank's images, labels and features (share, T, D) -> its loss terms, as many as
        self.terms, and its mean distance over the dispersed blocks, in one tensor."""
        views = [self.inputs(step, images, labels)]
        if self.args.contrastive:
            views.append(self.second_view(step, views[0]))
        captured = sorted({*self.blocks, *([self.args.repa_block] if self.project else [])})
        shown = torch.zeros(len(self.terms) + 1, device=self.device)
        self.mark("draws")
        for begin in range(0, self.share, self.micro):
            part, fraction = slice(begin, begin + self.micro), self.micro / self.share
            with contextlib.ExitStack() as exchange:
                for module in (self.model, self.project) if part.stop < self.share else ():
                    if hasattr(module, "no_sync"):
                        exchange.enter_context(module.no_sync())
                loss, shown_loss, activations = self.regress(self.model, views, part, captured)
                z, terms = dict(zip(captured, activations)), [loss]
                self.mark("forward")
                if self.blocks:
                    terms.append(sum(self.disperse(z[block]) for block in self.blocks) / len(self.blocks))
                self.mark("dispersion")
                if self.project:
                    with self.autocast():
                        projected = self.project(z[self.args.repa_block][:self.micro])
                    terms.append(repa_loss(projected, features[part]))
                    self.mark("alignment")
                terms = torch.stack(terms)
                total = terms @ self.factors
                # a loss that is not finite on one rank must make the gradients of all ranks so
                total.backward(torch.where(total.isfinite(), fraction, math.nan))
                self.mark("backward")
            terms = torch.cat([shown_loss[None], terms[1:].detach()])
            distance = sum(mean_distance(z[block][:self.micro], self.group) for block in self.blocks) \
                / len(self.blocks) if with_distance and self.blocks else terms.new_zeros(())
            shown += torch.cat([terms, distance[None]]) * fraction
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.weights])
        if self.args.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.weights, self.args.grad_clip, norm)
        finite = torch.cat([shown[:-1], norm[None]]).isfinite()
        self.first_bad = torch.minimum(self.first_bad, torch.where(finite, NEVER, step + 1))
        self.optimizer.found_inf = (self.first_bad[-1] < NEVER).float()  # skips the update, without waiting to know
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mark("optimiser")
        decay = min(self.args.ema, (1 + step) / (10 + step))  # warmed up, so that a short run's EMA forgets its start
        with torch.no_grad():
            torch._foreach_lerp_([*self.ema.parameters()], [*self.net.parameters()], 1 - decay)
        self.mark("EMA")
        return shown

    def labels(self, labels):
        """The labels that the model knows: the null label for all, where it is trained without labels."""
        return torch.full_like(labels, self.net.num_classes) if self.args.label_dropout == 1 else labels

    @torch.no_grad()
    def validate(self, held_out, rank):
        """The EMA's regression loss on the first held-out images, under draws that depend on neither seed nor batch."""
        count = min(VAL_IMAGES, len(held_out))
        total = torch.zeros((), device=self.device)
        for first in range(0, count, VAL_CHUNK)[rank::self.world]:
            entries = np.arange(first, min(first + VAL_CHUNK, count))
            images, labels = (tensor.to(self.device) for tensor in held_out.read(entries, np.zeros(len(entries), bool)))
            draw = lambda purpose: torch.randn(len(entries), *held_out.shape, device=self.device,
                                               generator=stream(0, first, purpose, self.device))
            times = self.objective.times(len(entries), stream(0, first, "val time", self.device))
            t, r = times if isinstance(times, tuple) else (times, times)
            with self.autocast():
                x = held_out.prepare(images, None if held_out.pixels else draw("val posterior"))
                loss, _ = self.objective.loss(self.ema, x, self.labels(labels), t, draw("val noise"), r)
            total += (self.objective.squared_error if self.objective_name == "meanflow" else loss).sum()
        if self.world > 1:
            dist.all_reduce(total)
        return total.item() / count

    def state(self, step):
        modules = dict(model=self.net, ema=self.ema, opt=self.optimizer)
        if self.projector:
            modules["projector"] = self.projector
        return {**{name: module.state_dict() for name, module in modules.items()}, "step": step, "config": self.config}

    def load(self, checkpoint, path):
        load_weights(self.net, checkpoint["model"], path)
        load_weights(self.ema, checkpoint["ema"], path)
        if self.projector:
            load_weights(self.projector, checkpoint.get("projector"), path)
        own = self.optimizer.state_dict()["param_groups"]
        try:
            saved = dict(checkpoint["opt"])
            fits = [group["params"] for group in saved["param_groups"]] == [group["params"] for group in own]
            for i, p in enumerate(self.weights):
                check_state(saved["state"][i], path)
                shapes = [saved["state"][i][name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
                fits = fits and shapes == [(), p.shape, p.shape]
        except (KeyError, IndexError, TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"{path}: its optimiser's state does not fit the model")
        # a copy, else it keeps the file mapped, and on disk; the rates are those of the flags
        self.optimizer.load_state_dict(dict(state=copy.deepcopy(saved["state"]), param_groups=own))

    def check(self):
        """UserError, on all ranks alike, if anything was not finite up to here. Waits for the device."""
        if self.world > 1:
            dist.all_reduce(self.first_bad, dist.ReduceOp.MIN)
        first = self.first_bad.tolist()
        if min(first) < NEVER:
            names = dict(loss="regression loss", disp="dispersive loss", repa="alignment loss", gradient="gradient")
            bad = [names[term] for term, step in zip([*self.terms, "gradient"], first) if step == min(first)]
            raise UserError(f"step {min(first):,}: not finite: {', '.join(bad)}; no update has been made since. Try a "
                            f"smaller --lr, --grad-clip 1 or --dtype fp32; checkpoints written before are whole")

    def check_ranks(self, step):
        """UserError if the ranks do not hold the same bits, which they do unless hardware or network is at fault."""
        if self.world == 1:
            return
        sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in self.weights])
        ends = torch.cat([sums, -sums])
        dist.all_reduce(ends, dist.ReduceOp.MAX)  # the greatest, and minus the least
        if (ends[:len(sums)] + ends[len(sums):]).any():
            raise UserError(f"step {step:,}: the ranks hold different weights: hardware, network, or an --out that "
                            f"they do not share is at fault; the checkpoint before is as it was")


class Stop:
    """SIGTERM (preemption) and SIGINT (Ctrl-C) end a run after a step that all ranks agree on; a second one, at once.

    Every rank calls `agreed` after every step. Nobody waits: the ranks exchange what they have received over the CPU,
    while the next step runs.
    """

    def __init__(self, world):
        self.received, self.before = 0, {}
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
        self.shared, self.exchange = torch.zeros(1, dtype=torch.int32), None

    def __enter__(self):
        # a thread takes the signals: Python's handlers wait for whatever the main thread does outside of Python
        inbox, self.outbox = socket.socketpair()
        self.outbox.setblocking(False)
        self.previous_fd = signal.set_wakeup_fd(self.outbox.fileno())
        for which in (signal.SIGTERM, signal.SIGINT):
            self.before[which] = signal.signal(which, lambda *_: None)
        self.thread = threading.Thread(target=self.receive, args=(inbox,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        for which, handler in self.before.items():
            signal.signal(which, handler)
        signal.set_wakeup_fd(self.previous_fd)
        self.outbox.close()
        self.thread.join()  # a thread that ends with the interpreter may abort the process

    def receive(self, inbox):
        with inbox:
            while which := int.from_bytes(inbox.recv(1), "big"):  # 0: closed
                if not self.received and which in self.before:
                    self.received, since = which, time.monotonic()
                elif which in self.before and time.monotonic() - since > 1:  # launchers repeat at once what all got
                    os._exit(128 + which)

    def agreed(self):
        """The number of the signal that ends the run with this step, or 0."""
        if self.group is None:
            return self.received
        if self.exchange:
            self.exchange.wait()
        agreed = int(self.shared)
        self.shared.fill_(self.received)
        self.exchange = dist.all_reduce(self.shared, dist.ReduceOp.MAX, self.group, async_op=True)
        return agreed


def read_checkpoint(path):
    """A checkpoint of this file; UserError unless every byte is as it was written, by the checksums of its archive."""
    checkpoint = load_file(path)
    if not {"model", "ema", "opt", "step"} <= checkpoint.keys() or not isinstance(checkpoint.get("config"), dict):
        raise UserError(f"{path}: not a checkpoint of train.py; --resume needs one")
    if type(checkpoint["step"]) is not int or checkpoint["step"] < 0:
        raise UserError(f"{path}: its step is not a natural number")
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:  # zipfile raises whatever the damage causes
        wrong = first_line(error)
    if wrong:
        raise UserError(f"{path}: damaged ({wrong})")
    return checkpoint


def job_id():
    """What tells torchrun's attempts at a job from other jobs."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def resume(run, args, rank):
    """Load what --resume names -> (its step, its path), or (0, None). A damaged latest gives way to the one before."""
    found = [path for path in (Path(args.out, name) for name in CKPT[:2]) if path.exists()]
    note, restarts = Path(args.out, ".job"), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    # torchrun --max-restarts: a job that has begun here goes on here; rank 0 decides for all
    again = [restarts > 0 and note.exists() and note.read_text() == job_id()]
    if run.world > 1:
        dist.broadcast_object_list(again, device=run.device)
    if args.resume != "auto" and not (again[0] and found):
        found = [] if args.resume == "none" else [Path(args.resume)]
    for path in found:
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            if path == found[-1]:
                raise
            if rank == 0:
                print(f"{error}; going on from {found[-1]}", file=sys.stderr)
            continue
        refuse_other(path, checkpoint["config"], run.config)
        run.load(checkpoint, path)
        return checkpoint["step"], path
    return 0, None


def save_checkpoint(state, out):
    """Write the latest checkpoint; the one that was the latest is kept, whatever happens."""
    latest, previous, new = (out / name for name in CKPT)
    with atomic(new) as file:
        torch.save(state, file)
    read_checkpoint(new)
    if latest.exists():
        os.replace(latest, previous)
    os.replace(new, latest)


def prepare_out(out, first, source, size):
    """Make --out ready: set another run's files aside, and cut a continued run's log where it continues -> the log."""
    latest, previous, _ = (out / name for name in CKPT)
    log, spare, entries = out / "log.jsonl", out / "ckpt.aside.pt", []
    for path in out.glob(CKPT[2] + "*"):  # of a run that was killed while it wrote
        path.unlink()
    if source and source.resolve() in (latest.resolve(), previous.resolve()):
        if source.resolve() != latest.resolve() and latest.exists():
            os.replace(latest, spare)  # lest the next checkpoint puts it in the place of the good one
        if log.exists():
            lines = [line for line in log.read_text().splitlines() if line.startswith('{"step": ') and line[-1] == "}"]
            entries = [entry for entry in map(json.loads, lines) if entry["step"] <= first]
            with atomic(log) as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
    elif log.exists() or latest.exists() or previous.exists():
        aside = next(path for path in (out / f"old{n}" for n in itertools.count(1)) if not path.exists())
        aside.mkdir()
        for path in (latest, previous, spare, log, out / "samples", out / "snapshots"):
            if path.exists():
                os.replace(path, aside / path.name)
    (out / "samples").mkdir(exist_ok=True)
    (out / ".job").write_text(job_id())
    kept = sum(path.stat().st_size for path in (latest, previous) if path.exists())
    free = shutil.disk_usage(out).free
    if free < 3 * size - kept:  # the latest, the one before, and the next while it is written
        raise UserError(f"--out {out}: {free / 1e9:.1f} GB are free there, and the checkpoints need "
                        f"{(3 * size - kept) / 1e9:.1f} GB")
    return entries


def picture(run, step, args, out, decode):
    """A grid of EMA samples, one class a row, and what 64 samples' activations are like after every block."""
    data, device = run.data, run.device
    rows = np.linspace(0, len(data.classes) - 1, min(10, len(data.classes))).round().astype(int)
    labels = run.labels(torch.from_numpy(rows.repeat(8)))
    images = generate(run.ema, run.objective, data.shape, labels, range(len(labels)), args.seed, device, run.dtype,
                      decode, steps=1 if run.objective_name == "meanflow" else 25)
    grid = out / "samples" / f"{step:07d}.png"
    save_grid(images.numpy(), grid, columns=8)

    count, generator = min(64, len(data)), stream(args.seed, 0, "probe", device)
    entries = np.linspace(0, len(data) - 1, count).astype(int)  # of all classes: a cache is sorted by class
    images, labels = (tensor.to(device) for tensor in data.read(entries, np.zeros(count, bool))[:2])
    times = run.objective.times(count, generator)
    noise = torch.randn(count, *data.shape, generator=generator, device=device)
    with torch.no_grad(), run.autocast():
        _, activations = run.objective.loss(run.ema, data.prepare(images, 0.0), run.labels(labels),
                                            times[0] if isinstance(times, tuple) else times, noise,
                                            blocks=range(1, len(run.net.blocks) + 1))
    measures = dict(block_distance=mean_distance, block_rank=effective_rank,
                    block_norm=lambda z: z.float().square().mean())
    return grid, {name: [float(f"{f(z).item():.6g}") for z in activations] for name, f in measures.items()}


def train(args, data, held_out, rank, world, device):
    run, out = Trainer(args, data, rank, world, device), Path(args.out)
    decode = None if data.pixels else VAE(args.vae or data.vae).to(device if rank == 0 else "cpu").decode
    steps = args.steps or max(1, round(args.epochs * len(data) / args.batch))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        run.lock = lock(out)
    barrier()
    first, source = resume(run, args, rank)
    run.check_ranks(first)
    past = prepare_out(out, first, source, 16 * sum(p.numel() for p in run.weights)) if rank == 0 else []
    barrier()
    floor = dispersive_floor(args.disp, run.group, args.disp_tau, args.disp_margin) if run.blocks else 0.0

    def say(text):
        if rank == 0:
            print(text, flush=True)

    board = None
    if args.wandb and rank == 0:
        import wandb
        board = wandb.init(project="dispersive", dir=str(out), config=run.config)

    def record(**values):
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")
            if board:
                board.log(values, step=values["step"])

    def show(done):
        if rank == 0 and (done % args.sample_every == 0 or done == steps):
            grid, measures = picture(run, done, args, out, decode)
            record(step=done, **measures)
            say(f"step {done:,}: {grid}; distance after each block "
                + " ".join(f"{d:.3g}" for d in measures["block_distance"]))

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    say(f"model   {args.model}, {sum(p.numel() for p in run.net.parameters()) / 1e6:.1f}M parameters, "
        f"objective {run.objective_name}{run.origin}")
    say(f"data    {data.name}: {len(data):,} of {'x'.join(map(str, data.shape))}, {len(data.classes)} classes"
        + ("" if data.mirrors else ", without flips: --repa holds no features of mirror images"))
    say(f"device  {world} x {name}, {run.dtype}{', compiled' if run.compiled else ''}")
    say(f"batch   {args.batch} = {world} rank(s) x {run.share // run.micro} pass(es) x {run.micro}; {steps:,} steps, "
        f"{steps * args.batch / len(data):.1f} epochs" + (f", continued from step {first:,}" if first else ""))
    about = f"groups of {run.group}" + (f", {args.contrastive} views" if args.contrastive else f", floor {floor:.3f}")
    say(f"loss    + {args.disp_weight} x {args.disp}, block {','.join(map(str, run.blocks))}, {about}" if run.blocks
        else "loss    without dispersion")

    sums, logged = 0.0, first
    started = shown = time.time()
    with Stop(world) as stop:
        if first and not any(entry["step"] == first and "block_distance" in entry for entry in past):
            show(first)  # the run ended before it could
        for step, *batch in batches(data, first, steps, args.batch, run.mine, args.seed, device):
            done = step + 1
            is_log = done % args.log_every == 0 or done == steps
            values = run.step(step, *batch, with_distance=is_log)
            sums = sums + values[:-1]
            stopped_by = stop.agreed()
            is_ckpt = done % args.ckpt_every == 0 or done == steps or stopped_by
            is_snapshot = args.snapshot_every and done % args.snapshot_every == 0
            if is_log or is_ckpt or is_snapshot:
                run.check()
            if is_log:
                means = [sums / (done - logged), values[-1:]]
                means = torch.cat(means)
                if world > 1:
                    dist.all_reduce(means)
                means = dict(zip([*run.terms, "distance"], (means / world).tolist()))
                now = time.time()
                rate = (done - logged) * args.batch / (now - shown)
                left = (steps - done) * (now - started) / (done - first)
                sums, logged, shown = 0.0, done, now
                if not run.blocks:
                    del means["distance"]
                elif not args.contrastive:
                    means["floor"] = floor
                record(step=done, **means, images_per_second=rate, seconds=now - started)
                text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
                say(f"step {done:,}/{steps:,}  {text}  {rate:,.1f} images/s  {clock(left)} left")
            paused = time.time()
            if held_out and is_ckpt:
                val = run.validate(held_out, rank)
                record(step=done, val=val)
                say(f"step {done:,}: held-out loss {val:.4f}")
            if is_snapshot and rank == 0:
                (out / "snapshots").mkdir(exist_ok=True)
                with atomic(out / "snapshots" / f"{done:07d}.pt") as file:
                    torch.save(dict(ema=run.ema.state_dict(), step=done, config=run.config), file)
            if is_ckpt:  # last: what is due at a step before would be missing from a run that goes on from here
                run.check_ranks(done)
                if rank == 0:
                    save_checkpoint(run.state(done), out)
            if stopped_by:
                barrier()
                say(f"{signal.Signals(stopped_by).name}: saved at step {done:,}; --resume auto, the default, goes on")
                sys.exit(128 + stopped_by)
            show(done)
            shown += time.time() - paused  # images/s counts training alone
    if first >= steps:
        say(f"{source} is at step {first:,} already: nothing to train; more with --steps")


class Stopwatch:
    """Marks the ends of a step's phases; on a GPU by events, for which the host need not wait."""

    def __init__(self, device):
        self.gpu, self.steps = device.type == "cuda", []

    def __call__(self, phase):
        moment = torch.cuda.Event(enable_timing=True) if self.gpu else time.perf_counter()
        if self.gpu:
            moment.record()
        if phase == "start":
            self.steps.append([])
        self.steps[-1].append((phase, moment))

    def seconds(self):
        """{phase: seconds} of every step."""
        if self.gpu:
            torch.cuda.synchronize()
        table = []
        for marks in self.steps:
            table.append(dict.fromkeys((phase for phase, _ in marks[1:]), 0.0))
            for (_, begin), (phase, end) in zip(marks, marks[1:]):
                table[-1][phase] += begin.elapsed_time(end) / 1000 if self.gpu else end - begin
        return table


def matmul_rate(device, dtype):
    """FLOP/s of large square matrix products, the median of some."""
    n = 8192 if device.type == "cuda" else 2048
    a, watch = torch.randn(n, n, device=device, dtype=dtype), Stopwatch(device)
    for _ in range(12):
        watch("start")
        a @ a
        watch("product")
    return 2 * n ** 3 / np.median([step["product"] for step in watch.seconds()[2:]])


def bench(args, data, rank, world, device):
    """Time --bench steps without dispersion, with it as the flags say, and on all blocks, in turn; print a table."""
    begin, run = time.perf_counter(), Trainer(args, data, rank, world, device)
    watch = run.mark = Stopwatch(device)
    names = ["none", f"{args.disp}, block {','.join(map(str, run.blocks))}", f"{args.disp}, all"]
    variants = [copy.copy(run) for _ in names[:3 if run.blocks else 1]]
    for variant, blocks in zip(variants, [[], run.blocks, range(1, len(run.net.blocks) + 1)]):
        variant.choose_blocks([*blocks])
    warm, count = 3 * len(variants), len(variants) * args.bench
    watch("start")
    for step, *batch in batches(data, 0, warm + count, args.batch, run.mine, args.seed, device):
        watch("data")
        variants[step % len(variants)].step(step, *batch)
        if step + 1 == warm:
            watch.seconds()  # waits for the device
            ready = time.perf_counter() - begin
        watch("start")
    table = watch.seconds()[warm:-1]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build_model(args.model, **{name: run.config[name] for name in ("input_size", "in_channels")})
        net(torch.empty(1, *data.shape), torch.empty(1), torch.empty(1, dtype=torch.long))
    needed = 3 * counter.get_total_flops()  # an image's forward and, twice as much, backward
    rate = matmul_rate(device, torch.bfloat16 if run.dtype == "bf16" else torch.float32)
    if rank > 0:
        return
    times = [np.array([sum(step.values()) for step in table[i::len(variants)]]) for i in range(len(variants))]
    rows = {"images/s": [f"{args.batch / np.median(t):,.1f}" for t in times],
            "FLOP/s, of a matmul's": [f"{needed * args.batch / world / np.median(t) / rate:.1%}" for t in times],
            "dispersion's share": [f"{np.median(t - times[0]) / np.median(t):+.2%}" for t in times],
            "step, ms": [f"{1e3 * np.median(t):,.1f}" for t in times]}
    for phase in table[0]:
        rows["- " + phase] = [f"{1e3 * np.median([step[phase] for step in table[i::len(variants)]]):,.2f}"
                              for i in range(len(variants))]
    name = torch.cuda.get_device_name(device) if run.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{args.model}, {run.objective_name}, {'x'.join(map(str, data.shape))}, batch {args.batch}, passes of "
          f"{run.micro}, {world} x {name}, {run.dtype}{', compiled' if run.compiled else ''}, torch "
          f"{torch.__version__}: medians of {args.bench} steps\n")
    for label, cells in {"dispersion": names[:len(variants)], "---": ["---"] * len(variants), **rows}.items():
        print(f"| {label} | {' | '.join(cells)} |")
    print(f"\n{needed / 1e9:,.1f} GFLOP an image (one view, forward and backward); matmul {rate / 1e12:,.2f} "
          f"TFLOP/s; ready after {ready:.1f} s with {warm} warm-up steps; peak memory {peak / 1e9:.2f} GB a rank")


@command
def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.images and not args.data:
        raise UserError("--images needs --data DIR, where the cached arrays go")
    if args.cache_only and not args.images:
        raise UserError("--cache-only needs --images FOLDER")
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb: the wandb package is not installed")
    if args.model not in MODELS:
        raise UserError(f"--model {args.model}: expected one of {', '.join(MODELS)}")
    if args.contrastive and args.disp == "none":
        raise UserError("--contrastive needs a --disp other than none")
    rank, world, device = start()
    if args.images:
        cache_images(args, rank, world, device)
        if args.cache_only:
            return
    if args.data:
        data = Data.open(args.data)
    elif args.bench:
        latents = np.random.default_rng(0).random((1024, 2, 8, 32, 32), np.float32).astype(np.float16)
        data = Data("random latents", latents, np.arange(1024) % 1000, list(map(str, range(1000))), "ema")
    else:
        data = Data("drawn demo", *demo_data())
    if args.repa:
        data.add_features(args.repa, (data.shape[-1] // MODELS[args.model]["patch_size"]) ** 2)
    if args.bench:
        return bench(args, data, rank, world, device)
    held_out = Data.open(args.val) if args.val else None
    if held_out and (held_out.shape, held_out.classes) != (data.shape, data.classes):
        raise UserError(f"--val {args.val}: its shape or classes differ from the training data's")
    train(args, data, held_out, rank, world, device)
    if not args.data and rank == 0:
        print(f"see {args.out}/samples; next: python sample.py --ckpt {args.out}/ckpt.pt --out {args.out}/generated")


if __name__ == "__main__":
    main()
