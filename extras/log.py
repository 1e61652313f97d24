"""Running means of a training run, a line per interval; the end of one that is not finite."""
import json
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

from extras.cli import InputError, replace_text


class Log:
    """Mean values, a line per interval: metrics.jsonl, and TensorBoard if it is installed.

    To log a value, add() it in the loop. Sums stay on the device, as reading one each step would
    stall a GPU. Lines after first_step, of an earlier part of the run, are dropped. remedy: what
    to resume with after a gradient that is not finite.
    """

    def __init__(self, out, first_step, remedy, rank=0):
        self.sums, self.step, self.time, self.rank = {}, first_step, time.time(), rank
        self.remedy, self.bad_step = remedy, torch.tensor(math.inf)
        self.path, self.board = out / "metrics.jsonl", None
        if rank > 0:
            return
        out.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        kept = [line + "\n" for line in whole if json.loads(line)["step"] <= first_step]
        replace_text(self.path, "".join(kept))
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=first_step + 1)
        except ImportError:
            pass

    def add(self, name, value, t=None):
        """Add a loss (B,) or a number. t (B,): its means by quarter of the timesteps as well."""
        value = value.detach().reshape(-1)
        rows = {name: (value.sum(), torch.ones_like(value).sum())}
        if t is not None:
            quarter = F.one_hot((t // 250).clamp(max=3), 4).to(value)       # (B, 4)
            rows[f"{name}_by_t"] = ((value[:, None] * quarter).sum(0), quarter.sum(0))
        for key, row in rows.items():
            self.sums[key] = self.sums.get(key, 0) + torch.stack(row)       # sum, count

    def add_gradient(self, name, norm, step):
        """Add a gradient's norm, which is finite only if every loss and gradient is."""
        self.add(name, norm)
        bad_step = self.bad_step.to(norm.device)
        self.bad_step = torch.where(norm.isfinite(), bad_step, bad_step.clamp(max=step))

    def write(self, step, step_size):
        """Write the means since the last line, over all processes, and return them.

        InputError if a gradient since then was not finite, so call this before saving.
        """
        if math.isfinite(self.bad_step):
            out = self.path.parent
            saved = (out / "checkpoint.pt").exists()
            what_next = (f"the last checkpoint in {out} is good. Resume" if saved
                         else "nothing was saved yet. Start again")
            raise InputError(f"step {int(self.bad_step)}: the loss or a gradient is not finite; "
                             f"{what_next} with {self.remedy}")
        line = {"step": step}
        for name, sums in self.sums.items():
            if dist.is_initialized():
                dist.all_reduce(sums)
            line[name] = (sums[0] / sums[1].clamp(min=1)).tolist()
        line["samples_per_s"] = (step - self.step) * step_size / (time.time() - self.time)
        self.sums, self.step, self.time = {}, step, time.time()
        if self.rank == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if self.board and isinstance(value, float):
                self.board.add_scalar(name, value, step)
        return line
