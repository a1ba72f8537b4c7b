"""Checks of what a CPU cannot show: kernels, number formats and processes of a GPU (Ampere or newer).

`train/lab/gpu_report.py` runs them on a GPU. Each also runs on a CPU, which shows that it can pass. Unless
stated otherwise, expected values come from a CPU, in fp64 or from a run in fp32. An error is the norm of the
difference divided by the norm of the expected values.
"""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from model.tinyseek import TinySeek
from modules.attention import flash_triton
from modules.attention.context import build_context
from modules.attention.grouped_query import attend
from modules.cross_entropy import linear_cross_entropy
from modules.experts import grouped
from modules.experts.moe import loop_experts
from modules.experts.router import TopkRouter
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding, apply_rotary
from tests.modules.tools import shake, small_config as small_shape
from tests.train.tools import machine, make_trainer, small_config, small_model
from train.engine.language_model_loss import LanguageModelLoss
from utils.log import read_log

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
FP64 = 1e-10
FP32 = 1e-4  # whole models, with sums in another order
NOT_TF32 = 2.0**-16  # fp32 rounds to 2^-24, and sums of some hundred terms stay below this; TF32 to 2^-11
BF16 = 2.0**-6  # bf16 rounds to 2^-9: room for eight roundings in a row
LOSS = 2.0**-8  # two roundings in bf16
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
           "moe_intermediate_size": 16}  # fmt: skip
LATENT = EXPERTS | {"attention_kind": "mla", "q_lora_rank": 16, "kv_lora_rank": 16}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def tf32():
    """Allow TF32, as training on a GPU does."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)


def close(bound, ours, expected):
    """Assert that no tensor of a list is NaN or off by more than the bound."""
    for number, pair in enumerate(zip(ours, expected, strict=True)):
        one, other = (tensor.detach().to(CPU, torch.float64) for tensor in pair)
        assert (one - other).norm() <= bound * other.norm(), f"tensor {number}"


def normal(*shapes, dtype=torch.float32):
    """Return random tensors on the CPU, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(compute, upstream, inputs, device, dtype):
    """Return the value, computed on the device in the dtype, and the gradients of all inputs."""
    inputs = [tensor.detach().to(device, dtype, copy=True).requires_grad_() for tensor in inputs]
    value = compute(*inputs)
    return [value, *torch.autograd.grad(value, inputs, upstream.to(value))]


def model_of(device, dtype=torch.float64, **shape):
    """Return a model with random weights, the same every time."""
    return shake(TinySeek(small_shape(**shape))).to(device, dtype)


def loss_and_gradients(model, runner, ids, **batch):
    """Return the loss and the gradients of all parameters, for ids (B, T + 1)."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in ({"labels": ids[:, 1:]} | batch).items()}
    loss = runner(ids[:, :-1].to(device), **batch).loss_sum
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


# ---------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(("tokens", "idle"), [
    (512, []), (512, [0, 3, 7]), (300, [1, 2, 3, 4, 5, 6]), (3, []), (1, [0]),
])  # fmt: skip
def test_one_kernel_for_all_experts_is_the_loop(device, monkeypatch, tokens, idle):
    """Idle experts get zero gradients. Free memory holds NaN first, to expose what is not written."""
    if device == CPU:
        monkeypatch.setattr(grouped, "has_kernel", lambda gate_up, down: True)  # which CPUs are not sent to
    scores, *inputs, upstream = normal((tokens, 8), (tokens, 64), (tokens, 2), (8, 64, 64), (8, 64, 32),
                                       (tokens, 64), dtype=torch.bfloat16)  # fmt: skip
    indices = scores.index_fill(1, torch.tensor(idle, dtype=torch.long), -math.inf).topk(2).indices

    def through(path):
        return lambda x, weights, *stacks: path(x, indices.to(x.device), weights, *stacks)

    garbage = [torch.full((2**18,), math.nan, device=device) for _ in range(16)]
    del garbage
    with (torch.autocast(device.type, torch.bfloat16),
          mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as kernel):  # fmt: skip
        ours = with_gradients(through(grouped.grouped_experts), upstream, inputs, device, torch.float32)
    assert kernel.call_count == 6  # 2 forward, 4 backward
    close(BF16, ours, with_gradients(through(loop_experts), upstream, inputs, CPU, torch.float64))


def attention(name, device, dtype, tensors, **rules):
    """Return attention by the path `name`, and its gradients. `rules` are those of `build_context`."""
    *inputs, upstream = tensors
    rules = {key: value.to(device) if torch.is_tensor(value) else value for key, value in rules.items()}
    context = build_context(upstream.shape[2], device, **rules)

    def compute(q, k, v):
        return attend(name, q, k, v, context, scale=0.2)

    return with_gradients(compute, upstream, inputs, device, dtype)


REAL = torch.arange(45) < torch.tensor([[45], [20], [0]])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("rules", [
    {"padding_mask": REAL}, {"document_ids": torch.arange(45).expand(3, -1) // 10},
    {"padding_mask": REAL, "window": 7},
], ids=["padding", "documents", "window"])  # fmt: skip
def test_masked_attention_with_shared_keys_is_the_formula(device, dtype, bound, rules):
    """Padding gives no NaN, forward or backward, not even a row that is all padding."""
    tensors = normal(*((3, heads, 45, 32) for heads in (8, 2, 2, 8)), dtype=torch.bfloat16)
    expected = attention("eager", CPU, torch.float64, tensors, **rules)
    close(bound, attention("sdpa", device, dtype, tensors, **rules), expected)


def test_the_flash_kernel_takes_the_plain_case(device):
    tensors = normal(*((2, heads, 128, 64) for heads in (8, 2, 2, 8)), dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises if it does not fit
        ours = attention("sdpa", device, torch.bfloat16, tensors)
    close(BF16, ours, attention("eager", CPU, torch.float64, tensors))


@CUDA
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("width", [32, 80, 256])
@pytest.mark.parametrize("rules", [
    {"padding_mask": REAL, "document_ids": torch.arange(45).expand(3, -1) // 10}, {"window": 7},
], ids=["documents and padding", "window"])  # fmt: skip
def test_the_triton_kernel_is_the_formula(dtype, bound, width, rules):
    """On a CPU, tests/modules/attention/test_flash_triton.py runs it in Triton's interpreter."""
    tensors = normal(*((3, heads, 45, width) for heads in (8, 2, 2, 8)), dtype=torch.bfloat16)
    with mock.patch.object(flash_triton, "flash_forward", wraps=flash_triton.flash_forward) as kernel:
        ours = attention("auto", torch.device("cuda"), dtype, tensors, **rules)
    assert kernel.call_count == 1
    close(bound, ours, attention("eager", CPU, torch.float64, tensors, **rules))


@CUDA
def test_the_triton_kernel_allocates_nothing_of_the_size_of_a_mask():
    """A mask of 4,096 x 4,096 bools is larger than all that is needed."""
    tokens, device = 4096, torch.device("cuda")
    tensors = normal(*((1, heads, tokens, 32) for heads in (4, 2, 2, 4)), dtype=torch.bfloat16)
    documents = (torch.arange(tokens) // 1000)[None]
    attention("auto", device, torch.bfloat16, tensors, document_ids=documents)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention("auto", device, torch.bfloat16, tensors, document_ids=documents)
    assert torch.cuda.max_memory_allocated() - before < tokens**2


# --------------------------------------------------------------------------------- fp32 where TF32 is allowed


def norm(x, weight):
    return functional_call(RMSNorm(512), {"weight": weight}, x)


def rotary(x):
    """Rotate only 128 positions, because larger fp32 angles have an error of their own."""
    table = RotaryEmbedding(64).to(x.device, x.dtype)
    return apply_rotary(x, *table(torch.arange(128, device=x.device)[None]))


def logits_of_the_router(x, weight):
    router = TopkRouter(small_shape(hidden_size=512, **EXPERTS)).to(x.device)
    return functional_call(router, {"weight": weight}, x).logits


def cross_entropy(hidden, weight):
    """Check softmax, logarithm and sum only: the factors of the logits fit into TF32."""
    labels = torch.arange(3, device=hidden.device)
    return linear_cross_entropy(*(x.bfloat16().to(x.dtype) for x in (hidden, weight)), labels)[0]


@pytest.mark.parametrize(("compute", "shapes", "gradients"), [
    (norm, [(64, 512), (512,)], True), (rotary, [(1, 2, 128, 64)], True),
    (logits_of_the_router, [(256, 512), (8, 512)], False), (cross_entropy, [(3, 64), (4000, 64)], False),
])  # fmt: skip
def test_fp32_where_it_was_promised(device, tf32, compute, shapes, gradients):
    inputs = normal(*shapes)
    upstream, kept = torch.ones_like(compute(*inputs)), slice(None if gradients else 1)
    ours, expected = (with_gradients(compute, upstream, inputs, *where)[kept]
                      for where in ((device, torch.float32), (CPU, torch.float64)))  # fmt: skip
    close(NOT_TF32, ours, expected)


# ----------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("shape", [EXPERTS, LATENT], ids=["experts", "latent"])
def test_a_whole_model_is_its_plain_paths(device, shape):
    """Forward and backward, with padding and packed documents; and the same text from a cache."""
    ids = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(0))
    real = torch.arange(16) < torch.tensor([[16], [9], [0]])
    batch = {"labels": ids[:, 1:].masked_fill(~real, -100), "padding_mask": real,
             "document_ids": (torch.arange(16) // 6).expand(3, -1)}  # fmt: skip
    model = model_of(device, **shape)
    plain = model_of(CPU, **shape, attn_implementation="eager", moe_implementation="loop")
    close(FP64, *(loss_and_gradients(each, each, ids, **batch) for each in (model, plain)))
    greedy = SamplingParams(temperature=0.0, max_new_tokens=12)
    texts = [Generator(each.eval()).generate([[5, 17, 9], [23]], greedy) for each in (model, plain)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_compiled_model_with_experts_is_the_plain_one(device):
    """Token counts per expert change from step to step, and nothing is recompiled."""
    model = model_of(device, torch.float32, num_hidden_layers=1, **EXPERTS)
    torch._dynamo.reset()
    runner = torch.compile(model, backend="inductor" if device.type == "cuda" else "eager")
    for seed in range(3):
        ids = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(seed))
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            ours = loss_and_gradients(model, runner, ids)
        close(FP32, ours, loss_and_gradients(model, model, ids))


# --------------------------------------------------------------------------------------------------- training


def train(out, device, dtype=torch.float32, resume=False, steps=6, scaler=None, dropout=0.0):
    """Train a small model with experts at a constant rate; return the trainer and the loss of each step."""
    settings = [f"model.{key}={value}" for key, value in (EXPERTS | {"dropout": dropout}).items()]
    settings += ["balance.bias_rate=0.001", "optim.optimizer=muon", "optim.schedule=wsd"]
    settings += ["optim.decay_fraction=0.01", "optim.warmup_steps=0"]
    config = small_config(*settings, steps=steps)
    where, model = {"device": device, "dtype": dtype, "scaled": dtype == torch.float16}, small_model(config)
    loss = LanguageModelLoss(model, config, machine(**where))
    trainer = make_trainer(out, config, model=model, loss=loss, resume=resume, **where)
    trainer.scaler = scaler or trainer.scaler
    trainer.run()
    return trainer, [row["loss"] for row in read_log(out / "toy" / "log.txt") if "loss" in row]


def moved(trainer):
    """Return how far all weights have moved from the first ones."""
    start = small_model(trainer.config).parameters()
    pairs = zip(trainer.model.parameters(), start, strict=True)
    return [torch.cat([(now.detach().cpu() - before).flatten() for now, before in pairs])]


def same_end(ours, expected):
    """Compare how far two runs have moved. Kernels may sum in any order, which every step amplifies: equal
    runs may end 1 % apart. Losing an optimizer's state or the place in the data changes tens of per cent."""
    close(0.01, moved(ours[0]), moved(expected[0]))


def test_training_in_bf16_is_that_in_fp32(device, tmp_path):
    _, ours = train(tmp_path / "bf16", device, torch.bfloat16)
    _, expected = train(tmp_path / "fp32", CPU)
    assert ours == pytest.approx(expected, rel=LOSS)


def test_training_in_fp16_is_that_in_fp32_and_leaves_out_an_overflow(device, tmp_path):
    """After five steps the scale grows so much that the sixth overflows: it has a loss, but is skipped."""
    scaler = torch.amp.GradScaler(device.type, growth_interval=5, growth_factor=2.0**100)
    trainer, ours = train(tmp_path / "fp16", device, torch.float16, scaler=scaler)
    _, expected = train(tmp_path / "fp32", CPU)
    assert ours == pytest.approx(expected, rel=LOSS)
    assert {int(state["step"]) for state in trainer.optimizers[-1].state.values()} == {5}
    assert scaler.get_scale() == 2.0**115 and all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_resumed_run_ends_where_an_unbroken_one_does(device, tmp_path):
    expected = train(tmp_path / "whole", device, dropout=0.2)
    train(tmp_path / "parts", device, dropout=0.2, steps=3)
    same_end(train(tmp_path / "parts", device, dropout=0.2, resume=True), expected)


def test_a_group_of_one_process_trains_as_no_group(device, tmp_path):
    """The group uses nccl on a GPU and reduces every gradient."""
    expected = train(tmp_path / "alone", device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # as in utils/distributed.py
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as messages:
            ours = train(tmp_path / "group", device)
    finally:
        dist.destroy_process_group()
    sent = [call.args[0].device.type for call in messages.call_args_list].count(device.type)
    assert sent >= 6 * len(list(ours[0].model.parameters()))
    same_end(ours, expected)
