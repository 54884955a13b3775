"""Token-level routes: which experts each token chose, from which every count can be made.

counts[w, l, e]        = tokens of window w that chose expert e at layer l
coactivation[l, e, f]  = tokens that chose both e and f at layer l        (e ≠ f; 0 for e = f)
transitions[l, e, f]   = tokens that chose e at layer l and f at layer l + 1
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from cmjax.placement.loads import Loads, check_sizes, checked_labels

_CHUNK = 4096  # tokens whose choices are spread out at once: about 8 MB at 256 experts


@dataclass(frozen=True, eq=False)
class Routes:
    """The experts chosen by each token at each MoE layer.

    Attributes:
      ids: unsigned integers `[tokens, layers, top_k]`, in the order they were recorded; no expert
        twice in one token's choice. Read-only.
      experts: routed experts per layer.
      sequence: `[tokens]`, the request or document a token belongs to, if known.
      domain: `[tokens]`, index into `domain_names`, if the recording tells domains apart.
      domain_names: names of the domains.
      source, layer_labels: as in `Loads`.
    Raises: ValueError, one line, for ids that are no routes.
    """

    ids: Integer[np.ndarray, "tokens layers top_k"]
    experts: int
    sequence: Int[np.ndarray, "tokens"] | None = None
    domain: Int[np.ndarray, "tokens"] | None = None
    domain_names: tuple[str, ...] = ()
    source: str = "routes"
    layer_labels: tuple[int, ...] | None = None

    def __post_init__(self):
        ids = np.asarray(self.ids)
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or ids.size == 0:
            raise ValueError(
                f"{self.source}: expected ids as integers [tokens, layers, top_k], found "
                f"{ids.dtype} of shape {ids.shape}"
            )
        check_sizes(self.source, layers=ids.shape[1], experts=self.experts)
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= self.experts:
            found = least if least < 0 else most
            raise ValueError(
                f"{self.source}: expected ids of 0 or more, ids below {self.experts} experts, "
                f"found {found}"
            )
        ordered = np.sort(ids, axis=-1)
        twice = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(-1))
        if len(twice):
            token, layer = twice[0]
            raise ValueError(
                f"{self.source}: expected different experts in each choice, found one twice at "
                f"token {token}, layer {layer}"
            )
        ids = ids.astype(np.min_scalar_type(self.experts - 1))
        ids.flags.writeable = False
        object.__setattr__(self, "ids", ids)
        for name in ("sequence", "domain"):
            labels = getattr(self, name)
            if labels is not None and np.shape(labels) != (len(ids),):
                raise ValueError(
                    f"{self.source}: expected one {name} per token ({len(ids)}), found shape "
                    f"{np.shape(labels)}"
                )
        object.__setattr__(
            self, "layer_labels", checked_labels(self.layer_labels, ids.shape[1], self.source)
        )

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def layers(self) -> int:
        return self.ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.ids.shape[2]

    def select(self, tokens: slice | Bool[np.ndarray, "tokens"] | Sequence[int]) -> "Routes":
        """The routes of some tokens: a slice, a mask or indices.

        Raises: ValueError if none is left.
        """
        pick = tokens if isinstance(tokens, slice) else np.asarray(tokens)
        sequence = None if self.sequence is None else self.sequence[pick]
        domain = None if self.domain is None else self.domain[pick]
        return replace(self, ids=self.ids[pick], sequence=sequence, domain=domain)

    def stretch(self, windows: int, first: int, last: int) -> "Routes":
        """The routes of windows `first` to before `last` of `windows`, cut as `counts` does."""
        parts = np.array_split(np.arange(self.tokens), windows)[first:last]
        return self.select(slice(parts[0][0], parts[-1][-1] + 1))

    def by_domain(self) -> dict[str, "Routes"]:
        """One set of routes per domain, in the order of `domain_names`; {} if none are known."""
        if self.domain is None:
            return {}
        return {
            name: replace(
                self.select(self.domain == index), source=f"{self.source} ({name})",
                domain=None, domain_names=(),
            )
            for index, name in enumerate(self.domain_names)
        }  # fmt: skip

    def counts(self, windows: int = 1) -> Int[np.ndarray, "windows layers experts"]:
        """Tokens per expert in equal stretches of tokens.

        Raises: ValueError for fewer than one window, or more than there are tokens.
        """
        if not 1 <= windows <= self.tokens:
            raise ValueError(
                f"{self.source}: expected 1 to at most {self.tokens} windows (tokens), "
                f"found {windows}"
            )
        offset = self.experts * np.arange(self.layers)[:, None]
        counts = [
            np.bincount((part + offset).ravel(), minlength=self.layers * self.experts)
            for part in np.array_split(self.ids, windows)
        ]
        return np.stack(counts).reshape(windows, self.layers, self.experts)

    def loads(self, windows: int = 1) -> Loads:
        """`counts` as `Loads`."""
        return Loads(self.counts(windows), self.source, self.layer_labels)

    def coactivation(self) -> Float[np.ndarray, "layers experts experts"]:
        """Tokens that chose both experts of a pair, per layer; symmetric, zero on the diagonal."""
        pairs = self._pairs(range(self.layers), range(self.layers))
        diagonal = np.arange(self.experts)
        pairs[:, diagonal, diagonal] = 0
        return pairs

    def transitions(self) -> Float[np.ndarray, "steps experts experts"]:
        """Tokens that chose one expert at a layer and another at the next; steps = layers - 1."""
        return self._pairs(range(self.layers - 1), range(1, self.layers))

    def _pairs(self, firsts, seconds):
        total = np.zeros((len(firsts), self.experts, self.experts))
        for start in range(0, self.tokens, _CHUNK):
            part = self.ids[start : start + _CHUNK]
            for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
                total[index] += self._chosen(part[:, first]).T @ self._chosen(part[:, second])
        return total

    def _chosen(self, ids):
        """1 where a token chose an expert, [tokens, experts]; exact in single precision."""
        chosen = np.zeros((len(ids), self.experts), np.float32)
        chosen[np.arange(len(ids))[:, None], ids] = 1
        return chosen
