"""Ask a search twenty questions that a newcomer has about this repository, and rank the files that answer.

The questions were written down, each with its answers, before any of them was searched for. The answer to a
question is in each of its files.
"""

QUESTIONS = {
    "how are gradients clipped": ("train/engine/parallel.py",),
    "where are the labels shifted by one position": ("load_data/loader.py", "load_data/chat/chat_loader.py"),
    "what happens if the power fails while a checkpoint is written": ("utils/checkpoint.py",),
    "can a model file from a stranger run code on my computer": (
        "utils/checkpoint.py",
        "inference/hf/folder.py",
    ),
    "how does the model know the order of the words": ("modules/rope.py",),
    "how does generation avoid reading the whole prompt again for each new token": (
        "modules/attention/cache.py",
        "inference/generation/generator.py",
    ),
    "how is the next word drawn from the probabilities": ("inference/generation/sampling.py",),
    "why are some experts used more than others, and what can be done about it": (
        "modules/experts/balance.py",
        "train/engine/load_balancer.py",
    ),
    "which parameters are trained by Muon and which by AdamW": (
        "train/engine/optimizers.py",
        "modules/muon.py",
    ),
    "training runs out of memory, how can it need less": (
        "modules/checkpointing.py",
        "train/engine/forecast.py",
        "utils/errors.py",
    ),
    "how can a large model be fine-tuned with few trainable numbers": (
        "modules/adapters/lora.py",
        "train/lora_train.py",
        "modules/adapters/prefix.py",
        "train/prefix_train.py",
    ),
    "how is a text split into pieces that occur often": (
        "load_data/byte_pair.py",
        "load_data/tokenization/train_tokenizer.py",
        "load_data/tokenization/tokenizer.py",
    ),
    "guess several tokens ahead and check them all at once": (
        "inference/generation/speculative.py",
        "modules/mtp.py",
    ),
    "run my trained model in llama.cpp": (
        "inference/export_gguf.py",
        "inference/gguf_files/architectures.py",
    ),
    "is it safe when the model computes with a calculator": ("inference/tools/calculator.py",),
    "when does the learning rate start to fall": ("train/engine/schedule.py",),
    "what happens when I press Ctrl-C during training": ("train/engine/stopping.py",),
    "can a message pretend to be the assistant": (
        "load_data/chat/chat_template.py",
        "load_data/tokenization/plain_text.py",
    ),
    "how do I know that every weight really learns": (
        "train/proof/gradient_check.py",
        "train/proof/weight_witness.py",
    ),
    "learn from rewards without a critic": ("train/grpo_train.py", "modules/alignment/advantage.py"),
}
