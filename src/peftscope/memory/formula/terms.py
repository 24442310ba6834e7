"""The meaning of a formula's letters, and the origin of each term. No torch."""

from __future__ import annotations

from peftscope.memory.kernels import LOGPROB_COLUMNS, LOGPROB_ROWS, liger_chunk
from peftscope.memory.question import Question

DIMENSIONS = {
    "B": "rows of a batch",
    "S": "positions of a sequence, virtual tokens included",
    "P": "positions that attention looks at, a prefix included",
    "T": "tokens of a batch, B·S",
    "U": "tokens of a batch without virtual tokens",
    "N": "positions of a batch whose logits are computed",
    "E": "positions of the evaluation whose logits are on the card",
    "F": "the same before its last batch",
    "c": "positions whose logits are computed at a time",
    "s": "positions of a row whose logits are computed",
    "n": "positions of a tile of logits",
    "w": "tokens of the vocabulary in a tile of logits",
    "L": "layers",
    "h": "hidden size",
    "q": "width of all queries",
    "k": "width of all keys",
    "q+2k": "width of queries, keys and values",
    "a": "attention heads",
    "g": "heads of keys",
    "d": "width of a head",
    "I": "intermediate size",
    "2I": "twice the intermediate size",
    "m": "copies of tokens on their way through experts, T times the experts of a token",
    "e": "experts of a layer",
    "J": "intermediate size of an expert",
    "2J": "twice the intermediate size of an expert",
    "V": "vocabulary",
    "r": "rank",
    "o": "rank of GaLore or APOLLO",
    "v": "virtual tokens",
    "W": "values of the linear layers of a block of the vision tower",
    "X": "values of its projector",
    "Y": "its other values",
    "1/G": "one over the number of cards",
}
"""The meaning of a formula's letters."""

OPTIMIZER_COPY = "temporary copy of the optimizer"
GATHERED = "gathered logits of the evaluation"

SOURCES = {
    "weights": "config.json; one element each, tied embeddings once",
    "quantised weights": "bitsandbytes.functional.quantize_4bit: half a byte a weight, constants per block of 64",
    "adapters": "peft: autocast_adapter_dtype keeps them in 32 bits",
    "gradients": "torch: the parameter's precision, until zero_grad",
    "saved activations": "torch: kept for the backward pass",
    "temporaries": "torch: gone within the pass",
    "logits and loss": "transformers ForCausalLMLoss, and its gradients",
    "logits": "transformers ForCausalLM.forward",
    "logits in 32 bits": "transformers ForCausalLMLoss",
    "logits of a chunk (Liger)": "stand-in: liger-kernel 0.8.5 fused_linear_cross_entropy_forward",
    "gradient of the hidden states (Liger)": "stand-in: liger-kernel 0.8.5, made in the forward pass",
    "gradient of the head (Liger)": "stand-in: liger-kernel 0.8.5, made in the forward pass",
    "16-bit copy for the fused loss": "formula only: cut-cross-entropy 25.1.1 takes 16-bit numbers",
    "log-sum-exp of the logits": "formula only: cut-cross-entropy 25.1.1, LinearCrossEntropyFunction",
    GATHERED: "formula only: transformers 5.24 EvalLoopContainer.add, from Trainer.evaluation_loop",
    "log-softmax of the logits": "torch cross_entropy keeps it for its gradient",
    "tile of logits": "TRL 1.16.0, kernels/chunked_logprob.py, which reuses it for the gradients",
    "gradients in 32 bits": "TRL 1.16.0, kernels/chunked_logprob.py: sums over the tiles",
    "gradients of the logits, row by row": "TRL 0.24.0, selective_log_softmax: a gradient for each row",
    "gradients of the logits": "torch stacks those of all rows",
    "logits of the chosen answers": "TRL 0.24.0, orpo_trainer.py: a copy for the cross-entropy",
    "32-bit copy of a norm's input": "transformers RMSNorm.forward: .to(torch.float32)",
    "normalised input": "transformers RMSNorm.forward",
    "copy of the input of each adapted layer in the adapter's precision": "peft BaseTunerLayer._cast_input_dtype",
    "output of A": "peft lora.Linear.forward",
    "output of B": "peft lora.Linear.forward",
    "keys for every head": "transformers repeat_kv, since a mask rules enable_gqa out",
    "values for every head": "transformers repeat_kv, since a mask rules enable_gqa out",
    "additive mask of each layer": "torch scaled_dot_product_attention: convert_boolean_attn_mask",
    "output of attention": "torch scaled_dot_product_attention keeps it for its gradient",
    "log-sum-exp of attention": "torch scaled_dot_product_attention keeps it for its gradient",
    "rotated heads": "transformers apply_rotary_pos_emb",
    "output of the activation function": "transformers MLP.forward",
    "trained copy": "peft ModulesToSaveWrapper: the frozen module stays beside it",
    "first and second moments": "torch.optim.AdamW, or bitsandbytes.optim",
    "importance scores of AdaLoRA": "peft RankAllocator.update_ipt: three of each adapter matrix",
    OPTIMIZER_COPY: "torch.optim: foreach takes square roots of all states at once",
    "dequantised weights of one layer": "bitsandbytes MatMul4Bit",
    "singular value decomposition of the largest target": "torch.linalg.svd of the weight in 32 bits",
    "LoftQ's initialisation of the largest target": "peftscope.methods.loftq, in 32 bits",
    "largest layer before it is quantised": "transformers loads it in 16 bits, then bitsandbytes quantises it",
    "weights gathered from other cards": "FSDP: two whole blocks at a time",
    "weights fetched from the host": "formula only: ZeRO-Offload, FSDP's CPUOffloadPolicy: two whole blocks at a time",
    "weights outside of layers, gathered in a pass": "formula only: torch fully_shard, whose root stays gathered",
    "gradients of a layer on their way to other cards or the host": "formula only: torch foreach_reduce, with a copy",
    "32-bit copies of trained weights (ZeRO-2)": "formula only: DeepSpeed, single_partition_of_fp32_groups",
    "buffers of gradients (ZeRO-2)": "formula only: DeepSpeed, ipg_buffer of reduce_bucket_size values",
    "cuBLAS workspace": "torch CublasHandlePool",
    "what experts keep": "transformers 5.24 integrations/moe.py, grouped_mm_experts_forward",
    "dequantised experts of one layer": "bitsandbytes 0.50 nn/parametrize.py, Bnb4bitParametrization",
    "B·A of DoRA": "peft DoraLinearLayer.get_lora_weight",
    "identity matrix of DoRA": "peft DoraLinearLayer.get_lora_weight",
    "transposed A of DoRA": "peftscope.methods.dora, in place of the identity matrix",
    "updated weight whose norm DoRA takes": "peft DoraLinearLayer.get_weight_norm; kept if the norm has a gradient",
    "weight in the adapter's precision (DoRA)": "peft DoraLinearLayer.forward",
    "16-bit weights (autocast)": "torch.autocast",
    "16-bit copy of an input (autocast)": "torch.autocast",
    "16-bit copy for the attention kernel": "torch.autocast, or transformers get_target_dtype for flash attention",
    "attention probabilities in 32 bits": "transformers eager_attention_forward, or torch's math kernel",
}
"""The code that each term, or else each kind, stands for."""


def sizes_of(question: Question, batch_size: int | None = None) -> dict[str, int]:
    """Returns the value of every named dimension, for sequences of ``spec.seq_len`` tokens."""
    spec, shape = question.spec, question.model.shape
    assert shape is not None
    batch = question.rows if batch_size is None else batch_size
    virtual = getattr(spec.method, "virtual_tokens", 0)
    prefix = virtual - spec.method.logit_offset()
    length = spec.seq_len + virtual - prefix
    of_row = question.responses if question.scores_responses else length
    kept = batch * of_row
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    of_experts: dict[str, int] = {}
    if one := shape.experts:
        of_experts = {"m": batch * length * one.per_token, "e": one.number, "J": one.size, "2J": 2 * one.size}
    return {
        "1": 1,
        "2": 2,
        "B": batch,
        "S": length,
        "P": length + prefix,
        "T": batch * length,
        "U": batch * spec.seq_len,
        "N": kept,
        "c": liger_chunk(kept, shape.vocab_size, shape.hidden_size),
        "s": of_row,
        "n": min(kept, LOGPROB_ROWS),
        "w": LOGPROB_COLUMNS,
        "L": shape.num_layers,
        "h": shape.hidden_size,
        "q": queries,
        "k": keys,
        "q+2k": queries + 2 * keys,
        "a": shape.num_heads,
        "g": shape.num_kv_heads,
        "d": shape.head_dim,
        "I": shape.intermediate_size,
        "2I": 2 * shape.intermediate_size,
        "o": question.beside.optimizer_rank,
        **of_experts,
        "V": shape.vocab_size,
        "r": getattr(spec.method, spec.method.rank_field, 1),
        "v": virtual,
        **(dict(zip("WXY", question.model.vision[1:], strict=True)) if question.model.vision else {}),
    }


def evaluation_sizes(question: Question) -> dict[str, int]:
    """Returns the same for a batch of the evaluation, which computes logits at response positions only.

    An evaluation that gathers logits computes those of all positions.
    """
    batch, rows = question.spec.eval_batch_size, question.gathered_rows
    sizes = sizes_of(question, batch)
    if not rows:
        kept = batch * question.responses
        return {**sizes, "N": kept, "n": min(kept, LOGPROB_ROWS)}
    return {**sizes, "N": sizes["T"], "E": rows * sizes["S"], "F": max(0, rows - batch) * sizes["S"]}
