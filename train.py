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
import functools
import importlib.util
import itertools
import json
import math
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from dispersive import KINDS, MODELS, build_model, dispersive_floor, dispersive_loss, mean_distance
from sample import (OBJECTIVES, VAE, Parser, Progress, UserError, atomic, barrier, clock, command, cpu_cores,
                    default_dtype, default_objective, first_line, generate, list_images, load_file, load_weights,
                    number, read_image, read_json, refuse_other, save_grid, start, weights_in)

DEMO = dict(model="SiT-XS/4", epochs=12, batch=32, lr=1e-3, ema=0.99, log_every=50, ckpt_every=400, sample_every=400)
LABEL_DROPOUT = 0.1
# what may differ when a run is resumed; the data is compared by content
MAY_CHANGE = {"steps", "epochs", "micro", "compile", "log_every", "ckpt_every", "sample_every", "wandb", "resume",
              "out", "data", "images", "cache_only", "skip_bad", "size", "vae"}


def parse(argv):
    p = Parser(prog="train.py", description=__doc__)
    data = p.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="directory of cached latents or pixels")
    data.add_argument("--images", metavar="FOLDER", help="cache this folder of class folders in --data first")
    data.add_argument("--size", type=number(int, 8), default=256, help="crop and resize images to this (256)")
    data.add_argument("--vae", help="ema, mse or a file: keep Stable Diffusion's latents (ema); none: keep the pixels")
    data.add_argument("--skip-bad", action="store_true", help="leave out unreadable images instead of stopping")
    data.add_argument("--cache-only", action="store_true", help="stop after caching")
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
    out = p.add_argument_group("output")
    out.add_argument("--out", default="out", help="directory of ckpt.pt, log.jsonl and samples/ (out)")
    out.add_argument("--log-every", type=number(int, 1), default=100, help="(100)")
    out.add_argument("--ckpt-every", type=number(int, 1), default=5000, help="(5000)")
    out.add_argument("--sample-every", type=number(int, 1), default=10000, help="(10000)")
    out.add_argument("--resume", default="auto", help="auto: continue --out; none: start afresh; or a file (auto)")
    out.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    args = p.parse_args(argv)
    if not args.data and not args.images:  # the demo: its values replace the defaults, not what the user says
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
        """Arrays of the entries, mirrored where flips says, and their labels, as tensors."""
        rows = self.rows[entries]
        if self.pixels:
            images = np.ascontiguousarray(self.latents[rows])
            images[flips] = images[flips, ..., ::-1]
        else:
            images = self.latents[rows, flips.astype(int)]
        return torch.from_numpy(images), torch.from_numpy(self.labels[rows])

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
    """Yield (step, images, labels), this rank's slice `mine` of every global batch; a thread reads one step ahead."""
    def read(step):
        flips = np.random.default_rng([seed, step, zlib.crc32(b"flip")]).random(batch) < 0.5
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
             or name == table and name in state and state[name].shape != value.shape}
    load_weights(net, {**state, **fresh}, path)
    return f", from {path}" + (f" without {', '.join(fresh)}" if fresh else "")


def load_checkpoint(path, config):
    """A checkpoint of this file whose config does not contradict the present one."""
    checkpoint = load_file(path)
    if not {"model", "ema", "opt", "step"} <= checkpoint.keys() or not isinstance(checkpoint.get("config"), dict):
        raise UserError(f"{path}: not a checkpoint of train.py; --resume needs one")
    refuse_other(path, checkpoint["config"], config)
    return checkpoint


def train(args, data, rank, world, device):
    torch.manual_seed(args.seed)
    if data.shape[-1] % MODELS[args.model]["patch_size"]:
        raise UserError(f"--model {args.model}: its patches do not divide images of size {data.shape[-1]}")
    model_config = dict(input_size=data.shape[-1], in_channels=data.shape[0], num_classes=len(data.classes))
    kind = args.objective or default_objective(args.model)
    net = build_model(args.model, **model_config, second_time=kind == "meanflow")
    origin = initialize(net, args.init) if args.init else ""
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    objective = OBJECTIVES[kind]()
    decode = None if data.pixels else VAE(args.vae or data.vae).to(device).decode
    blocks = parse_blocks(args.disp_blocks, len(net.blocks)) if args.disp != "none" else []
    group = args.disp_group if blocks else 1
    micro = check_batch(args.batch, world, args.micro, group)
    share = args.batch // world
    mine = slice(rank * share, (rank + 1) * share)
    steps = args.steps or max(1, round(args.epochs * len(data) / args.batch))
    dtype = args.dtype or default_dtype(device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bf16")
    floor = dispersive_floor(args.disp, group, args.disp_tau, args.disp_margin) if blocks else 0.0

    config = dict(data=f"{len(data)} of {'x'.join(map(str, data.shape))} ({data.hash:08x})")
    config |= {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    config |= dict(model_config, dtype=dtype, disp_blocks=blocks, objective=kind, classes=data.classes, vae=data.vae)
    out = Path(args.out)
    latest = out / "ckpt.pt"
    source = {"none": None, "auto": latest if latest.exists() else None}.get(args.resume, args.resume)
    checkpoint = load_checkpoint(source, config) if source else None
    first = checkpoint["step"] if checkpoint else 0
    barrier()
    if rank == 0:
        prepare_out(out, first, continues=bool(source) and Path(source).resolve() == latest.resolve())

    betas = (0.9, 0.95) if kind == "meanflow" else (0.9, 0.999)
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, betas, weight_decay=0.0, fused=device.type != "mps")
    if checkpoint:
        load_weights(net, checkpoint["model"], source)
        load_weights(ema, checkpoint["ema"], source)
        optimizer.load_state_dict(checkpoint["opt"])
    if compiled:
        net.compile()
    model = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net
    weights = [p.detach() for p in net.parameters()]
    ema_weights = list(ema.parameters())

    def say(text):
        if rank == 0:
            print(text, flush=True)

    run = None
    if args.wandb and rank == 0:
        import wandb
        run = wandb.init(project="dispersive", dir=str(out), config=config)

    def record(**values):
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")
            if run:
                run.log(values, step=values["step"])

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    size = sum(p.numel() for p in net.parameters()) / 1e6
    say(f"model   {args.model}, {size:.1f}M parameters, objective {kind}{origin}")
    say(f"data    {data.name}: {len(data):,} of {'x'.join(map(str, data.shape))}, {len(data.classes)} classes")
    say(f"device  {world} x {name}, {dtype}{', compiled' if compiled else ''}")
    say(f"batch   {args.batch} = {world} rank(s) x {share // micro} pass(es) x {micro}; {steps:,} steps, "
        f"{steps * args.batch / len(data):.1f} epochs" + (f", continued from step {first:,}" if first else ""))
    say(f"loss    + {args.disp_weight} x {args.disp}, block {','.join(map(str, blocks))}, groups of {group}, "
        f"floor {floor:.3f}" if blocks else "loss    without dispersion")

    def save(step):
        if rank == 0:
            with atomic(latest) as file:
                torch.save(dict(model=net.state_dict(), ema=ema.state_dict(), opt=optimizer.state_dict(), step=step,
                                config=config), file)

    def picture(step):
        """A grid of EMA samples, one class a row, and the spread of 64 samples' activations after every block."""
        if rank != 0:
            return
        grid = out / "samples" / f"{step:07d}.png"
        kinds = np.linspace(0, len(data.classes) - 1, min(10, len(data.classes))).round().astype(int)
        labels = torch.from_numpy(kinds.repeat(8))
        images = generate(ema, objective, data.shape, labels, range(len(labels)), args.seed, device, dtype, decode,
                          steps=1 if kind == "meanflow" else 25)
        save_grid(images.numpy(), grid, columns=8)

        count = min(64, len(data))
        entries = np.linspace(0, len(data) - 1, count).astype(int)  # of all classes: a cache is sorted by class
        images, labels = (tensor.to(device) for tensor in data.read(entries, np.zeros(count, bool)))
        generator = stream(args.seed, 0, "probe", device)
        times = objective.times(count, generator)
        t, r = times if isinstance(times, tuple) else (times, None)
        noise = torch.randn(count, *data.shape, generator=generator, device=device)
        with torch.no_grad(), autocast():  # of the EMA, which is not compiled
            _, activations = objective.loss(ema, data.prepare(images, 0.0), labels, t, noise, r,
                                            blocks=range(1, len(net.blocks) + 1))
        spread = [round(mean_distance(z).item(), 6) for z in activations]
        record(step=step, block_distance=spread)
        say(f"step {step:,}: {grid}; distance after each block " + " ".join(f"{d:.3g}" for d in spread))

    def draw(kind, step, purpose, *shape):
        """This rank's slice of what is drawn for the whole global batch."""
        return kind(args.batch, *shape, generator=stream(args.seed, step, purpose, device), device=device)[mine]

    sums, logged = torch.zeros(2, device=device), first
    started = shown = time.time()
    for step, images, labels in batches(data, first, steps, args.batch, mine, args.seed, device):
        x = data.prepare(images, None if data.pixels else draw(torch.randn, step, "posterior", *data.shape))
        y = torch.where(draw(torch.rand, step, "label") < LABEL_DROPOUT, net.num_classes, labels)
        times = objective.times(args.batch, stream(args.seed, step, "time", device))
        t, r = (v[mine] for v in times) if isinstance(times, tuple) else (times[mine], None)
        noise = draw(torch.randn, step, "noise", *data.shape)
        done = step + 1
        is_ckpt = done % args.ckpt_every == 0 or done == steps
        is_log = done % args.log_every == 0 or is_ckpt  # before a checkpoint, to see that the loss is finite
        distance = torch.zeros((), device=device)
        for begin in range(0, share, micro):
            part = slice(begin, begin + micro)
            with contextlib.nullcontext() if part.stop == share or model is net else model.no_sync():
                with autocast():
                    loss, activations = objective.loss(model, x[part], y[part], t[part], noise[part],
                                                       None if r is None else r[part], blocks=blocks)
                loss, disp = loss.mean(), loss.new_zeros(())
                for z in activations:
                    disp = disp + dispersive_loss(z, args.disp, args.disp_tau, args.disp_margin, group) / len(blocks)
                ((loss + args.disp_weight * disp) * (micro / share)).backward()
            shown_loss = objective.squared_error.mean() if kind == "meanflow" else loss.detach()
            sums += torch.stack([shown_loss, disp.detach()]) * (micro / share)
            if is_log:
                for z in activations:
                    distance += mean_distance(z, group) / len(blocks) * (micro / share)
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + step) / (10 + step))  # warmed up, so that a short run's EMA forgets its start
        torch._foreach_lerp_(ema_weights, weights, 1 - decay)

        if is_log:
            values = torch.cat([sums / (done - logged), distance[None]])
            if world > 1:
                dist.all_reduce(values)
                values /= world
            loss, disp, distance = values.tolist()
            if not math.isfinite(loss + disp):
                raise UserError(f"at step {done} the loss is {loss} and the dispersive loss {disp}: try a smaller "
                                f"--lr, or --grad-clip 1; checkpoints written before are whole")
            now = time.time()
            rate, left = (done - logged) * args.batch / (now - shown), (steps - done) * (now - started) / (done - first)
            sums.zero_()
            logged, shown = done, now
            extra = dict(disp=disp, floor=floor, distance=distance) if blocks else {}
            record(step=done, loss=loss, **extra, images_per_second=rate, seconds=now - started)
            say(f"step {done:,}/{steps:,}  loss {loss:.4f}"
                + (f"  disp {disp:.3f} (floor {floor:.3f}, distance {distance:.3g})" if blocks else "")
                + f"  {rate:,.1f} images/s  {clock(left)} left")
        paused = time.time()
        if is_ckpt:
            save(done)
        if done % args.sample_every == 0 or done == steps:
            picture(done)
        shown += time.time() - paused  # images/s counts training alone
    if first >= steps:
        say(f"{source} is at step {first:,} already: nothing to train; more with --steps")


def prepare_out(out, first, continues):
    """Make --out; set another run's files aside, and cut a continued run's log where it continues."""
    log = out / "log.jsonl"
    if continues:
        whole = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
        with atomic(log) as file:
            file.write("".join(line + "\n" for line in whole if json.loads(line)["step"] <= first).encode())
    elif log.exists() or (out / "ckpt.pt").exists():
        aside = next(path for path in (out / f"old{n}" for n in itertools.count(1)) if not path.exists())
        aside.mkdir()
        for path in (out / "ckpt.pt", log, out / "samples"):
            if path.exists():
                os.replace(path, aside / path.name)
    (out / "samples").mkdir(parents=True, exist_ok=True)


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
    rank, world, device = start()
    if args.images:
        cache_images(args, rank, world, device)
        if args.cache_only:
            return
    data = Data.open(args.data) if args.data else Data("drawn demo", *demo_data())
    train(args, data, rank, world, device)
    if not args.data and rank == 0:
        print(f"see {args.out}/samples; next: python sample.py --ckpt {args.out}/ckpt.pt --out {args.out}/generated")


if __name__ == "__main__":
    main()
