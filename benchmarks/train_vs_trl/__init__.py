"""Train the same model both ways and compare speed, memory and losses.

    python -m benchmarks.train_vs_trl captions --json FILE
    python -m benchmarks.train_vs_trl questions --questions 5
    python -m benchmarks.train_vs_trl small-llm --rounds 1             # a quick try

Workloads are the files of `workloads/`; `preferences` compares with trl's DPOTrainer, `rewards` with its
GRPOTrainer: their answers are sampled, and so their losses aren't compared (no `peer-steps`), only how long the
same number of questions and answers takes. Every run is a fresh process with pinned threads; runs alternate, and each
ratio is formed within a round.

ours   what `finetune train` does, loading left out: rows read and tokenized, each picture encoded once, rows planned
       by what the LLM takes and what samples share, `train_stage`.
peer   trl's SFTTrainer on transformers' LlavaForConditionalGeneration (without media on the LLM itself), with its own
       collator and fused head, lengths grouped, activation checkpoints off (slower wherever memory doesn't ask for
       them: `peer-checkpointed` shows it), and Liger's layer kernels where they run. Each question about a picture is a
       row of its own. As many samples a step as ours have on average. trl's DPOTrainer asks the reference in each step:
       with pictures it refuses to do so once.

peer-compact       only learned positions are scored, as trl itself does on a GPU; on a CPU it scores every position.
peer-turns         the questions about a picture are turns of one conversation, as in LLaVA's data. Another loss: each
                   answer is learned behind the questions and answers before it. Only its speed is compared.
peer-steps         each optimizer step holds the very samples of ours, read from the plan of our rows, and so the same
                   schedule: of this run the losses are compared, step by step.
peer-checkpointed, ours-checkpointed   with activation checkpoints.
peer-compiled, ours-compiled           what of each layer isn't attention, compiled; on a CPU only traced.
peer-plain, ours-liger                 on a GPU: trl without Liger's kernels, ours with them.

The same on both sides: LLM weights and quantization (one loader), encoder weights, first projector and LoRA weights
(written once, read by both), chat template, samples, learning rates, precision, seeds, no dropout. Token ids, labels
and features of a peer's first samples are compared with ours; on both sides the gradients of projector and LoRA must
not be zero, and the loss must fall.
"""
