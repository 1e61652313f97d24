"""YAMNet's place in extras.eval, taken by an interpreter whose answers are known."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import InputError, read_json
from extras import eval as evaluate
from extras.metrics import Ear, sha256


def interpreter(path, experimental_preserve_all_tensors):
    """Class i's score is the window's sample i, each element of the embedding its last one."""
    infos = [{"index": i, "shape": s} for i, s in enumerate(([15600], [1, 5], [1, 9], [1, 1024]))]
    return SimpleNamespace(
        get_input_details=lambda: infos[:1], get_output_details=lambda: infos[1:2],
        get_tensor_details=lambda: infos[2:], allocate_tensors=dict, get_tensor=(t := {}).get,
        set_tensor=t.__setitem__, invoke=lambda: t.update(
            {1: t[0][None, :5], 3: np.full((1, 1024), t[0][15599])}))


@pytest.fixture
def ear(tmp_path, monkeypatch):
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Interpreter=interpreter))
    (tmp_path / "yamnet_class_map.csv").write_text('display_name\nA\nBark\nRain\nD\n"Wind, x"\n')
    (tmp_path / "words").write_text('{"dog, hound": ["Bark"], "rain": ["Rain", "Wind, x"]}')
    (tmp_path / "yamnet.tflite").write_bytes(b"weights")
    return tmp_path / "yamnet.tflite"


def test_a_clip_has_the_mean_of_windows_and_hits_are_in_the_top_three(ear, tmp_path):
    wav, starts = np.linspace(0.9, 0.1, 40960), np.array([0, 12680, 25360])     # to the very end
    (scores, embeddings), (short, padded) = map(Ear(ear).windows, [wav, np.full(9, 0.5)])
    expected = wav[starts[:, None] + range(5)], wav[starts + 15599]
    assert scores == pytest.approx(expected[0]) and embeddings[:, 7] == pytest.approx(expected[1])
    assert short.tolist() == [[0.5] * 5] and padded.tolist() == [[0] * 1024]
    evaluate.write_wav(tmp_path / "x.wav", np.stack([wav, 0 * wav], 1), 16000, "FLOAT")
    _, logits = Ear(ear)(tmp_path / "x.wav", 10)
    assert logits.sigmoid().numpy()[0] == pytest.approx(expected[0].mean(0) / 2)
    logits = torch.tensor([[3., 2, 1, 0, -1], [0, 1, 3, 2, 4], [5, 4, 1, 2, 3], [9, 9, 9, 0, 0]])
    said = ["Rain, then a hound.", "a dog, RAIN", "RAIN: wind", "it rains"]     # 2: is of dogs
    assert Ear(ear, tmp_path / "words").hits(logits, said) == {
        "hit": 2 / 3, "hit_N": 3, "hits": {"dog, hound": 0.5, "rain": 1}}
    (tmp_path / "manifest.json").write_text('[{"file": "x.wav", "prompt": "dog", "seed":0, "k":0}]')
    go = lambda: evaluate.main(f"score --generated {tmp_path} --reference {tmp_path} --ear {ear} "
                               f"--words {tmp_path}/words --out {tmp_path}".split())
    go()
    row = read_json(tmp_path / "scores.json")
    assert row["weights"] == {name: sha256(tmp_path / name) for name in ("yamnet.tflite", "words")}
    assert [row[key] for key in ("N", "FAD", "hit", "hit_N")] == [1, None, 1, 1]
    assert abs(row["KL"]) < 1e-4 and evaluate.line("x", row).endswith("  hit 1.00 of 1")
    for says, name, text in (("has no class .'Dog'.", "words", '{"dog": ["Bark", "Dog"]}'),
                             ("is not YAMNet", "yamnet_class_map.csv", "display_name\nBark\n"),
                             ("pip install ai-edge-litert", "ai_edge_litert.interpreter", ""),
                             ("no prompt of x.wav", "manifest.json", "[]")):
        sys.modules.pop(name, None) or (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=says):
            go()
