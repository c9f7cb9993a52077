"""Kernels of a graph from its adjacency (B, N, N) or (N, N), entry [i, j] >= 0 the weight of the edge from i to j."""

import torch
from torch import Tensor

from ...errors import require
from .._precision import full_precision
from .checks import knowable


def random_walk_frequency(
    adjacency: Tensor, walk_length: int, decay: float = 1.0, *, num_walks: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """How often walks of `walk_length` nodes visit each node: F = sum_t decay^t P^t, t = 0 ... walk_length - 1, P = D^-1 A.

    Args:
        adjacency: dense, or sparse COO or CSR. A walk ends at a node without edges.
        walk_length: nodes of a walk, its start counted.
        decay: weight of each further step; 1 - p where walks halt with probability p.
        num_walks: None for the expectation; a number to draw that many walks from each node instead.
        generator: of those draws.

    Returns:
        F of the adjacency's shape, dense: row i counts the walks from node i.
    """
    require(walk_length > 0, "walk_length={} must be at least 1", walk_length)
    require(0.0 <= decay <= 1.0, "decay={} must be in [0, 1]", decay)
    require(num_walks is None or num_walks > 0, "num_walks={} must be at least 1, or None for the expectation", num_walks)
    n, dtype = adjacency.shape[-1], torch.promote_types(adjacency.dtype, torch.float32)
    start = torch.eye(n, device=adjacency.device, dtype=dtype).expand(adjacency.shape)
    if num_walks is not None:
        dense = adjacency.to_dense() if adjacency.layout != torch.strided else adjacency
        return _sampled(dense.to(dtype), start, walk_length, decay, num_walks, generator)
    if walk_length == 1:
        return start.clone()
    with full_precision(adjacency):
        if adjacency.layout != torch.strided:
            steps = _sparse_transition(adjacency.to(dtype))
            visits = start + decay * steps.to_dense()
            for _ in range(walk_length - 2):
                visits = start + decay * (torch.bmm(steps, visits) if steps.ndim == 3 else torch.sparse.mm(steps, visits))
            return visits
        steps = decay * _transition(adjacency.to(dtype))
        visits = start + steps
        for _ in range(walk_length - 2):
            visits = start + steps @ visits
        return visits


def _transition(adjacency: Tensor) -> Tensor:
    degree = adjacency.sum(-1, keepdim=True)
    return adjacency / degree.where(degree > 0, torch.ones_like(degree))


def _sparse_transition(adjacency: Tensor) -> Tensor:
    adjacency = adjacency.to_sparse_coo().coalesce()
    index, values, shape = adjacency.indices(), adjacency.values(), adjacency.shape
    row = index[0] if len(shape) == 2 else index[0] * shape[-2] + index[1]
    degree = values.new_zeros(shape[:-1].numel()).index_add(0, row, values)[row]
    values = values / degree.where(degree > 0, torch.ones_like(degree))
    return torch.sparse_coo_tensor(index, values, shape, is_coalesced=True, check_invariants=False)


@torch.no_grad()
def _sampled(adjacency: Tensor, start: Tensor, walk_length: int, decay: float, num_walks: int, generator: torch.Generator | None) -> Tensor:
    rows = adjacency.reshape(-1, adjacency.shape[-1])
    n, nodes = rows.shape[1], torch.arange(rows.shape[0], device=rows.device)
    first = (nodes // n) * n
    dead = rows.sum(-1) == 0
    chances = rows.masked_fill(dead[:, None], 1.0)  # a draw there is thrown away
    at = nodes[:, None].expand(-1, num_walks)
    alive = torch.ones_like(at, dtype=torch.bool)
    visits = start.reshape(-1, n).clone()
    for t in range(1, walk_length):
        alive = alive & ~dead[at]
        at = torch.multinomial(chances[at.flatten()], 1, generator=generator).view_as(at) + first[:, None]
        visits = visits.scatter_add(1, at - first[:, None], alive * (decay**t / num_walks))
    return visits.view(adjacency.shape)


def normalise_rows(frequency: Tensor, p: float | None) -> Tensor:
    """Rows over their p-norm; a row of zeros stays."""
    if p is None:
        return frequency
    size = frequency.abs().sum(-1, keepdim=True) if p == 1 else torch.linalg.vector_norm(frequency, p, -1, keepdim=True)
    return frequency / size.where(size > 0, torch.ones_like(size))


def real_part(adjacency: Tensor, node_mask: Tensor | None) -> Tensor:
    """The adjacency in at least float32, without the edges of nodes that are not real."""
    adjacency = adjacency.to(torch.promote_types(adjacency.dtype, torch.float32))
    if node_mask is None:
        return adjacency if adjacency.ndim == 3 or adjacency.layout != torch.strided else adjacency[None]
    dense = adjacency.to_dense() if adjacency.layout != torch.strided else adjacency
    return dense * (node_mask[:, :, None] & node_mask[:, None])


def random_walk_kernel(adjacency: Tensor, walk_length: int, decay: float, p: float | None) -> Tensor:
    """F F^T of normalised visits: how alike the neighbourhoods of two nodes are."""
    visits = random_walk_frequency(adjacency, walk_length, decay)
    visits = normalise_rows(visits[None] if visits.ndim == 2 else visits, p)
    return visits @ visits.mT


def kernel_of(
    adjacency: Tensor, kind: str, *, walk_length: int, decay: float, p: float | None, learned: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The kernel "random_walk", "adjacency", "diffusion" or "taylor" of a graph whose real nodes are those of `mask` (B, N).

    `walk_length`, `decay` and `p` are of "random_walk"; `learned` are the times of "diffusion" or the coefficients of "taylor".
    """
    with full_precision(adjacency):
        if kind == "random_walk":
            return random_walk_kernel(real_part(adjacency, mask), walk_length, decay, p)
        adjacency = real_part(adjacency.to_dense() if adjacency.layout != torch.strided else adjacency, mask)
        if learned is None:
            return neighbour_kernel(adjacency)
        learns = diffusion_kernel if kind == "diffusion" else taylor_kernel
        return learns(symmetric_operator(adjacency), learned.to(adjacency.dtype))


def neighbour_kernel(adjacency: Tensor) -> Tensor:
    """A + I > 0."""
    own = torch.eye(adjacency.shape[-1], device=adjacency.device, dtype=torch.bool)
    return ((adjacency > 0) | own).to(adjacency.dtype)


def symmetric_operator(adjacency: Tensor) -> Tensor:
    """S = D^-1/2 A D^-1/2; the row and the column of an isolated node are zero."""
    degree = adjacency.sum(-1)
    rate = degree.where(degree > 0, torch.ones_like(degree)).rsqrt()
    return rate[..., :, None] * adjacency * rate[..., None, :]


def diffusion_kernel(operator: Tensor, times: Tensor) -> Tensor:
    """exp(t_h S) for S (B, N, N) and t (H,): (B, H, N, N)."""
    spectrum = _spectrum(operator)
    if spectrum is None:
        return torch.linalg.matrix_exp(times[:, None, None] * operator[:, None])
    values, vectors = spectrum
    return (vectors[:, None] * (times[:, None] * values[:, None]).exp()[:, :, None]) @ vectors[:, None].mT


def taylor_kernel(operator: Tensor, coefficients: Tensor) -> Tensor:
    """sum_i c_{h,i} S^i for S (B, N, N) and c (H, terms): (B, H, N, N)."""
    spectrum = _spectrum(operator)
    if spectrum is None:
        power = torch.eye(operator.shape[-1], device=operator.device, dtype=operator.dtype).expand(operator.shape)
        total = coefficients[:, 0, None, None] * power[:, None]
        for i in range(1, coefficients.shape[1]):
            power = power @ operator if i > 1 else operator
            total = total + coefficients[:, i, None, None] * power[:, None]
        return total
    values, vectors = spectrum
    powers = values[..., None] ** torch.arange(coefficients.shape[1], device=values.device)
    scales = (powers[:, None] * coefficients[:, None]).sum(-1)
    return (vectors[:, None] * scales[:, :, None]) @ vectors[:, None].mT


def _spectrum(operator: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and eigenvectors of a symmetric operator: one decomposition serves every head.

    None where the operator is not symmetric, or may not be looked at, or needs a gradient: that of an eigenvector is infinite at equal
    eigenvalues, which graphs are full of. On the meta device the graph counts as undirected, so that counted costs are those of most graphs.
    """
    if operator.is_meta:
        return torch.linalg.eigh(operator)
    usable = not operator.requires_grad and knowable(operator) and torch.allclose(operator, operator.mT, rtol=1e-6, atol=0.0)
    return torch.linalg.eigh(operator) if usable else None
