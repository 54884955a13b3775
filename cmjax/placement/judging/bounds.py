"""What no placement can beat: the even share, the hottest copy, and a linear program over copies.

A rank holds whole copies, so for copies c of the experts the slowest rank of window w gets at least

    m[w] >= max( total[w] / ranks,  max over experts e of load[w, e] / c[e] ),    sum of c = slots.

with 1 / c replaced by the least that an engine's rule leaves to the busiest of c copies
(`Routing.least_top_share`), which is more. For one window the best c is greedy (`replicate`), or
found by bisection under a rule (`cover`). Windows share one c, though: what a weighted sum
of their times can reach at least is an integer program of each layer, whose relaxation (a share
z[e, k] of expert e having k copies) is solved by HiGHS:

    min λ · t    t[w] >= price(m[w])      m[w] >= sum over k of z[e, k] · load[w, e] / k
                 sum over k of z[e, k] = 1      sum over e, k of k · z[e, k] <= slots

The objective of the summed time is the largest λ · t over the weights λ that it may give windows
(equal ones for the mean; the dual form of CVaR and the worst; Artzner et al., "Coherent measures of
risk", 1999), so any of these bounds it; some are tried.
"""

from itertools import pairwise

import numpy as np
import scipy
from jaxtyping import Float

from cmjax.placement.methods.greedy import cover, replicate
from cmjax.placement.plan import count_copies
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Problem
from cmjax.placement.rank_cost import even_level

_CUTS = 96  # points at which the price is sampled between the least and the greatest m
_WEIGHTS = 4  # weights of the windows tried


def lower_bound_tokens(problem: Problem) -> Float[np.ndarray, "windows layers"]:
    """Tokens that the busiest rank gets at least, each window served by a plan of its own.

    The mean over ranks, or the smallest largest load of a single copy that the slots allow: some
    rank has to hold that copy. Holds for any split of an expert's tokens over its copies where the
    problem's routing is even, as shares of one's own are. Where ranks cost unequally, in ordinary
    tokens: all ranks equally busy, or that copy on the rank of least cost.
    """
    bound = np.zeros(problem.loads.counts.shape[:2])
    for rows, part in problem.dense():
        counts = part.loads.counts
        flat = counts.reshape(-1, part.experts)
        copy = _least_copy(part, flat).reshape(counts.shape[:2])
        even = even_level(part.rank_cost, part.ranks)
        bound[:, rows] = np.maximum(counts.sum(-1) / part.ranks * even, copy * _least_cost(part))
    return bound


def _least_cost(problem) -> float:
    """The cost of the cheapest rank."""
    return 1.0 if problem.rank_cost is None else min(problem.rank_cost)


def _least_copy(part, loads) -> Float[np.ndarray, "rows"]:
    """The smallest largest load of a copy."""
    return _largest_copy(part, loads, _fewest(part, loads)).max(-1)


def _fewest(part, loads):
    """Copies, [rows, experts], that make the largest load of a copy as small as can be."""
    if part.routing == "even":
        return count_copies(replicate(loads, part.copies, part.most_copies), part.experts)
    return cover(loads, part.copies, part.route.least_top_share(part.ranks))


def _largest_copy(part, loads, copies):
    """Tokens that the busiest of so many copies of an expert gets at least."""
    if part.routing == "even":
        return loads / copies
    return loads * part.route.least_top_share(part.ranks)[copies - 1]


def lower_bound_time_s(
    problem: Problem, layer_time_s: LayerTime
) -> Float[np.ndarray, "windows layers"]:
    """Seconds that no plan can beat, by window and layer, for a symmetric convex `layer_time_s`.

    One rank gets `lower_bound_tokens`, the others share the rest evenly. Every plan's tokens
    majorise this vector, so any Schur-convex price (the slowest rank's, for one) is at least this.
    A price that tells ranks apart, as by their node, is not bounded by it.
    """
    return _price_of_peak(problem, layer_time_s, lower_bound_tokens(problem))


def lower_bound_objective_s(problem: Problem, layer_time_s: LayerTime) -> float:
    """Seconds that the objective of no plan can beat: all windows share a layer's copies.

    For a price that, with the other ranks even, does not fall with the slowest rank's tokens. It is
    at least the objective of `lower_bound_time_s`, and more where the windows want different
    copies. For a quantile it is that objective.
    """
    risk, apart = problem.objective, lower_bound_time_s(problem, layer_time_s)
    bound = float(risk(apart.sum(-1)))
    if risk.kind == "quantile" or len(apart) == 1:
        return bound
    programs = _programs(problem, layer_time_s)
    weights = np.full(len(apart), 1 / len(apart))
    for _ in range(1 if risk.kind == "mean" else _WEIGHTS):
        time_s = _together(apart, programs, weights)
        bound = max(bound, float(weights @ time_s))
        slowest = np.zeros_like(weights)
        slowest[np.argsort(-time_s)] = risk.weights(len(apart))
        weights = (weights + slowest) / 2
    return bound


def _together(apart, programs, weights) -> Float[np.ndarray, "windows"]:
    """Times of all layers, by window, whose weighted sum no plan can beat."""
    found = apart.copy()
    for layer, program in programs.items():
        relaxed = program(weights)
        if weights @ relaxed > weights @ apart[:, layer]:
            found[:, layer] = relaxed
    return found.sum(-1)


def _programs(problem, layer_time_s):
    """The linear programs, by layer, where copies good for one window are not good for all."""
    programs = {}
    for rows, part in problem.dense():
        counts = part.loads.counts * _least_cost(part)
        mean = counts.sum(-1) / part.ranks
        least = lower_bound_tokens(part)
        # Copies that serve every window at once: no plan need be worse than they allow.
        covering = (counts / mean[..., None]).max(0)
        copies = _fewest(part, covering)
        most = np.maximum(mean, counts.max(-1))
        points = least + (most - least) * np.linspace(0, 1, _CUTS)[:, None, None] ** 2
        prices = np.stack([_price_of_peak(part, layer_time_s, p) for p in points])
        coupled = (_largest_copy(part, counts, copies).max(-1) > least * (1 + 1e-9)).any(0)
        for at in np.flatnonzero(coupled):
            programs[int(rows[at])] = _program(
                counts[:, at], mean[:, at], points[:, :, at], prices[:, :, at],
                part.redundant, part.route.least_top_share(part.ranks),
            )  # fmt: skip
    return programs


def _price_of_peak(problem, layer_time_s, peak):
    """Price of ranks of which one has `peak` tokens and the others share the rest evenly."""
    total = problem.loads.counts.sum(-1) * _least_cost(problem)
    others = len(problem.alive) - 1
    rest = np.maximum(total - peak, 0.0) / max(others, 1)
    tokens = np.concatenate([peak[..., None], np.repeat(rest[..., None], others, axis=-1)], axis=-1)
    return price_s(layer_time_s, tokens)


def _program(counts, mean, points, prices, spare, least):
    """The linear program of one layer, a function of the windows' weights that returns times.

    Args: counts [windows, experts], mean [windows], points and prices [cuts, windows], extra
    copies, and by copies the least share of the busiest of them.
    Variables: t and m per window, z.
    """
    windows, _experts = counts.shape
    # One copy of a cold expert exceeds the least m in no window: it needs no more and no variable.
    hot = np.flatnonzero((counts > points[0][:, None]).any(0))
    # More than bring an expert's copies to the mean are of no use to the bound.
    enough = np.searchsorted(-least, -(mean[:, None] / counts[:, hot]).min(0) * (1 + 1e-12)) + 1
    most = np.minimum(enough, len(least))
    kept = [(e, k) for e, limit in zip(hot, most, strict=True) for k in range(1, limit + 1)]
    expert, copies = np.array(kept).T
    t, m, z = 0, windows, 2 * windows
    size = z + len(kept)
    scale = prices.mean()

    rows, columns, values, limits = [], [], [], []

    def add(entries, limit):
        for column, value in entries:
            rows.append(len(limits))
            columns.append(column)
            values.append(value)
        limits.append(limit)

    for w in range(windows):
        for slope, at in _under(points[:, w] / mean[w], prices[:, w] / scale):
            add([(m + w, slope), (t + w, -1.0)], -at)
        for e in hot:
            if counts[w, e] > points[0, w]:
                mine = np.flatnonzero(expert == e)
                share = counts[w, e] / mean[w] * least[copies[mine] - 1]
                add([*zip(z + mine, share, strict=True), (m + w, -1.0)], 0.0)
    add(list(zip(z + np.arange(len(kept)), copies - 1.0, strict=True)), float(spare))
    upper = scipy.sparse.coo_array((values, (rows, columns)), shape=(len(limits), size)).tocsr()
    once = scipy.sparse.coo_array(
        (np.ones(len(kept)), (np.searchsorted(hot, expert), z + np.arange(len(kept)))),
        shape=(len(hot), size),
    ).tocsr()
    ranges = np.zeros((size, 2))
    ranges[:, 1] = np.inf
    ranges[m : m + windows, 0] = points[0] / mean

    def solve(weights):
        found = scipy.optimize.linprog(
            np.concatenate([weights, np.zeros(size - windows)]), A_ub=upper, b_ub=limits,
            A_eq=once, b_eq=np.ones(len(hot)), bounds=ranges, method="highs",
        )  # fmt: skip
        return found.x[:windows] * scale * (1 - 1e-7) if found.status == 0 else np.zeros(windows)

    return solve


def _under(x, y):
    """Lines (slope, value at 0) whose maximum is a convex function below y.

    y is known at the points x only but never falls, so up to x[i + 1] it is at least y[i]; the
    lines are the lower convex hull of the points (x[i + 1], y[i]) and (x[0], y[0]).
    """
    points = [(x[0], y[0]), *zip(x[1:], y[:-1], strict=True)]
    hull = []
    for point in points:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        if not hull or point[0] > hull[-1][0]:
            hull.append(point)
    lines = [(0.0, y[0])]
    for (x0, y0), (x1, y1) in pairwise(hull):
        slope = (y1 - y0) / (x1 - x0)
        lines.append((slope, y0 - slope * x0))
    return lines


def _turn(a, b, c):
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
