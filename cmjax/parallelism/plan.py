"""A plan: how training is split over devices in five dimensions (PanGu-alpha, section 4).

devices = data x tensor x pipeline,        micro-batches = global batch / (data x micro_batch)
"""

import dataclasses
import difflib
import itertools
from typing import Any, Literal, get_args

from cmjax.models.dense import DenseConfig, Recompute
from cmjax.parallelism.layerwise import (
    MODES,
    Counts,
    Layerwise,
    parse_layerwise,
    read_runs,
    runs_text,
)

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
Optimizer = Literal["none", "zero1", "zero2", "zero3"]
DIMENSIONS = ("tensor", "pipeline", "data")
EVEN = "even"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A split of one training step.

    Fields:
      data, tensor, pipeline: degrees; their product is the number of devices.
      micro_batch: sequences of a micro-batch on one data-parallel replica.
      schedule: order of micro-batches in the pipeline. interleave: model chunks of a stage.
      layers: of every stage, or of each of its chunks; empty for numbers as even as there are.
      recompute: what the backward pass computes again, of all layers or `Layerwise`.
      optimizer: what is spread over the replicas: nothing, the optimizer's state (zero1), the
        gradients too (zero2), the parameters too (zero3).
      sequence_parallel: whether tensor-parallel ranks share the sequence between layers.
      overlap: whether gradients are reduced while the last micro-batch is still in its backward
        pass.
      expert: of the data-parallel replicas, so many in a row share the experts of a layer; 1 for a
        dense model.
      context: of the data-parallel replicas, so many in a row share sequences, of which each has a
        part; they gather the keys and values of all parts.
      order: dimensions from neighbours outward: the first fills a server, the last spans the
        machine.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    micro_batch: int = 1
    schedule: Schedule = "1f1b"
    interleave: int = 1
    layers: tuple[int, ...] = ()
    recompute: Recompute | Layerwise = "full"
    optimizer: Optimizer = "none"
    sequence_parallel: bool = False
    overlap: bool = False
    expert: int = 1
    context: int = 1
    order: tuple[str, ...] = DIMENSIONS

    def __post_init__(self):
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"plan: {name} must be a whole number >= 1, got {value!r}")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not isinstance(value, Layerwise):
                raise ValueError(f"plan: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if sorted(self.order) != sorted(DIMENSIONS):
            raise ValueError(
                f"plan: order must name {', '.join(DIMENSIONS)} once each, such as "
                f"{'-'.join(DIMENSIONS)}; got {'-'.join(self.order)!r}"
            )
        if (self.schedule == "interleaved") != (self.interleave > 1):
            raise ValueError(
                f"plan: schedule={self.schedule} does not go with interleave={self.interleave}; "
                "interleaved has 2 or more chunks, every other schedule 1"
            )
        if self.interleave > 1 and self.pipeline == 1:
            raise ValueError("plan: interleave needs pipeline of at least 2")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.layers):
            raise ValueError(
                f"plan: layers must be at least 1 on every stage, got {runs_text(self.layers)}"
            )
        if self.layers and len(self.layers) != self.pipeline:
            raise ValueError(
                f"plan: layers={runs_text(self.layers)} has {len(self.layers)} numbers; one for "
                f"each of the pipeline={self.pipeline} stages would do"
            )

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """Groups of ranks that have sequences of their own."""
        return self.data // self.context

    def micro_batches(self, global_batch: int) -> int:
        """Micro-batches of a step on one replica."""
        return global_batch // (self.replicas * self.micro_batch)

    def stages(self, layers: int) -> tuple[int, ...]:
        """Layers of every stage's chunks, of a model with so many: `layers`, or as PanGu-alpha's
        code divides them, layer i of n being on stage floor(i p / n).

        >>> Plan(pipeline=3).stages(8)
        (3, 3, 2)
        """
        if self.layers:
            return self.layers
        n, p = layers // self.interleave, self.pipeline
        first = [-(-stage * n // p) for stage in range(p + 1)]
        return tuple(b - a for a, b in itertools.pairwise(first))

    def counts(self, layers: int) -> list[Counts]:
        """Of every stage's chunks, of a model with so many layers, how many are recomputed in which
        way."""
        stages = self.stages(layers)
        if isinstance(self.recompute, Layerwise):
            return [self.recompute.of(stage, number) for stage, number in enumerate(stages)]
        full, selective = (self.recompute == mode for mode in ("full", "selective"))
        return [Counts(number, number * full, number * selective) for number in stages]

    @property
    def modes(self) -> tuple[Recompute, ...]:
        """The ways in which layers may be recomputed."""
        return MODES if isinstance(self.recompute, Layerwise) else (self.recompute,)

    @property
    def recompute_of_all(self) -> Recompute:
        """What is recomputed of every layer.

        Raises: ValueError: that differs from layer to layer.
        """
        if isinstance(self.recompute, Layerwise):
            raise ValueError(
                f"plan: recompute={self.recompute} goes layer by layer, which a mixture of experts "
                f"cannot; one of {', '.join(MODES)} would do"
            )
        return self.recompute

    def check(self, model: DenseConfig, global_batch: int) -> None:
        """Raises: ValueError: a degree that does not divide what it splits."""
        t = self.tensor
        if self.expert > 1:
            raise ValueError(f"plan: expert={self.expert} needs a mixture of experts")
        if self.heads_apart(model):
            raise ValueError(
                f"plan: tensor={t} must divide the {model.heads} heads, {model.key_heads} heads of "
                f"keys and the feed-forward width {model.ffn}"
            )
        if self.data % self.context or model.sequence % self.context:
            raise ValueError(
                f"plan: context={self.context} must divide data={self.data} and the sequence of "
                f"{model.sequence}"
            )
        if self.sequence_parallel and model.sequence // self.context % t:
            part = f"{model.sequence // self.context}"
            raise ValueError(f"plan: tensor={t} does not divide the sequence of {part}")
        self.check_stages(model.layers)
        if isinstance(self.recompute, Layerwise):
            self.recompute.check(self.stages(model.layers))
        if global_batch % (self.replicas * self.micro_batch):
            shared = f" / context={self.context}" if self.context > 1 else ""
            raise ValueError(
                f"plan: data={self.data}{shared} x micro_batch={self.micro_batch} does not divide "
                f"the global batch of {global_batch}"
            )
        if self.schedule == "interleaved" and self.micro_batches(global_batch) % self.pipeline:
            raise ValueError(
                f"plan: interleaved needs micro-batches in multiples of pipeline={self.pipeline}, "
                f"got {self.micro_batches(global_batch)}"
            )

    def check_stages(self, layers: int) -> None:
        """Raises: ValueError: stages and chunks that cannot share so many layers."""
        p, v = self.pipeline, self.interleave
        if layers % v:
            raise ValueError(f"plan: interleave={v} does not divide the {layers} layers")
        if p * v > layers:
            chunks = f" x interleave={v}" if v > 1 else ""
            raise ValueError(f"plan: pipeline={p}{chunks} is more than the {layers} layers")
        if (found := sum(self.stages(layers)) * v) != layers:
            chunks = f" in each of {v} chunks" if v > 1 else ""
            raise ValueError(
                f"plan: layers={runs_text(self.layers)}{chunks} makes {found}; the model has "
                f"{layers}"
            )

    def heads_apart(self, model: DenseConfig) -> bool:
        """Whether the tensor degree cannot split the model's layers."""
        return any(n % self.tensor for n in (model.heads, model.key_heads, model.ffn))

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `parse_plan` takes the same names."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        layers = runs_text(self.layers) if self.layers else EVEN
        words = {"order": "-".join(self.order), "recompute": str(self.recompute), "layers": layers}
        return values | words

    def __str__(self) -> str:
        """Its degrees and what differs from the defaults, as `parse_plan` reads it."""
        usual = Plan().to_dict()
        values = {
            name: value
            for name, value in self.to_dict().items()
            if name in _DEGREES or value != usual[name]
        }
        return ",".join(
            f"{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in values.items()
        )


_DEGREES = ("data", "tensor", "pipeline", "micro_batch", "schedule", "recompute", "optimizer")
_COUNTS = ("data", "tensor", "pipeline", "micro_batch", "interleave", "expert", "context")
_CHOICES: dict[str, tuple] = {
    "schedule": get_args(Schedule),
    "recompute": MODES,
    "optimizer": get_args(Optimizer),
}


def parse_plan(text: str) -> Plan:
    """A plan from `name=value,name=value`; what is not named has its default, `recompute` being
    full. An `interleave` above 1 makes the schedule interleaved where none is named.

    >>> parse_plan("data=16,tensor=8,pipeline=16,optimizer=zero1").devices
    2048

    Raises: ValueError: an unknown name or value, with what would do.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(Plan)}
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"plan: expected name=value, got {part!r}")
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1) or list(kinds)
            raise ValueError(f"plan: unknown name {name!r}; closest: {', '.join(close)}")
        if name in values:
            raise ValueError(f"plan: {name} is given twice")
        values[name] = _read(name, value, kinds[name])
    interleaved = values.get("interleave", 1) != 1
    if interleaved and values.get("schedule", "1f1b") == "1f1b":
        values["schedule"] = "interleaved"  # as Megatron names 1F1B with virtual stages
    if values.get("schedule") == "zero-bubble":
        values["schedule"] = "zero_bubble"
    return Plan(**values)


def _read(name: str, value: str, kind: object) -> object:
    if kind is int:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"plan: {name} must be a whole number >= 1, got {value!r}")
        return int(value)
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if value.lower() not in words:
            raise ValueError(f"plan: {name} must be true or false, got {value!r}")
        return words[value.lower()]
    if name == "recompute" and ":" in value:
        return parse_layerwise(value)
    if name == "layers":
        layers = () if value == EVEN else read_runs(value)
        if layers is None:
            raise ValueError(
                "plan: layers takes numbers for every stage as 15-16-16-17 or 15-16x2-17, or "
                f"{EVEN}; got {value!r}"
            )
        return layers
    return tuple(value.split("-")) if name == "order" else value
