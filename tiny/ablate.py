"""The paper's ablations on the tiny world: one change at a time, several seeds, mean and spread.

    python -m tiny.ablate table4            # the paper's Table IV; table5: number of captions
    python -m tiny.ablate levers --steps 200 --seeds 1      # one flag of the tiny default at a time
    python -m tiny.ablate objectives --list second third    # VSD and the recipes, at equal cost
    python -m tiny.ablate long --list second third          # the best of them, 3,000 steps
    python -m tiny.ablate queries --student out/student     # the teacher in 1 to 50 steps beside it

Such tables choose things, so they are scored on the second held-out list; the third is to report a
choice by. Students and scores stay under --out and are not made again. --steps is short by
default: what is compared is the order, at equal cost.
"""
import json
import sys
from pathlib import Path

import train
from data import Parser, cli, number, read_json, replace_text, require
from model import TINY, read_settings
from recipes import arc, consistency, energy
from tiny import score, world

# Flags in which tables IV and V differ from the tiny default (tiny/teacher/swiftaudio.json).
EQ8, EQ1 = "--lora_weighting alpha2", "--student_t 999"
PAPER = f"{EQ8} {EQ1}"

# table: {row: (the program that trains it, its flags)}
TABLES = {
    "table4": {
        "tiny default at T: eq. 8 weighted like v": (train, EQ1),
        "eq. 8 as in the paper, and below": (train, PAPER),
        "LoRA rank 2": (train, f"{PAPER} --lora_rank 2 --lora_alpha 2"),
        "LoRA rank 64": (train, f"{PAPER} --lora_rank 64 --lora_alpha 64"),
        "TV l1, 0.05": (train, f"{PAPER} --tv l1 --tv_weight 0.05"),
        "TV l2, 0.05": (train, f"{PAPER} --tv l2 --tv_weight 0.05"),
        "LoRA teacher guided too (the paper's)": (train, f"{PAPER} --lora_guidance 2"),
    },
    "table5": {
        f"{n} captions": (train, f"{PAPER} --max_captions {n}") for n in (100, 500, 2000, 6000)
    },
    "levers": {
        flags or "default": (train, flags) for flags in (
            "", EQ1, EQ8, "--lora_targets linear",
            "--lora_targets qv --lora_rank 64 --lora_alpha 128", "--lora_lr 1e-3",
            "--lora_lr 4e-3", "--lr 1e-4", "--lr 4e-4", "--warmup 0", "--guidance 1",
            "--guidance 3", "--beta1 0.9 --beta2 0.999", "--ema 0", "--t_min 200", "--t_max 801",
            "--lora_drop 0")
    },
    # rows about as costly as 480 and 3,000 steps of VSD, the teacher's clips included
    "objectives": {
        "VSD": (train, "--max_steps 480"),
        "VSD at T": (train, f"--max_steps 480 {EQ1}"),
        "energy": (energy, "--max_steps 436"),
        "ARC": (arc, "--max_steps 385"),
        "consistency": (consistency, "--max_steps 653"),
    },
    "long": {
        "VSD": (train, "--max_steps 3000"),
        "VSD at T": (train, f"--max_steps 3000 {EQ1}"),
        "consistency": (consistency, "--max_steps 3860 --clips 3072"),
    },
}
QUERIES = (2, 4, 10, 25, 50)        # steps of the guided teacher; each takes two passes


def line(name, found):
    """A table's line: the metrics of several seeds' rows as "mean ± standard deviation"."""
    return f"| {name} | {' | '.join(score.cells(score.summary(found), '±'))} |"


def distil(program, flags, args, seed, name, rows):
    """Train a student by a program and score it on list `name`, unless --out holds its scores.

    InputError where --out holds scores of other defaults or another number of captions.
    """
    folder = "_".join([program.__name__, *flags.replace("--", "").split()])
    out = args.out / f"{args.steps} steps" / folder / f"seed {seed}"
    key = {"defaults": read_settings(TINY), "clips": args.clips}
    for path in out.glob("row *.json"):                 # of any list
        require(read_json(path)["key"] == key, f"{out}: holds a run with other defaults or "
                "--clips; choose another --out")
    if (path := out / f"row {name}.json").exists():
        return read_json(path)
    command = ["--teacher", "tiny", "--seed", seed, "--out_dir", out, "--max_steps", args.steps]
    if program is not train:                            # the teacher's clips serve all rows
        command += ["--cache", args.out / f"clips of seed {seed}.safetensors"]
    # It goes on where it was stopped; a finished student stays as it is.
    if code := program.main([*map(str, command), *flags.split()]):
        sys.exit(code)                                  # it was stopped now
    student = {"student": score.load_student(out / "student")[2]}
    found = {"key": key, **score.measure(student, rows, seed)["student"]}
    replace_text(path, json.dumps(found, indent=2) + "\n")
    return found


def queries(args, rows):
    """Score real audio, the teacher in 1 to 50 steps and --student: {name: a row for each seed}.

    In one step the teacher is unguided.
    """
    teacher = {"teacher, 1 step at T": score.load_teacher(1, guidance=1)}
    teacher |= {f"teacher, {steps} steps": score.load_teacher(steps) for steps in QUERIES}
    students = [{name: score.load_student(name.replace("{seed}", str(seed)))[2]
                 for name in args.student} for seed in range(args.seeds)]
    systems = [{**teacher, **student} for student in students]
    return score.beside_floor(systems, rows, range(args.seeds))


def main(argv=None):
    p = Parser(__doc__)
    add, count = p.add_argument, number(int, 1)
    add("table", choices=[*TABLES, "queries"], help="what to measure")
    add("--only", nargs="*", default=[], help="some of its rows")
    add("--steps", type=count, default=300, help="of training, where a row has none")
    add("--seeds", type=count, default=3, help="how many, from 0")
    add("--clips", type=count, default=512, help="held-out captions")
    add("--list", choices=world.LISTS, nargs="+", default=["second"], help="held-out lists")
    add("--student", nargs="*", default=[],
        help="queries: beside the teacher; out{seed}/student is another one for each seed")
    add("--out", type=Path, default=Path("ablations"), help="folder of the runs")
    args = p.parse_args(argv)
    table = TABLES.get(args.table, {})
    for name in args.only:
        require(name in table, f"--only: {args.table} has no row {name!r}; its rows: "
                f"{', '.join(table)}")
    for name in args.list:
        report(args, table, name)


def report(args, table, name):
    """Print a table of the students, or of queries(), scored on a held-out list."""
    rows = score.held_out(args.clips, name)
    found = queries(args, rows) if args.table == "queries" else {}
    for row in args.only or table:
        found[row] = [distil(*table[row], args, seed, name, rows) for seed in range(args.seeds)]
        print(line(row, found[row]), flush=True)
    print(f"\nN = {len(rows)} held-out captions, {name} list, {args.seeds} seeds")
    print(f"| | {' | '.join(score.DIGITS)} |\n|---" + "|---" * len(score.DIGITS) + "|")
    print("\n".join(line(row, scores) for row, scores in found.items()))


if __name__ == "__main__":
    cli(main)
