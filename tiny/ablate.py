"""The paper's ablations on the tiny world: one change at a time, several seeds, mean and spread.

    python -m tiny.ablate table4                    # parameterization, LoRA's capacity, total variation (the paper's Table IV)
    python -m tiny.ablate table5                    # number of captions (Table V)
    python -m tiny.ablate queries --student out/student     # the teacher in 1 to 50 steps beside a student
    python -m tiny.ablate levers --steps 150 --seeds 1      # what the tiny default was chosen from

Runs are kept under --out and not made again. `--steps` is short by default: what is compared is the order, at equal cost.
"""
import argparse
import json
from pathlib import Path

import numpy as np

import train
from data import write
from model import Teacher, load_unet
from tiny import score

# name: flags that differ from the tiny default (tiny/teacher/swiftaudio.json)
TABLES = {
    "table4": {
        "tiny default": "",
        "w/o eq. 1 (direct)": "--parameterization direct",
        "LoRA rank 2": "--lora_rank 2 --lora_alpha 2",
        "LoRA rank 64": "--lora_rank 64 --lora_alpha 64",
        "TV l1, 0.05 (the paper's)": "--tv l1 --tv_weight 0.05",
        "TV l2, 0.05": "--tv l2 --tv_weight 0.05",
    },
    "table5": {**{f"{n} captions": f"--max_captions {n}" for n in (100, 500, 2000)}, "6000 captions (tiny default)": ""},
    "levers": {
        "tiny default": "",
        "w = DMD's": "--weighting dmd",
        "LoRA teacher guided too": "--lora_guidance 2",
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
        "batch 8, twice the steps": "--batch_size 8 --double",
    },
}


def spread(rows):
    """FD, KL and IS of several seeds as "mean ± standard deviation"."""
    columns = (np.array([row[k] for row in rows], float) for k in ("FD", "KL", "IS"))
    return " | ".join(f"{c.mean():.{d}f}" + (f" ± {c.std(ddof=1):.{d}f}" if len(c) > 1 else "") for c, d in zip(columns, (1, 2, 1)))


def distil(flags, args, seed, teacher, held):
    """The scores of a student trained with these flags; from --out if it holds them, and nothing they depend on has changed."""
    out = args.out / f"{args.steps} steps" / (flags.replace("--", "").replace(" ", "_") or "default") / f"seed {seed}"
    key = {"flags": flags, "defaults": teacher.defaults, "clips": len(held)}
    found = json.loads((out / "row.json").read_text()) if (out / "row.json").exists() else None
    if found and found["key"] != key:
        raise SystemExit(f"error: {out} holds a run with other flags, defaults or clips; choose another --out")
    if not found:
        steps = args.steps * (2 if "--double" in flags else 1)
        train.main(["--teacher", "tiny", "--max_steps", str(steps), "--eval_clips", "0", "--seed", str(seed), "--out_dir", str(out),
                    *flags.replace("--double", "").split()])
        rows, _ = score.measure(teacher, {"student": score.student_latents(out / "student", teacher)}, held, seed)
        found = {"key": key, **rows["student"]}
        write(out / "row.json", lambda path: path.write_text(json.dumps(found, indent=2) + "\n"))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "queries"])
    parser.add_argument("--only", nargs="*", help="some of its rows")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--student", nargs="*", default=[], help="queries: students to print beside the teacher")
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    args = parser.parse_args(argv)
    teacher, held, found = Teacher("tiny"), score.held_out(args.clips), {}
    if args.table == "queries":
        unet = load_unet(teacher.folder).to(teacher.device)
        systems = {f"teacher, {n} step{'s' * (n > 1)}": score.teacher_latents(teacher, unet, n if n > 1 else 0) for n in (1, 2, 4, 10, 25, 50)}
        systems |= {student: score.student_latents(student, teacher) for student in args.student}
        for seed in range(args.seeds):
            rows, _ = score.measure(teacher, systems, held, seed)
            for name, row in rows.items():
                found.setdefault(name, []).append(row)
    else:
        for name, flags in TABLES[args.table].items():
            if not args.only or name in args.only:
                found[name] = [distil(flags, args, seed, teacher, held) for seed in range(args.seeds)]
                print(f"| {name} | {spread(found[name])} |", flush=True)
    print(f"\nN = {len(held)} held-out captions, {args.seeds} seeds" + ("" if args.table == "queries" else f", {args.steps} steps"))
    print("| | FD | KL | IS |\n|---|---|---|---|")
    print("\n".join(f"| {name} | {spread(rows)} |" for name, rows in found.items()))


if __name__ == "__main__":
    main()
