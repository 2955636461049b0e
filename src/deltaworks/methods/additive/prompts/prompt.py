"""Prompt tuning: a few free token embeddings in front of the input.

Paper: The Power of Scale for Parameter-Efficient Prompt Tuning, Lester et al., 2021, arXiv:2104.08691.

Formula: H_0 = [E ; emb(x)] with E [P, d] and emb(x) [n, d]; masks, positions and token types grow with it, and the
P virtual tokens are left out of the output.
Count: P d.
Departure: the published initialisation takes the 5,000 most frequent entries of the vocabulary; frequencies are
not part of a model, so rows are drawn from the whole vocabulary here, and the tokens of an encoder that pools its
first token stand behind that token, so that it is still the first.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tokens, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class PromptTuner(Tuner):
    """The virtual tokens ``E`` [P, d] of one trunk."""

    def __init__(self, site: Site, config: "Prompt") -> None:
        super().__init__()
        table: nn.Embedding = site.module.get_input_embeddings()  # type: ignore[operator]
        entries, width = table.num_embeddings, table.embedding_dim
        if config.init == "uniform":
            self.E = site.uniform(config.length, width, bound=0.5)
        elif site.device.type == "meta":
            self.E = nn.Parameter(torch.empty(config.length, width, device="meta"))
        else:
            ids = torch.randint(entries, (config.length,), generator=site.generator).to(site.device)
            with torch.no_grad():  # through the module: some families scale their embeddings
                self.E = nn.Parameter(table(ids).float().clone())
        pools_first = not site.causal and site.place.stack not in ("encoder", "decoder")
        self.position = int(pools_first) if config.position is None else config.position
        self.kept = config.kept

    def around(self, base: Callable[[Tokens], Tensor], tokens: Tokens) -> Tensor:
        if not tokens.cached and self.position > tokens.embeds.shape[1]:
            raise UserError(
                f"prompt: position {self.position} is behind the end of an input of {tokens.embeds.shape[1]} tokens"
            )
        return base(tokens.insert(self.E, self.position, kept=self.kept))


@method(
    "prompt",
    family="additive/prompts",
    paper="Lester et al., 2021, arXiv:2104.08691",
    kinds=("trunk",),
    tuner=PromptTuner,
    identity=False,
    learning_rate=3e-2,
    tried=(1e-2, 3e-2, 1e-1),
    limits={
        f"family:{family}": "it makes its embeddings itself, so no virtual tokens can stand before them"
        for family in ("vit", "clip", "whisper")
    },
    small={"length": 4},
)
class Prompt(Config):
    targets: str = option("trunk", "the stacks that read the prompt; in encoder-decoder models the encoder's alone")
    length: int = option(20, "number of virtual tokens P; beyond 20 little is gained", least=0)
    init: str = option("vocabulary", "rows of the embedding table, or U(-0.5, 0.5)", choices=("vocabulary", "uniform"))
    position: int | None = option(None, "how many tokens stay in front; default: 1 where the first is pooled", least=0)
    kept: bool = option(False, "keep the virtual tokens in the output; one that pools its first token then pools them")

    def places(self, anatomy):  # type: ignore[no-untyped-def]
        places = super().places(anatomy)
        if self.targets == "trunk" and any(place.stack == "encoder" for place in places):
            return [place for place in places if place.stack == "encoder"]
        return places
