"""A teacher in many steps: load_teacher("tiny", steps=25)(["rain falls"]), as load_student().

    python -m extras.control --teacher tiny --teacher_steps 25 --prompt "rain falls"
"""
import sample
from data import number, require
from losses import guided
from model import TO_HEAR, System, find, load_unet, open_student, read_settings
from recipes.clips import many_steps


class Teacher(System):
    """A System that makes its latents by the teacher's own sampling, guided, in `steps` steps."""

    def __init__(self, folder, steps, guidance, seconds=None, precision="auto", device=None):
        about = {"teacher": str(folder), "steps": steps, "guidance": guidance}
        super().__init__(folder, load_unet(folder), about, seconds, precision, device)
        self.steps, self.eps = steps, guided(self.eps, self.encode_text([""]), guidance)

    def latents(self, z_T, text):
        return many_steps(self.eps, z_T, text, self.scheduler, self.steps)


def load_teacher(name, steps, guidance=None, **more):
    """Load a teacher, "tiny", a folder or a hub name; guidance None: its folder's own, else 7.5.

    more: seconds, precision, device, as of load_student().
    """
    folder = find(name, TO_HEAR)
    if guidance is None:
        guidance = read_settings(folder).get("sample", {}).get("guidance", 7.5)
    return Teacher(folder, steps, guidance, **more)


def add_teacher(add):
    """Add the flags that select the teacher instead of the student of sample.add_system()."""
    add("--teacher_steps", type=number(int, 1, 1000), help="sample the teacher, in N steps")
    add("--guidance", type=number(float), help="the teacher's; default: its folder's own, else 7.5")


def open_system(args, seconds=None, prompts=()):
    """sample.open_system() of the student or, with --teacher_steps, of the teacher."""
    if not args.teacher_steps:
        require(args.guidance is None, "--guidance goes with --teacher_steps")
        return sample.open_system(args, seconds, prompts)
    require(args.decoder == "vae", "--decoder fast does not go with --teacher_steps")
    teacher = args.teacher or open_student(args.student)[2].get("teacher")
    require(teacher, f"--teacher is needed: {args.student} does not say what it was made from")
    system = load_teacher(teacher, args.teacher_steps, args.guidance, seconds=seconds,
                          precision=args.precision, device=args.device)
    sample.warn_unread(system, prompts)
    return system
