"""Names of a LoRA adapter here and in `peft`: parameters, layouts and targets.

    ours, of a layer L                               in peft, after `base_model.model.`
    L.lora_A.default                  (R, in)        L.lora_A.weight
    L.lora_B.default                  (out, R)       L.lora_B.weight
    L.lora_magnitude_vector.default   (out,)         L.lora_magnitude_vector
    L.lora_A.gate_up_proj.default     (E, R, C)      L.base_layer.lora_A.weight    (E*R, C)
    L.lora_B.gate_up_proj.default     (E, 2F, R)     L.base_layer.lora_B.weight    (2F, R*E)
    L.lora_A.down_proj.default        (E, R, F)      L.lora_A.weight               (E*R, F)
    L.lora_B.down_proj.default        (E, C, R)      L.lora_B.weight               (C, R*E)

Formulas and scale are the same (modules/adapters/lora.py), so the numbers stay as they are. In `peft`,
`target_modules` names linear layers and `target_parameters` single parameters, by the last parts of their
path. Stacks of experts are parameters; the wrapper of the first, gate_up_proj, is inside that of the second.

Trap: on a mixture, `peft` takes gate_proj, up_proj and down_proj in `target_modules` for the experts, which
had these names in older files. Plain feed-forwards beside experts are therefore named as parameters,
`mlp.gate_proj.weight` for example. A parameter takes neither DoRA nor dropout in `peft`.
"""

from torch import nn

from config.adapters import LoraConfig
from model.tinyseek import TinySeek
from modules.adapters.lora import LoraExperts
from modules.adapters.lora_model import GROUPS, target_labels

PREFIX = "base_model.model."
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def matrices_of(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a plain layer that an adapter changes."""
    return ("weight",) if isinstance(layer, nn.Linear) else LoraExperts.MATRICES


def parameter_shapes(model: TinySeek, layers, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return our name and shape of every parameter of an adapter on `layers` (paths)."""
    shapes = {}
    for path in layers:
        layer = model.get_submodule(path)
        for matrix in matrices_of(layer):
            *stack, out, width = getattr(layer, matrix).shape
            end = "default" if matrix == "weight" else f"{matrix}.default"
            shapes[f"{path}.lora_A.{end}"] = (*stack, lora.r, width)
            shapes[f"{path}.lora_B.{end}"] = (*stack, out, lora.r)
            if lora.use_dora:
                shapes[f"{path}.lora_magnitude_vector.{end}"] = (*stack, out)
    return shapes


def split_name(name: str) -> tuple[str, str, str]:
    """Return the layer's path, the part (A, B, magnitude_vector) and the matrix of one of our parameters."""
    path, _, rest = name.partition(".lora_")
    part, *matrix, _ = rest.split(".")
    return path, part, matrix[0] if matrix else "weight"


def hugging_face_path(path: str, model: TinySeek) -> str:
    """Return the path of a layer or a weight in the model of `transformers`. Qwen2-MoE, the family with a
    gate, has one shared expert and says so."""
    gated = model.config.shared_expert_gate
    return path.replace(".shared_experts.", ".shared_expert.") if gated else path


def peft_name(name: str, model: TinySeek, both: bool = True) -> str:
    """Return peft's name of one of our parameters; `both`: both stacks of its layer are adapted."""
    path, part, matrix = split_name(name)
    path = hugging_face_path(path, model)
    inner = ".base_layer" if matrix == "gate_up_proj" and both else ""
    return f"{PREFIX}{path}{inner}.lora_{part}" + ("" if part == "magnitude_vector" else ".weight")


def flatten(name: str, tensor):
    """Return one of our parameters in peft's layout: that of experts is flat."""
    if tensor.dim() < 3:
        return tensor
    return tensor.flatten(0, 1) if ".lora_A." in name else tensor.permute(1, 2, 0).flatten(1)


def unflatten(name: str, tensor, shape):
    """Return one of peft's parameters in our layout, of `shape`."""
    if len(shape) < 3 or ".lora_A." in name:
        return tensor.reshape(shape)
    E, out, R = shape
    return tensor.reshape(out, R, E).permute(2, 0, 1).contiguous()


def peft_targets(layers: set[str], model: TinySeek) -> tuple[list[str], list[str]]:
    """Return `target_modules` and `target_parameters` that name exactly `layers` (paths).

    Our targets do not depend on the layer's number, so the path behind the number is enough; and only those
    of feed-forwards end in a word that experts or another feed-forward share.
    """
    mixture = model.config.n_routed_experts or model.config.attention_kind == "mla"  # dense MLA: DeepSeek-V3
    modules, parameters = set(), set()
    for path in layers:
        tail, leaf = hugging_face_path(path, model).split(".", 3)[3], path.rpartition(".")[2]
        if leaf == "experts":
            parameters |= {f"{tail}.{matrix}" for matrix in LoraExperts.MATRICES}
        elif mixture and leaf in FEED_FORWARD:
            parameters.add(f"{tail}.weight")
        else:
            modules.add(leaf)
    return sorted(modules), sorted(parameters)


def named_weights(model: TinySeek, modules, parameters, numbers=()) -> set[str]:
    """Return the weights of the base that `target_modules` and `target_parameters` name: `<layer>.weight`, or
    a stack of experts. `numbers` are those of `layers_to_transform`; empty for all layers."""

    def ends(path, targets):
        return any(f".{path}".endswith(f".{target}") for target in targets)

    found = set()
    for path in target_labels(model):
        if not path.startswith("model."):  # a second prediction head, which peft's models have not
            continue
        layer, number = model.get_submodule(path), int(path.split(".")[2])
        theirs, in_range = hugging_face_path(path, model), not numbers or number in numbers
        if isinstance(layer, nn.Linear) and in_range and ends(theirs, modules):
            found.add(f"{path}.weight")
        named = [matrix for matrix in matrices_of(layer) if ends(f"{theirs}.{matrix}", parameters)]
        found.update(f"{path}.{matrix}" for matrix in named)
    return found


def our_targets(model: TinySeek, weights: set[str]) -> list[str]:
    """Return `lora.target_modules` for these weights of the base: groups and names that cover no others, if
    there are such, or else the names of the layers that are left, which cover more."""
    labels = {path: words for path, words in target_labels(model).items() if path.startswith("model.")}
    layers, groups = {weight.rpartition(".")[0] for weight in weights}, (*GROUPS.values(), "experts")
    chosen, covered = [], set()
    for word in (*groups, *sorted(set().union(*labels.values()).difference(groups))):
        paths = {path for path in labels if word in labels[path]}
        if paths <= layers and paths - covered:
            chosen.append(word)
            covered |= paths
    return chosen + sorted({path.rpartition(".")[2] for path in layers - covered})
