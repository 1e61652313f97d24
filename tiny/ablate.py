"""The paper's ablations on the tiny world: one change at a time, several seeds, mean and spread.

    python -m tiny.ablate table4                    # the paper's Table IV: parameterization, LoRA's
                                                    # capacity, total variation
    python -m tiny.ablate table5                    # its Table V: number of captions
    python -m tiny.ablate queries --student out/student     # the teacher in 1 to 50 steps beside it
    python -m tiny.ablate levers --steps 200 --seeds 1      # what the tiny default was chosen from
    python -m tiny.ablate objectives        # VSD, ARC, energy score and regression in five minutes
    python -m tiny.ablate energy            # parts of the energy score; arc: of ARC

Runs are kept under --out and not made again. --steps is short by default: what is compared is the
order, at equal cost.
"""
import json
from pathlib import Path

import posttrain
import train
from extras.cli import InputError, Parser, number, read_json, replace_text, run
from model import Pipeline
from tiny import score

# name: flags that differ from the tiny default (tiny/teacher/swiftaudio.json). Tables IV and V
# vary the paper's eq. 8.
EQ8 = "--lora_weighting alpha2"
# The stages of a row are divided by "|", each starts from the student before; the steps make each
# row as dear as 480 steps of VSD, the 512 clips of the teacher counted.
VSD, T625, LOW = "--max_steps {}", "--student_t 625", "--lr 2e-5 --warmup 0"
MORE_VSD = "--objective vsd --max_steps {}"
CLIPS = "--max_steps {} --clips 512 --beta1 0.9"
ENERGY = f"--objective energy {CLIPS} --lr 3e-4 --batch_size 24"
REGRESSION = f"--objective regression {CLIPS} --lr 3e-4 --batch_size 48"
ARC = "--objective arc --max_steps {} --clips 512 --lr 1e-4 --d_first 20"
TABLES = {
    "table4": {
        "tiny default: eq. 8 weighted like v": "",
        "eq. 8 as in the paper, and below": EQ8,
        "w/o eq. 1 (direct)": f"{EQ8} --parameterization direct",
        "LoRA rank 2": f"{EQ8} --lora_rank 2 --lora_alpha 2",
        "LoRA rank 64": f"{EQ8} --lora_rank 64 --lora_alpha 64",
        "TV l1, 0.05 (the paper's)": f"{EQ8} --tv l1 --tv_weight 0.05",
        "TV l2, 0.05": f"{EQ8} --tv l2 --tv_weight 0.05",
        "LoRA teacher guided too (the paper's)": f"{EQ8} --lora_guidance 2",
    },
    "table5": {
        "100 captions": f"{EQ8} --max_captions 100",
        "500 captions": f"{EQ8} --max_captions 500",
        "2000 captions": f"{EQ8} --max_captions 2000",
        "6000 captions": EQ8,
    },
    "levers": {
        "tiny default": "",
        "one step at t = 625": "--student_t 625",
        "eq. 8 as in the paper": EQ8,
        "w = DMD's": "--weighting dmd",
        "LoRA on q and v": "--lora_targets qv --lora_rank 64 --lora_alpha 128",
        "LoRA on linear layers": "--lora_targets linear",
        "LoRA's rate x 1/2": "--lora_lr 1e-3",
        "LoRA's rate x 2": "--lora_lr 4e-3",
        "student's rate x 1/2": "--lr 1e-4",
        "student's rate x 2": "--lr 4e-4",
        "no warm-up": "--warmup 0",
        "guidance 1": "--guidance 1",
        "guidance 3": "--guidance 3",
        "betas 0.9, 0.999": "--beta1 0.9 --beta2 0.999",
        "no EMA": "--ema 0",
        "t from 200": "--t_min 200",
        "t to 800": "--t_max 801",
        "no empty captions": "--lora_drop 0",
    },
    "objectives": {
        "VSD": VSD.format(480),
        "VSD at t = 625": f"{VSD.format(480)} {T625}",
        "energy": f"{ENERGY.format(436)} {T625}",
        "regression": f"{REGRESSION.format(436)} {T625}",
        "ARC": f"{ARC.format(385)} {T625}",
        "energy, then VSD": f"{ENERGY.format(105)} {T625} | {MORE_VSD.format(313)}",
        "regression, then VSD": f"{REGRESSION.format(105)} {T625} | {MORE_VSD.format(313)}",
        "ARC, then VSD": f"{ARC.format(93)} {T625} | {MORE_VSD.format(313)}",
        "VSD, then energy": f"{VSD.format(313)} {T625} | {ENERGY.format(105)} {LOW}",
        "VSD, then regression": f"{VSD.format(313)} {T625} | {REGRESSION.format(105)} {LOW}",
        "VSD, then ARC": f"{VSD.format(313)} {T625} | {ARC.format(93)} {LOW}",
        "VSD, then ARC and VSD": f"{VSD.format(313)} {T625} | {ARC.format(57)} {LOW} --vsd 50",
    },
    "energy": {
        "2 clips, patches of 4 columns": f"{ENERGY.format(200)} {T625}",
        "patches of 2": f"{ENERGY.format(200)} {T625} --patch 2",
        "patches of 8": f"{ENERGY.format(200)} {T625} --patch 8",
        "whole clips": f"{ENERGY.format(200)} {T625} --patch 32",
        "3 clips of 16 captions": f"{ENERGY.format(200)} {T625} --samples 3 --batch_size 16",
        "features of the teacher": f"{ENERGY.format(200)} {T625} --feature_weight 0.01",
    },
    "arc": {
        "ARC": f"{ARC.format(200)} {T625}",
        "w/o the contrastive loss": f"{ARC.format(200)} {T625} --contrast 0",
        "w/o R1": f"{ARC.format(200)} {T625} --r1 0",
        "w/o R1 and R2": f"{ARC.format(200)} {T625} --r1 0 --r2 0",
        "frozen features": f"{ARC.format(200)} {T625} --d_frozen 1 --d_lr 2e-3",
    },
}

QUERIES = (2, 4, 10, 25, 50)        # steps of the guided teacher; each takes two passes


def line(name, found):
    """A table's line: the metrics of several seeds' rows as "mean ± standard deviation"."""
    return f"| {name} | " + " | ".join(score.cells(score.summary(found), "±")) + " |"


def distil(flags, args, seed, pipe, rows):
    """Train a student with these flags and score it, or read its scores if --out holds them.

    InputError where they are there but of other flags, defaults or clips.
    """
    def folder(flags):
        name = flags.replace("--", "").replace(" ", "_") or "default"
        return args.out / f"{args.steps} steps" / name / f"seed {seed}"

    out, cache = folder(flags), args.out / f"clips of seed {seed}.safetensors"
    key = {"flags": flags, "defaults": pipe.settings, "clips": len(rows)}
    path = out / "row.json"
    if path.exists():
        found = read_json(path)
        if found["key"] != key:
            raise InputError(f"{out}: holds a run with other flags, defaults or clips; choose "
                             "another --out")
        return found
    start, stages = ["--teacher", "tiny"], flags.split(" | ")
    for n, stage in enumerate(stages):      # rows that begin alike share what they begin with
        to = folder(" | ".join(stages[:n + 1]))
        common = [*start, "--seed", str(seed), "--out_dir", str(to), "--max_steps", str(args.steps)]
        if "--objective" in stage:
            posttrain.main([*common, "--cache", str(cache), *stage.split()])
        else:
            train.main([*common, *stage.split()])
        start = ["--student", str(to / "student")]
    _, _, latents = score.load_student(to / "student", pipe)
    found = {"key": key, **score.measure(pipe, {"student": latents}, rows, seed)["student"]}
    replace_text(path, json.dumps(found, indent=2) + "\n")
    return found


def ablations(args, pipe, rows):
    """Make a table, printing each line as soon as it is there: {name: a row for each seed}."""
    found = {}
    for name, flags in TABLES[args.table].items():
        if args.only and name not in args.only:
            continue
        found[name] = [distil(flags, args, seed, pipe, rows) for seed in range(args.seeds)]
        print(line(name, found[name]), flush=True)
    return found


def queries(args, pipe, rows):
    """Score real audio, the teacher in 1 to 50 steps and --student: {name: a row for each seed}.

    In one step the teacher is unguided, as the student before training.
    """
    teacher = {"teacher, 1 step": score.teacher_latents(pipe, 1, guidance=1)}
    for steps in QUERIES:
        teacher[f"teacher, {steps} steps"] = score.teacher_latents(pipe, steps)
    students = [{name: score.load_student(name.replace("{seed}", str(seed)), pipe)[2]
                 for name in args.student} for seed in range(args.seeds)]
    found = {}
    for seed, student in enumerate(students):
        measured = score.measure(pipe, {**teacher, **student}, rows, seed)
        for name, row in {**score.floor(rows, seed), **measured}.items():
            found.setdefault(name, []).append(row)
    return found


def parse_args(argv=None):
    p = Parser(__doc__)
    add, count = p.add_argument, number(int, 1)
    add("table", choices=[*TABLES, "queries"], help="what to measure")
    add("--only", nargs="*", default=[], help="some of its rows")
    add("--steps", type=count, default=300, help="of training")
    add("--seeds", type=count, default=3, help="how many, from 0")
    add("--clips", type=count, default=512, help="held-out captions")
    add("--student", nargs="*", default=[],
        help="queries: beside the teacher; out{seed}/student is another one for each seed")
    add("--out", type=Path, default=Path("ablations"), help="folder of the runs")
    args = p.parse_args(argv)
    known = TABLES.get(args.table, {})
    for name in args.only:
        if name not in known:
            raise InputError(f"--only: {args.table} has no row {name!r}; its rows: "
                             f"{', '.join(known)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    pipe, rows = Pipeline("tiny"), score.held_out(args.clips)
    found = (queries if args.table == "queries" else ablations)(args, pipe, rows)
    print(f"\nN = {len(rows)} held-out captions, {args.seeds} seeds"
          + ("" if args.table == "queries" else f", {args.steps} steps"))
    print(f"| | {' | '.join(score.DIGITS)} |\n|---" + "|---" * len(score.DIGITS) + "|")
    for name in found:
        print(line(name, found[name]))


if __name__ == "__main__":
    run(main)
