"""Find the checkpoint that the same command continues from; refuse another run's."""
import torch
from safetensors.torch import load_file

from extras.cli import InputError, read_json
from lora import load_lora_state, lora_layers

# Flags that may differ on resume; changing any other makes it a different run.
MAY_CHANGE = {
    "max_steps", "save_every", "log_every", "out_dir", "device", "compile", "checkpointing",
    "captions", "caption_column", "max_captions",       # the captions themselves are compared
    "lr", "lora_lr", "d_lr", "precision",               # to get past a step that was not finite
    "cache",                                            # what the clips are of is compared
}


def read_checkpoint(path, config, digest, instead="choose another --out_dir"):
    """Load this run's checkpoint, or None. InputError, naming the flag, for another run's.

    instead: the advice that ends the error.
    """
    out = path.parent
    if not path.exists():
        if (out / "student").exists():
            raise InputError(f"{out}: holds a student but no checkpoint to resume from; {instead}")
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                              # torch.load fails in many ways
        raise InputError(f"{path}: cannot be read ({type(e).__name__}); remove it to start anew, "
                         f"or {instead}")
    fixed = set(config) - MAY_CHANGE | ({"max_steps"} if config["decay"] else set())
    # first of all whose run it is: train.py has no objective
    for name in ["objective", *sorted(fixed)]:
        if found["config"].get(name) != config.get(name):
            raise InputError(f"{out}: holds a run with --{name} {found['config'].get(name)}, this "
                             f"one has {config.get(name)}; {instead}")
    if found["digest"] != digest:
        raise InputError(f"{out}: holds a run on other captions; {instead}")
    return found


def restore_lora(unet, folder, args):
    """Load the LoRA teacher that a run left beside its student, if there is one; say which."""
    if not folder.is_dir():
        return f"{folder}: not there, so the LoRA teacher starts as the teacher"
    config = read_json(folder / "adapter_config.json")
    if (config["r"], config["lora_alpha"], config["target_modules"]) != (
            args.lora_rank, args.lora_alpha, sorted(lora_layers(unet))):
        raise InputError(f"{folder}: does not fit --lora_rank, --lora_alpha and --lora_targets")
    try:
        load_lora_state(unet, load_file(folder / "adapter_model.safetensors"))
    except Exception as e:
        raise InputError(f"{folder}: the LoRA teacher cannot be read ({type(e).__name__})")
    return f"{folder}: the LoRA teacher goes on from there"
