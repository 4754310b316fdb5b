"""One run of ours."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.train_vs_trl.kernels import compile_layers, eager_again
from benchmarks.train_vs_trl.measure import Clock, Memory, Watcher
from benchmarks.train_vs_trl.options import Options
from benchmarks.train_vs_trl.prepare import OurTraining, recipe_of, shared_over
from finetune.model.trainable import set_trainable, trained_parts
from finetune.training.collate import Collator
from finetune.training.liger import use_liger
from finetune.training.stage_training import StageTraining
from finetune.training.stopping import StopBetweenSteps
from finetune.training.train import rollouts_of
from finetune.training.trainer import train_stage


def train(options: Options, kind: str, language_model: Any = None) -> dict[str, Any]:
    """`language_model`: loaded before, and left as it came but for Liger's kernels."""
    memory = Memory()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        shared = shared_over(recipe_of(options, folder), language_model)
        shared.language_model.eval()  # loads it: as of the peer, loading is neither timed nor counted as memory above
        memory.start()
        clock = Clock()
        ours = OurTraining.of(options, shared, folder, first=True)
        prepared_in = clock.figures()["seconds"]
        run, model = ours.prepared.run, ours.model
        settings, components = run.recipe.train, run.components
        if "checkpointed" in kind:
            model.causal_lm.activation_checkpointing_enable(every_n_layers=1)
        if "compiled" in kind:
            compile_layers(model.causal_lm)
        if "liger" in kind:
            use_liger(model.causal_lm)
        stage = settings.stages[0]
        set_trainable(model, stage.trains)
        trained = trained_parts(model, stage.trains)
        watched = {"lora_B": next(p for p in trained["adapter"] if p.shape[1] == options.rank)}
        if options.chosen.media:
            watched["projector"] = trained["projectors.image"][0]
        watcher = Watcher(watched)
        collator = Collator(
            ours.samples,
            run.features.features,
            field="features",
            kind=ours.kind,
            pad_token_id=components.tokenizer.pad_token_id,
        )
        reward, rollouts = options.chosen.reward, None
        if reward is not None:
            rollouts = rollouts_of(ours.prepared, stage, collator, model, lambda sample, answer: reward(answer))
        training = StageTraining(
            model=model,
            tokenizer=components.tokenizer,
            stage=stage,
            settings=settings,
            collator=collator,
            rows=ours.rows,
            folder=folder / "run" / "checkpoints" / stage.name,
            seed=options.seed,
            dtype=components.dtype,
            rollouts=rollouts,
        )
        with StopBetweenSteps() as stop:
            log = train_stage(training, stop, callbacks=[watcher])
        figures = {**clock.figures(), "memory": memory.figures()}
    eager_again(model.causal_lm)
    shared.release()
    losses = [entry["loss"] for entry in log]
    watcher.check(losses, falls=rollouts is None)
    steps = [[number for group in row for number in group] for row in ours.rows]
    return {
        **figures,
        "prepared_in": prepared_in,
        **watcher.figures(),
        "step_samples": sum(map(len, steps)) / len(steps),
        "losses": losses,
        "steps": steps,
    }
