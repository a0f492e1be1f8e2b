"""Gradient-boosted trees on tables, from sums of gradients over silos.

For a yes or no, with missing values and categories. All silos bin their columns alike;
at each level of a tree a silo sends, per node, column and bin, the sums of its rows'
gradients and curvatures, and the orchestrator finds the best split (Chen and Guestrin
2016, eq. 6 and 7, Alg. 3). These sums are whole numbers (2^-30 of a gradient), so the
trees are those of the pooled rows, bit for bit, and secure sums can carry them.
Functions that begin with `silo_` run inside a silo, the others at the orchestrator;
they take `ask`, which calls such a function in every silo and adds up
(`analysis.ask_silos`, or a real run). Needs only numpy: copy this file on its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

Ask = Callable[..., dict[str, np.ndarray]]  # as `analysis.Ask`
Plain = dict[str, Any]  # what JSON takes
UNIT = 2.0**30  # a gradient of 1, as a whole number
MISSING = 0  # the code of a missing value
LEAF = {"column": 0, "code": 0, "equal": False, "missing_left": False, "left": -1}
LEAF |= {"right": -1, "value": 0.0, "gain": 0.0, "rows": 0}


class TooFew(ValueError):
    """A silo's refusal: its sums would describe too few patients."""

    code = "TOO_FEW"  # all that a real run says of it


@dataclass(frozen=True)
class Bins:
    """How columns are cut into bins, the same in all silos.

    names: of the columns. edges: per column, increasing; a value v has the code 1 + the
    number of edges <= v, a missing one 0. categories: per column how many values there
    are, 0 to categories - 1, or 0 for a column of numbers.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[float, ...], ...]
    categories: tuple[int, ...]

    @property
    def size(self) -> int:
        """Codes of the column that has the most."""
        counts = [len(e) + 2 for e in self.edges] + [c + 1 for c in self.categories]
        return max(counts)

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Codes [N, F] of rows [N, F], NaN where a value is missing.

        Raises ValueError, naming the column, for a category that was not agreed on.
        """
        if x.ndim != 2 or x.shape[1] != len(self.names):
            raise ValueError(f"x must be [N, {len(self.names)}], got {x.shape}")
        codes = np.zeros(x.shape, dtype=np.int16)
        for k, (name, edges) in enumerate(zip(self.names, self.edges, strict=True)):
            column, there = x[:, k], ~np.isnan(x[:, k])
            if self.categories[k]:
                known = np.isin(column, np.arange(self.categories[k]))
                if (there & ~known).any():
                    most = self.categories[k] - 1
                    raise ValueError(
                        f"column {name!r} must hold categories 0 to {most}; give an "
                        "unknown one as missing (NaN), or agree on more"
                    )
                codes[there, k] = 1 + column[there].astype(np.int16)
            else:
                codes[there, k] = 1 + np.searchsorted(
                    edges, column[there], side="right"
                )
        return codes


def even_bins(
    columns: Mapping[str, tuple[float, float] | int], *, bins: int = 32
) -> Bins:
    """Bins of equal width over public ranges.

    columns: {name: (lowest, highest) value that makes sense, or how many categories
    there are}. Values beyond a range count in its outer bins.
    """
    edges, categories = [], []
    for name, about in columns.items():
        if isinstance(about, int):
            edges.append(()), categories.append(about)
            continue
        low, high = about
        if not low < high:
            raise ValueError(f"the range of {name!r} must be (low, high), got {about}")
        inner = np.linspace(low, high, bins + 1)[1:-1]
        edges.append(tuple(map(float, inner))), categories.append(0)
    return Bins(tuple(columns), tuple(edges), tuple(categories))


def equal_bins(ask: Ask, fine: Bins, *, bins: int = 32, min_count: int = 10) -> Bins:
    """Bins with about as many rows each, from counts in fine bins, such as
    `even_bins(columns, bins=256)`. Only sums leave the silos, no smallest value."""
    counts = ask(silo_counts, bins=asdict(fine), min_count=min_count)["counts"]
    edges = []
    for column, old in zip(counts, fine.edges, strict=True):
        inside = np.cumsum(column[1 : len(old) + 2])  # without the missing
        wanted = inside[-1] * np.arange(1, bins) / bins if len(old) else []
        places = sorted({int(p) for p in np.searchsorted(inside, wanted)})
        edges.append(tuple(old[p] for p in places if p < len(old)))
    return Bins(fine.names, tuple(edges), fine.categories)


class Rows:
    """One silo's rows, and what it remembers between questions; nothing leaves."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        """x: [N, F] numbers, NaN where missing. y: [N], 0 or 1. Not modified."""
        try:
            self.x, self.y = np.asarray(x, dtype=np.float64), np.asarray(y)
        except (ValueError, TypeError):  # their text would hold a patient's value
            raise ValueError("x holds text; give categories as numbers") from None
        if self.x.ndim != 2 or self.y.shape != (len(self.x),) or not len(self.x):
            raise ValueError(
                f"x must be [N, F], y [N], got {self.x.shape}, {self.y.shape}"
            )
        if np.isinf(self.x).any() or not np.isin(self.y, (0, 1)).all():
            raise ValueError("x must be finite or NaN, and y 0 or 1")
        self._bins: Plain = {}
        self._codes = np.zeros((0, 0), dtype=np.int16)
        self._trees: list[Plain] = []
        self._margin = np.zeros(0)

    def codes(self, bins: Plain) -> np.ndarray:
        """Codes, column by column: [F, N]."""
        if bins != self._bins:
            codes = _bins(bins).codes(self.x)
            self._codes, self._bins = np.ascontiguousarray(codes.T), bins
            self._trees, self._margin = [], np.zeros(0)
        return self._codes

    def margin(self, model: Plain) -> np.ndarray:
        """Log odds [N] of a model; only trees that are new are worked out."""
        codes, trees = self.codes(model["bins"]), model["trees"]
        known = len(self._trees)
        if not known or trees[:known] != self._trees:
            known, self._margin = 0, np.full(len(self.y), float(model["base"]))
        for tree in trees[known:]:
            value = np.asarray(tree["value"])
            self._margin = self._margin + value[_leaf_of(codes, tree)]
        self._trees = [*trees]
        return self._margin


def _bins(plain: Plain) -> Bins:
    edges = tuple(tuple(map(float, e)) for e in plain["edges"])
    return Bins(tuple(plain["names"]), edges, tuple(map(int, plain["categories"])))


def _leaf_of(codes: np.ndarray, tree: Plain) -> np.ndarray:
    """The node [N] of a tree, also of an unfinished one, in which each row ends."""
    node = np.zeros(codes.shape[1], dtype=np.int64)
    left, right = np.asarray(tree["left"]), np.asarray(tree["right"])
    for parent in range(len(left)):  # parents come before their children
        if left[parent] < 0:
            continue
        rows = np.flatnonzero(node == parent)
        goes_left = _goes_left(codes[tree["column"][parent]][rows], tree, parent)
        node[rows] = np.where(goes_left, left[parent], right[parent])
    return node


def _goes_left(code: np.ndarray, tree: Plain, node: int) -> np.ndarray:
    at = tree["code"][node]
    found = code == at if tree["equal"][node] else code <= at
    return np.where(code == MISSING, tree["missing_left"][node], found)


# -- what a silo answers


def silo_counts(data: Rows, *, bins: Plain, min_count: int = 10) -> dict[str, Any]:
    """Rows [F, size] of each column by code; small cells of a silo count as 0."""
    _check_rows(data, min_count)
    codes, size = data.codes(bins), _bins(bins).size
    counts = np.stack([np.bincount(column, minlength=size) for column in codes])
    return {"counts": np.where(_hidden(counts, min_count), 0, counts)}


def silo_outcome(data: Rows, *, min_count: int = 10) -> dict[str, int]:
    """Rows and cases of a silo."""
    _check_rows(data, min_count)
    cases = int(data.y.sum())
    if any(0 < n < min_count for n in (cases, len(data.y) - cases)):
        raise TooFew(f"fewer than {min_count} rows of a class; it takes no part")
    return {"rows": len(data.y), "cases": cases}


def silo_histograms(
    data: Rows, *, model: Plain, tree: Plain, nodes: Sequence[int], min_count: int = 10
) -> dict[str, np.ndarray]:
    """Sums over the rows in some nodes of an unfinished tree, by column and code.

    min_count: cells with 1 to min_count - 1 of the silo's rows count as 0, and if the
    hidden cells of a node and column then have fewer rows together, the next smallest
    one too, so that the node's total does not give them away; 0 where only the sums
    over silos are seen. (Nodes of several levels and trees can still be combined: a
    limit against a curious orchestrator, no proof. Secure sums are the better way.)
    Returns int64 [nodes, F, size]: gradient, curvature (in 2^-30), rows.
    """
    _check_rows(data, min_count)
    codes, size = data.codes(model["bins"]), _bins(model["bins"]).size
    share = 1 / (1 + np.exp(-data.margin(model)))
    place = np.full(len(tree["left"]), -1)
    place[list(nodes)] = np.arange(len(nodes))
    place = place[_leaf_of(codes, tree)]
    rows = np.flatnonzero(place >= 0)
    first = place[rows] * size
    weights = [  # whole numbers in floats: exact below 2^53
        np.rint((share - data.y)[rows] * UNIT),
        np.rint((share * (1 - share))[rows] * UNIT),
        None,
    ]
    shape = (len(nodes), size)
    found = np.zeros((3, len(codes), *shape), dtype=np.int64)
    for k, column in enumerate(codes):
        cell = first + column[rows]
        for part, weight in zip(found, weights, strict=True):
            part[k] = np.bincount(cell, weight, shape[0] * size).reshape(shape)
    found = found.transpose(0, 2, 1, 3)
    found = np.where(_hidden(found[2], min_count), 0, found)
    return dict(zip(("gradient", "curvature", "rows"), found, strict=True))


def silo_loss(data: Rows, *, model: Plain, min_count: int = 10) -> dict[str, Any]:
    """Sum of the log losses of a silo's rows, and how many."""
    _check_rows(data, min_count)
    margin = data.margin(model)
    loss = np.logaddexp(0, margin) - data.y * margin
    return {"loss": float(loss.sum()), "rows": len(loss)}


def _check_rows(data: Rows, min_count: int) -> None:
    if len(data.y) < min_count:
        raise TooFew(f"fewer than {min_count} rows; this silo takes no part")


def _hidden(rows: np.ndarray, min_count: int) -> np.ndarray:
    """Which cells [..., size] of counts do not leave a silo."""
    hidden = (rows > 0) & (rows < min_count)
    if not hidden.any():
        return hidden
    lonely = hidden.any(-1) & ((rows * hidden).sum(-1) < min_count)
    large = np.where(rows >= min_count, rows, np.iinfo(np.int64).max)
    next_one = np.arange(rows.shape[-1]) == large.argmin(-1)[..., None]
    return hidden | (next_one & lonely[..., None] & (rows >= min_count))


# -- what the orchestrator does


@dataclass(frozen=True)
class Growth:
    """How trees grow.

    trees: how many at most. depth: questions in a row. rate: what of a tree's answer is
    taken. l2: as lambda of the paper, shrinks leaves. min_rows: rows of all silos that
    a leaf needs. min_gain: what a split must win, as gamma of the paper.
    """

    trees: int = 100
    depth: int = 3
    rate: float = 0.1
    l2: float = 1.0
    min_rows: int = 20
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        if min(self.trees, self.depth, self.min_rows) < 1 or self.l2 < 0:
            raise ValueError(f"trees, depth and min_rows must be >= 1, l2 >= 0: {self}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate}")


@dataclass(frozen=True)
class Trees:
    """A fitted model: plain numbers, that a person and JSON can read.

    base: log odds before the first tree. trees: each a dict of lists by node: column,
    code, equal, missing_left, left, right (-1 for a leaf), value, gain, rows.
    losses: of the validation rows after each tree, if there were any.
    """

    bins: Bins
    base: float
    trees: list[Plain]
    losses: list[float] = field(default_factory=list)

    def plain(self) -> Plain:
        """What a silo is sent, and what `to_json` writes."""
        return {"bins": asdict(self.bins), "base": self.base, "trees": self.trees}

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Probabilities [N] of rows [N, F], NaN where a value is missing."""
        codes = np.ascontiguousarray(self.bins.codes(np.asarray(x, np.float64)).T)
        margin = np.full(codes.shape[1], self.base)
        for tree in self.trees:
            margin = margin + np.asarray(tree["value"])[_leaf_of(codes, tree)]
        return 1 / (1 + np.exp(-margin))

    def importance(self) -> dict[str, float]:
        """Share of the gain of all splits that each column has; 1 together."""
        gain = dict.fromkeys(self.bins.names, 0.0)
        for tree in self.trees:
            for column, won in zip(tree["column"], tree["gain"], strict=True):
                gain[self.bins.names[column]] += won
        total = sum(gain.values()) or 1.0
        return {name: value / total for name, value in gain.items()}

    def to_json(self) -> str:
        """The model as text; read it with `trees_from_json`."""
        return json.dumps(self.plain())


def trees_from_json(text: str) -> Trees:
    """Read `Trees.to_json`: plain data, no code is run. Raises ValueError for a tree
    whose nodes do not lead forward, or that asks for a column that is not there."""
    plain = json.loads(text)
    bins = _bins(plain["bins"])
    for number, tree in enumerate(plain["trees"]):
        size = len(tree["left"])
        ends = zip(tree["left"], tree["right"], strict=True)
        forward = all(
            a == b == -1 or node < min(a, b) <= max(a, b) < size
            for node, (a, b) in enumerate(ends)
        )
        known = all(0 <= column < len(bins.names) for column in tree["column"])
        if not (forward and known and {len(v) for v in tree.values()} == {size}):
            raise ValueError(f"tree {number} is damaged")
    return Trees(bins, float(plain["base"]), plain["trees"])


def fit_trees(
    ask: Ask,
    bins: Bins,
    *,
    growth: Growth = Growth(),
    min_count: int = 10,
    validate: Ask | None = None,
    patience: int = 10,
) -> Trees:
    """Fit boosted trees for a yes or no over all silos' rows.

    ask: calls a function in every silo and returns the sums.
    bins: from `even_bins` or `equal_bins`.
    growth: how many trees, how deep, how fast.
    min_count: see `silo_histograms`.
    validate: asks silos about rows that are not trained on; then the fit ends early,
        and the best number of trees is kept.
    patience: trees in a row that do not lower the loss of these rows.

    Raises ValueError if all rows are cases, or none, and what a silo raises.
    """
    outcome = ask(silo_outcome, min_count=min_count)
    cases, rows = int(outcome["cases"]), int(outcome["rows"])
    if not 0 < cases < rows:
        raise ValueError(f"{cases} of {rows} rows are cases; there is nothing to learn")
    base = float(np.log(cases / (rows - cases)))
    model, losses = Trees(bins, base, []), []
    for _ in range(growth.trees):
        tree = _grow(ask, model, growth, min_count)
        model = Trees(bins, base, [*model.trees, tree])
        if validate is not None:
            found = validate(silo_loss, model=model.plain(), min_count=min_count)
            losses.append(float(found["loss"]) / int(found["rows"]))
            if len(losses) - 1 - int(np.argmin(losses)) >= patience:
                break
    best = int(np.argmin(losses)) + 1 if losses else len(model.trees)
    return Trees(bins, base, model.trees[:best], losses)


def _grow(ask: Ask, model: Trees, growth: Growth, min_count: int) -> Plain:
    """One tree, level by level."""
    tree: Plain = {key: [] for key in LEAF}
    _add_node(tree)
    sums: dict[int, np.ndarray] = {}
    level = [0]
    for depth in range(growth.depth + 1):
        _ask_level(ask, model, tree, level, sums, min_count)
        children: list[int] = []
        for node in level:
            total = sums[node].sum(axis=2)
            _finish(tree, node, total, growth)
            split = _best_split(sums[node], model.bins, growth)
            if split and depth < growth.depth:
                tree["gain"][node] = split.pop("gain")
                for key, value in split.items():
                    tree[key][node] = value
                tree["left"][node] = _add_node(tree)
                tree["right"][node] = _add_node(tree)
                children += [tree["left"][node], tree["right"][node]]
        level = children
        if not level:
            break
    return tree


def _add_node(tree: Plain) -> int:
    """A new leaf, and its number."""
    for key, value in tree.items():
        value.append(LEAF[key])
    return len(tree["left"]) - 1


def _ask_level(
    ask: Ask,
    model: Trees,
    tree: Plain,
    level: Sequence[int],
    sums: dict[int, np.ndarray],
    min_count: int,
) -> None:
    """The sums of a level's nodes; of two siblings, one is the rest of the parent.

    Not with small cells hidden: then a difference is not what it would be.
    """
    asked = [n for n in level if min_count or n == 0 or n % 2]
    how = {"model": model.plain(), "tree": tree, "nodes": asked, "min_count": min_count}
    found = ask(silo_histograms, **how)
    parts = np.stack([found[name] for name in ("gradient", "curvature", "rows")], 1)
    sums.update(zip(asked, parts, strict=True))
    for node in set(level) - set(asked):  # a right child, its sibling came before it
        sums[node] = sums[tree["right"].index(node)] - sums[node - 1]


def _finish(tree: Plain, node: int, total: np.ndarray, growth: Growth) -> None:
    """A node's value, should it stay a leaf; total: [3, F], alike if none is hidden."""
    column = int(total[2].argmax())
    gradient, curvature = total[:2, column] / UNIT
    tree["value"][node] = float(-growth.rate * gradient / (curvature + growth.l2))
    tree["rows"][node] = int(total[2, column])


def _best_split(sums: np.ndarray, bins: Bins, growth: Growth) -> Plain | None:
    """The split of a node that wins most; sums: [3, F, size]."""
    best: Plain | None = None
    for column, (edges, categories) in enumerate(
        zip(bins.edges, bins.categories, strict=True)
    ):
        cells = sums[:, column, 1 : (categories or len(edges) + 1) + 1]
        inside = cells if categories else cells.cumsum(axis=1)[:, :-1]
        missing, total = sums[:, column, MISSING], sums[:, column].sum(axis=1)
        for missing_left in (False, True) if missing[2] else (False,):
            left = inside + missing[:, None] * missing_left
            gain = _gain(left, total[:, None], growth)
            if gain.size and gain.max() > (best["gain"] if best else growth.min_gain):
                code = int(gain.argmax())
                best = {"gain": float(gain[code]), "column": column, "code": code + 1}
                best |= {"equal": bool(categories), "missing_left": missing_left}
    return best


def _gain(left: np.ndarray, total: np.ndarray, growth: Growth) -> np.ndarray:
    """What a split wins, eq. 7 of the paper; -inf where a side has too few rows."""

    def score(part: np.ndarray) -> np.ndarray:
        gradient, curvature = part[:2] / UNIT
        return gradient**2 / (curvature + growth.l2)

    right = total - left
    won = (score(left) + score(right) - score(total)) / 2
    enough = np.minimum(left[2], right[2]) >= growth.min_rows
    return np.where(enough & np.isfinite(won), won, -np.inf)
