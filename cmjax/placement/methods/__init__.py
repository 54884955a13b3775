"""Ways to place experts, and the door to all of them by name."""

from cmjax.placement.methods.budgets import choose_slots
from cmjax.placement.methods.contiguous import contiguous
from cmjax.placement.methods.gradient import GradientConfig, gradient, relax_and_round
from cmjax.placement.methods.greedy import greedy, greedy_global, greedy_hierarchical
from cmjax.placement.methods.once_per_rank import once_per_rank
from cmjax.placement.methods.one_spare import one_spare
from cmjax.placement.methods.place import METHODS, check_method, place, register_method
from cmjax.placement.methods.robust import robust
from cmjax.placement.methods.search import SearchConfig, search
from cmjax.placement.methods.shuffled import shuffled
from cmjax.placement.methods.split import optimize_split

__all__ = [
    "METHODS",
    "GradientConfig",
    "SearchConfig",
    "check_method",
    "choose_slots",
    "contiguous",
    "gradient",
    "greedy",
    "greedy_global",
    "greedy_hierarchical",
    "once_per_rank",
    "one_spare",
    "optimize_split",
    "place",
    "register_method",
    "relax_and_round",
    "robust",
    "search",
    "shuffled",
]
