"""What a method of the benchmark takes and gives; every method, ours or a peer's, has this shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

Case = TypeVar("Case", contravariant=True)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What a method made of one slice.

    Attributes
    ----------
    image : Tensor
        ``(H, W)``: magnitude or complex image in the units of k-space for MRI, HU for CT.
    std : Tensor, optional
        Standard deviation ``(H, W)`` over samples, in the same units.
    nfe : int
        Network evaluations, over all samples; 0 for a method without a network.
    chosen : mapping
        What was chosen by the method for this slice (a weight λ, say), JSON-ready; shown below the table.
    per_target : mapping
        Target -> image, for methods that choose something by the target itself (an oracle); `image` is then
        the one of the first target.
    first_sample : Tensor, optional
        The first of `num_samples` samples, ``(H, W)``, where that is to be a row of its own beside `image`,
        their mean.
    num_samples : int
        Samples that `image` is the mean of.
    """

    image: Tensor
    std: Tensor | None = None
    nfe: int = 0
    chosen: Mapping[str, Any] = field(default_factory=dict)
    per_target: Mapping[str, Tensor] = field(default_factory=dict)
    first_sample: Tensor | None = None
    num_samples: int = 1


class Method(Protocol, Generic[Case]):
    """A reconstruction, ready to run: its networks are loaded.

    `name` is what a table calls it. `settings` says in one line what a result depends on besides the data; a
    change there makes stored rows stale. `needs_seed` is false where every seed gives the same image: then it
    runs once.
    """

    @property
    def name(self) -> str:
        """What a table calls it."""
        ...

    @property
    def settings(self) -> str:
        """What a result depends on besides the data."""
        ...

    @property
    def needs_seed(self) -> bool:
        """Whether the seed makes a difference."""
        ...

    def reconstruct(self, case: Case, seed: int) -> Reconstruction:
        """Reconstruct a slice: `benchmarks.cases.Scenario` of MRI, `benchmarks.ct_quality.Task` of CT."""
        ...
