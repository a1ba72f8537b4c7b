"""The command line that all stages share: flags in, one checked `Command` out.

The configuration, the output folder and the permission to replace what it holds are checked before any work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from config.load import default_preset, load_config, preset_names
from config.schema import RunConfig
from inference.generation.load import FULL_MODELS, REWARD, SPECIAL, answers_questions, model_section
from utils.checkpoint import final_name, latest_checkpoint, load_checkpoint
from utils.errors import Parser, UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Command:
    """A checked command."""

    config: RunConfig
    out: Path
    init: dict | None  # the checkpoint to start from, loaded
    init_path: Path | None
    resume: bool
    stage: str  # the name of the log folder
    short: str  # that of the checkpoints
    lora: bool = False  # a policy trains an adapter


def parse_command(
    stage: str, short: str, description: str, argv=None, bases: tuple = (),
    lora: Callable[[RunConfig], bool] = lambda config: False, sections: tuple[str, ...] = ("model",),
    lent: Callable[[RunConfig, Path], dict] | None = None,
) -> Command:  # fmt: skip
    """Read the flags of stage `stage` (checkpoints named `short`). Raises `UserError`; writes nothing.

    A stage that needs a trained model lists in `bases` the stages whose results it starts from without
    `--init`, in order of preference. A policy says by `lora` whether an adapter is to be trained: such a run
    has names of its own, since both results may be in one folder. `sections`: those of the configuration
    that can be the model's; the one of `--init` is inherited. `lent(config, out)`: sections that a second
    model decides, which the settings name; those of `--init` come first.
    """
    parser = Parser(description)
    add = parser.add_argument
    words, default = ".txt, .jsonl, a folder of them, or the word python", ""
    if bases:
        words = ".jsonl, a folder of them, or the word skills (skills:lists,naming; skills:all)"
        default = f" (default: {', then '.join(map(final_name, bases))} in --out, then in out/)"
    add("--config", metavar="NAME|FILE.json", help=f"preset ({', '.join(preset_names(stage))}) or JSON file")
    add("--data", nargs="+", metavar="PATH", help=words)
    add("--init", metavar="CHECKPOINT", help="start from these weights, model and tokenizer" + default)
    add("--out", metavar="DIR", help="where to write (default: out/, or out/<preset>/ for other presets)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out, if there is one")
    add("--overwrite", action="store_true", help="start over, replacing a run of this stage in --out")
    add("--max-steps", type=int, metavar="N", help="stop after N steps (replaces the preset's limits)")
    add("--max-seconds", type=float, metavar="S",
        help="stop after S seconds, evaluations included (replaces the preset's limits)")  # fmt: skip
    add("--limit", type=int, metavar="N", help="use at most N documents")
    add("--device", choices=("auto", "cpu", "cuda", "mps"))
    add("--seed", type=int, metavar="N")
    add("--set", action="append", default=[], metavar="section.key=value", dest="settings",
        help="any setting of config/schema.py, for example train.batch_size=4; may be repeated")  # fmt: skip
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: choose one")

    preset = default_preset(stage)
    named = Path(args.config).stem if args.config else preset
    out = Path(args.out) if args.out else ROOT / "out" / (named if named != preset else "")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    init_path = Path(args.init) if args.init else default_base(stage, bases, out)
    init = load_checkpoint(init_path) if init_path else None
    inherited = inherited_sections(init, str(init_path), sections) if init else {}
    config = load_config(args.config, args.settings, inherited, flag_settings(args), stage)
    if lent:
        inherited = both_held_out(inherited, lent(config, out))
        config = load_config(args.config, args.settings, inherited, flag_settings(args), stage)
    if config.quant.method != "none":  # or the checkpoint would promise codes and hold numbers
        raise UserError(
            f"quant.method={config.quant.method} is for finished models: train without it, and quantise the "
            "result with python inference/quantize.py"
        )
    if config.qat.bits and stage != "sft_train":
        raise UserError(f"qat.bits={config.qat.bits} is for train/sft_train.py: leave it out")
    if adapted := lora(config):
        stage, short = f"{stage}_lora", f"{short}Lora"
    if not args.overwrite:
        refuse_to_overwrite(out, stage, short, args.resume)
    return Command(config, out, init, init_path, args.resume, stage, short, adapted)


def default_base(stage: str, bases: tuple, out: Path, flag: str = "--init CHECKPOINT") -> Path | None:
    """Return the first result of `bases` in `out`, or else in the default folder; None without `bases`.
    `flag` names another one."""
    for path in [folder / final_name(base) for folder in (out, ROOT / "out") for base in bases]:
        if path.is_file():
            return path
    if not bases:
        return None
    raise UserError(
        f"{stage} starts from a trained model, and there is no {final_name(bases[-1])} in {out}: train one "
        f"with python train/{bases[-1].lower()}_train.py, or name one with {flag}"
    )


def both_held_out(first: dict, second: dict) -> dict:
    """Return the sections that two models decide: where both do, the first; held out is what is held out from
    both, which the smaller fraction selects."""
    data = [sections["data"] for sections in (first, second) if "data" in sections]
    fractions = [part["val_fraction"] for part in data if "val_fraction" in part]
    merged = {key: value for part in data[::-1] for key, value in part.items()}
    merged |= {"val_fraction": min(fractions)} if fractions else {}
    return second | first | {"data": merged}


def inherited_sections(
    init: dict, path: str, accepted: tuple[str, ...] = ("model",), flag: str = "--init "
) -> dict:
    """Return the settings that a checkpoint decides: its model and tokenizer; the held-out fraction, since a
    later stage must not score what this one trained on; after dialogues, or with a tokenizer that brought its
    own markers along, the template; and that a router without a bias gets none."""
    if init.get("base"):
        raise UserError(
            f"{flag}{path} holds an adapter, not a whole model: name its base ({init['base'].get('path')})"
        )
    kinds = {"config": dict, "weights": dict, "tokenizer": str}
    missing = [key for key, kind in kinds.items() if not isinstance(init.get(key), kind)]
    section = model_section(init)
    sections = {} if missing else {name: init["config"].get(name) for name in (section, "tokenizer")}
    missing += [f"config.{name}" for name, values in sections.items() if not isinstance(values, dict)]
    if missing:
        what = f"a checkpoint without {', '.join(missing)}"
        raise UserError(f"{flag}{path}: {what}; name one of a training run")
    quant = init["config"].get("quant")
    if isinstance(quant, dict) and quant.get("method", "none") != "none":
        raise UserError(
            f"{flag}{path}: its weights are codes of {quant['method']}, which cannot be trained; name "
            f"a model in full precision instead ({init.get('source', 'the one that it was trained from')})"
        )
    if section not in accepted:
        raise UserError(
            f"{flag}{path}: the model of {init.get('stage')} has the settings of section {section}, and "
            f"this stage trains one of section {' or '.join(accepted)}: name another checkpoint"
        )
    if init.get("short") == "Embed" and len(accepted) == 1:  # not the stage that takes a body of either kind
        raise UserError(
            f"{flag}{path}: an embedding model, without the head that this stage trains: name the model "
            "it was made from, or another checkpoint"
        )
    if init.get("short") == "Embed" and isinstance(init["config"].get("embed"), dict):
        sections["embed"] = init["config"]["embed"]  # how it reads texts
    data = init["config"].get("data") or {}
    own = (sections["tokenizer"] or {}).get("kind") == "hf"
    names = ["same_question"] + ["template"] * (own or answers_questions(init))
    if not all(str(path).lower().endswith(".txt") for path in data.get("paths") or [""]):
        names.append("val_fraction")  # plain text shares no held-out question with a later stage
    old = {"same_question": "exact"}  # the split of checkpoints that do not name theirs
    if init.get("stage") == "import_hf":  # no training here has held anything out
        names, old = ["template"], {}
    biases = [part for key, part in init["weights"].items() if key.endswith("e_score_correction_bias")]
    softmax = sections[section].get("scoring_func") == "softmax"
    if softmax and biases and not any(part.any() for part in biases):
        sections["balance"] = {"bias_rate": 0.0}  # as in Hugging Face, where none has such a bias
    return sections | {"data": old | {name: data[name] for name in names if name in data}}


def flag_settings(args) -> dict:
    """Return the flags that are settings, as sections. A limit among them replaces both of the preset's."""
    train = {key: getattr(args, key) for key in ("device", "seed") if getattr(args, key) is not None}
    if args.max_steps is not None or args.max_seconds is not None:
        train |= {"max_steps": args.max_steps, "max_seconds": args.max_seconds}
    data = {"paths": args.data, "limit": args.limit}
    return {"train": train, "data": {key: value for key, value in data.items() if value is not None}}


def refuse_to_overwrite(out: Path, stage: str, short: str, resume: bool) -> None:
    """Raise `UserError` if `out` holds a run of this stage that would be lost."""
    final, newest = out / final_name(short), latest_checkpoint(out, short)
    others = "start over with --overwrite, or write elsewhere with --out DIR"
    if resume and final.exists() and not newest:
        raise UserError(
            f"{final} has no checkpoint beside it to resume from: start from its weights with --init "
            f"{final} --out DIR, or start over with --overwrite"
        )
    if final.exists() and not resume:
        raise UserError(
            f"{final} is a finished run of {stage}: use it with `{chat_command(short, out)}`, give it "
            f"more steps with --resume --max-steps N, {others}"
        )
    if newest and not resume:
        raise UserError(f"{newest} is an unfinished run of {stage}: resume it with --resume, {others}")


def chat_command(short: str, out: Path) -> str:
    """Return the command that uses the result of a stage in folder `out`."""
    path = quote(str(out / final_name(short)))
    if short in FULL_MODELS and short not in SPECIAL:
        flag = "" if out.resolve() == (ROOT / "out").resolve() else f" --out {quote(str(out))}"
        return "python inference/chat.py" + flag
    if (use := SPECIAL[short]) == REWARD:
        return f"python train/grpo_train.py {use}{path}"
    return f"{use} {path}" if use.startswith("python ") else f"python inference/chat.py {use} {path}"
