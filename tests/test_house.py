"""The house: six files that need none of the others, and no imports that go in a circle."""
import ast
import graphlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import soundfile
from conftest import ROOT, refused, started
from runs import alike, call, metrics, read_checkpoint

import sample
import train
from data import read_json

SIX = {"train", "sample", "model", "lora", "losses", "data"}
FILES = [p for name in (".", "extras", "recipes", "tiny") for p in ROOT.glob(f"{name}/*.py")]


def test_the_six_import_nothing_of_ours_but_each_other_and_nothing_circles():
    ours = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    assert {name for name in ours if "." not in name} == SIX
    found = {}                                              # also of imports inside functions
    for name, path in ours.items():
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        names = {x.name for n in nodes if isinstance(n, ast.Import) for x in n.names}
        for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = names & set(ours)
        assert name not in SIX or found[name] <= SIX, name
    assert "train" in found["recipes.arc"] and "extras.metrics" in found["recipes.decoder"]
    list(graphlib.TopologicalSorter(found).static_order())      # CycleError shows the circle


def test_every_program_is_a_command(tmp_path):
    for path in FILES:
        if path.stem not in SIX and "def main(" in path.read_text("utf-8"):
            refused(f"{path.parent.name}.{path.stem}", "--nonsense", cwd=tmp_path, says=[])


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The six files and the tiny teacher with its captions, alone."""
    root = tmp_path_factory.mktemp("house")
    for name in SIX:
        shutil.copy(ROOT / f"{name}.py", root)
    shutil.copytree(ROOT / "tiny/teacher", root / "tiny/teacher")
    shutil.copy(ROOT / "tiny/captions.csv", root / "tiny")
    return root


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds torchrun's processes there")
def test_six_files_train_are_killed_go_on_in_two_processes_and_are_heard(house):
    """kill -9, then by torchrun with half the batch in each; one of the two gets SIGTERM."""
    out, where = house / "out", dict(cwd=house, root=house)
    flags = ["--teacher", "tiny", "--no-decay", "--save_every", 1, "--log_every", 1,
             "--device", "cpu", "--max_steps"]
    with started(out / "checkpoint.pt", "train.py", *flags, 10 ** 6, "--batch_size", 2,
                 **where) as process:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = read_checkpoint(out)["step"]
    whole = shutil.copytree(out, house / "whole")
    call(train.main, *flags, step + 2, "--batch_size", 2, "--out_dir", whole)

    with started(out / f"student-{step + 2}/config.json", "train.py", *flags, 10 ** 6,
                 "--batch_size", 1, "--keep_every", step + 2, ranks=2, **where) as process:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGTERM)
        said = process.communicate(timeout=120)[0]
    last, identity = (read_checkpoint(out)[key] for key in ("step", "identity"))
    assert f"from step {step}" in said and identity["captions a step"] == 2, said
    assert said.count(f"stopped after step {last}, which is saved") == 1, said
    assert [line["step"] for line in metrics(out)] == [*range(1, last + 1)]
    alike(metrics(out)[step:step + 2], metrics(whole)[step:])
    assert read_json(out / "student/swiftaudio.json")["step"] == last

    call(sample.main, "--student", out / "student", "--prompt", "a dog barks", "--seconds", 0.64,
         "--out", house / "samples", "--device", "cpu")
    wav, rate = soundfile.read(house / "samples/a-dog-barks_seed0_0.wav")
    assert (len(wav), rate) == (0.64 * 16000, 16000) and wav.any()
    assert (house / "samples/a-dog-barks_seed0_0.png").exists()
