r"""Graph-kernel attention (GKAT): global attention on nodes, multiplied by how near two nodes are in the graph.

    softmax:  W = exp(q k^T / sqrt(d) - max) K over (its row sum + 1e-9)
    linear:   W = phi(q) phi(k)^T |K| + 1e-8 over its row sum,   phi(q) = relu(q / sqrt(d)) + 1e-8,  phi(k) = relu(k) + 1e-8
    K = F F^T, F = normalised rows of sum_{t < L} decay^t (D^-1 A)^t;  or exp(t_h S), sum_i c_hi S^i with S = D^-1/2 A D^-1/2;  or A + I > 0

Choromanski, Lin, Chen, Zhang, Sehanobish, Likhosherstov, Parker-Holder, Sarlos, Weller, Weingarten, "From block-Toeplitz matrices to
differential equations on graphs: towards a general theory for scalable masked Transformers", ICML 2022. arXiv:2107.07999.
The authors count sampled walks; we take the expectation (`random_walk_frequency` draws them), and the row maximum over the nodes that K lets
through. B batch, N nodes, H heads, d head width, L walk_length, r rank. Not in the paper: masks of nodes.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule
from ...ops import graph_kernels as gk
from ...parts.heads import merge_heads, split_heads
from ...parts.linear import Linear
from ...parts.masks import zero_rows
from ...validate import check_divisible, check_mask, check_option, check_tokens


class GraphKernelAttention(Mechanism):
    """Args:
    dim: width of the nodes.
    num_heads: the output width is split between them.
    out_dim: width of the output; dim if None.
    attention: "softmax" (the authors' GKAT) or "linear" (features).
    kernel: "random_walk", "diffusion", "taylor", "adjacency" (nodes and their neighbours), or "none": the one given to forward, else ones.
    walk_length, decay, kernel_norm: of "random_walk": nodes of a walk, weight of each further step, p-norm of the rows (2, 1 or None).
    num_terms: of "taylor".
    feature_map: of attention="linear": "relu" or "elu".
    activation: applied to the merged heads: None, "elu" (the authors' classifier) or "relu".
    qkv_bias, out_proj: biases of the projections; a last linear layer.
    dropout: probability of dropping a weight in training.
    """

    card: ClassVar = Card(
        id="graph_kernel",
        layout="graph",
        paper=Paper(
            title="From block-Toeplitz matrices to differential equations on graphs: towards a general theory for scalable masked Transformers",
            authors="Krzysztof Choromanski, Han Lin, Haoxian Chen, Tianyi Zhang, Arijit Sehanobish, Valerii Likhosherstov, "
            "Jack Parker-Holder, Tamas Sarlos, Adrian Weller, Thomas Weingarten",
            venue="ICML",
            year=2022,
            arxiv="2107.07999",
        ),
        source="HL-hanlin/GKAT@d97f5e3 (no licence), GKATLayer; masks of google-research/scenic (Apache-2.0)",
        summary="Attention between all nodes of a graph, weighted by a random-walk or diffusion kernel.",
        when="Graphs whose labels hang on structure beyond one hop; pass `kernel=` to reuse one kernel for many layers.",
        # `kernel_products` N x N x N products make the kernel. The eigenvalues behind "diffusion" and "taylor" are no matrix product and not counted.
        flops="6*B*N*dim*out_dim + 4*B*N**2*out_dim + 2*B*N**3*kernel_products + (2*B*N*out_dim**2 if out_proj else 0)",
        grows={"N": 3.0},
        can=frozenset({"weights", "row_stochastic", "permutation_equivariant"}),
        checked_against="authors",
        uncertain="Expected visit counts stand for the authors' sampled walks; diffusion, Taylor and linear forms follow the equations.",
        example={"dim": 16, "num_heads": 4},
        variants=(
            {"dim": 8, "num_heads": 4, "out_dim": 16, "walk_length": 3, "decay": 0.9, "kernel_norm": 1, "activation": "elu"},
            {"dim": 16, "num_heads": 2, "attention": "linear", "qkv_bias": True, "out_proj": True, "kernel_norm": None},
            {"dim": 16, "num_heads": 2, "attention": "linear", "kernel": "diffusion", "feature_map": "elu"},
            {"dim": 16, "num_heads": 2, "kernel": "taylor", "num_terms": 5},
        ),
    )
    functions: ClassVar[Mapping[str, Callable[..., Any]]] = {"random_walk_frequency": gk.random_walk_frequency}
    random_walk_frequency = staticmethod(gk.random_walk_frequency)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        out_dim: int | None = None,
        attention: Literal["softmax", "linear"] = "softmax",
        kernel: Literal["random_walk", "diffusion", "taylor", "adjacency", "none"] = "random_walk",
        *,
        walk_length: int = 6,
        decay: float = 1.0,
        kernel_norm: int | None = 2,
        num_terms: int = 100,
        feature_map: Literal["relu", "elu"] = "relu",
        activation: Literal["elu", "relu"] | None = None,
        qkv_bias: bool = False,
        out_proj: bool = False,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.out_dim = dim, num_heads, dim if out_dim is None else out_dim
        check_divisible(self.out_dim, num_heads, "out_dim", "num_heads")
        check_option(attention, ("softmax", "linear"), "attention")
        check_option(kernel, ("random_walk", "diffusion", "taylor", "adjacency", "none"), "kernel")
        check_option(kernel_norm, (None, 1, 2), "kernel_norm")
        check_option(feature_map, ("relu", "elu"), "feature_map")
        check_option(activation, (None, "elu", "relu"), "activation")
        require(walk_length > 0, "walk_length={} must be at least 1", walk_length)
        require(0.0 <= decay <= 1.0, "decay={} must be in [0, 1]", decay)
        require(num_terms > 0, "num_terms={} must be at least 1", num_terms)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.attention, self.kernel, self.walk_length, self.decay, self.kernel_norm = attention, kernel, walk_length, decay, kernel_norm
        self.num_terms, self.feature_map, self.activation, self.qkv_bias, self.dropout = num_terms, feature_map, activation, qkv_bias, dropout
        self.kernel_products = {"random_walk": max(walk_length - 2, 0) + 1, "diffusion": num_heads, "taylor": num_heads}.get(kernel, 0)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, self.out_dim, qkv_bias, **dd) for _ in range(3))
        self.out_proj = Linear(self.out_dim, self.out_dim, **dd) if out_proj else None
        if kernel == "diffusion":
            self.heat_params = nn.Parameter(torch.ones(num_heads, **dd))
        if kernel == "taylor":
            terms = torch.exp(-0.01 * torch.arange(num_terms, device=device, dtype=torch.float32))
            self.taylor_params = nn.Parameter(terms.to(dtype or torch.get_default_dtype()).repeat(num_heads, 1))

    def key_maps(self) -> tuple[KeyMap, ...]:
        """One linear layer for each head and role; in the notebook's classifier below the number of the layer."""

        def role(prefix: str, theirs: str, ours: str) -> Rule:
            heads = tuple(f"{prefix}{head}.{theirs}.*" for head in range(self.num_heads))
            return Rule(heads, (f"{ours}.*",), lambda t, _: [torch.cat(t)], lambda t, _: list(t[0].chunk(self.num_heads)))

        layers = {"GKATLayer": "", **{f"GKAT classifier, layer {layer}": f"layers.{layer}." for layer in range(4)}}
        return tuple(KeyMap(name, tuple(role(prefix, f"fc_{r}", f"{r.lower()}_proj") for r in "QKV")) for name, prefix in layers.items())

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        adjacency: Tensor | None = None,
        *,
        kernel: Tensor | None = None,
        frequency: Tensor | None = None,
        node_mask: Bool[Tensor, "b n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n out_dim"] | tuple[Tensor, Tensor]:
        """Attend among the nodes of each graph.

        Args:
            x: features of the nodes.
            adjacency: (B, N, N) or (N, N), not negative, dense or sparse (COO, CSR).
            kernel: takes the place of the adjacency's: (N, N), (B, N, N) or (B, H, N, N), from `kernel_of` for example.
            frequency: F of K = F F^T, its rows still to be normalised: (B, N, r) or (N, r), not negative.
            node_mask: True = a real node; the rows of others come out 0.
            return_weights: also return the weights (B, H, N, N).
        """
        check_tokens(x, self.dim)
        check_mask(node_mask, *x.shape[:2], name="node_mask")
        learns, linear = self.kernel in ("diffusion", "taylor"), self.attention == "linear"
        require(kernel is None or frequency is None, "kernel and frequency are both given; {} needs one", type(self).__name__)
        if kernel is not None:
            gk.check_matrix(kernel, "kernel", x, heads=self.num_heads, signed=linear or learns)
        elif frequency is not None:
            gk.check_frequency(frequency, x)
            frequency = gk.normalise_rows(frequency, self.kernel_norm)
        elif self.kernel == "none":
            kernel = x.new_ones(1, 1, 1).expand(1, x.shape[1], x.shape[1])
        else:
            require(adjacency is not None, "kernel={!r} needs the adjacency, or a kernel, or a frequency", self.kernel)
            assert adjacency is not None
            gk.check_matrix(adjacency, "adjacency", x)
            kernel = self._kernel(adjacency, node_mask)
        x = zero_rows(x, node_mask)
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        way: dict[str, Any] = {"frequency": frequency, "mask": node_mask, "feature_map": self.feature_map if linear else None}
        out = merge_heads(gk.attend(q, k, v, kernel, **way, signed=learns, dropout=self.dropout if self.training else 0.0))
        if self.activation is not None:
            out = getattr(nn.functional, self.activation)(out)
        out = zero_rows(out if self.out_proj is None else self.out_proj(out), node_mask)
        if not return_weights:
            return out
        w = gk.weights(q, k, kernel, **way)
        return out, w if node_mask is None else w.masked_fill(~node_mask[:, None, :, None], 0.0)

    def kernel_of(self, adjacency: Tensor, node_mask: Tensor | None = None) -> Tensor:
        """The kernel of a graph, to be passed as `kernel=` to every layer and call on that graph: (B, N, N), or (B, H, N, N) where it learns."""
        require(self.kernel != "none", "kernel='none' makes no kernel of the adjacency")
        gk.check_matrix(adjacency, "adjacency")
        return self._kernel(adjacency, node_mask)

    def _kernel(self, adjacency: Tensor, mask: Tensor | None) -> Tensor:
        walks: dict[str, Any] = {"walk_length": self.walk_length, "decay": self.decay, "p": self.kernel_norm}
        learned = self.heat_params if self.kernel == "diffusion" else self.taylor_params if self.kernel == "taylor" else None
        return gk.kernel_of(adjacency, self.kernel, **walks, learned=learned, mask=mask)
