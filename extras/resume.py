"""What the same command again goes on from, and what it must not mix up."""
import torch

from extras.cli import InputError

# Flags that may differ on resume; changing any other makes it a different run.
MAY_CHANGE = {
    "max_steps", "save_every", "log_every", "out_dir", "device", "compile", "checkpointing",
    "captions", "caption_column", "max_captions",       # the captions themselves are compared
    "lr", "lora_lr", "precision",                       # to get past a step that was not finite
}


def read_checkpoint(path, config, digest):
    """Load this run's checkpoint, or None. InputError, naming the flag, for another run's."""
    out = path.parent
    if not path.exists():
        if (out / "student").exists():
            raise InputError(f"{out}: holds a student but no checkpoint to resume from; choose "
                             "another --out_dir")
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                              # torch.load fails in many ways
        raise InputError(f"{path}: cannot be read ({type(e).__name__}); remove it to start anew, "
                         "or choose another --out_dir")
    fixed = set(config) - MAY_CHANGE | ({"max_steps"} if config["decay"] else set())
    for name in sorted(fixed):
        if found["config"].get(name) != config[name]:
            raise InputError(f"{out}: holds a run with --{name} {found['config'].get(name)}, this "
                             f"one has {config[name]}; choose another --out_dir")
    if found["digest"] != digest:
        raise InputError(f"{out}: holds a run on other captions; choose another --out_dir")
    return found
