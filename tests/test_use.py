"""docs/USE.md and README.md: each piece of Python runs, and does what it says."""
import re
import runpy
import shutil
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import runs
import soundfile
import torch
from conftest import ROOT
from huggingface_hub.utils import filter_repo_objects

import sample
import train
from data import InputError
from model import load_student, load_unet

DOC = (ROOT / "docs/USE.md").read_text(encoding="utf-8")
API, DIFFUSERS, DDIM, PEFT, ONNX, HUB = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
README, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
FORK, = re.findall(r"```diff\n(.*?)```", DOC, re.DOTALL)
TRAIN = ["--teacher", "tiny", "--max_steps", "2", "--batch_size", "2", "--device", "cpu",
         "--log_every", "1", "--no-decay"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the tiny teacher and out/, a student and adapters of two steps."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny").symlink_to(ROOT / "tiny", target_is_directory=True)
    train.main([*TRAIN, "--out_dir", str(home / "out")])
    return home


@pytest.fixture(scope="module")
def names(home):
    """What the pieces of plain diffusers and PEFT define, run one after the other."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        torch.manual_seed(0)
        for piece in (DIFFUSERS, DDIM, PEFT):
            exec(piece, found)
    return found


def test_the_api(home, monkeypatch):
    monkeypatch.chdir(home)
    exec(API, found := {})
    wav, rate = soundfile.read(home / "dog.wav", dtype="float32")
    assert rate == 16000 and len(wav) == 2.56 * rate and wav.any()
    assert found["wavs"].shape == (2, len(wav)) and abs(found["wavs"][0] - wav).max() < 1e-4
    assert len(API.splitlines()) <= 5


def test_the_readmes_python(home, monkeypatch):
    monkeypatch.chdir(home)
    exec(README, found := {})
    sample.main(["--prompt", "a dog barks twice"])
    wav, _ = soundfile.read("samples/a-dog-barks-twice_seed0_0.wav")
    assert found["wav"].shape == wav.shape and abs(found["wav"] - wav).max() < 1e-4
    assert found["mel"].shape == (1, 64, 256)
    system, z_T = found["system"], found["system"].noise([0], seed=0).requires_grad_()
    x0 = system.latents(z_T, system.encode_text(["rain falls"]))
    assert torch.equal(x0, found["x0"])
    assert torch.autograd.grad(x0.sum(), z_T)[0].abs().min() > 0


def test_plain_diffusers_makes_the_clip_that_ours_makes(home, names):
    system = load_student(home / "out/student", precision="fp32", device="cpu")
    text = system.encode_text(["a dog barks twice"])
    torch.testing.assert_close(names["text"], text)
    assert names["z_T"].shape == (1, *system.shape)
    with torch.no_grad():
        x0 = system.latents(names["z_T"], text)
    assert (names["x0"] - x0).abs().max() < 1e-4 * x0.std()


def test_the_scheduler_computes_the_same_and_its_step_to_0_does_not(names):
    x0, t, eps, x_t, scheduler = (names[k] for k in ("x0", "t", "eps", "x_t", "scheduler"))
    assert t == 625 and (x_t - names["z_T"]).abs().max() > 0.1
    assert (names["x0_ddim"] - x0).abs().max() < 1e-5
    scheduler.set_timesteps(1)
    assert (scheduler.step(eps, t, x_t).prev_sample - x0).abs().max() > 0.01


def test_peft_has_the_lora_teacher_and_the_teacher(home, names):
    teacher = load_unet(ROOT / "tiny/teacher")
    with torch.no_grad():
        expected = teacher(names["x_t"], names["t"], names["text"]).sample
    torch.testing.assert_close(names["eps_teacher"], expected, rtol=0, atol=1e-5)
    assert (names["eps_lora"] - expected).abs().max() > 1e-4        # it has learned


def test_what_is_uploaded_is_the_student_with_its_card_and_decoder(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "out/student/decoder").mkdir()
    for name in ("README.md", "decoder/config.json", "decoder/checkpoint.pt"):
        (home / "out/student" / name).write_text("")
    for name in ("create_repo", "upload_folder"):
        function = getattr(huggingface_hub, name)
        monkeypatch.setattr(huggingface_hub, name, create_autospec(function))
    exec(HUB, {})
    asked = huggingface_hub.upload_folder.call_args.kwargs
    assert huggingface_hub.create_repo.call_args.args == (asked["repo_id"],)
    there = Path(asked["folder_path"])
    files = [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()]
    assert sorted(filter_repo_objects(files, ignore_patterns=asked["ignore_patterns"])) == [
        "README.md", "config.json", "decoder/config.json", "diffusion_pytorch_model.safetensors",
        "swiftaudio.json"]


def apply(diff, code):
    """Put a diff without line numbers into code: + behind the line before it, or in place of -."""
    old = None
    for mark, line in ((line[0], line[1:].strip()) for line in diff.splitlines()):
        if mark == "+":
            (place, new) = old
            code, old = code.replace(place, new(line)), (line, new)
            continue
        assert code.count(line) == 1, f"train.py has {code.count(line)} times {line!r}"
        indent = re.search(rf"^( *).*{re.escape(line)}", code, re.MULTILINE)[1]
        keep = f"{line}\n{indent}" if mark == " " else ""
        old = line, lambda added, keep=keep: keep + added
    return code


def test_a_fork_has_the_loss_the_flag_and_the_value_in_the_log(home, tmp_path):
    """A checkpoint that does not know the flag goes on with its default, one that does here."""
    code = (ROOT / "train.py").read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text(apply(FORK, code), encoding="utf-8")
    fork = runpy.run_path(str(tmp_path / "train.py"))["main"]
    for out, weight in (("a", "0"), ("b", "100")):
        fork([*TRAIN, "--out_dir", str(tmp_path / out), "--spread_weight", weight])
    plain, pulled = (runs.metrics(tmp_path / out) for out in "ab")
    for line in plain:                                      # a mean of squares: at least this
        assert line["spread"] >= (line["x0_std"] - 1) ** 2 - 1e-6 > 0
    assert plain[0]["spread"] == pulled[0]["spread"]        # of the same first student
    assert plain[0]["grad_student"] != pulled[0]["grad_student"]
    longer = [*TRAIN, "--max_steps", "3", "--out_dir"]
    of_before = str(shutil.copytree(home / "out", tmp_path / "before"))
    with pytest.raises(InputError, match="holds a run with spread_weight 0.0, not 1.0; start"):
        fork([*longer, of_before, "--spread_weight", "1"])
    fork([*longer, of_before])
    train.main([*longer, str(tmp_path / "a")])
    assert [len(runs.metrics(tmp_path / name)) for name in ("before", "a")] == [3, 3]
