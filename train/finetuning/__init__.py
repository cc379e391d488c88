"""From an encoder to its scores: GLUE, IMDb and SQuAD, fine-tuned with transformers' Trainer.

    tasks.py      the table of tasks: where the data lies, labels, metrics, the papers' hyper-parameters
    settings.py   what a run of one task is made of, resolved
    runs.py       tasks x seeds: skips what is finished, goes on with what was killed, writes scores.json
    results.py    scores.json: write, read, median and spread, macro average
    training.py   one call of transformers' Trainer: progress, checkpoints, stop; used by every kind of task
    encoders.py   a folder with an encoder -> a model with a task's head, nothing below the head left at random

Each kind of task ("sequence": one label for a text or a pair; "span": an answer within a text) is one module, named in
`runs.KINDS`, with two functions; the second gives an object of this shape (`runs.Runner`):

    check(job: Job) -> None                # cheap refusals (files, model, teachers), for all tasks before the first
    prepare(job: Job) -> Runner            # reads the data, checks model and teachers, encodes: once for all seeds
    runner.train_examples: int             # what scores.json says of it
    runner.dev_examples: dict[str, int]
    runner.metrics: tuple[str, ...]        # names of the task's metrics, in the order of tables, without "score"
    runner.parameters: int
    runner.fingerprints: dict[str, str]    # digests of the data: an OUT begun with other contents is refused
    runner.run_seed(seed: int, work: Path, out: Path) -> dict[str, float]
        # trains in `work` (checkpoints; survives a kill), writes the model folder `out`, returns metrics and "score" in
        # points of 0..100; further keys ("seconds", "examples_per_s") are kept beside them
        # raises training.Stopped after saving a checkpoint when job.stop.requested

`Job` (settings.py) carries task, model, data, settings, teachers, unlabelled, folder (OUT/TASK: soft labels are cached
there), stop (train.distributed.signals.StopRequest or None) and say (prints a line for the user).
"""
