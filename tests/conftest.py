"""Small random teachers in Auffusion's two layouts, and helpers to run the command lines."""
import contextlib
import copy
import functools
import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                      # read when the library is imported
os.environ["OMP_NUM_THREADS"] = "1"                     # the programs that tests start have it too

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runs

import model
import train
from extras.random_teacher import write_teacher

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)                                # sums in one order: runs repeat bit for bit

VOCODER = dict(
    num_mels=64, upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 7, 4],
    upsample_initial_channel=32, resblock="1", resblock_kernel_sizes=[3, 5],
    resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]])
SMALL = dict(   # latents (4, 8, 8); two levels hold all kinds of layers, in half the tensors
    dim=24, unet=(16, 32), vae=(4, 8, 8, 8), vocoder=VOCODER, seconds=0.64)


# ---- teachers, captions and short runs ----------------------------------------------------------

def write_checkpoint(folder, layout="plain", **more):
    """Write a small random teacher: layout "plain" (no adapter) or "adapter" (the older one)."""
    write_teacher(folder, **{**SMALL, **more})
    if layout == "adapter":
        encoder, dim = (folder / "text_encoder").rename(folder / "text_encoder_0"), SMALL["dim"]
        shutil.copytree(folder / "tokenizer", encoder, dirs_exist_ok=True)
        shutil.rmtree(folder / "tokenizer")
        (folder / "condition_config.json").write_text(json.dumps([{
            "text_encoder_name": "text_encoder_0", "condition_adapter_name": "condition_adapter_0",
            "condition_max_length": 77, "condition_dim": dim, "cross_attention_dim": dim}]))
        (home := folder / "condition_adapter_0").mkdir()
        (home / "config.json").write_text(json.dumps({"condition_dim": dim}))
        torch.save({"proj.weight": torch.randn(dim, dim), "proj.bias": torch.randn(dim),
                    "norm.weight": torch.rand(dim) + 0.5, "norm.bias": torch.randn(dim)},
                   home / "condition_adapter.pt")
    return folder


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


@pytest.fixture(scope="session")
def clap(tmp_path_factory):
    return runs.write_clap(tmp_path_factory.mktemp("clap"))


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
    """Read each teacher once, as a third of so short a run is reading, and hand out copies."""
    load_unet = model.load_unet
    read = functools.cache(load_unet)

    def copied_unet(folder, part="unet"):
        if part != "unet":                              # a student's, which may have gone on
            return load_unet(folder, part)
        return copy.deepcopy(read(folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "TextEncoder", functools.cache(model.TextEncoder))
        for module in (model, train, *(m for n, m in sys.modules.items() if "recipes." in n)):
            if hasattr(module, "load_unet"):
                patch.setattr(module, "load_unet", copied_unet)
        yield


@pytest.fixture(scope="session")
def words(plain, captions):
    """The words of a small run of train.py; the last value of a flag given twice counts."""
    first = ["--teacher", plain, "--captions", captions, "--lora_rank", 4, *runs.SMALL]
    return lambda out, *flags: [str(word) for word in (*first, "--out_dir", out, *flags)]


@pytest.fixture(scope="session")
def go(words):
    """Train in this process: what is left."""
    def go(out, *flags):
        train.main(words(out, *flags))
        return runs.result(out)

    return go


@pytest.fixture(scope="session")
def one_step_run(words, tmp_path_factory):
    train.main(words(out := tmp_path_factory.mktemp("one"), "--max_steps", 1))
    return out


@pytest.fixture(scope="session")
def two_step_run(words, tmp_path_factory):
    train.main(words(out := tmp_path_factory.mktemp("two")))
    return out


# ---- commands -----------------------------------------------------------------------------------

def start(script, flags, cwd, ranks=0, root=ROOT, threads=1, env={}, **kw):
    """Start a command, with torchrun in `ranks` processes, as a user would; kw: of Popen."""
    words = [sys.executable]
    if ranks:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(root / script)] if script.endswith(".py") else ["-m", script]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads),
           "CUDA_VISIBLE_DEVICES": "", **env}
    kw = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") | kw
    return subprocess.Popen([*words, *map(str, flags)], cwd=cwd, env=env, **kw)


def run(script, *flags, cwd, **kw):
    """Run a command to its end: (exit code, all it printed). More options: of start().

    script: a file's name, or a module's. root: the folder that has it.
    """
    with start(script, flags, cwd, **kw) as process:
        try:
            said = process.communicate(timeout=900)[0]
        finally:
            process.kill()
    return process.returncode, said


@contextlib.contextmanager
def started(path, script, *flags, cwd, **kw):
    """A command as it runs, from when there is something in the file `path`."""
    with start(script, flags, cwd, **kw) as process:
        try:
            until = time.time() + 300
            while not (path.exists() and path.stat().st_size):
                if process.poll() is not None or time.time() > until:
                    process.terminate()
                    pytest.fail(process.communicate(timeout=60)[0])
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()                         # torchrun first ends the others
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def refused(script, *flags, cwd, says):
    """The run must end with exit code 1 and one line `error: ...` that holds each of `says`.

    script: a file's name, or a module's. In this process, as a new one imports for seconds.
    """
    with (pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(),
          pytest.raises(SystemExit) as stopped):
        warnings.simplefilter("ignore", RuntimeWarning)         # the module is imported already
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    line = str(stopped.value.code)                      # Python prints it and ends with 1
    assert line.startswith("error:") and "\n" not in line, line
    for word in says:
        assert word in line, line


# ---- pytest -------------------------------------------------------------------------------------

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
