"""LST: a thin copy of the transformer beside the frozen one, so that nothing flows back through the backbone.

Paper: LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning, Sung, Cho and Bansal, 2022,
arXiv:2206.06522 (NeurIPS).

Formula: s = D_0 h_0; before each side block l: s <- mu_l s + (1 - mu_l) (D_l h_l + c_l), mu_l = sigmoid(a_l / T), then
s <- SideBlock_l(s); output U LN(s), which the frozen head reads. h_0 is the input of the first block and h_l the
output of block l; D [d/r, d], U [d, d/r], all with biases; the side blocks have widths divided by r and as many heads.
A decoder's side blocks attend to the side encoder.
Count: T5-base, r = 8, without layers 0, 4, 8: 3,878,706.
Departure: the published code copies each architecture by hand; here the side network is the trunk's own class with a
thin configuration, so that masks and positions are the model's own. It starts from weight norms, not Fisher scores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.board import Tap
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tokens, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.additive.side.thin import Projection, thin_copy

PASSED = ("attention_mask", "position_ids", "token_type_ids", "encoder_attention_mask")


class Rung(nn.Module):
    """A side block and the gate before it, which lets in the output of its block of the backbone."""

    def __init__(self, block: nn.Module, tap: Tap, down: Projection, temperature: float) -> None:
        super().__init__()
        self.block, self.tap, self.down, self.temperature = block, tap, down, temperature
        self.gate = nn.Parameter(torch.zeros(1, device=down.weight.device))

    def forward(self, state: Tensor, *args: Any, **kwargs: Any) -> Any:
        mu = torch.sigmoid(self.gate / self.temperature)
        return self.block(mu * state + (1 - mu) * self.down(self.tap.value).to(state.dtype), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a trunk asks of its blocks, such as the type of their attention
            return getattr(super().__getattr__("block"), name)


class LSTTuner(Tuner):
    """The side network of one trunk; in an encoder-decoder the encoder's side state goes to the decoder's."""

    def __init__(self, site: Site, config: "LST") -> None:
        super().__init__()
        paths = site.anatomy.blocks[site.place.stack]
        kept = [block for block in range(len(paths)) if block not in config.dropped(len(paths))]
        if not kept:
            raise UserError(f"lst: drop={config.drop!r} leaves no side block")
        self.depth = len(paths)
        side, blocks = thin_copy(site, config.reduction, kept)
        self.side: Any = side
        width, thin = site.width, self.side.config.hidden_size
        self.first, self.start = site.watch(paths[0], "input"), Projection(site, width, thin)
        for path, block in zip(blocks, kept, strict=True):
            tap, down = site.watch(paths[block], "output"), Projection(site, width, thin)
            rung = Rung(self.side.get_submodule(path), tap, down, config.temperature)
            self.side.set_submodule(path, rung)
        stacks = {place.stack for place in site.anatomy.places if place.kind == "trunk"}
        self.gives_states = site.place.stack == "encoder" and "decoder" in stacks
        self.states: Tap = site.shared("side states", lambda: Tap("output"))
        self.up = None if self.gives_states else Projection(site, thin, width)

    def around(self, base: Callable[[Any], Tensor], x: Tokens) -> Tensor:
        with torch.no_grad():
            hidden = base(x)
            first = self.first.value.detach()  # may be the embeddings themselves
        call = {name: x.arguments[name] for name in PASSED if x.arguments.get(name) is not None}
        if x.arguments.get("encoder_hidden_states") is not None:
            call["encoder_hidden_states"] = self._encoded(x.arguments["encoder_hidden_states"])
        whole = None if self.gives_states else x.arguments.get("past_key_values")
        if whole is not None:
            call["past_key_values"] = self._cache(whole, x.cached)
        call["use_cache"] = whole is not None or (None if self.gives_states else False)
        # the thin network computes in float32, whatever the backbone's dtype
        state = self.side(inputs_embeds=self.start(first).float(), **call)[0]
        if whole is not None:
            for own, layers in zip(_parts(whole), _parts(call["past_key_values"]), strict=True):
                own.layers[self.depth :] = layers.layers
        if self.up is None:
            self.states.value = state
            return hidden
        return self.up(state.to(hidden.dtype))

    def _encoded(self, states: Tensor) -> Tensor:
        """The side encoder's states for the rows of ``states``, which beam search may have repeated."""
        encoded = self.states.value
        if encoded is None or states.shape[0] % encoded.shape[0] or states.shape[1] != encoded.shape[1]:
            raise UserError("lst: the decoder needs the encoder run under the same adapter just before it")
        return encoded.repeat_interleave(states.shape[0] // encoded.shape[0], dim=0)

    def _cache(self, whole: Any, cached: int) -> Any:
        """The side network's part of the cache, which stands behind the backbone's layers in the same object."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        views = []
        for part in _parts(whole):
            views.append(DynamicCache())
            views[-1].layers = part.layers[self.depth :]
        if cached and not views[0].layers:
            raise UserError("lst: this cache was filled without the side network: begin with an empty one")
        return EncoderDecoderCache(*views) if len(views) == 2 else views[0]


def _parts(cache: Any) -> list[Any]:
    """The caches of self- and cross-attention, or the one that there is."""
    both = getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None)
    return [cache] if both[0] is None else list(both)


@method(
    "lst",
    family="additive/side",
    paper="Sung, Cho and Bansal, 2022, arXiv:2206.06522",
    kinds=("trunk",),
    tuner=LSTTuner,
    identity=False,
    learning_rate=3e-3,
    tried=(3e-3, 1e-2, 3e-2),
    limits={
        f"family:{family}": "it needs a trunk that reads token embeddings" for family in ("vit", "clip", "whisper")
    },
    small={"reduction": 2},
)
class LST(Config):
    targets: str = option("trunk", "the trunks; in an encoder-decoder both")
    reduction: int = option(8, "r: widths of the side network are those of the backbone over r", least=1)
    drop: str = option("", "blocks that get no side block, in each trunk: their numbers, such as '0 4 8'")
    temperature: float = option(0.1, "T of the gates sigmoid(a / T)", least=1e-3)

    def dropped(self, depth: int) -> set[int]:
        """The numbers in ``drop``. Raises UserError for what is not a block."""
        words = self.drop.replace(",", " ").split()
        wrong = [word for word in words if not word.isdecimal() or int(word) >= depth]
        if wrong:
            raise UserError(f"lst: drop={self.drop!r} names {wrong[0]!r}, but the blocks are 0 to {depth - 1}")
        return {int(word) for word in words}
