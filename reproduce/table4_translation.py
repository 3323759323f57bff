"""Translation with an encoder-decoder Transformer: AutoDropout's patterns of a language model moved there, against
dropout and variational dropout, all at the same budget.

    python reproduce/table4_translation.py                              # demo: minutes, offline, no arguments needed
    python reproduce/table4_translation.py --preset small --data DIR    # DIR has train.de, train.en, valid.de, ...
    python reproduce/table4_translation.py --preset paper --data wmt14  # downloads; or iwslt14

Every method's strength is chosen by the BLEU on the validation part, with the same number of trials; the test part is
used once, by the final models. Translations are found by beam search and scored by sacrebleu. An interrupted run
continues with the same command. The tables go to stdout, one JSON line per trained model and the plot to results/, the
state of the run to runs/, both in the current directory.
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

from autodropout.reproduce.beam_search import LONGER
from autodropout.reproduce.command import Parser
from autodropout.reproduce.command import Report
from autodropout.reproduce.command import add_experiment_options
from autodropout.reproduce.command import preset_parser
from autodropout.reproduce.command import refused
from autodropout.reproduce.command import run_table
from autodropout.reproduce.command import some_of
from autodropout.reproduce.dry_run import cost_lines
from autodropout.reproduce.dry_run import cost_of
from autodropout.reproduce.dry_run import models_line
from autodropout.reproduce.experiment import Experiment
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.experiment import Settings
from autodropout.reproduce.learning_rates import only_rises
from autodropout.reproduce.methods import method_label
from autodropout.reproduce.methods import open_policy
from autodropout.reproduce.methods import policy_origin
from autodropout.reproduce.models.transformer import BASE
from autodropout.reproduce.models.transformer import Size
from autodropout.reproduce.models.transformer import Transformer
from autodropout.reproduce.parallel_corpus import BIBLE
from autodropout.reproduce.parallel_corpus import DOWNLOADS
from autodropout.reproduce.parallel_corpus import open_parallel_corpus
from autodropout.reproduce.report import Row
from autodropout.reproduce.transformer_methods import METHODS
from autodropout.reproduce.translation_task import TranslationTask
from autodropout.reproduce.translation_training import SMOOTHING
from autodropout.reproduce.translation_training import TranslationRecipe
from autodropout.reproduce.translation_training import signature
from autodropout.reproduce.translation_training import smoothed_loss
from autodropout.reproduce.translation_training import untouched_bleu

NAME = "table4_translation"
DATA_VARIABLE = "AUTODROPOUT_DATA"
POLICY = "hand-lm-v0"
SPLITS = {"valid_bleu": "validation", "bleu": "test"}


@dataclass(frozen=True)
class Preset:
    recipe: TranslationRecipe
    seeds: int
    tuning_seeds: int
    threads: int | None
    cost: str


PRESETS = {
    "demo": Preset(
        TranslationRecipe(
            Size(layers=1, width=96, heads=4, inner=192),
            vocabulary=1000,
            epochs=11,
            batch_words=300,
            longest=60,
            learning_rate=5e-3,
            warmup=100,
            beam=4,
            penalty=0.6,
        ),
        seeds=2,
        tuning_seeds=1,
        threads=1,
        cost="17 models, offline (measured: 7 min 28 s on one of two CPU cores)",
    ),
    # One thread, as in table 3.
    "small": Preset(
        TranslationRecipe(
            Size(layers=3, width=256, heads=4, inner=512),
            vocabulary=8000,
            epochs=10,
            batch_words=2000,
            longest=60,
            learning_rate=1e-3,
            warmup=1000,
            beam=4,
            penalty=0.6,
        ),
        seeds=2,
        tuning_seeds=1,
        threads=1,
        cost="17 models of 6 million parameters on Multi30k, 45 to 65 min each on one CPU core (from 8 steps of each "
        "method)",
    ),
    # The network, the words of a batch, the largest learning rate and when, and the number of steps, which are two
    # epochs of WMT'14, are those of Vaswani et al. 2017: Pham and Le do not say theirs.
    "paper": Preset(
        TranslationRecipe(
            BASE,
            vocabulary=32_000,
            epochs=2,
            batch_words=25_000,
            longest=256,
            learning_rate=7e-4,
            warmup=4000,
            beam=4,
            penalty=0.6,
        ),
        seeds=3,
        tuning_seeds=1,
        threads=None,
        cost="21 models of 60 million parameters; WMT'14: about 100,000 steps a model, for which Vaswani et al. name "
        "12 hours on 8 P100 GPUs, and by estimate 30 GB of memory for the text; IWSLT'14: 50 epochs. Not measured",
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
    return run_table(NAME, experiment, "test BLEU", lambda results: _reports(task, results))


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
        metavar="DATA",
        help="folder with train.de, train.en, valid.de, ..., or gzipped (default: multi30k in "
        f"${DATA_VARIABLE}; demo: {BIBLE}); '{BIBLE}' is the King James and the American Standard Version, a change of "
        f"style within English; {' and '.join(repr(name) for name in DOWNLOADS)} are downloaded",
    )
    parser.add_argument(
        "--policy",
        metavar="POLICY",
        default=POLICY,
        help="name or file of the policy whose rates autodropout scales (default: %(default)s)",
    )
    add_experiment_options(parser)
    return parser


def _task(args: argparse.Namespace, preset: Preset) -> TranslationTask:
    source = args.data
    if source is None and args.preset == "demo":
        source = BIBLE
    if source is None and args.preset == "small" and os.environ.get(DATA_VARIABLE):
        source = os.path.join(os.environ[DATA_VARIABLE], "multi30k")
    if source is None:
        raise ValueError(
            f"preset {args.preset} needs a parallel corpus: give --data with "
            f"{' or '.join(DOWNLOADS)} to download one, or a folder with train.de, train.en, valid.de, valid.en, "
            f"test.de and test.en (or the same gzipped), for example of Multi30k"
        )
    policy_name, policy = open_policy(args.policy)
    recipe = preset.recipe
    if args.preset == "paper" and source == "iwslt14":  # a 240th of the pairs; ours
        recipe = dataclasses.replace(recipe, vocabulary=10_000, epochs=50, batch_words=4096)
    settings = Settings(
        name=NAME,
        preset=args.preset,
        recipe=dataclasses.replace(recipe, epochs=args.epochs or recipe.epochs),
        methods=args.methods,
        seeds=args.seeds or preset.seeds,
        tuning_seeds=preset.tuning_seeds,
        final_on_all=False,
        policy_name=policy_name,
        policy=policy,
    )
    return TranslationTask(settings, open_parallel_corpus(source))


def _reports(task: TranslationTask, results: Sequence[Result]) -> list[Report]:
    notes = _notes(task)
    return [
        (_title(task, split), _rows(task, results, metric), notes if metric == task.metric else [])
        for metric, split in SPLITS.items()
    ]


def _title(task: TranslationTask, split: str) -> list[str]:
    recipe, corpus, prepared = task.settings.recipe, task.corpus, task.prepared
    size = recipe.size
    left_out = f" ({prepared.left_out:,} longer ones left out)" if prepared.left_out else ""
    return [
        f"Table 4 (the numbering is ours): {split} BLEU, Transformer of {size.layers} + {size.layers} layers of width "
        f"{size.width}, {_parameters(task):,} parameters, {recipe.epochs} epochs"
        f"{only_rises(recipe.warmup, _training_steps(task), 'steps')}",
        f"Data: {corpus.title}, fingerprint {corpus.fingerprint[:12]}; {len(prepared.train):,} training{left_out}, "
        f"{len(corpus.valid):,} validation, {len(corpus.test):,} test pairs, {len(prepared.subwords):,} subwords",
    ]


def _rows(task: TranslationTask, results: Sequence[Result], metric: str) -> list[Row]:
    """The paper's numbers are not known."""
    settings = task.settings
    return [
        Row(
            method_label(result.method, settings.policy_name, policy_origin(settings.policy)),
            result.strength,
            tuple(record[metric] for record in result.records),
            None,
        )
        for result in results
    ]


def _notes(task: TranslationTask) -> list[str]:
    settings, corpus = task.settings, task.corpus
    recipe = settings.recipe
    trials = f"{settings.tuning_seeds} seed{'s' if settings.tuning_seeds > 1 else ''}"
    return [
        f"tuned: the best of three strengths on the validation part, {trials} each (AutoDropout: a factor on the rates "
        f"of its policy's patterns, made for a language model and moved by depth within encoder and decoder). Final "
        f"models: seeds 0 to {settings.seeds - 1}. Interval: Student's t over seeds. Beam {recipe.beam}, exponent of "
        f"the length {recipe.penalty:g}. paper: Pham & Le 2021, whose numbers are not known.",
        f"BLEU: sacrebleu {signature()}; the source itself, untouched, has {untouched_bleu(corpus.valid):.2f} on the "
        f"validation and {untouched_bleu(corpus.test):.2f} on the test part.",
    ]


def _described(task: TranslationTask, device: torch.device) -> str:
    recipe, settings = task.settings.recipe, task.settings
    steps = _training_steps(task)
    trials = settings.tuning_seeds * sum(len(task.strengths[m]) for m in settings.methods)
    number, length = _batch(task)
    cost = cost_of(lambda: _step(task))
    batch = f"{number:,} pairs of {length} subwords on either side, the mean of the longer ones"
    data = f"{len(task.prepared.train):,} pairs"
    return "\n".join(
        [
            *_title(task, "test"),
            f"Methods: {', '.join(settings.methods)}",
            *cost_lines(cost, batch, 1, copies=2, width=2 if device.type == "cuda" else 4),
            f"Adam, learning rate {recipe.learning_rate:g} after {recipe.warmup:,} steps, then along the cosine of "
            f"all; label smoothing {SMOOTHING:g}; beam {recipe.beam}, translations of at most {LONGER} subwords more "
            "than the source",
            models_line("to tune", trials, data, recipe.epochs, steps, cost.flops),
            models_line("final", settings.seeds * len(settings.methods), data, recipe.epochs, steps, cost.flops),
        ]
    )


def _training_steps(task: TranslationTask) -> int:
    recipe: TranslationRecipe = task.settings.recipe
    return recipe.epochs * task.prepared.steps(recipe)


def _batch(task: TranslationTask) -> tuple[int, int]:
    """Pairs of a full batch, and their length: the mean of what padding makes of a pair."""
    train = task.prepared.train
    lengths = [max(len(a), len(b)) for a, b in zip(train.source, train.target, strict=True)]
    length = round(sum(lengths) / len(lengths))
    return max(1, task.settings.recipe.batch_words // length), length


def _step(task: TranslationTask) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """For `cost_of`."""
    model = Transformer(len(task.prepared.subwords), task.settings.recipe.size)
    words = torch.empty(_batch(task), dtype=torch.int64)
    return model, lambda: smoothed_loss(model(words, words), words)


def _parameters(task: TranslationTask) -> int:
    with torch.device("meta"):
        model = Transformer(len(task.prepared.subwords), task.settings.recipe.size)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
