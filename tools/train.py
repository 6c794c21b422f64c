"""Train a CMamba model on a folder of photographs.

    python tools/train.py --data photos --out runs/tiny --config tiny --minutes 60

Writes `checkpoint.pt` (everything needed to go on, replaced atomically), `log.jsonl`, and at the
end of training `model/` with config.json and model.safetensors.  The same command goes on from
`checkpoint.pt` where there is one; `--init DIR` starts from saved weights with new optimisers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cmamba_ref import CMamba, CMambaError
from cmamba_ref.config import CONFIGS
from cmamba_ref.files import write_atomically
from cmamba_ref.losses import rate_distortion_loss

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# Crops are cut up to this much larger and reduced, which also hides the traces of JPEG.
MAX_REDUCTION = 2.0
VALIDATION_CROP = 256
VALIDATION_QUALITIES = (1.0, 3.0, 5.0, 8.0)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of photographs, searched recursively")
    add("--out", type=Path, required=True, help="folder for checkpoint, log and model")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--config", default="tiny", choices=sorted(CONFIGS), help="which model (default: tiny)"
    )
    start.add_argument("--init", type=Path, help="directory of weights to start from instead")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="length of training in steps")
    length.add_argument("--minutes", type=float, help="length of training in minutes of run time")
    add("--batch", type=int, default=8, help="crops per step (default: 8)")
    add("--crop", type=int, default=128, help="side of a crop, a multiple of 64 (default: 128)")
    add("--lr", type=float, default=1e-3, help="learning rate after warm-up (default: 1e-3)")
    add("--final-lr", type=float, default=2e-5, help="learning rate at the end (default: 2e-5)")
    add("--aux-lr", type=float, default=1e-3, help="of the prior's quantiles (default: 1e-3)")
    add("--warmup", type=int, default=200, help="steps of linear warm-up (default: 200)")
    add("--decay", type=float, default=0.3, help="final part with falling rate (default: 0.3)")
    add("--clip", type=float, default=1.0, help="bound of the gradient norm (default: 1)")
    add("--lmbda", type=float, default=0.013, help="for a model of one rate (default: 0.013)")
    add("--balance", type=float, default=0.5, help="loss is divided by lambda^BALANCE (0.5)")
    add("--validation", type=int, default=8, help="photographs held out (default: 8)")
    add("--save-every", type=float, default=5.0, help="minutes between checkpoints (default: 5)")
    add("--seed", type=int, default=0)
    add(
        "--round-transforms",
        action="store_true",
        help="export g_a, g_s and h_a rounded to float16, in a smaller file",
    )
    add("--threads", type=int, help="torch threads (default: torch's choice)")
    args = parser.parse_args(argv)
    if args.crop % 64 or args.crop <= 0:
        parser.error(f"--crop must be a positive multiple of 64, got {args.crop}")
    if (args.steps or args.minutes or 0) <= 0:
        parser.error("--steps or --minutes must be above 0")
    if args.validation < 1:
        parser.error(f"--validation must be at least 1, got {args.validation}")
    return args


def load_photographs(folder: Path) -> list[np.ndarray]:
    """All photographs below `folder`, sorted by path, as uint8 `[H, W, 3]`."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"no photographs below {folder}")

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(read, paths), total=len(paths), desc="reading"))


def random_crop(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random crop `[size, size, 3]`, at random reduced in scale and flipped."""
    largest = min(MAX_REDUCTION, min(photo.shape[:2]) / size)
    side = size if largest <= 1 else int(size * rng.uniform(1, largest))
    if min(photo.shape[:2]) < side:
        raise SystemExit(f"a photograph of {photo.shape[:2]} is smaller than the crop of {size}")
    top = rng.integers(photo.shape[0] - side + 1)
    left = rng.integers(photo.shape[1] - side + 1)
    crop = photo[top : top + side, left : left + side]
    if side != size:
        resized = Image.fromarray(crop).resize((size, size), Image.Resampling.LANCZOS)
        crop = np.asarray(resized)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def to_batch(crops: list[np.ndarray]) -> Tensor:
    """uint8 crops `[S, S, 3]` to one batch `[B, 3, S, S]` in 0...1, channels last in memory."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def lr_factor(step: int, progress: float, args: argparse.Namespace) -> float:
    """Linear warm-up, a plateau, then a linear fall to `final_lr` over the last `decay` part."""
    warm = min(1.0, (step + 1) / max(1, args.warmup))
    left = min(1.0, (1 - progress) / args.decay) if args.decay > 0 else 1.0
    floor = args.final_lr / args.lr
    return warm * (floor + (1 - floor) * max(0.0, left))


class Trainer:
    """Model, optimisers, random state and position of one training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.rng = np.random.default_rng(args.seed)
        self.model = CMamba.from_pretrained(args.init) if args.init else CMamba(args.config)
        self.model.train().requires_grad_(True)
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        named = dict(self.model.named_parameters())
        aux = named.pop("entropy_bottleneck.quantiles")
        self.params = list(named.values())
        self.optimizer = torch.optim.Adam(self.params, lr=args.lr)
        self.aux_optimizer = torch.optim.Adam([aux], lr=args.aux_lr)
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0

    @property
    def progress(self) -> float:
        """Part of the run that is done, 0...1."""
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def train_step(self, photos: list[np.ndarray]) -> dict[str, float]:
        """One optimiser step on one batch of random crops."""
        args, model = self.args, self.model
        picks = self.rng.integers(len(photos), size=args.batch)
        x = to_batch([random_crop(photos[i], args.crop, self.rng) for i in picks])
        quality, lmbda, weight = None, args.lmbda, 1.0
        if model.gain is not None:
            # Stratified, so that every step sees the whole range of rates.
            span = len(model.config.lmbdas) - 1
            spread = (self.rng.permutation(args.batch) + self.rng.random(args.batch)) / args.batch
            quality = torch.from_numpy(1 + span * spread).float()
            lmbda = model.gain.lmbda(quality)
            weight = (lmbda / lmbda.new_tensor(model.config.lmbdas).log().mean().exp()) ** (
                -args.balance
            )
        losses = rate_distortion_loss(model(x, quality), x, lmbda)
        loss = (weight * losses["loss"]).mean()

        factor = lr_factor(self.step, self.progress, args)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * factor
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params, args.clip)
        if torch.isfinite(norm) and torch.isfinite(loss):
            self.optimizer.step()
        else:
            self.skipped += 1
        self.aux_optimizer.zero_grad()
        aux_loss = model.aux_loss()
        aux_loss.backward()
        self.aux_optimizer.step()
        self.step += 1
        return {
            "loss": float(loss.detach()),
            "bpp": float(losses["bpp"].detach().mean()),
            "mse": float(losses["distortion"].detach().mean()),
            "aux": float(aux_loss.detach()),
            "grad_norm": float(norm),
        }

    @torch.no_grad()
    def validate(self, photos: list[np.ndarray]) -> dict[str, dict[str, float]]:
        """Estimated bpp and PSNR (of rounded pictures, mean) of held-out centre crops."""
        self.model.eval()
        result = {}
        qualities = VALIDATION_QUALITIES if self.model.gain is not None else (None,)
        for quality in qualities:
            bpp, psnr = [], []
            for photo in photos:
                top = max(0, photo.shape[0] - VALIDATION_CROP) // 2
                left = max(0, photo.shape[1] - VALIDATION_CROP) // 2
                x = to_batch([photo[top : top + VALIDATION_CROP, left : left + VALIDATION_CROP]])
                output = self.model(x, quality)
                output["x_hat"] = (output["x_hat"].clamp(0, 1) * 255).round() / 255
                losses = rate_distortion_loss(output, x, 0.0)
                bpp.append(float(losses["bpp"]))
                psnr.append(-10 * float(losses["distortion"].log10()))
            result[str(quality)] = {"bpp": float(np.mean(bpp)), "psnr": float(np.mean(psnr))}
        self.model.train()
        return result

    def save(self) -> None:
        """Write `checkpoint.pt`; the old one stays until the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "config": self.model.config.to_json(),
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.args.out / "checkpoint.pt", buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same configuration."""
        state = torch.load(path, weights_only=True)
        if state["config"] != self.model.config.to_json():
            raise SystemExit(f"{path} is of another configuration; choose another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.aux_optimizer.load_state_dict(state["aux_optimizer"])
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.skipped = state["skipped"]

    def export(self) -> None:
        """Write the model with its entropy tables into `model/`."""
        if self.args.round_transforms:
            # These decide what the picture looks like, but not how a decoder reads its symbols.
            with torch.no_grad():
                for module in (self.model.g_a, self.model.g_s, self.model.h_a):
                    for parameter in module.parameters():
                        parameter.copy_(parameter.half())
        self.model.update(force=True)
        self.model.save_pretrained(self.args.out / "model")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    photos = load_photographs(args.data)
    if len(photos) <= args.validation:
        raise SystemExit(
            f"{len(photos)} photographs, of which --validation holds {args.validation} back: "
            "nothing is left to train on"
        )
    held_out = photos[:: len(photos) // args.validation][: args.validation]
    kept = {id(photo) for photo in held_out}
    photos = [photo for photo in photos if id(photo) not in kept]
    try:
        trainer = Trainer(args)
    except CMambaError as error:
        raise SystemExit(f"--init: {error}") from error
    if (args.out / "checkpoint.pt").exists():
        trainer.resume(args.out / "checkpoint.pt")

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    saved = trainer.seconds
    recent: list[dict[str, float]] = []
    with (
        open(args.out / "log.jsonl", "a") as log,
        tqdm(
            total=1.0,
            initial=trainer.progress,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
            mininterval=5,
        ) as bar,
    ):

        def write(record: dict) -> None:
            log.write(json.dumps(record) + "\n")
            log.flush()

        def write_validation(event: str) -> None:
            write(
                {
                    "event": event,
                    "step": trainer.step,
                    "minutes": round(trainer.seconds / 60, 3),
                    "qualities": trainer.validate(held_out),
                }
            )

        if trainer.step == 0:
            write({"event": "start", "args": {k: str(v) for k, v in vars(args).items()}})
        while trainer.progress < 1 and not stop:
            began = time.monotonic()
            recent.append(trainer.train_step(photos))
            trainer.seconds += time.monotonic() - began
            bar.update(min(1.0, trainer.progress) - bar.n)
            if trainer.step % 50 == 0:
                record = {key: float(np.mean([r[key] for r in recent])) for key in recent[0]}
                recent.clear()
                bar.set_postfix_str(f"step {trainer.step} loss {record['loss']:.4f}")
                write(
                    {
                        "step": trainer.step,
                        "minutes": round(trainer.seconds / 60, 3),
                        "lr": trainer.optimizer.param_groups[0]["lr"],
                        "skipped": trainer.skipped,
                        **record,
                    }
                )
            if trainer.seconds - saved > 60 * args.save_every:
                saved = trainer.seconds
                trainer.save()
                write_validation("validation")
        trainer.save()
        if not stop:
            write_validation("end")
            trainer.export()
    return 0


if __name__ == "__main__":
    sys.exit(main())
