"""Models as ONNX files, in ONNX Runtime against PyTorch."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cmamba_ref import CMamba
from tests.codec_helpers import SMALL

onnx_export = pytest.importorskip("cmamba_ref.onnx_export", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime")


# torch's own: in its exporter.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
def test_runtime_and_pytorch_agree(tmp_path: Path):
    torch.manual_seed(0)
    model = CMamba(dataclasses.replace(SMALL, depths=(0, 0, 1))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh blocks are the identity
            parameter.add_(0.1 * torch.randn_like(parameter))
    onnx_export.export(model, f"{tmp_path}/new/folder")
    quality = torch.tensor([1.5])
    for name, shapes in (
        ("analyze", [(3, 64, 128), (3, 192, 64)]),
        ("synthesize", [(16, 4, 3), (16, 1, 9)]),
    ):
        session = onnxruntime.InferenceSession(tmp_path / "new" / "folder" / f"{name}.onnx")
        for shape in shapes:
            x = torch.rand(1, *shape)
            expected = getattr(model, name)(x, quality)
            first = session.get_inputs()[0].name
            (found,) = session.run(None, {first: x.numpy(), "quality": quality.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
