"""A tabular benchmark for searchers: every policy of a small space, genuinely trained on digits, several seeds each.

    python reproduce/digits_table.py --workers 2         # trains all of it anew: about an hour on two idle CPU cores

The space: one of ten patterns after each of the three batch normalisations of a small ConvNet, 1,000 policies in all.
Each is trained on the 100 training images of table2_cifar's demo and measured on its 500 validation images (what a
search sees) and its 797 test images. The result is digits_table.json beside this file, with which hundreds of searches
cost seconds; its "noise" says how far the seeds of a policy lie apart. Finished policies are kept under runs/.

The seeds of a policy are trained side by side, as the groups of one network: grouped convolutions share no weight,
batch normalisation no statistic, the losses are added, and every network has its own weights, order of images, masks.
Their one coupling is the scale of tiled patterns, Size / Sum of the masks of all of them instead of one of them.
All policies share the weights and the orders of their seeds, so that differences between policies are paired.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from autodropout import Policy
from autodropout import apply_policy
from autodropout.files import write_atomically
from autodropout.provenance import commit
from autodropout.reproduce.augment import derive
from autodropout.reproduce.data import DIGITS
from autodropout.reproduce.data import ImageData
from autodropout.reproduce.data import open_data
from autodropout.reproduce.experiment import device_name
from autodropout.reproduce.experiment import versions
from autodropout.reproduce.training import Normalise
from autodropout.search.conv_space import KINDS
from autodropout.search.conv_space import ConvSite
from autodropout.search.conv_space import ConvSpace

TABLE = Path(__file__).with_name("digits_table.json")
RUNS = Path("runs") / "digits_table"
SCHEMA = 1

TRAIN_IMAGES, VALID_IMAGES = 100, 500
SEEDS = 6
WIDTH = 16
STEPS, BATCH = 150, 50
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.2, 0.9, 5e-4
# The map of each site, and what it can get: off, two strengths of each classical pattern, a tile of three sizes.
MAPS = ((WIDTH, 8, 8), (2 * WIDTH, 4, 4), (2 * WIDTH, 4, 4))
VALUES: dict[str, tuple[float, ...]] = {
    "rate": (0.1, 0.2),
    "block_size": (3,),
    "size": (0.25, 0.5, 0.75),
    "stride": (0.0,),
    "repeat": (1,),
    "rotate": (0.0,),
    "shear_x": (0.0,),
    "shear_y": (0.0,),
    "share_c": (False,),
}


def table_space() -> ConvSpace:
    """The space of the table: 1,000 sequences."""
    names = [name for name, module in DigitsNet(1).named_modules() if isinstance(module, nn.BatchNorm2d)]
    sites = [ConvSite(name, i / 2, (seen,)) for i, (name, seen) in enumerate(zip(names, MAPS, strict=True))]
    return ConvSpace(sites, KINDS, VALUES)


def all_choices() -> list[tuple[int, ...]]:
    """Every sequence of the space, sorted."""
    space = table_space()
    per_token = [range(len(token.values)) for token in space.tokens]
    sites = [[i for i, token in enumerate(space.tokens) if token.site == site] for site in range(len(MAPS))]
    whole = (0,) * len(space.tokens)
    options = []
    for tokens in sites:
        # The sites do not depend on each other: a site's options are those that are valid beside others that are off.
        found = []
        for choices in itertools.product(*(per_token[token] for token in tokens)):
            try:
                space.check([*whole[: tokens[0]], *choices, *whole[tokens[-1] + 1 :]])
            except ValueError:
                continue
            found.append(choices)
        options.append(found)
    return sorted(tuple(itertools.chain.from_iterable(parts)) for parts in itertools.product(*options))


class DigitsNet(nn.Module):
    """`seeds` networks side by side: three 3x3 convolutions with batch normalisation and ReLU, mean, linear.

    Images `(N, seeds, 8, 8)`, one channel for each network; the result is `(N, seeds, 10)`, unnormalised scores.
    """

    def __init__(self, seeds: int) -> None:
        super().__init__()
        self.seeds = seeds
        widths = (1, WIDTH, 2 * WIDTH, 2 * WIDTH)
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        for layer, (before, after) in enumerate(itertools.pairwise(widths)):
            convolution = nn.Conv2d(
                seeds * before, seeds * after, 3, stride=1 + (layer == 1), padding=1, bias=False, groups=seeds
            )
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            self.convolutions.append(convolution)
            self.norms.append(nn.BatchNorm2d(seeds * after))
        self.scores = nn.Conv2d(seeds * widths[-1], seeds * 10, 1, groups=seeds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        scores: torch.Tensor = self.scores(x.mean((2, 3), keepdim=True))
        return scores.view(len(x), self.seeds, 10)


def train(policy: Policy, seeds: int = SEEDS) -> tuple[list[int], list[int]]:
    """Trains the networks of a policy; returns how many validation and test images each classifies correctly."""
    data = _data()
    torch.manual_seed(derive("digits table", "weights"))
    model = DigitsNet(seeds)
    apply_policy(model, policy, example=torch.zeros(2, seeds, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    normalise = Normalise(data.train.images, torch.device("cpu"))
    images, labels = normalise(data.train.images)[:, 0], data.train.labels
    per_epoch = len(labels) // BATCH
    order = torch.empty(0)
    for step in range(STEPS):
        epoch, batch = divmod(step, per_epoch)
        if batch == 0:
            order = _orders(len(labels), seeds, epoch)
        chosen = order[batch * BATCH : (batch + 1) * BATCH]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad(set_to_none=True)
        scores = model(images[chosen]).flatten(0, 1)
        # The sum over networks of each one's mean: their gradients are those of separate trainings.
        loss = F.cross_entropy(scores, labels[chosen].flatten(), reduction="sum") / BATCH
        loss.backward()
        optimizer.step()
    model.eval()
    correct = []
    with torch.inference_mode():
        for split in (data.valid, data.test):
            guesses = model(normalise(split.images).expand(-1, seeds, -1, -1)).argmax(2)
            correct.append((guesses == split.labels[:, None]).sum(0).tolist())
    return correct[0], correct[1]


def _orders(images: int, seeds: int, epoch: int) -> torch.Tensor:
    """The order of the images in an epoch, `(images, seeds)`, an own one for each network."""
    generator = torch.Generator().manual_seed(derive("digits table", "order", epoch))
    return torch.stack([torch.randperm(images, generator=generator) for _ in range(seeds)], dim=1)


@cache
def _data() -> ImageData:
    return open_data(DIGITS, TRAIN_IMAGES, VALID_IMAGES)


# ---- the table -----------------------------------------------------------------------------------------------------


def _train_one(choices: tuple[int, ...]) -> tuple[tuple[int, ...], list[int], list[int]]:
    torch.set_num_threads(1)
    return choices, *train(table_space().decode(choices))


def train_all(workers: int, runs: Path, progress: Callable[[], object]) -> list[list[Any]]:
    """Rows (choices, validation and test images correct by seed) of all sequences, sorted; continues from `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    done = runs / f"{_settings_key()}.jsonl"
    rows: dict[tuple[int, ...], list[Any]] = {}
    for line in done.read_text(encoding="utf-8").splitlines() if done.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill: that policy is trained again
            continue
        rows[tuple(row[0])] = row
        progress()
    missing = [choices for choices in all_choices() if choices not in rows]
    with done.open("a", encoding="utf-8") as file, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        if rows:
            file.write("\n")  # ends a torn line; the empty one is skipped as such
        for future in as_completed([pool.submit(_train_one, choices) for choices in missing]):
            choices, valid, test = future.result()
            rows[choices] = [list(choices), valid, test]
            file.write(json.dumps(rows[choices]) + "\n")
            file.flush()
            progress()
    return [rows[choices] for choices in sorted(rows)]


def _settings() -> dict[str, Any]:
    return {
        "space": table_space().to_json(),
        "data": {"title": _data().title, "fingerprint": _data().fingerprint},
        "network": {"widths": [WIDTH, 2 * WIDTH, 2 * WIDTH], "kernel": 3},
        "training": {
            "images": TRAIN_IMAGES,
            "steps": STEPS,
            "batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
        },
        "seeds": SEEDS,
        "valid_images": len(_data().valid),
        "test_images": len(_data().test),
    }


def _settings_key() -> str:
    return f"{derive('digits table', json.dumps(_settings(), sort_keys=True)):016x}"


def noise(rows: Iterable[list[Any]]) -> dict[str, float]:
    """Standard deviations of validation accuracies, in percent.

    `seed`: between the seeds of a policy, pooled over policies, which is what one observation of a search is off by;
    `residual`: the same without what a seed adds to all policies, of the layout policies x seeds. All policies share
    the weights and the orders of their seeds, so that a lucky seed lifts all of them and is no error between them.
    `mean`: of a policy's mean over its seeds beside other policies, from `residual`; `policies`: between the means of
    policies, which includes `mean`.
    """
    valid = [[100 * correct / VALID_IMAGES for correct in row[1]] for row in rows]
    of_policies = [statistics.fmean(seeds) for seeds in valid]
    of_seeds = [statistics.fmean(policies) for policies in zip(*valid, strict=True)]
    overall = statistics.fmean(of_policies)
    squares = math.fsum(
        (accuracy - of_policy - of_seed + overall) ** 2
        for seeds, of_policy in zip(valid, of_policies, strict=True)
        for accuracy, of_seed in zip(seeds, of_seeds, strict=True)
    )
    residual = math.sqrt(squares / ((len(of_policies) - 1) * (len(of_seeds) - 1)))
    return {
        "seed": round(math.sqrt(statistics.fmean(statistics.variance(seeds) for seeds in valid)), 3),
        "residual": round(residual, 3),
        "mean": round(residual / math.sqrt(len(of_seeds)), 3),
        "policies": round(statistics.stdev(of_policies), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each (default: 1)")
    parser.add_argument("--output", type=Path, default=TABLE, help="the file to write (default: beside this script)")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    with tqdm(total=len(all_choices()), unit="policy", smoothing=0.05) as bar:
        rows = train_all(arguments.workers, RUNS, bar.update)
    header = {
        "schema": SCHEMA,
        "command": "python reproduce/digits_table.py",
        **_settings(),
        "noise": noise(rows),
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
        "commit": commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "columns": ["choices", "validation images correct, by seed", "test images correct, by seed"],
    }
    # One row a line, so that the file can be read and compared.
    text = json.dumps(header, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n ]\n}\n"
    write_atomically(arguments.output, lambda file: file.write(text.encode()))
    print(f"{len(rows)} policies: {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
