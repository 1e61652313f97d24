"""Small random checkpoints in Auffusion's two layouts, and helpers to run the command lines."""
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"                                 # before the library reads it
from bench import write_teacher

VOCODER = dict(num_mels=64, upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 7, 4], upsample_initial_channel=32,
               resblock="1", resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]])
SMALL = dict(dim=24, unet=(16, 32, 32, 32), vae=(4, 8, 8, 8), vocoder=VOCODER, seconds=0.64)        # latents of 4 x 8 x 8


def write_checkpoint(folder, layout="plain", **more):
    """A small random teacher of Auffusion's structure in one of its layouts: "plain" (no adapter) or "adapter"."""
    return write_teacher(folder, layout, **{**SMALL, **more})


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("adapter"), "adapter")


@pytest.fixture
def broken(plain, tmp_path):
    """A copy of the plain teacher, to break."""
    return Path(shutil.copytree(plain, tmp_path / "teacher"))


@pytest.fixture(scope="session")
def captions(tmp_path_factory):
    path = tmp_path_factory.mktemp("captions") / "captions.csv"
    path.write_text("id,caption\n" + "".join(f"{i},dog number {i} barks\n" for i in range(23)))
    return path


def run(script, *flags, cwd, ranks=0, threads=1, **kw):
    """Run train.py or sample.py as a user would: (exit code, all it printed)."""
    command = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else [])
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command + [str(ROOT / script), *map(str, flags)], cwd=cwd, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900, **kw)
    return done.returncode, done.stdout


def refused(script, *flags, cwd, says, **kw):
    """The run must end with exit code 1 and one line `error: ...` holding each of `says`, and no traceback.

    In this process (a new one imports for seconds), or with options for subprocess in one of its own.
    """
    if kw:
        code, output = run(script, *flags, cwd=cwd, **kw)
        assert code == 1 and "Traceback" not in output, output
        line, = (line for line in output.splitlines() if line.startswith("error:"))
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *map(str, flags)])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        line = str(stopped.value.code)                              # Python prints it and ends with 1
        assert line.startswith("error:") and "\n" not in line, line
    for word in says:
        assert word in line, line


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too (minutes to an hour, up to 24 GB)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
