"""Transformer-XL language models: AutoDropout against dropout and variational dropout, all at the same budget.

    python reproduce/table3_language_model.py                              # demo: minutes, offline, no arguments needed
    python reproduce/table3_language_model.py --preset small --data DIR    # DIR has train.txt, valid.txt and test.txt
    python reproduce/table3_language_model.py --preset paper --data DIR    # or gzipped: train.txt.gz, ...

Every method's strength is chosen on the validation text, with the same number of trials; the test text is used once, by
the final models. Perplexity by word, over the whole text as one stream with a memory. An interrupted run continues with
the same command. The tables go to stdout, one JSON line per trained model and the plot to results/, the state of the
run to runs/, both in the current directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autodropout.reproduce.command import Parser
from autodropout.reproduce.command import Report
from autodropout.reproduce.command import add_experiment_options
from autodropout.reproduce.command import preset_parser
from autodropout.reproduce.command import refused
from autodropout.reproduce.command import run_table
from autodropout.reproduce.command import some_of
from autodropout.reproduce.corpus import HUB
from autodropout.reproduce.corpus import PYDOC
from autodropout.reproduce.corpus import open_corpus
from autodropout.reproduce.dry_run import Cost
from autodropout.reproduce.dry_run import cost_lines
from autodropout.reproduce.dry_run import cost_of
from autodropout.reproduce.dry_run import models_line
from autodropout.reproduce.experiment import Experiment
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.experiment import Settings
from autodropout.reproduce.language_task import LanguageTask
from autodropout.reproduce.language_training import LanguageRecipe
from autodropout.reproduce.language_training import segments
from autodropout.reproduce.language_training import streams
from autodropout.reproduce.learning_rates import only_rises
from autodropout.reproduce.methods import method_label
from autodropout.reproduce.methods import open_policy
from autodropout.reproduce.methods import policy_origin
from autodropout.reproduce.models.transformer_xl import PENN_TREEBANK
from autodropout.reproduce.models.transformer_xl import Size
from autodropout.reproduce.models.transformer_xl import TransformerXL
from autodropout.reproduce.report import Row
from autodropout.reproduce.transformer_methods import METHODS

NAME = "table3_language_model"
DATA_VARIABLE = "AUTODROPOUT_DATA"
POLICY = "hand-lm-v0"
# AutoDropout with Transformer-XL on Penn Treebank as a leaderboard quotes it. No other number is known.
PAPER = {"valid_perplexity": "58.1", "perplexity": "54.9"}
PENN_TREEBANK_TEXT = "3ed3b5c1e5b5"  # fingerprint of Mikolov's version
SPLITS = {"valid_perplexity": "validation", "perplexity": "test"}


@dataclass(frozen=True)
class Preset:
    recipe: LanguageRecipe
    seeds: int
    tuning_seeds: int
    threads: int | None
    cost: str


PRESETS = {
    "demo": Preset(
        LanguageRecipe(
            Size(layers=2, width=64, heads=4, inner=128),
            epochs=16,
            batch_size=20,
            segment=32,
            memory=32,
            evaluation_memory=64,
            learning_rate=4e-3,
            warmup=50,
        ),
        seeds=2,
        tuning_seeds=1,
        threads=1,
        cost="17 models, 4 to 6 minutes on two CPU cores, offline (measured: 4 min 11 s, 5 min 55 s)",
    ),
    # One thread: where other programs run, two wait for each other, and a step was seen to take ten times as long.
    "small": Preset(
        LanguageRecipe(
            Size(layers=2, width=200, heads=4, inner=400, cutoffs=(2000,)),
            epochs=2,
            batch_size=20,
            segment=35,
            memory=35,
            evaluation_memory=70,
            learning_rate=2e-3,
            warmup=300,
        ),
        seeds=2,
        tuning_seeds=1,
        threads=1,
        cost="17 models of 3.5 million parameters, 5 to 9 min each on one CPU core (measured)",
    ),
    # Segment, memories and learning rate are ours: the paper does not say them.
    "paper": Preset(
        LanguageRecipe(
            PENN_TREEBANK,
            epochs=200,
            batch_size=60,
            segment=70,
            memory=70,
            evaluation_memory=640,
            learning_rate=5e-4,
            warmup=2000,
        ),
        seeds=5,
        tuning_seeds=1,
        threads=None,
        cost="29 models of 24 million parameters and 200 epochs: GPU days; not measured",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    preset = PRESETS[args.preset]
    if preset.threads is not None:
        torch.set_num_threads(preset.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        task = _task(args, preset)
        task.check_policies()
        if args.dry_run:
            print(_described(task, device))
            return 0
        experiment = Experiment(task, device)
    except (ValueError, OSError) as error:
        return refused(NAME, error)
    return run_table(NAME, experiment, "test perplexity", lambda results: _reports(task, results))


def _parser() -> Parser:
    parser = preset_parser(NAME, str(__doc__), {name: preset.cost for name, preset in PRESETS.items()})
    parser.add_argument(
        "--methods",
        type=some_of(METHODS),
        metavar="A,B,...",
        default=METHODS,
        help=f"from: {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help=f"folder with train.txt, valid.txt and test.txt, or gzipped (default: ptb in ${DATA_VARIABLE}; demo: "
        f"{PYDOC}); '{PYDOC}' is the language reference that comes with Python, '{HUB}' downloads WikiText-2",
    )
    parser.add_argument(
        "--policy",
        metavar="POLICY",
        default=POLICY,
        help="name or file of the policy whose rates autodropout scales (default: %(default)s)",
    )
    add_experiment_options(parser)
    return parser


def _task(args: argparse.Namespace, preset: Preset) -> LanguageTask:
    source = args.data
    if source is None and args.preset == "demo":
        source = PYDOC
    if source is None and os.environ.get(DATA_VARIABLE):
        source = os.path.join(os.environ[DATA_VARIABLE], "ptb")
    if source is None:
        raise ValueError(
            f"preset {args.preset} needs a text: give --data DIR with train.txt, valid.txt and test.txt (or the same "
            f"gzipped), for example of the Penn Treebank, or set {DATA_VARIABLE}=DIR above ptb/ with them"
        )
    policy_name, policy = open_policy(args.policy)
    corpus = open_corpus(source)
    batch, tokens = preset.recipe.batch_size, len(corpus.train)
    if tokens < batch:
        raise ValueError(
            f"train.txt must have at least {batch} words, ends of lines included, for a batch, got {tokens}"
        )
    settings = Settings(
        name=NAME,
        preset=args.preset,
        recipe=dataclasses.replace(preset.recipe, epochs=args.epochs or preset.recipe.epochs),
        methods=args.methods,
        seeds=args.seeds or preset.seeds,
        tuning_seeds=preset.tuning_seeds,
        final_on_all=False,
        policy_name=policy_name,
        policy=policy,
    )
    return LanguageTask(settings, corpus)


def _reports(task: LanguageTask, results: Sequence[Result]) -> list[Report]:
    notes = _notes(task)
    return [
        (_title(task, split), _rows(task, results, metric), notes if metric == task.metric else [])
        for metric, split in SPLITS.items()
    ]


def _title(task: LanguageTask, split: str) -> list[str]:
    recipe, corpus = task.settings.recipe, task.corpus
    size = recipe.size
    tokens = f"{len(corpus.train):,} training, {len(corpus.valid):,} validation, {len(corpus.test):,} test words"
    return [
        f"Table 3 (the numbering is ours): {split} perplexity, Transformer-XL of {size.layers} layers of width "
        f"{size.width}, {_parameters(task):,} parameters, {recipe.epochs} epochs"
        f"{only_rises(recipe.warmup, _training_steps(task), 'steps')}",
        f"Data: {_name(task)}, fingerprint {corpus.fingerprint[:12]}; {tokens}, {len(corpus.words):,} different ones",
    ]


def _rows(task: LanguageTask, results: Sequence[Result], metric: str) -> list[Row]:
    settings = task.settings
    known = _of_penn_treebank(task) and settings.recipe.size == PENN_TREEBANK
    return [
        Row(
            method_label(result.method, settings.policy_name, policy_origin(settings.policy)),
            result.strength,
            tuple(record[metric] for record in result.records),
            PAPER[metric] if known and result.method == "autodropout" else None,
        )
        for result in results
    ]


def _notes(task: LanguageTask) -> list[str]:
    settings = task.settings
    trials = f"{settings.tuning_seeds} seed{'s' if settings.tuning_seeds > 1 else ''}"
    return [
        f"tuned: the best of three strengths on the validation text, {trials} each (AutoDropout: a factor on the rates "
        f"of its policy's patterns). Final models: seeds 0 to {settings.seeds - 1}. Interval: Student's t over seeds. "
        f"Each word is predicted once, from at least {settings.recipe.evaluation_memory} before it or all of them. "
        "paper: Pham & Le 2021, Transformer-XL of 24 million parameters on Penn Treebank.",
    ]


def _described(task: LanguageTask, device: torch.device) -> str:
    recipe, settings = task.settings.recipe, task.settings
    steps = _training_steps(task)
    trials = settings.tuning_seeds * sum(len(task.strengths[m]) for m in settings.methods)
    cost = _cost(task)
    batch = f"{recipe.batch_size} segments of {recipe.segment} words with a memory of {recipe.memory}"
    data = f"{len(task.corpus.train):,} words"
    return "\n".join(
        [
            *_title(task, "test"),
            f"Methods: {', '.join(settings.methods)}",
            *cost_lines(cost, batch, 1, copies=2, width=2 if device.type == "cuda" else 4),
            f"Adam, learning rate {recipe.learning_rate:g} after {recipe.warmup:,} steps, then along the cosine of "
            f"all; a memory of {recipe.evaluation_memory} in evaluation",
            models_line("to tune", trials, data, recipe.epochs, steps, cost.flops),
            models_line("final", settings.seeds * len(settings.methods), data, recipe.epochs, steps, cost.flops),
        ]
    )


def _training_steps(task: LanguageTask) -> int:
    recipe: LanguageRecipe = task.settings.recipe
    return recipe.epochs * -(-(len(task.corpus.train) // recipe.batch_size) // recipe.segment)


def _cost(task: LanguageTask) -> Cost:
    """Of the first words of the text, with a memory, which all segments have but the first ones."""
    recipe, corpus = task.settings.recipe, task.corpus
    first = next(segments(streams(corpus.train, corpus.start, recipe.batch_size), recipe.segment))
    # Which words they are decides what an adaptive softmax computes.
    device = "cpu" if any(cutoff < len(corpus.words) for cutoff in recipe.size.cutoffs) else "meta"
    words, targets = (part.to(device) for part in first)

    def step() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
        model = TransformerXL(len(corpus.words), recipe.size)
        memory = torch.zeros(recipe.size.layers, recipe.batch_size, recipe.memory, recipe.size.width)
        return model, lambda: model(words, targets, memory)[0].mean()

    return cost_of(step, device)


def _parameters(task: LanguageTask) -> int:
    with torch.device("meta"):
        model = TransformerXL(len(task.corpus.words), task.settings.recipe.size)
    return sum(parameter.numel() for parameter in model.parameters())


def _of_penn_treebank(task: LanguageTask) -> bool:
    return task.corpus.fingerprint.startswith(PENN_TREEBANK_TEXT)


def _name(task: LanguageTask) -> str:
    return "Penn Treebank" if _of_penn_treebank(task) else task.corpus.title


if __name__ == "__main__":
    sys.exit(main())
