"""Mix-And-Match adapter: a short prefix in attention and a scaled parallel adapter at the feed-forward layers.

Paper: Towards a Unified View of Parameter-Efficient Transfer Learning, He et al., 2021, arXiv:2110.04366.

Formula: attention over [P_k ; K] and [P_v ; V] with P_k, P_v [l, d_kv] (an MLP makes them while training), and
out = FFN(x) + s (U relu(D x + b_D) + b_U), D [r, d], U [d, r].
Count: stored 2 l d_kv for each attention and 2 r d + r + d for each feed-forward layer; training adds the MLP, see
`prefix`.
Departure: none in the formula; prefix keys have no position, see `prefix`.
"""

from deltaworks.core.registry import Config, configure, method, option


@method(
    "mam",
    family="hybrid",
    paper="He et al., 2021, arXiv:2110.04366",
    kinds=("keyvalue", "sublayer"),
    identity=False,
    learning_rate=1e-3,
    tried=(3e-4, 1e-3, 3e-3),
    small={"length": 4, "width": 16},
)
class MAM(Config):
    targets: str = option("*attention.kv", "the attentions that get a prefix")
    mlp: str = option("mlp", "the sub-layers that get a parallel adapter")
    length: int = option(30, "number of virtual keys l", least=0)
    width: int = option(800, "width of the MLP that makes the prefix", least=1)
    reduction: int = option(2, "the bottleneck r is the width d of the model divided by this", least=1)
    bottleneck: int | None = option(None, "the bottleneck r itself, instead of reduction", least=1)
    scale: float = option(4.0, "the scale s of the adapter (the paper: 4, and 2 for GLUE)")
    learned: bool = option(False, "train s too")

    def parts(self) -> list[Config]:
        return [
            configure("prefix", targets=self.targets, length=self.length, width=self.width),
            configure(
                "parallel",
                targets=self.mlp,
                reduction=self.reduction,
                width=self.bottleneck,
                scale=self.scale,
                learned=self.learned,
            ),
        ]
