"""README.md and docs/REPRODUCE.md as a user follows them, in small, the hub's models in its cache.

    python -m pytest --slow -s tests/test_rehearsal.py          # prints each command
"""
import csv
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, write_checkpoint
from runs import write_clap
from test_metrics import cnn14_state

from extras.metrics import Cnn14, VGGish

TEACHER, CLAP = "auffusion/auffusion-full-no-adapter", "laion/clap-htsat-unfused"
SENTENCES = ["Rain falls on a tin roof", "A dog barks twice, then whines", "A bell rings",
             'A man says "hello" to a crowd', "Wind blows, and leaves rustle", "A cat meows",
             '"Stop", a woman shouts', "Water drips", "Birds sing", "A door slams", "A horn honks"]
IDS = [f"Ab-{k:02d}_xYz{k:02d}" for k in range(13)]     # as long as YouTube's
TRAIN = ("python train.py --captions audiocaps.csv --out_dir out_big --max_steps 8 --batch_size 2 "
         "--grad_accum 2 --keep_every 4 --log_every 1")
SAMPLE = "python sample.py --student {} --prompt 'a dog barks while rain falls' --n 2 --out {}"
EVAL = ("python -m extras.eval audiocaps --student {} --captions {} --reference recordings "
        f"--clap {CLAP} --seconds 3 --out eval/{{}}")


def publish(machine, name):
    """The folder of a model in a machine's cache of the hub, new."""
    home = machine / f"home/.cache/huggingface/hub/models--{name.replace('/', '--')}"
    (home / "snapshots").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs/main").write_text("abc123")
    return home / "snapshots/abc123"


def options(machine):
    """Of subprocess, on a machine with the code, the packages and what is in its cache."""
    for name in ("extras", "recipes"):                  # extras.teacher needs recipes.clips
        shutil.copytree(ROOT / name, machine / "work" / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, machine / "work")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH", "XDG_"))}
    env |= dict(HOME=str(machine / "home"), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="",
                PATH=f"{Path(sys.executable).parent}:{env['PATH']}")
    return dict(cwd=machine / "work", env=env, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT)


def go(options, command):
    """Run a command, print it, and return the lines it wrote less its bars."""
    print(f"\n$ {command}")
    done = subprocess.run(shlex.split(command), timeout=900, **options)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    return [line for line in re.split(r"[\r\n]+", done.stdout)
            if line.strip() and not re.search(r"\d%\||it/s\]|B/s", line)]


def write_inputs(work, cache):
    """Write captions, the list of Table II, its recordings and the two networks, as published."""
    rows = [(91139 + k, IDS[k % 13], 30, text) for k, text in enumerate(SENTENCES + SENTENCES[:3])]
    with open(work / "audiocaps.csv", "w", newline="") as f:
        csv.writer(f).writerows([("audiocap_id", "youtube_id", "start_time", "caption"), *rows])
    (work / "test_audiocaps.raw.json").write_text("".join(json.dumps({
        "dataset_name": "AudioCaps", "audio_path": f"/data/audiocaps/data/{name}_30.wav",
        "text": SENTENCES[k % 11]}) + "\n" for k, name in enumerate(IDS)))
    (work / "recordings").mkdir()
    for k, name in enumerate(IDS[:11]):
        t = np.arange(160000) / 16000
        wav = 0.3 * np.sin(600 * (k + 1) * t) * (t % 1 < 0.6) + 0.02 * np.sin(9e4 * t * t)
        soundfile.write(work / f"recordings/Y{name}.wav", wav, 16000)
    torch.manual_seed(0)
    cnn, vgg = cnn14_state(), {k: 2 * w for k, w in VGGish().state_dict().items()}
    cnn |= {f"fc1.{k}": cnn[f"fc1.{k}"] / 1000 for k in ("weight", "bias")}    # FD of a few digits
    cache.mkdir(parents=True)
    torch.save({"iteration": 1, "model": cnn}, cache / Cnn14.file)
    torch.save(vgg, cache / VGGish.file)


@pytest.mark.slow
def test_the_real_run_in_small(tmp_path):
    gpu, laptop = tmp_path / "gpu", tmp_path / "laptop"
    teacher = write_checkpoint(publish(gpu, TEACHER))
    (teacher / "swiftaudio.json").unlink()              # Auffusion has none: clips of 10.24 s
    shutil.copytree(teacher, publish(laptop, TEACHER))
    write_clap(publish(gpu, CLAP))
    here = functools.partial(go, options(gpu))
    work, read = gpu / "work", lambda path: (gpu / "work" / path).read_bytes()
    write_inputs(work, gpu / "home/.cache/swiftaudio")

    output = " ".join(here(TRAIN))
    counts = {"rows": 14, "not whole": 0, "empty": 0, "duplicates": 3}
    assert f"11 captions used, of {counts}" in output
    lines = [json.loads(line) for line in read("out_big/metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9)]
    keys = "vsd", "lora", "x0_std", "grad_student", "grad_lora", "samples_per_s"
    assert all(0 < line[k] < 1e4 for line in lines[1:] for k in keys)
    assert lines[0]["vsd"] < 1e-6                       # the LoRA teacher starts as the teacher

    here(SAMPLE.format("out_big/student-8", "samples"))
    names = [f"a-dog-barks-while-rain-falls_seed0_{k}.wav" for k in range(2)]
    heard = [read(f"samples/{name}") for name in names]
    assert soundfile.info(work / "samples" / names[0]).frames == 163840

    captions = "test_audiocaps.raw.json"
    output = here(EVAL.format("out_big/student", captions, "student"))
    assert f"{captions}: N = 11 of 13 clips; 2 without a recording in recordings: " + ", ".join(
        f"/data/audiocaps/data/{name}_30.wav" for name in IDS[11:]) in output
    row = json.loads(read("eval/student/scores.json"))
    assert row["N"] == 11
    assert row["list"] == dict(zip([f"Y{name}.wav" for name in IDS], SENTENCES))
    assert min(row[k] for k in ("FD", "FAD", "KL")) > 0 and row["IS"] > 1 > abs(row["CLAP"]) > 0
    assert output[-2].split()[1:7] == (
        "{N} {FD:.2f} {FAD:.2f} {KL:.2f} {IS:.2f} {CLAP:.3f}".format(**row).split())

    # another machine has what is on the hub, and nothing else
    here("python -m extras.publish out_big/student")
    card = read("out_big/student/README.md").decode()
    assert f"license: cc-by-nc-sa-4.0\nbase_model: {TEACHER}\n" in card
    assert f"`{TRAIN}`, 8 steps" in card and str(tmp_path) not in card
    shutil.copytree(work / "out_big/student", publish(laptop, "user/student"))
    gpu.rename(tmp_path / "switched-off")
    go(options(laptop), SAMPLE.format("user/student", "samples"))
    assert heard == [(laptop / "work/samples" / name).read_bytes() for name in names]
