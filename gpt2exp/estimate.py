"""What a run will need, before it runs. No torch."""

from __future__ import annotations

from dataclasses import replace

from gpt2exp.config import RunConfig

PROCESS_BYTES = 340 * 2**20
"""Resident memory of Python with PyTorch and wandb loaded: counted on a CPU, where the process is what fills up."""


def memory(config: RunConfig, *, on_cpu: bool, unfused_attention: bool) -> int:
    """Estimated peak bytes of training in fp32.

    Weights, gradients and AdamW's two moments take 16 bytes a parameter. At the start of the backward pass the
    activations are whole and the gradients still to come: per layer and token 17·n_embd floats (two LayerNorm inputs
    and outputs, query, key and value, attention's output twice, and the MLP's hidden layer before and after GELU), and
    at the head three times the logits (themselves, their log-softmax, its gradient). Unfused attention keeps scores
    and probabilities as well. The peak is the larger of that and the moment when all gradients are there.

    On a CPU freed buffers are kept (`runtime.keep_freed_memory`), and glibc's posix_memalign does not fill a hole of
    just the size it is asked for: after a few steps holes the size of one to three logits lie about (measured with
    glibc 2.36, differently in every run), counted here as two, and as one more with the rounded copies of the head's
    operands where products are emulated.
    """
    model, train = config.model, config.train
    parameters = 4 * model.parameters["total"]
    per_token = model.n_layer * 17 * model.n_embd + 3 * model.vocab_size
    if unfused_attention:
        per_token += model.n_layer * (3 * model.n_head * train.seq_len + 4 * model.n_embd)
    head_gradient = 4 * model.vocab_size * model.n_embd
    backward = 4 * train.tokens_per_micro_batch * per_token + head_gradient
    peak = 3 * parameters + max(parameters + head_gradient // 2, backward)
    if on_cpu:
        logits = 4 * train.tokens_per_micro_batch * model.vocab_size
        peak += PROCESS_BYTES + 2 * logits + (logits + head_gradient if unfused_attention else 0)
    return peak


def fitting_batch(config: RunConfig, free: int, *, on_cpu: bool, unfused_attention: bool) -> int | None:
    """The largest power of two below `train.batch_size` whose estimate is at most `free` bytes; None if not even 1."""
    batch = 2 ** ((config.train.batch_size - 1).bit_length() - 1) if config.train.batch_size > 1 else 0
    while batch:
        smaller = replace(config, train=replace(config.train, batch_size=batch))
        if memory(smaller, on_cpu=on_cpu, unfused_attention=unfused_attention) <= free:
            return batch
        batch //= 2
    return None
