"""The public functions, and the registration of the backends that come with this package."""

from typing import Literal, overload

from torch import Tensor

from cmamba_ref.ops import dispatch, lazy_triton, reference
from cmamba_ref.ops.autocast import without_autocast
from cmamba_ref.ops.chunked import op as chunked
from cmamba_ref.ops.dispatch import BACKENDS, Backend, register_backend
from cmamba_ref.ops.validation import Scan2dInputs, ScanInputs, check_scan, check_scan_2d
from cmamba_ref.stages import SCAN, stage

register_backend(Backend("reference", reference.selective_scan, reference.selective_scan_2d))
register_backend(Backend("chunked", chunked.selective_scan, chunked.selective_scan_2d))
register_backend(
    Backend(
        "triton",
        lazy_triton.selective_scan,
        lazy_triton.selective_scan_2d,
        lazy_triton.refusal,
    )
)


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan along one axis (Gu and Dao 2023, arXiv:2312.00752, eq. 2).

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t = (<C_t, h_t> + D u_t) * silu(z_t)

    The first ten arguments, their shapes and types and the results are those of `mamba_ssm`'s
    `selective_scan_fn` for real A. State and arithmetic are fp32, fp64 for fp64 inputs; autocast
    has no effect.

    Args:
        u: input `[B, D, L]`; fp16, bf16, fp32 or fp64, called the I/O type below.
        delta: time steps `[B, D, L]`, I/O type, before bias and softplus.
        A: real state matrix, diagonal, `[D, N]`, fp32 (fp64 for fp64 inputs); A itself, negative in
            a stable system, not its logarithm.
        B: `[D, N]` constant, in A's type, or `[B, N, L]` or `[B, G, N, L]` with D divisible
            by G, in the I/O type; group g serves channels g*D/G to (g+1)*D/G - 1.
        C: as B.
        D: skip weights `[D]` in A's type, or None for no skip.
        z: gate `[B, D, L]`, I/O type, or None for no gate.
        delta_bias: `[D]` in A's type, added to delta, or None.
        delta_softplus: apply softplus to delta after the bias.
        return_last_state: also return the state after the last position; its gradient flows.
        initial_state: state before the first position `[B, D, N]` in A's type; zero when
            None. Our extension: a sequence may be scanned in segments.
        seq_idx: integers `[B, L]`: which sequence a position belongs to, where several are packed
            into one row. Wherever it changes along L, the state begins at zero again;
            `initial_state` belongs to the first sequence of a row, the last state to the last. As
            in Mamba-2. None: one sequence.
        backend: `auto`, `reference`, `chunked`, `triton` or a registered one; see `scan_backend`.

    Returns:
        y `[B, D, L]` in the I/O type; with `return_last_state` the pair (y, last state `[B, D, N]`
        in A's type).

    Raises:
        InvalidArgumentError: a shape, type, device or backend name is wrong.
        BackendUnavailableError: the backend asked for by name cannot run here.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx)
    check_scan(inputs)
    name = dispatch.choose(backend, u.device.type, A.shape[1])
    with without_autocast(u.device):
        y, last_state = BACKENDS[name].scan(inputs)
    return (y, last_state) if return_last_state else y


def selective_scan_2d(
    x: Tensor,
    proj: Tensor,
    A: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    D: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum of four selective scans over a map (SS2D of VMamba, Liu et al. 2024, arXiv:2401.10166).

    Direction 0 visits the positions row by row, 1 column by column, 2 and 3 are their reverses.
    Direction k has its own projections and parameters:

        dt_t = softplus(dt_weight_k r_t + dt_bias_k)
        h_t = exp(dt_t A_k) h_{t-1} + dt_t B_t x_t
        y_t = <C_t, h_t> + D_k x_t

    State, arithmetic and the sum over directions are fp32, fp64 for fp64 inputs; autocast has no
    effect. Projections are taken in raster order for every direction, because they act on
    single positions and so commute with the order of the scan (our choice).

    Args:
        x: map `[B, H, W, D]`, channels last; fp16, bf16, fp32 or fp64, the I/O type.
        proj: `[B, H, W, 4, R + 2N]` in the I/O type: r (R), B (N) and C (N) of each direction.
        A: real state matrices, diagonal, `[4, D, N]`, fp32 (fp64 for fp64 inputs); A itself,
            negative in a stable system, not its logarithm.
        dt_weight: `[4, D, R]` in A's type.
        dt_bias: `[4, D]` in A's type.
        D: skip weights `[4, D]` in A's type, or None for no skip.
        backend: `auto`, `reference`, `chunked`, `triton` or a registered one; see `scan_backend`.

    Returns:
        The sum of the four directions `[B, H, W, D]` in the I/O type.

    Raises:
        InvalidArgumentError: a shape, type, device or backend name is wrong.
        BackendUnavailableError: the backend asked for by name cannot run here.
    """
    inputs = Scan2dInputs(x, proj, A, dt_weight, dt_bias, D)
    check_scan_2d(inputs)
    name = dispatch.choose(backend, x.device.type, A.shape[2], dt_weight.shape[2])
    with without_autocast(x.device), stage(SCAN):
        return BACKENDS[name].scan_2d(inputs)
