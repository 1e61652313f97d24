"""The house: six files that need none of the others, and no imports that go in a circle."""
import ast
import graphlib
import shutil

import pytest
import soundfile
from conftest import ROOT, refused, run, started

SIX = {"train", "sample", "model", "lora", "losses", "data"}
FOLDERS = {"extras", "recipes", "tiny"}


def imports():
    """{module: those of ours that it imports, at its top or anywhere below}."""
    files = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in ROOT.glob(f"{name}/*.py"))]
    ours = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    found = {}
    for name, path in ours.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = names & set(ours)
        gone = {n for n in names - FOLDERS if n.split(".")[0] in SIX | FOLDERS
                and n not in ours and n.rpartition(".")[0] not in ours}
        assert not gone, f"{path} imports {gone}"
    return found


def test_the_six_import_nothing_of_ours_but_each_other_and_nothing_circles():
    found = imports()
    assert {name for name in found if "." not in name} == SIX
    for name in SIX:
        assert found[name] <= SIX, name
    assert any(found[name] & SIX for name in found if name.startswith("extras."))
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
    """kill -9, the same command, two processes with the same batch, one step and many."""
    where = dict(cwd=house, root=house)
    flags = ["--teacher", "tiny", "--batch_size", 2, "--no-decay", "--save_every", 1]
    with started(house / "out/checkpoint.pt", "train.py", *flags, **where) as process:
        process.kill()
    for ranks, batch, steps in ((0, 2, 10), (2, 1, 11)):
        code, said = run("train.py", *flags, "--batch_size", batch, "--max_steps", steps,
                         "--save_every", 100, ranks=ranks, **where)
        assert code == 0 and "from step 0" not in said, said
        log = (house / "out/metrics.jsonl").read_text().splitlines()
        assert f'{{"step": {steps}, ' in log[-1]

    for out, more in (("a", []), ("b", ["--teacher", "tiny", "--teacher_steps", 10])):
        code, said = run("sample.py", "--prompt", "a dog barks", "--seconds", 0.64, "--out", out,
                         *more, **where)
        assert code == 0, said
        wav, rate = soundfile.read(house / out / "a-dog-barks_seed0_0.wav")
        assert (len(wav), rate) == (0.64 * 16000, 16000) and wav.any()
        assert (house / out / "a-dog-barks_seed0_0.png").exists()
    refused("train.py", "--teacher", "tiny", "--lora_ranks", 2, says=["--lora_ranks"], **where)
