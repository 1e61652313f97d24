"""The house: six files that need none of the others, and no imports that go in a circle."""
import ast
import graphlib
import json
import shutil
import signal

import pytest
import soundfile
from conftest import ROOT, run, started

SIX = {"train", "sample", "model", "lora", "losses", "data"}
FOLDERS = {"extras", "recipes", "tiny"}


def test_the_six_import_nothing_of_ours_but_each_other_and_nothing_circles():
    files = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in ROOT.glob(f"{name}/*.py"))]
    ours = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
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


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The six files and the tiny teacher with its captions, alone."""
    root = tmp_path_factory.mktemp("house")
    for name in SIX:
        shutil.copy(ROOT / f"{name}.py", root)
    shutil.copytree(ROOT / "tiny/teacher", root / "tiny/teacher")
    shutil.copy(ROOT / "tiny/captions.csv", root / "tiny")
    return root


def test_six_files_train_are_killed_go_on_and_are_heard(house):
    """kill -9, the same command by torchrun in two processes of half the batch, SIGTERM."""
    where = dict(cwd=house, root=house)
    flags = ["--teacher", "tiny", "--no-decay", "--max_steps", 10 ** 6]
    with started(house / "out/checkpoint.pt", "train.py", *flags, "--batch_size", 2,
                 "--save_every", 1, **where) as process:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    shutil.rmtree(house / "out/lora", ignore_errors=True)
    with started(house / "out/lora/adapter_config.json", "train.py", *flags, "--batch_size", 1,
                 "--save_every", 1, ranks=2, **where) as process:
        process.terminate()                                 # torchrun, which tells the others
        said = process.communicate(timeout=120)[0]
    assert "from step 0" not in said and '"captions a step": 2' in said, said
    step = json.loads((house / "out/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert said.count(f"stopped after step {step}, which is saved") == 1, said
    about = json.loads((house / "out/student/swiftaudio.json").read_text())
    assert about["step"] == step and "SIGKILL" not in said      # neither had to be

    code, said = run("sample.py", "--prompt", "a dog barks", "--seconds", 0.64, **where)
    assert code == 0, said
    wav, rate = soundfile.read(house / "samples/a-dog-barks_seed0_0.wav")
    assert (len(wav), rate) == (0.64 * 16000, 16000) and wav.any()
    assert (house / "samples/a-dog-barks_seed0_0.png").exists()
