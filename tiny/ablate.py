"""The paper's ablations on the tiny world: one change at a time, several seeds, mean and spread.

    python -m tiny.ablate table4                    # parameterization, LoRA's capacity, total variation (the paper's Table IV)
    python -m tiny.ablate table5                    # number of captions (Table V)
    python -m tiny.ablate queries --student out/student     # the teacher in 1 to 50 steps beside a student
    python -m tiny.ablate levers --steps 200 --seeds 1      # what the tiny default was chosen from

Runs are kept under --out and not made again. `--steps` is short by default: what is compared is the order, at equal cost.
"""
import argparse
import json
import re
from pathlib import Path

import numpy as np

import train
from data import write
from model import Teacher, load_unet
from tiny import score

# name: flags that differ from the tiny default (tiny/teacher/swiftaudio.json). Tables IV and V vary the paper's eq. 8.
EQ8 = "--lora_weighting alpha2"
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
    "table5": {f"{n} captions": EQ8 + (f" --max_captions {n}" if n < 6000 else "") for n in (100, 500, 2000, 6000)},
    "levers": {
        "tiny default": "",
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
        train.main(["--teacher", "tiny", "--max_steps", str(args.steps), "--eval_clips", "0", "--seed", str(seed), "--out_dir", str(out),
                    *flags.split()])
        rows, _ = score.measure(teacher, {"student": score.student_latents(out / "student", teacher)}, held, seed)
        found = {"key": key, **rows["student"]}
        write(out / "row.json", lambda path: path.write_text(json.dumps(found, indent=2) + "\n"))
    return found


def plot(path, found):
    """An SVG of FD against network passes, both logarithmic: the teacher's line, and each student's point at one pass."""
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 300" font-family="sans-serif" font-size="12">',
             '<rect width="520" height="300" fill="white"/>', '<text x="260" y="292" text-anchor="middle">UNet passes for a clip</text>',
             '<text x="14" y="150" text-anchor="middle" transform="rotate(-90 14 150)">FD (lower is better)</text>']
    x, y = lambda passes: 60 + 210 * np.log10(passes), lambda fd: 255 - 120 * np.log10(fd / 10)
    for v in (1, 2, 4, 8, 20, 50, 100):
        lines.append(f'<text x="{x(v):.0f}" y="273" text-anchor="middle">{v}</text><path d="M{x(v):.0f} 20V255" stroke="#eee"/>')
    for v in (10, 20, 50, 100, 200, 500, 1000):
        lines.append(f'<text x="52" y="{y(v) + 4:.0f}" text-anchor="end">{v}</text><path d="M60 {y(v):.0f}H480" stroke="#eee"/>')
    points = []
    for name, rows in found.items():
        if name.startswith("real"):
            continue
        steps = re.match(r"teacher, (\d+) step", name)
        passes = 1 if not steps or steps[1] == "1" else 2 * int(steps[1])       # guidance doubles them; a single step has none
        low, mean, high = (f([row["FD"] for row in rows]) for f in (min, np.mean, max))
        color = "#1f5fa8" if steps else "#c0392b"
        points += [(x(passes), y(mean))] if steps else []
        lines.append(f'<circle cx="{x(passes):.1f}" cy="{y(mean):.1f}" r="4" fill="{color}"/><path d="M{x(passes):.1f} {y(low):.1f}V{y(high):.1f}" stroke="{color}"/>')
        lines += [] if steps else [f'<text x="{x(passes) + 9:.0f}" y="{y(mean) + 4:.0f}" fill="{color}">student</text>']
    lines.append('<polyline fill="none" stroke="#1f5fa8" points="' + " ".join(f"{a:.1f},{b:.1f}" for a, b in points) + '"/>')
    lines.append(f'<text x="{points[-1][0]:.0f}" y="{points[-1][1] - 12:.0f}" text-anchor="end" fill="#1f5fa8">teacher</text></svg>')
    path.write_text("\n".join(lines) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "queries"])
    parser.add_argument("--only", nargs="*", help="some of its rows")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--student", nargs="*", default=[], help="queries: students beside the teacher; out{seed}/student for one of each seed")
    parser.add_argument("--figure", type=Path, help="queries: an SVG to write")
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    args = parser.parse_args(argv)
    if missing := set(args.only or ()) - set(TABLES.get(args.table, ())):
        raise SystemExit(f"error: --only: {args.table} has no row {missing.pop()!r}; its rows: {', '.join(TABLES.get(args.table, ()))}")
    teacher, held, found = Teacher("tiny"), score.held_out(args.clips), {}
    if args.table == "queries":
        unet = load_unet(teacher.folder).to(teacher.device)
        systems = {f"teacher, {n} step{'s' * (n > 1)}": score.teacher_latents(teacher, unet, n if n > 1 else 0) for n in (1, 2, 4, 10, 25, 50)}
        for seed in range(args.seeds):
            systems |= {student: score.student_latents(student.format(seed=seed), teacher) for student in args.student}
            rows, _ = score.measure(teacher, systems, held, seed)
            for name, row in rows.items():
                found.setdefault(name, []).append(row)
    else:
        for name, flags in TABLES[args.table].items():
            if not args.only or name in args.only:
                found[name] = [distil(flags, args, seed, teacher, held) for seed in range(args.seeds)]
                print(f"| {name} | {spread(found[name])} |", flush=True)
    if args.figure and args.table == "queries":
        plot(args.figure, found)
    print(f"\nN = {len(held)} held-out captions, {args.seeds} seeds" + ("" if args.table == "queries" else f", {args.steps} steps"))
    print("| | FD | KL | IS |\n|---|---|---|---|")
    print("\n".join(f"| {name} | {spread(rows)} |" for name, rows in found.items()))


if __name__ == "__main__":
    main()
