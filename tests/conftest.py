"""Small random teachers in Auffusion's two layouts, and helpers to run the command lines."""
import contextlib
import copy
import functools
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                      # read when the library is imported
os.environ["OMP_NUM_THREADS"] = "1"                     # the programs that tests start have it too

import pytest
import torch
from tqdm import tqdm

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


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture(autouse=True)
def signals():
    """Put back what train.py catches."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def loaded_once():
    """Read each teacher once, as a third of so short a run is reading, and hand out copies."""
    load_unet = model.load_unet
    read = functools.cache(load_unet)

    def copied_unet(folder, part="unet", dtype=torch.float32, fits=None):
        if part != "unet":                              # a student's, which may have gone on
            return load_unet(folder, part, dtype, fits)
        return copy.deepcopy(read(folder, fits=fits)).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "TextEncoder", functools.cache(model.TextEncoder))
        for module in (model, train, *(m for n, m in sys.modules.items() if "recipes." in n)):
            if hasattr(module, "load_unet"):
                patch.setattr(module, "load_unet", copied_unet)
        yield


@pytest.fixture(scope="module")
def one_step_run(plain, captions, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    runs.go(plain, captions, out, "--max_steps", 1)
    return out


@pytest.fixture(scope="module")
def two_step_run(plain, captions, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    runs.go(plain, captions, out)
    return out


@pytest.fixture
def copied(tmp_path):
    """Copy a run, to go on from it or to damage it."""
    return lambda out: shutil.copytree(out, tmp_path / "copied")


# A fork of this process has the libraries, which a new one imports for 8 seconds. It has none of
# the threads, though, and where there is an accelerator the backward pass needs some.
FORK = hasattr(os, "fork") and not torch.accelerator.is_available()
OURS = {path.stem for path in ROOT.iterdir()}


def become(script, flags, root, cwd, env, output):
    """Be the command, in a fork of this process."""
    for number in (1, 2):
        os.dup2(output, number)
    how = dict(mode="w", encoding=env.get("PYTHONIOENCODING", "utf-8"), closefd=False)
    sys.stdout, sys.stderr = open(1, **how), open(2, errors="backslashreplace", **how)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(torch.get_num_threads())      # a new pool, before threads race for it
    tqdm.set_lock(threading.RLock())                    # its own is shared: a kill could leave it
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]                           # patched, or of another root
    sys.path[:] = [str(root), *(path for path in sys.path if path != str(ROOT))]
    sys.argv = [script, *flags]
    sys.orig_argv = ["python", *([script] if script.endswith(".py") else ["-m", script]), *flags]
    os.environ.update(env)
    os.chdir(cwd)
    if script.endswith(".py"):
        runpy.run_path(str(root / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Forks:
    """A command in a fork, or in several as torchrun starts them, with the methods of Popen."""

    def __init__(self, script, flags, ranks, root, cwd, env):
        self.output, self.rows = tempfile.TemporaryFile(), []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks or 1):
            of_torchrun = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=ranks,
                               RANK=rank, LOCAL_RANK=rank) if ranks else {}
            env = {"TOKENIZERS_PARALLELISM": "false", **env, **of_torchrun}
            self.rows.append(multiprocessing.get_context("fork").Process(target=become, args=(
                script, flags, root, cwd, {k: str(v) for k, v in env.items()},
                self.output.fileno())))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # that this process has threads
            for row in self.rows:
                row.start()

    @property
    def returncode(self):
        """None while one runs, then the first that is not 0."""
        codes = [row.exitcode for row in self.rows]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self):
        return self.returncode

    def terminate(self):
        """Tell one: all must end."""
        self.rows[-1].terminate()

    def kill(self):
        for row in self.rows:
            row.kill()

    def communicate(self, timeout=None):
        for row in self.rows:
            row.join(timeout)
        assert self.returncode is not None, "still running"
        self.output.seek(0)
        return self.output.read().decode("utf-8", "replace").replace("\r\n", "\n"), None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.communicate()


def start(script, flags, cwd, ranks=0, root=ROOT, threads=1, env={}, new=False, **kw):
    """Start a command, with torchrun in `ranks` processes; new: no forks, but as a user would."""
    flags = [*map(str, flags)]
    if FORK and not new and threads == 1:
        return Forks(script, flags, ranks, root, cwd, env)
    words = [sys.executable]
    if ranks:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(root / script)] if script.endswith(".py") else ["-m", script]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads),
           "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.Popen([*words, *flags], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **kw)


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
            process.kill()


def refused(script, *flags, cwd, says, **kw):
    """The run must end with exit code 1 and one line `error: ...` that holds each of `says`.

    script: a file's name, or a module's. In this process, as a new one imports for seconds; with
    options of run() in a new one.
    """
    if kw:
        code, output = run(script, *flags, cwd=cwd, **kw)
        assert code == 1 and "Traceback" not in output, output
        line, = (line for line in output.splitlines() if line.startswith("error:"))
    else:
        with (pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(),
              pytest.raises(SystemExit) as stopped):
            warnings.simplefilter("ignore", RuntimeWarning)     # the module is imported already
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *map(str, flags)])
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
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
