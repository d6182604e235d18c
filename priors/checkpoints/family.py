"""What a family of checkpoints is: how it lies on disk, and how a prior is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from priors.base import Contract, ScorePrior


@dataclass(frozen=True, eq=False)
class Recipe:
    """All that a file says about a network.

    Parameters
    ----------
    settings
        JSON-ready: everything the network and its noise convention are built from. A converted prior keeps
        them in its header.
    weights
        The network's state dict, exactly.
    """

    settings: dict[str, Any]
    weights: dict[str, Tensor]


class Family(Protocol):
    """One layout of checkpoints, as one code base writes them.

    What comes from a file is not trusted: whatever is wrong with it is a :class:`priors.PriorError`.
    """

    name: str
    """Short and lower case; stands in the header of converted priors."""

    def recognises(self, content: Any) -> bool:
        """Whether the content of a file (nested dicts, lists, tensors, numbers, strings) has this layout."""

    def read(self, content: Any, config: Mapping[str, Any], *, ema: bool = True) -> Recipe:
        """Take settings and weights from a file's content.

        Parameters
        ----------
        content
            As opened; :meth:`recognises` said yes.
        config
            What the user knows beside the file: constructor arguments under their original names, flat or
            under ``"constructor"``. It goes before what is inferred; a contradiction with the shapes is an
            error, and so is a needed fact that is in neither, which the message asks for by name.
        ema
            Take the averaged weights where the file has them.

        Raises
        ------
        PriorError
            Naming the key at fault.
        """

    def network(self, settings: Mapping[str, Any]) -> nn.Module:
        """Build the network without weights; the keys of its state dict are the original's."""

    def contract(self, settings: Mapping[str, Any]) -> Contract:
        """What can be said of the prior without knowing its training data."""

    def prior(self, network: nn.Module, settings: Mapping[str, Any], contract: Contract) -> ScorePrior:
        """Wrap the network into a prior that speaks in the noise coordinate ``x = x0 + sigma z``."""
