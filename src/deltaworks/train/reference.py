"""The model without its adapter, for trainers that compare with a reference model: no second model is held."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaworks.core.delta import Delta


class Reference(nn.Module):
    """Stands for a frozen copy of a model: a call runs the model itself with ``delta`` disabled.

    It registers nothing, so that it has no parameters to hold, move or shard; what else is asked of it, the model
    answers.
    """

    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.__dict__["delta"] = delta

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["delta"].model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives without the adapter, in evaluation mode; a trainer's own ``forward`` is the model's."""
        model = self.delta.model
        training = [module for module in model.modules() if module.training]
        try:
            model.eval()
            with self.delta.disabled():
                return model(*args, **kwargs)
        finally:
            for module in training:
                module.training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's, by which a trainer knows whether reference values that it kept are of this model."""
        return self.delta.model.state_dict(*args, **kwargs)
