"""`CMamba.analyze` and `CMamba.synthesize` as ONNX files; extra: onnx.

The exporter sees a scan as one operator, `cmamba::chunked_scan_2d`; `_scan_2d` is that operator in
ONNX, around a Scan of one step per position.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from onnxscript import FLOAT, graph, opset18, script
from onnxscript.values import Opset
from torch import Tensor, nn
from torch.export import Dim

from cmamba_ref.entropy.latent_coder import MULTIPLE
from cmamba_ref.model import CMamba
from cmamba_ref.ops import scan_backend

# The opset that torch's exporter translates to; of type Any, because a script is no Python code.
op: Any = opset18


def export(model: CMamba, folder: str | os.PathLike) -> None:
    """Write `analyze.onnx` and `synthesize.onnx` into a folder, made where missing, in float32.

    Both take `quality` `[B]` as well if the model has variable rate. Batch, height and width are
    free.

        analyze     x `[B, 3, 64 h, 64 w]` in 0...1, see `cmamba_ref.model.pad`, to y
        synthesize  y `[B, M, h, w]` to x_hat `[B, 3, 16 h, 16 w]`, not clipped

    Raises:
        OSError: the folder cannot be made or written into.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    latent_channels = model.config.latent_channels
    _export(model, "analyze", ("x", "y"), (3, 2 * MULTIPLE, 3 * MULTIPLE), MULTIPLE, target)
    _export(model, "synthesize", ("y", "x_hat"), (latent_channels, 8, 12), 1, target)


class _Method(nn.Module):
    """A method of the model as a module, which is what can be exported."""

    def __init__(self, model: CMamba, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor, quality: Tensor | None = None) -> Tensor:
        return getattr(self.model, self.name)(x, quality)


def _export(
    model: CMamba,
    name: str,
    names: tuple[str, str],
    shape: Sequence[int],
    multiple: int,
    folder: Path,
) -> None:
    """Write one method, whose input has sides of multiples of `multiple`."""
    batch = Dim("batch")
    sides = {2: multiple * Dim("h"), 3: multiple * Dim("w")}
    arguments, dimensions, input_names = [torch.rand(2, *shape)], [{0: batch, **sides}], [names[0]]
    if model.gain is not None:
        arguments.append(torch.ones(2))
        dimensions.append({0: batch})
        input_names.append("quality")
    with torch.no_grad(), scan_backend("chunked"):
        exported = torch.export.export(
            _Method(model, name), tuple(arguments), dynamic_shapes=tuple(dimensions)
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=input_names,
            output_names=[names[1]],
            custom_translation_table={torch.ops.cmamba.chunked_scan_2d.default: _scan_2d},
            verbose=False,
        )
    assert program is not None  # it is, with dynamo=True
    program.save(folder / f"{name}.onnx")


@script(Opset("cmamba", 1), default_opset=op)
def _scan_2d(
    x, proj, A, dt_weight, dt_bias, skip, keep_starts: bool = False
) -> tuple[FLOAT, FLOAT]:
    batch, _, _, channels = op.Split(op.Shape(x), num_outputs=4)
    rank, n = op.Shape(dt_weight, start=2), op.Shape(A, start=2)

    # What a position and direction reads, side by side [B, H, W, 4, D + D + N + N].
    r, B_C = op.Split(proj, op.Concat(rank, n + n, axis=0), axis=4)
    dt = op.Softplus(op.Einsum(r, dt_weight, equation="bhwkr,kdr->bhwkd") + dt_bias)
    read = op.Concat(op.Expand(op.Unsqueeze(x, [3]), op.Shape(dt)), dt, B_C, axis=4)
    sizes = op.Concat(channels, channels, n, n, axis=0)

    # Directions 0 and 2 read rows, 1 and 3 columns, each [H W, B, 1, features].
    rows = op.Transpose(read, perm=[1, 2, 0, 3, 4])
    columns = op.Transpose(read, perm=[2, 1, 0, 3, 4])
    sequence = op.Concat([-1], op.Shape(rows, start=2), axis=0)
    row_0, _, row_2, _ = op.Split(op.Reshape(rows, sequence), axis=2, num_outputs=4)
    _, column_1, _, column_3 = op.Split(op.Reshape(columns, sequence), axis=2, num_outputs=4)

    @graph()
    def step(state, forward, backward):
        u_t, dt_t, B_t, C_t = op.Split(op.Concat(forward, backward, axis=1), sizes, axis=2)
        dt_n = op.Unsqueeze(dt_t, [3])
        change = dt_n * op.Unsqueeze(u_t, [3]) * op.Unsqueeze(B_t, [2])
        now = op.Exp(dt_n * A) * state + change
        y_t = op.ReduceSum(now * op.Unsqueeze(C_t, [2]), [3], keepdims=0)
        y_forward, y_backward = op.Split(y_t, axis=1, num_outputs=2)
        return now, y_forward, y_backward

    _, forward, backward = op.Scan(
        op.ConstantOfShape(op.Concat(batch, [4], channels, n, axis=0)),
        op.Concat(row_0, column_1, axis=2),
        op.Concat(row_2, column_3, axis=2),
        body=step,
        num_scan_inputs=2,
        scan_input_directions=[0, 1],
        scan_output_directions=[0, 1],
    )
    row_sum, column_sum = op.Split(forward + backward, axis=2, num_outputs=2)
    of_rows = op.Reshape(row_sum, op.Shape(op.Transpose(x, perm=[1, 2, 0, 3])))
    of_columns = op.Reshape(column_sum, op.Shape(op.Transpose(x, perm=[2, 1, 0, 3])))
    by_rows = op.Transpose(of_rows, perm=[2, 0, 1, 3])
    by_columns = op.Transpose(of_columns, perm=[2, 1, 0, 3])
    no_starts = op.ConstantOfShape(op.Concat([0], batch, [4], n, channels, axis=0))
    return by_rows + by_columns + x * skip, no_starts
