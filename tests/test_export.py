"""ONNX files of a student: the clip of docs/USE.md's script, without PyTorch, is sample.py's."""
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from runs import write_student
from test_use import ONNX

from data import InputError
from extras import export
from extras.metrics import sha256
from model import load_student

NO_TORCH = "import sys; sys.modules.update(torch=None, transformers=None, diffusers=None)\n"


@pytest.mark.parametrize("layout, flags, most", [("plain", [], 1e-3), ("adapter", ["--half"], 0.1)])
def test_a_clip_without_pytorch(layout, flags, most, request, tmp_path, monkeypatch):
    for name in export.MADE_WITH[3:]:
        pytest.importorskip(name)
    teacher = request.getfixturevalue(layout)
    student = write_student(tmp_path / "student", teacher, parameterization="eps")
    monkeypatch.chdir(tmp_path)
    export.main(["--student", str(student), *flags])
    about = json.loads((tmp_path / "onnx/manifest.json").read_text())
    assert about["latents"] == [4, 8, 8] and about["made with"]["onnx"]
    for name, (size, digest) in about["files"].items():
        path = tmp_path / "onnx" / name
        assert (path.stat().st_size, sha256(path)) == (size, digest)
        assert b".py" not in path.read_bytes()              # no trace of this machine's folders
    for part, (key, shape) in dict(step=("z_T", ["batch", 4, 8, "2*length"]),
                                   vocoder=("wav", ["batch", "160*length"])).items():
        assert about["parts"][part]["shapes"][key] == shape and about["parts"][part]["opset"] > 17
    assert ("mask" in about["parts"]["text"]["shapes"]) == (layout == "adapter")

    subprocess.run([sys.executable, "-c", NO_TORCH + ONNX], check=True)
    wav, rate = soundfile.read("clip.wav", dtype="float32")
    expected = load_student(student, precision="fp32", device="cpu")("a dog barks twice")[0]
    assert rate == 16000 and len(wav) == len(expected)
    assert np.abs(wav - expected).max() < most * np.abs(expected).max() + 1e-4
    assert len(ONNX.splitlines()) <= 30
    with pytest.raises(InputError, match="onnx exists; pass another --out"):
        export.main(["--student", str(student)])


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(export.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="onnx is needed: pip install onnx"):
        export.main(["--student", "s", "--out", str(tmp_path / "o")])
