"""README.md and docs/REPRODUCE.md as a user follows them, in small, with a hub on this machine.

    python -m pytest --slow -s tests/test_rehearsal.py          # prints each command and its answer
"""
import csv
import functools
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, write_checkpoint
from test_metrics import cnn14_state, write_clap

from extras.metrics import Cnn14, VGGish

TEACHER, CLAP = "auffusion/auffusion-full-no-adapter", "laion/clap-htsat-unfused"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HEARD = {f"vae/{WEIGHTS}", "vocoder/vocoder.pt"}        # sampling reads them, training does not
UNUSED = ["model_index.json", "safety_checker/model.safetensors", "text_encoder/model.fp16.bin",
          *(f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("unet", "vae"))]
SENTENCES = ["Rain falls on a tin roof", "A dog barks twice, then whines", "A bell rings",
             'A man says "hello" to a crowd', "Wind blows, and leaves rustle", "A cat meows",
             '"Stop", a woman shouts', "Water drips", "Birds sing", "A door slams", "A horn honks"]
IDS = [f"Ab-{k:02d}_xYz{k:02d}" for k in range(13)]     # as long as YouTube's
TRAIN = ("python train.py{} --captions audiocaps.csv --out_dir {} --max_steps 8 --batch_size 2 "
         "--grad_accum 2 --save_every 2 --keep_every 4 --log_every 1")
SAMPLE = "python sample.py --student {} --prompt 'a dog barks while rain falls' --n 2 --out {}"
EVAL = ("python -m extras.eval audiocaps --student {} --captions {} --reference recordings "
        f"--clap {CLAP} --seconds 3 --out eval/{{}}")


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub: the files of a repository, and each of them."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/\w+", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path)
        repo = self.server.root / (about or file or ["", "unknown"])[1]
        found = {str(p.relative_to(repo)): p for p in sorted(repo.rglob("*")) if p.is_file()}
        sha, code, content = hashlib.sha1(str(repo).encode()).hexdigest(), 200, b""
        if about and found:
            rows = [{"type": "file", "path": name, "size": p.stat().st_size, "oid": name,
                     "rfilename": name} for name, p in found.items()]
            info = {"id": about[1], "sha": sha, "siblings": rows}
            content = json.dumps(rows if about[2] == "tree" else info).encode()
        elif file and file[2] in found:
            content = found[file[2]].read_bytes()
            self.server.asked |= {(file[1], file[2])}
        else:
            code = 404
        self.send_response(code)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """The hub, with a small teacher in Auffusion's layout and a small CLAP."""
    repo = write_checkpoint(tmp_path / "hub" / TEACHER)
    (repo / "swiftaudio.json").unlink()                 # Auffusion has none: clips of 10.24 s
    for name in UNUSED:
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(b"not to be downloaded")
    write_clap(tmp_path / "hub" / CLAP)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.root, server.asked = tmp_path / "hub", set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def machine(folder, hub):
    """A machine with nothing but the code and the packages: options of subprocess."""
    shutil.copytree(ROOT / "extras", folder / "work/extras")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder / "work")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH", "XDG_"))}
    env |= dict(HOME=str(folder / "home"), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
                HF_HUB_DISABLE_XET="1", CUDA_VISIBLE_DEVICES="", NO_PROXY="127.0.0.1",
                PATH=f"{Path(sys.executable).parent}:{env['PATH']}")
    return dict(cwd=folder / "work", env=env, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT)


def go(options, command, code=0):
    """Run a command, print it with the end of its output, and return the lines it wrote."""
    begun = time.time()
    done = subprocess.run(shlex.split(command), timeout=900, **options)
    lines = [x for x in re.split(r"[\r\n]+", done.stdout) if x.strip() and not re.search(
        r"\d%\||it/s\]|B/s", x)]                         # bars
    print(f"\n$ {command}", *(line[:160] for line in lines[-4:]), sep="\n")
    print(f"# exit code {done.returncode}, {time.time() - begun:.0f} s")
    assert done.returncode == code and "Traceback" not in done.stdout, done.stdout
    return lines


def write_inputs(work, cache):
    """Write captions, the list of Table II, its recordings and the two networks, as published."""
    rows = [(91139 + k, IDS[k % 13], 30, text) for k, text in enumerate(SENTENCES + SENTENCES[:3])]
    with open(work / "audiocaps.csv", "w", newline="") as f:
        csv.writer(f).writerows([("audiocap_id", "youtube_id", "start_time", "caption"), *rows])
    (work / "test_audiocaps.raw.json").write_text("".join(json.dumps({
        "dataset_name": "AudioCaps", "audio_path": f"/data/audiocaps/data/{name}_30.wav",
        "text": SENTENCES[k % 11]}) + "\n" for k, name in enumerate(IDS)))
    forms = "{}_30.wav", "Y{}.wav", "{}.flac", "{}.wav"
    files = [forms[k % 4].format(name) for k, name in enumerate(IDS[:11])]
    (work / "recordings").mkdir()
    for k, file in enumerate(files):
        t = np.arange(160000) / 16000
        wav = 0.3 * np.sin(600 * (k + 1) * t) * (t % 1 < 0.6) + 0.02 * np.sin(9e4 * t * t)
        soundfile.write(work / "recordings" / file, wav, 16000)
    torch.manual_seed(0)
    cnn, vgg = cnn14_state(), {k: 2 * w for k, w in VGGish().state_dict().items()}
    cnn |= {f"fc1.{k}": cnn[f"fc1.{k}"] / 1000 for k in ("weight", "bias")}    # FD of a few digits
    cache.mkdir(parents=True)
    torch.save({"iteration": 1, "model": cnn}, cache / Cnn14.file)
    torch.save(vgg, cache / VGGish.file)
    return files


@pytest.mark.slow
def test_the_real_run_in_small(hub, tmp_path):
    options = machine(tmp_path / "gpu", hub)
    work, here = options["cwd"], functools.partial(go, options)
    files = write_inputs(work, tmp_path / "gpu/home/.cache/swiftaudio")
    read, asked = (lambda path: (work / path).read_bytes(),
                   lambda repo: {file for name, file in hub.asked if name == repo})
    to_train = {str(p.relative_to(hub.root / TEACHER)) for p in (hub.root / TEACHER).rglob("*.*")}
    to_train -= {*UNUSED, *HEARD}

    # ---- training is killed in the middle, and goes on by the same command ----------------------
    log = work / "out_big/metrics.jsonl"
    with subprocess.Popen(shlex.split(TRAIN.format("", "out_big")), **options) as process:
        while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
    seen = log.read_bytes().count(b"\n")
    print(f"\n# training was killed behind line {seen} of metrics.jsonl")
    assert process.returncode == -9 and 3 <= seen < 8
    output = " ".join(here(TRAIN.format("", "out_big")))
    counts = {"rows": 14, "not whole": 0, "empty": 0, "duplicates": 3}
    assert f"11 captions used, of {counts}" in output
    assert seen - 2 <= int(re.search(r"from step (\d+)", output)[1]) <= seen
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9)]
    keys = "vsd", "lora", "x0_std", "grad_student", "grad_lora", "samples_per_s"
    assert all(0 < line[k] < 1e4 for line in lines[1:] for k in keys)
    assert lines[0]["vsd"] < 1e-6                       # the LoRA teacher starts as the teacher

    # a run without a break, its teacher in a folder, is the same to the bit
    shutil.copytree(hub.root / TEACHER, work / "downloaded")
    here(TRAIN.format(" --teacher downloaded", "out_folder"))
    student = read(f"out_big/student/{WEIGHTS}")
    assert student == read(f"out_folder/student/{WEIGHTS}") == read(f"out_big/student-8/{WEIGHTS}")
    assert asked(TEACHER) == to_train                   # no VAE's or vocoder's weights

    # ---- listening ------------------------------------------------------------------------------
    here(SAMPLE.format("out_big/student-4", "early"))
    here(SAMPLE.format("out_big/student-8", "late"))
    here(SAMPLE.format("out_big/student", "samples"))
    assert asked(TEACHER) == to_train | HEARD
    names = [f"a-dog-barks-while-rain-falls_seed0_{k}.wav" for k in range(2)]
    heard = [read(f"samples/{name}") for name in names]
    assert heard == [read(f"late/{name}") for name in names]
    assert len({*heard, *(read(f"early/{name}") for name in names)}) == 4
    assert soundfile.info(work / "samples" / names[0]).frames == 163840

    (work / "downloaded").rename(work / "moved")        # a teacher's folder that is gone
    error, = here(SAMPLE.format("out_folder/student", "again"), code=1)
    assert error.startswith(f"error: {work / 'downloaded'}: no such folder")
    assert error.endswith("; as the teacher of out_folder/student, pass --teacher")
    here(SAMPLE.format("out_folder/student", "again") + f" --teacher {TEACHER}")
    assert heard == [read(f"again/{name}") for name in names]

    # ---- evaluation -----------------------------------------------------------------------------
    captions = "test_audiocaps.raw.json"
    output = here(EVAL.format("out_big/student", captions, "student"))
    assert f"{captions}: N = 11 of 13 clips; 2 without a recording in recordings: " + ", ".join(
        f"/data/audiocaps/data/{name}_30.wav" for name in IDS[11:]) in output
    row = json.loads(read("eval/student/scores.json"))
    assert row["N"] == 11
    assert row["list"] == dict(zip([f"{Path(file).stem}.wav" for file in files], SENTENCES))
    assert min(row[k] for k in ("FD", "FAD", "KL")) > 0 and row["IS"] > 1 > abs(row["CLAP"]) > 0
    here(EVAL.format("out_big/student", captions, "teacher") + " --teacher_steps 10")
    files = "eval/student/scores.json", "eval/teacher/scores.json"
    _, *table = here(f"python -m extras.eval table {files[0]} {files[1]}")
    (ours, *cells, _), (theirs, *others, _) = (line.split() for line in table)
    assert (ours, theirs) == files and cells[:2] != others[:2]
    shown = "{N} {FD:.2f} {FAD:.2f} {KL:.2f} {IS:.2f} {CLAP:.3f}".format(**row)
    assert cells == shown.split()

    # ---- publishing: another machine has what is on the hub, and nothing else -------------------
    here("python -m extras.publish out_big/student")
    card = read("out_big/student/README.md").decode()
    assert f"license: cc-by-nc-sa-4.0\nbase_model: {TEACHER}\n" in card
    assert f"`{TRAIN.format('', 'out_big')}`, 8 steps" in card and str(tmp_path) not in card
    shutil.copytree(work / "out_big/student", hub.root / "user/student")
    (tmp_path / "gpu").rename(tmp_path / "switched-off")
    hub.asked.clear()
    options = machine(tmp_path / "laptop", hub)
    go(options, SAMPLE.format("user/student", "samples"))
    assert heard == [(options["cwd"] / "samples" / name).read_bytes() for name in names]
    assert asked("user/student") == {"config.json", "swiftaudio.json", WEIGHTS}
    assert asked(TEACHER) == (to_train | HEARD) - {f"unet/{WEIGHTS}"}
