"""LoRA, rsLoRA and DoRA as folders of the library `peft`, and back.

    adapter_config.json          rank, scale and the names of the adapted layers
    adapter_model.safetensors    the factors; adapter_names.py has their names and layouts
    README.md                    the model card

A folder may come from a stranger. Names, shapes and types of its tensors are compared with the base before
one is read, patterns in it are not run, and a setting that TinySeek has no equal for is refused.

Trap: PiSSA and its relatives change the base before training. Their factors do not fit the plain base.
"""

import copy
import json
from pathlib import Path

import torch

from config.adapters import LoraConfig
from config.checks import validate_section
from config.load import from_dict, read_json, to_dict
from inference.generation.load import Loaded, check_base, open_as
from inference.hf.folder import new_folder, safetensors_package
from inference.hf.adapter_names import (
    flatten,
    named_weights,
    our_targets,
    parameter_shapes,
    peft_name,
    peft_targets,
    split_name,
    unflatten,
)
from model.adapters import ADAPTERS, adapted
from model.tinyseek import TinySeek
from modules.adapters.lora import wide
from modules.adapters.lora_model import find_targets
from utils.checkpoint import final_name, save_checkpoint
from utils.errors import UserError

SETTINGS, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}  # peft's
TARGETS = {"target_modules": str, "target_parameters": str, "layers_to_transform": int}  # lists of these
ACCEPTED = {"peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"), "layers_pattern": (None, [], "layers"),
            "init_lora_weights": (True, False, "gaussian", "orthogonal")}  # fmt: skip
OFF = (None, False, "none", [], {})  # of all other settings, but for those without effect:
IGNORED = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode",
           "megatron_core", "qalora_group_size"}  # fmt: skip
FLOATS = ("F32", "BF16", "F16")  # fp32 holds all of them exactly


# --- export ---------------------------------------------------------------------------------------


def adapter_to_peft(
    weights: dict[str, torch.Tensor], lora: LoraConfig, model: TinySeek, base_name: str | None = None
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the settings and the tensors of a peft folder for an adapter of `model`, a plain base.

    Parts on a second prediction head stay behind: no model of `transformers` has one. Raises `UserError` if
    nothing else is left, or for DoRA where peft has none.
    """
    kept = {name: weights[name] for name in sorted(weights) if name.startswith("model.")}
    if not kept:
        raise UserError("this adapter changes the second prediction head alone, which transformers lacks")
    modules, parameters = peft_targets({split_name(name)[0] for name in kept}, model)
    if lora.use_dora and parameters:
        raise UserError(
            f"peft has no DoRA for {', '.join(parameters)} in models with experts or latent attention: "
            "export the adapter merged instead"
        )
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": base_name, "r": lora.r, "use_rslora": lora.use_rslora,
        "lora_alpha": int(lora.lora_alpha) if lora.lora_alpha.is_integer() else lora.lora_alpha,
        "lora_dropout": 0.0 if parameters else lora.lora_dropout, "use_dora": lora.use_dora,
        "target_modules": modules, "target_parameters": parameters or None,
    }  # fmt: skip
    return settings, {peft_name(n, model): flatten(n, part).contiguous() for n, part in kept.items()}


def export_adapter(
    adapter_path: str | Path, base: Loaded, folder: str | Path, base_name: str | None = None
) -> Path:
    """Write the adapter in `adapter_path` as a new peft folder and return the folder.

    `base_name` is where others find the base: a folder or a name on the Hub. Raises `UserError`, and leaves
    nothing behind, for an adapter of another kind or base, a folder with files in it, or a full disk.
    """
    package, checkpoint = safetensors_package(), open_as("--adapter", adapter_path)
    check_base(checkpoint, adapter_path, base)
    if ADAPTERS[checkpoint["short"]] != "Lora":
        raise UserError(f"{adapter_path}: an adapter of {checkpoint['stage']}; peft folders hold LoRA only")
    config, weights = from_dict(checkpoint["config"], str(adapter_path)), checkpoint["weights"]
    adapted(base.model, checkpoint["short"], config, weights, str(adapter_path))  # compares names and shapes
    settings, tensors = adapter_to_peft(weights, config.lora, base.model, base_name)
    with new_folder(folder) as place:
        (place / WEIGHTS).write_bytes(package.torch.save(tensors, {"format": "pt"}))
        (place / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (place / "README.md").write_text(card(checkpoint, settings, tensors, base), encoding="utf-8")
    return Path(folder)


def card(checkpoint: dict, settings: dict, tensors: dict, base: Loaded) -> str:
    """Return the model card: the kind and size of the adapter, its training, and the base that it needs."""
    kind = "rs" * settings["use_rslora"] + ("DoRA" if settings["use_dora"] else "LoRA")
    own, beside = (sum(part.numel() for part in of) for of in (tensors.values(), base.model.parameters()))
    origin, name = [], settings["base_model_name_or_path"]
    rounded = checkpoint["config"].get("lora", {}).get("base", "full") == "nf4"
    codes = ["- trained beside the base in NF4: load that with `BitsAndBytesConfig(load_in_4bit=True, "
             'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)`'] * rounded  # fmt: skip
    if name:
        origin = [f"base_model: {json.dumps(name)}"]
    targets = ", ".join(settings["target_modules"] + (settings["target_parameters"] or []))
    return "\n".join([
        "---", "library_name: peft", *origin, "tags: [lora]", "---", "", "# An adapter from TinySeek", "",
        f"- {kind} of rank {settings['r']} with lora_alpha {settings['lora_alpha']}, on {targets}",
        f"- {own:,} parameters, beside {beside:,} of the base",
        f"- trained by the stage `{checkpoint['stage']}`: {checkpoint['step']:,} steps",
        f"- base: `{base.path.name}` with the weights `{base.digest}`; it fits no others", *codes, "",
        "    model = peft.PeftModel.from_pretrained(base, FOLDER)", "",
    ])  # fmt: skip


# --- import ---------------------------------------------------------------------------------------


def import_adapter(folder: str | Path, base: Loaded, out: str | Path, overwrite: bool = False) -> Path:
    """Write the adapter in a peft folder as a checkpoint in the folder `out`, and return its path.

    Raises `UserError`, and writes nothing, if there is one already that is not to be replaced, or if the
    folder does not fit the base.
    """
    path, config = Path(out) / final_name("Lora"), copy.deepcopy(base.config)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: name another --out, or replace it with --overwrite")
    weights, config.lora = peft_to_adapter(folder, base)
    adapted(base.model, "Lora", config, weights, str(folder))  # as in every later use
    save_checkpoint(path, {
        "stage": "import_hf", "short": "Lora", "config": to_dict(config), "weights": weights, "step": 0,
        "tokens": 0, "tokenizer": base.tokenizer.to_json(),
        "base": {"digest": base.digest, "path": str(base.path)},
    })  # fmt: skip
    return path


def peft_to_adapter(folder: str | Path, base: Loaded) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return the weights and the settings of the adapter in a peft folder, for a plain base.

    Our targets name layers by kind. A layer of such a kind that the folder leaves alone gets an adapter that
    changes nothing: zeros, and for DoRA the magnitudes of the base. Raises `UserError` for settings that
    cannot be kept, and for tensors that are missing, unknown, or of another shape or type.
    """
    path, model = Path(folder) / SETTINGS, base.model
    settings = read_settings(path)
    wanted = named_weights(model, *(settings[key] for key in TARGETS))
    if not wanted:
        raise UserError(f"{path}: its targets name no layer of {base.path} that can have an adapter")
    targets = our_targets(model, wanted)
    lora = LoraConfig(**{key: settings[key] for key in DEFAULTS}, target_modules=targets)
    longest = max(max(model.get_parameter(weight).shape) for weight in wanted)
    try:
        validate_section("lora", lora)
        if lora.r > longest:
            raise UserError(f"r={lora.r} is more than any adapted matrix has rows or columns")
    except (UserError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None
    if lora.use_dora and not all(weight.endswith(".weight") for weight in wanted):
        raise UserError(f"{path}: use_dora with target_parameters, which peft itself refuses")
    shapes, theirs = parameter_shapes(model, find_targets(model, targets), lora), {}
    for name in shapes:
        layer, _, matrix = split_name(name)
        if f"{layer}.{matrix}" in wanted:
            theirs[name] = peft_name(name, model, both=f"{layer}.down_proj" in wanted)
    flat = {theirs[name]: flatten(name, torch.empty(shapes[name], device="meta")).shape for name in theirs}
    found, weights = read_tensors(Path(folder), flat), {}
    for name, shape in shapes.items():
        if name in theirs:
            weights[name] = unflatten(name, found[theirs[name]], shape)
        elif ".lora_magnitude_vector." in name:
            weights[name] = wide(model.get_submodule(split_name(name)[0]).weight.detach()).norm(dim=-1)
        else:
            weights[name] = torch.zeros(shape)
    return weights, lora


def read_settings(path: Path) -> dict:
    """Return the settings in `path`, all of `DEFAULTS` and `TARGETS` among them. Raise `UserError`, with the
    list, if others are in use."""
    if path.is_file() and path.stat().st_size > 1_000_000:
        raise UserError(f"{path}: more than 1 MB, which is no adapter's settings")
    settings = {"peft_type": None} | DEFAULTS | dict.fromkeys(TARGETS) | read_json(path)
    others = {key: settings[key] for key in settings.keys() - {*DEFAULTS, *TARGETS} - IGNORED}
    if wrong := sorted(key for key, value in others.items() if value not in ACCEPTED.get(key, OFF)):
        words = ", ".join(f"{key}={str(others[key])[:60]}" for key in wrong)
        raise UserError(f"{path}: only plain LoRA, rsLoRA and DoRA can be imported, not {words}")
    for key, kind in TARGETS.items():
        value = [settings[key]] if type(settings[key]) is int else settings[key] or []
        if not isinstance(value, list) or any(type(one) is not kind for one in value):
            raise UserError(
                f"{path}: {key} must be a list of {kind.__name__}, not {str(value)[:60]!r}; patterns are not "
                "run, so write names of layers"
            )
        settings[key] = value
    return settings


def read_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the tensors of a peft folder in fp32. Raise `UserError`, with a list, before one is read, unless
    they are just those in `shapes`."""
    path, package = folder / WEIGHTS, safetensors_package()
    if not path.is_file():
        pickled = (folder / PICKLE).exists()
        reason = f"{PICKLE} is a pickle, which can run code, and is not read" if pickled else "no such file"
        raise UserError(f"{path}: {reason}; save the adapter with peft as safetensors")
    try:
        with package.safe_open(path, framework="pt") as file:
            there = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            forms = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in there.items()}
            misfits = [
                f"{name} {forms[name][1]} {forms[name][0]} where the base needs {tuple(shape)}"
                for name, shape in shapes.items()
                if name in forms and (forms[name][0] != shape or forms[name][1] not in FLOATS)
            ]
            faults = {
                "missing": sorted(set(shapes) - set(forms)), "unknown": sorted(set(forms) - set(shapes)),
                "of another shape or type": misfits,
            }  # fmt: skip
            words = [f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
                     for fault, names in faults.items() if names]  # fmt: skip
            if words:
                raise UserError(f"{path} does not fit {SETTINGS} and the base: tensors {'; '.join(words)}")
            return {name: file.get_tensor(name).float() for name in shapes}
    except package.SafetensorError as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({error})") from None
