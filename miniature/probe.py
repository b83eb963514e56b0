"""What the vision tower sees: a linear probe names the drawing in unseen scenes.

    .venv/bin/python -m miniature.probe --weights weights/mini

The IP-Adapter reads the tower's last hidden states but one. One linear layer on them (on the class token and the mean of the
patches) is trained on scenes of one object to tell all drawings apart, objects and styles. It is judged on scenes with
combinations that training never shows.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from cascade.running.device import choose_device
from miniature.compose import compose
from miniature.icons import load_drawings
from miniature.scenes import Plans, Split, sample_plans
from miniature.scores import table
from training.pictures import normalise

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
BATCH = 500
LEARNING_RATE = 1e-2


def scenes_of_one(names: list[str], seed: int, split: Split, styles: int, count: int) -> Plans:
    """Plans of ``count`` scenes with a single object, in styles drawn evenly."""
    plans = sample_plans(2 * count + 50, names, seed, split, styles)
    plans = plans[plans.objects[:, 1] < 0][:count]
    plans.styles[:] = np.random.default_rng((seed, 18)).integers(styles, size=(len(plans), 1))
    return plans


@torch.no_grad()
def features(encoder: CLIPVisionModelWithProjection, drawings: Tensor, plans: Plans, styles: int) -> Tensor:
    """The class token and the mean of the patches, (n, 2 D) float16, of the last hidden states but one.

    Scenes are composed at 256x256 pixels, and scaled to the tower's size as image prompts are.
    """
    side, made = encoder.config.image_size, []
    for first in tqdm(range(0, len(plans), BATCH), desc="encoding", mininterval=10):
        pixels = compose(drawings, plans[first : first + BATCH], styles, (256, 256))
        states = encoder(pixel_values=normalise(pixels, side), output_hidden_states=True).hidden_states[-2]
        made.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1).half())
    return torch.cat(made)


def train_probe(inputs: Tensor, labels: Tensor, classes: int, steps: int) -> nn.Module:
    """A linear classifier of standardised features.

    Args:
        inputs: (n, D).
        labels: (n,), below ``classes``.
        steps: of 4 `BATCH` features each, by AdamW with a learning rate that falls linearly to 0.
    """
    generator = torch.Generator(inputs.device).manual_seed(0)
    normalisation = nn.BatchNorm1d(inputs.shape[1], affine=False)
    probe = nn.Sequential(normalisation, nn.Linear(inputs.shape[1], classes)).to(inputs.device)
    optimizer = torch.optim.AdamW(probe.parameters(), LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in tqdm(range(steps), desc="probe", mininterval=10):
        chosen = torch.randint(len(inputs), (4 * BATCH,), generator=generator, device=inputs.device)
        loss = cross_entropy(probe(inputs[chosen].float()), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="miniature.probe", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="with image_encoder")
    parser.add_argument("--drawings", type=Path, default=ROOT / "build" / "mini" / "drawings.zip")
    parser.add_argument("--scenes", type=int, default=200_000, help="to train the probe (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="of the probe's training (default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=4000, help="scenes to judge (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, _, _ = choose_device()
    drawings, names, styles = load_drawings(options.drawings)
    drawings = drawings.to(device)
    encoder = CLIPVisionModelWithProjection.from_pretrained(options.weights / "image_encoder").to(device).float().eval()
    parts = {}
    for split, count in (("train", options.scenes), ("heldout", options.unseen)):
        plans = scenes_of_one(names, options.seed + 1, split, len(styles), count)
        labels = torch.from_numpy(plans.objects[:, 0].astype(np.int64) * len(styles) + plans.styles[:, 0]).to(device)
        parts[split] = features(encoder, drawings, plans, len(styles)), labels
    probe = train_probe(*parts["train"], len(names) * len(styles), options.steps)
    inputs, labels = parts["heldout"]
    with torch.no_grad():
        nearest = torch.cat([probe(part.float()).topk(5).indices for part in inputs.split(BATCH)])
    found = nearest == labels[:, None]
    values = {"drawing first": found[:, 0].float().tolist(), "drawing in 5": found.any(1).float().tolist()}
    logger.info("%d drawings, %d unseen scenes\n%s", len(names) * len(styles), len(labels), table({"probe": values}))


if __name__ == "__main__":
    main()
