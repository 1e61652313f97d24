"""Small random teachers in Auffusion's two layouts, and helpers to run the command lines."""
import copy
import functools
import gc
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                      # read when the library is imported
os.environ["OMP_NUM_THREADS"] = "1"                     # the programs that tests start have it too

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import posttrain
import train
from extras.random_teacher import write_teacher
from model import Pipeline, load_unet

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)                                # sums in one order: runs repeat bit for bit

VOCODER = dict(
    num_mels=64, upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 7, 4],
    upsample_initial_channel=32, resblock="1", resblock_kernel_sizes=[3, 5],
    resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]])
SMALL = dict(                                           # latents (4, 8, 8)
    dim=24, unet=(16, 32, 32, 32), vae=(4, 8, 8, 8), vocoder=VOCODER, seconds=0.64)


def write_checkpoint(folder, layout="plain", **more):
    """Write a small random teacher: layout "plain" (no adapter) or "adapter" (the older one)."""
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


@pytest.fixture
def tf32():
    """The two switches, on: of cuDNN's convolutions and of matrix products."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = True
    yield switches
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value


@pytest.fixture(scope="module")
def loaded_once():
    """Read each teacher once, as a third of so short a run is reading: nothing trains in it."""
    read = functools.cache(load_unet)

    def copied_unet(folder, part="unet", dtype=torch.float32):
        return copy.deepcopy(read(folder, part)).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        for module in (train, posttrain):
            patch.setattr(module, "Pipeline", functools.cache(Pipeline))
            patch.setattr(module, "load_unet", copied_unet)
        yield


def run(script, *flags, cwd, ranks=0, threads=1, **kw):
    """Run a command as a user would, in `ranks` processes: (exit code, all it printed).

    script: a file's name, or a module's, which is looked for here.
    """
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    command += map(str, flags)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads),
           "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=900, **kw)
    return done.returncode, done.stdout


def refused(script, *flags, cwd, says, **kw):
    """The run must end with exit code 1 and one line `error: ...` that holds each of `says`.

    In this process, as a new one imports for seconds; with options of subprocess in a new one.
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
        line = str(stopped.value.code)                  # Python prints it and ends with 1
        assert line.startswith("error:") and "\n" not in line, line
    for word in says:
        assert word in line, line


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="run the slow tests too (minutes to an hour, up to 24 GB)")


def pytest_collection_finish(session):
    """Keep the garbage collector from walking through all that was imported: a tenth faster."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
