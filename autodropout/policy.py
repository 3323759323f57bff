"""Policies: which pattern at which depth of a network. Plain data, a JSON file, loadable without the search code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from .files import write_atomically
from .patterns import Pattern
from .patterns.checks import choice
from .patterns.checks import json_fields
from .patterns.checks import json_object
from .patterns.checks import prefixed
from .patterns.checks import real

if TYPE_CHECKING:
    from importlib.abc import Traversable  # moved to importlib.resources.abc in Python 3.11

    from torch import nn

    from .sites import Example

SCHEMA = 1  # version of the file format
MASKS = 1  # version of the bit definitions: the same pattern and seed drop the same cells
# Where `apply_policy` puts patterns; what they are in a model: sites.py.
MAP_PLACES = ("batch_norm", "branch")
TOKEN_PLACES = ("query", "key", "value", "softmax", "output", "residual")  # of a Transformer's layer: the paper's
LAYER_PLACES = (*TOKEN_PLACES, "feed_forward")  # with ours
PLACES = MAP_PLACES + LAYER_PLACES

# Depths are quotients of site counts, rounded to floats, so that the distances of an exact tie may differ in the last
# bit. Distances that do differ are further apart than this in networks of up to ten thousand sites.
_TIE = 1e-9


@dataclass(frozen=True)
class Site:
    """One place of a network, and what is dropped there.

    Args:
        name: any non-empty string; "*" in the policies of `Policy.uniform`.
        depth: position in order of execution, from 0 (the first site) to 1 (the last).
        place: what the pattern is applied to: "batch_norm", the output of a batch normalisation, "branch", the end of a
            residual branch (for stochastic depth), or a place of a Transformer's layer: "query", "key", "value",
            "softmax", "output" (projection), "residual" or "feed_forward" (the hidden layer).
        pattern: the pattern; None = nothing is dropped.

    Raises:
        TypeError, ValueError: naming the field.
    """

    name: str
    depth: float
    place: str = "batch_norm"
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {self.name!r} of type {type(self.name).__name__}")
        if not self.name:
            raise ValueError("name must not be empty, got ''")
        object.__setattr__(self, "depth", real("depth", self.depth, 0, 1))
        choice("place", self.place, PLACES)
        if self.pattern is not None and not isinstance(self.pattern, Pattern):
            kind = type(self.pattern).__name__
            raise TypeError(f"pattern must be a Pattern or None, got {self.pattern!r} of type {kind}")

    def to_json(self) -> dict[str, Any]:
        """The site as a JSON object; "off" is null."""
        pattern = None if self.pattern is None else self.pattern.to_json()
        return {"name": self.name, "depth": self.depth, "place": self.place, "pattern": pattern}

    @classmethod
    def from_json(cls, data: object, path: str = "site") -> Site:
        """The site that `to_json` wrote; every field is required.

        Raises:
            ValueError: beginning with the path of the offending field.
        """
        values = dict(json_object(path, data))
        json_fields(path, values, required=("name", "depth", "place", "pattern"))
        if values["pattern"] is not None:
            values["pattern"] = Pattern.from_json(values["pattern"], f"{path}.pattern")
        with prefixed(path):
            return cls(**values)


@dataclass(frozen=True)
class Policy:
    """Patterns for the sites of a network; moves to networks with other sites by relative depth.

    Args:
        sites: at least one; names differ.
        provenance: where the policy comes from, an object of anything that JSON can hold. Copied; no part of the hash.

    Raises:
        TypeError, ValueError: beginning with the path of the offending field.
    """

    sites: tuple[Site, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.sites, (tuple, list)):
            raise TypeError(f"sites must be a tuple of Site, got {self.sites!r}")
        if not self.sites:
            raise ValueError("sites must hold at least one site, got none")
        first: dict[str, int] = {}
        for i, site in enumerate(self.sites):
            if not isinstance(site, Site):
                raise TypeError(f"sites[{i}] must be a Site, got {site!r} of type {type(site).__name__}")
            if site.name in first:
                raise ValueError(f"sites[{i}].name must differ from sites[{first[site.name]}].name, got {site.name!r}")
            first[site.name] = i
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "provenance", _json_copy("provenance", self.provenance))

    @classmethod
    def uniform(cls, pattern: Pattern | None) -> Policy:
        """The same pattern at every batch normalisation: one site named "*", to which all others are nearest.

        For another place name it: `Policy((Site("*", 0.0, place, pattern),))`.
        """
        return cls((Site("*", 0.0, pattern=pattern),))

    def pattern_at(self, depth: float) -> Pattern | None:
        """The pattern of the site nearest to `depth` (in [0, 1]); of two equally near the earlier, less deep one's."""
        depth = real("depth", depth, 0, 1)
        nearest = min(abs(site.depth - depth) for site in self.sites)
        candidates = [site for site in self.sites if abs(site.depth - depth) <= nearest + _TIE]
        return min(candidates, key=lambda site: site.depth).pattern

    def scaled(self, factor: float) -> Policy:
        """Every pattern `scaled` by `factor` (finite, >= 0); the provenance says so."""
        factor = real("factor", factor, 0)
        sites = (replace(s, pattern=None if s.pattern is None else s.pattern.scaled(factor)) for s in self.sites)
        return Policy(tuple(sites), {"scaled_by": factor, "from": self.provenance})

    def fit(self, model: nn.Module, example: Example | None = None, verbose: bool = True) -> Policy:
        """The policy moved to a model: a site for each of the model's, by name, so that it can be changed by hand.

        How it moves, which is what `apply_policy` does without being asked:

        - Place by place: what was learned for a query goes to queries. A place that the model lacks is left out.
        - Within a place by relative depth, the position in order of execution from 0 to 1: each site takes the pattern
          of the nearest one of the policy, ties to the earlier. In a Transformer with an encoder and a decoder each of
          them has depths from 0 to 1 and takes from the policy's own stack of that name, if that has both; attention to
          the encoder's output is one more attention of the decoder.
        - Lengths of tiled patterns are shares of the map's side and need no change; those of tokens stay tokens.
        - `residual` is lost where it means nothing, see `apply_policy`.

        Args:
            model: any module; it is not changed.
            example: what it is called with, as in `find_sites`.
            verbose: print what goes where, and what is left out.

        Returns:
            A policy whose names are those of the model's sites.

        Raises:
            TypeError, ValueError: as `apply_policy`, but for places that the model lacks, if it has one of them.
        """
        from .fit import fit_policy

        return fit_policy(self, model, example, verbose)

    def to_json(self) -> dict[str, Any]:
        """The policy as a JSON object."""
        provenance = _json_copy("provenance", self.provenance)
        return {"schema": SCHEMA, "masks": MASKS, "sites": [s.to_json() for s in self.sites], "provenance": provenance}

    @classmethod
    def from_json(cls, data: object) -> Policy:
        """The policy that `to_json` wrote; only `provenance` may be left out.

        Raises:
            ValueError: another version, an unknown or missing field, a wrong type, a value out of range. The message
                begins with the path of the field, as in `sites[2].pattern.size: must be in [0, 2], got 3.5`.
        """
        values = dict(json_object("policy", data))
        # Versions first: a file of another version may well have other fields.
        _check_version(values, "schema", SCHEMA, "the file format")
        _check_version(values, "masks", MASKS, "the bits of the masks")
        json_fields("", values, required=("schema", "masks", "sites"), optional=("provenance",))
        if not isinstance(values["sites"], list):
            raise ValueError(f"sites: must be a list, got {values['sites']!r}")
        sites = tuple(Site.from_json(site, f"sites[{i}]") for i, site in enumerate(values["sites"]))
        with prefixed(""):
            return cls(sites, values.get("provenance", {}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file that `load_policy` reads: at any moment the file is the old one or the new one.

        Raises:
            OSError: it cannot be written; a file that was there is as before.
        """
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        path = Path(path)
        if path.exists() and not path.is_file():  # what /dev/stdout stands for cannot be replaced
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(path.resolve(), lambda file: file.write(text.encode()))  # resolved: a link stays a link


def shipped_policies() -> list[str]:
    """The names of the policies that come with the package, sorted."""
    folder = files(__package__) / "policies"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_policy(name_or_path: str | os.PathLike[str]) -> Policy:
    """A policy that comes with the package, by name, or else a file.

    Args:
        name_or_path: a shipped name such as "hand-v0" (which wins over a file of that name: write "./hand-v0" for the
            file), or the path of a JSON file.

    Raises:
        TypeError: neither a string nor a path.
        ValueError: neither a shipped name nor a file; not a valid policy. The latter names file and field.
        OSError: the file cannot be read.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        kind = type(name_or_path).__name__
        raise TypeError(f"name_or_path must be a string or a path, got {name_or_path!r} of type {kind}")
    shipped = shipped_policies()
    file: Traversable = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in shipped:
        file = files(__package__) / "policies" / f"{name_or_path}.json"
    elif not file.is_file():
        names = ", ".join(shipped)
        raise ValueError(f"policy must be a file or one of the shipped policies ({names}), got {str(name_or_path)!r}")
    try:
        return Policy.from_json(json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_object))
    except ValueError as error:  # also bad UTF-8 and bad JSON
        raise ValueError(f"{name_or_path}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with the same field twice is refused, where Python would silently take the last."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name}: field appears twice in the same object")
        result[name] = value
    return result


def _check_version(values: dict[str, Any], name: str, known: int, what: str) -> None:
    if name not in values:
        raise ValueError(f"{name}: missing")
    got = values[name]
    if isinstance(got, bool) or got != known:
        raise ValueError(f"{name}: must be {known}, the version of {what} that this autodropout knows, got {got!r}")


def _json_copy(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy by way of JSON, so that what a policy holds is what its file will hold."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be an object, got {value!r} of type {type(value).__name__}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold only what JSON can hold: {error}") from error
    if copy != value:
        raise ValueError(f"{name} must hold only what JSON can hold (no tuples, no keys but strings), got {value!r}")
    return copy
