"""The command `autodropout`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NoReturn
from typing import TextIO

from .draw import MAX_MAP
from .draw import SUFFIXES
from .draw import save_figure
from .policy import PLACES
from .policy import load_policy
from .policy import shipped_policies
from .search.commands import INTERRUPTED
from .search.commands import Command
from .search.commands import add_commands

ERROR = 2  # the exit code of argparse for bad arguments, and ours for bad files
# Packages that not every command needs.
OPTIONAL = ("filelock", "matplotlib", "optuna", "ray", "rich", "scipy", "timm", "torchvision", "transformers")


class _Parser(argparse.ArgumentParser):
    """Complains in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(ERROR, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 after one line on stderr, or 130 after Ctrl-C.

    argv: by default `sys.argv[1:]`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser, run = _parser()
    arguments = parser.parse_args(words)
    try:
        return run[arguments.command](arguments, ["autodropout", *words])
    except (ValueError, OSError) as error:
        return _fail(error)
    except ImportError as error:
        if error.name not in OPTIONAL:
            raise
        return _fail(error)
    except KeyboardInterrupt:
        print("autodropout: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> tuple[argparse.ArgumentParser, dict[str, Command]]:
    parser = _Parser(
        prog="autodropout", description="Structured dropout patterns and policies, and the search for them."
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=_Parser)
    show = commands.add_parser(
        "show",
        help="draw a policy",
        description="Draw a policy: random placements of the pattern of each site, and its exact expected drop rate.",
    )
    show.add_argument("policy", help=f"a policy file, or one of the shipped policies: {', '.join(shipped_policies())}")
    show.add_argument("-o", "--output", required=True, help=f"the file to write ({', '.join(SUFFIXES)})")
    show.add_argument(
        "--map",
        type=_map_size,
        default=32,
        metavar="SIDE",
        help="side of the map in cells; of a Transformer: tokens, and channels (default: %(default)s)",
    )
    sites = commands.add_parser(
        "sites",
        help="list the sites of a model",
        description="List the sites of a model, place by place; with a policy, what it drops at each of them.",
    )
    sites.add_argument(
        "model",
        help="torchvision:NAME, timm:NAME, transformers:CLASS, or FILE.py:FUNCTION, which returns (model, example)",
    )
    sites.add_argument("--policy", help="a policy file, or a shipped policy: fit it to the model")
    sites.add_argument(
        "-o", "--output", metavar="FILE", help="write the policy that fits, a site for each of the model's"
    )
    return parser, {"show": _show, "sites": _sites, **add_commands(commands)}


def _show(arguments: argparse.Namespace, _command: Sequence[str]) -> int:
    save_figure(load_policy(arguments.policy), arguments.output, arguments.map)
    return 0


def _sites(arguments: argparse.Namespace, _command: Sequence[str]) -> int:
    from .fit import size_of  # these need torch
    from .sites import sites_by_place
    from .zoo import open_model
    from .zoo import running

    if arguments.output is not None and arguments.policy is None:
        raise ValueError(f"--output needs --policy, got {arguments.output} without one")
    model, example = open_model(arguments.model)
    if arguments.policy is not None:
        with running(arguments.model, model, example), _warnings_in_one_line():
            fitted = load_policy(arguments.policy).fit(model, example)
        if arguments.output is not None:
            fitted.save(arguments.output)
        return 0
    with running(arguments.model, model, example):
        found = {place: sites for place, sites in sites_by_place(model, example, PLACES).items() if sites}
    if not found:
        raise ValueError(f"model must have sites of one of the places {', '.join(PLACES)}, got {arguments.model}")
    for place, sites in found.items():
        print(f"{place}\n  depth         size  site")
        for site in sites:
            print(f"  {site.depth:5.2f}  {size_of(site):>11}  {site.name}")
    return 0


def _map_size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_MAP:
        raise argparse.ArgumentTypeError(f"must be an integer in [1, {MAX_MAP}], got {text!r}")
    return int(text)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Of warnings a user of the command wants the message, and not the line of source that made it."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"autodropout: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _fail(error: Exception) -> int:
    print(f"autodropout: error: {' '.join(str(error).split())}", file=sys.stderr)
    return ERROR


if __name__ == "__main__":
    sys.exit(main())
